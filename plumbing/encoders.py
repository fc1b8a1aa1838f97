"""Encoders that can be rebuilt from a file alone, and their way to other people's checkpoints."""

from pathlib import Path
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from plumbing.errors import UserError
from plumbing.files import load_checkpoint


class Encoder(nn.Module):
    """What every encoder carries: the fields that rebuild it, and the mean and deviation that normalise its images.

    A subclass hands its constructor's arguments on, and is then known to `load_encoder` by its name.
    """

    kinds: ClassVar[dict] = {}  # name of a subclass: the class

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        Encoder.kinds[cls.__name__] = cls

    def __init__(self, mean: tuple, std: tuple, **fields):
        super().__init__()
        self.fields = fields | {"mean": tuple(mean), "std": tuple(std)}  # all that rebuilds this module
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1] -> zero mean and unit variance a channel over the data set."""
        return (images - self.mean) / self.std


def save_encoder(encoder: nn.Module, file):
    """Write an encoder, to a path or an open file, so that `load_encoder` can rebuild it from the file alone."""
    fields = getattr(encoder, "fields", {})  # a module of a user's own may have none
    torch.save({"kind": type(encoder).__name__, "fields": fields, "weights": encoder.state_dict()}, file)


def load_encoder(path, image_size: int = 0) -> nn.Module:
    """The encoder of an encoder.pt file, in eval mode; a transformer for another size of images where one is given.

    The file that holds its class must have been imported: `common`, and for ConvNeXt and Swin `ebm_pretrain`.
    Raises UserError where the file is not one.
    """
    state = load_checkpoint(Path(path))
    if not isinstance(state, dict) or "kind" not in state:
        raise UserError(f"{path} is not an encoder file; expected the encoder.pt of a run")
    if state["kind"] not in Encoder.kinds:
        raise UserError(f"{path} holds a {state['kind']}, not known here; import the file that has this class first")
    try:
        changes = {"image_size": image_size} if image_size and "image_size" in state["fields"] else {}
        encoder = Encoder.kinds[state["kind"]](**state["fields"] | changes)
        encoder.load_state_dict(state["weights"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} does not fit this version ({str(error).splitlines()[0]})") from None
    return encoder.eval()


def to_timm(encoder: nn.Module) -> dict:
    """The weights of a `ViT` as timm's VisionTransformer names and lays them out: {name: tensor}.

    Patches become a convolution, and the fixed positions get one of zeros for the CLS token. timm's module must have
    the same width, depth and heads, and wants images that are normalised already (`encoder.normalize`).
    """
    weights = encoder.state_dict()
    weights["patch_embed.proj.weight"] = rearrange(
        weights["patch_embed.proj.weight"], "d (p q c) -> d c p q", p=encoder.patch, c=3
    )
    weights["pos_embed"] = torch.cat([torch.zeros_like(encoder.positions[:1]), encoder.positions])[None]
    return weights
