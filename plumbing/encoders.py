"""Encoders that can be rebuilt from a file alone, and their way to other people's checkpoints."""

import argparse
import math
import sys
import threading
from pathlib import Path
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from plumbing.errors import UserError, reason_of
from plumbing.files import load_checkpoint, plain


class Encoder(nn.Module):
    """What every encoder carries: the fields that rebuild it, and the mean and deviation that normalise its images.

    A subclass hands its constructor's arguments on, and is then known to `load_encoder` by its name. Which images it
    takes, it says by `image_sides`, `smallest_side` and `whole_cells`.
    Raises UserError for a field that no file can hold, for statistics that are not three numbers, and for a second
    class of the same name.
    """

    kinds: ClassVar[dict] = {}  # name of a subclass: the class
    image_sides: tuple | None = None  # (height, width) in pixels, where it takes no others
    smallest_side = 1  # in pixels
    whole_cells = False  # whether sides are multiples of the smallest

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        other = Encoder.kinds.get(cls.__name__, cls)
        if home_of(other) != home_of(cls):
            raise UserError(
                f"there is an encoder {cls.__name__} in {other.__module__} already; give the one in {cls.__module__} "
                f"another name: a file of weights knows its class by the name alone"
            )
        Encoder.kinds[cls.__name__] = cls

    def __init__(self, mean: tuple, std: tuple, **fields):
        super().__init__()
        self.fields = plain_fields(fields) | {
            "mean": three_numbers("mean", mean),
            "std": three_numbers("std", std, above=0),
        }  # all that rebuilds this module
        self.register_buffer("mean", torch.tensor(self.fields["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.fields["std"]).view(3, 1, 1), persistent=False)

    def normalize_by(self, mean: tuple, std: tuple):
        """Take another mean and deviation, those that weights from elsewhere were trained with, three numbers each."""
        self.fields |= {"mean": three_numbers("mean", mean), "std": three_numbers("std", std, above=0)}
        for name, buffer in (("mean", self.mean), ("std", self.std)):
            buffer.copy_(torch.tensor(self.fields[name]).view(3, 1, 1))

    def normalize(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> zero mean and unit variance a channel over the data set.

        Raises UserError for integers, and for a shape that this encoder does not take. Whether floats lie in [0, 1] is
        not asked: that would wait for a GPU in every step.
        """
        self.check_images(images)
        return (images - self.mean).div_(self.std)  # in place: a batch less to fill

    def check_images(self, images: Tensor):
        """Raise UserError where images have the wrong type or shape; no value is looked at."""
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = str(images.dtype).removeprefix("torch.") if isinstance(images, Tensor) else type(images).__name__
            hint = "images.float() / 255" if kind == "uint8" else "a float tensor (B, 3, H, W)"
            raise UserError(f"images are {kind}; expected floats in [0, 1]: {hint}")
        if images.ndim != 4 or images.shape[1] != 3:
            hint = "; add a batch dimension: images[None]" if images.ndim == 3 and images.shape[0] == 3 else ""
            raise UserError(f"images have the shape {tuple(images.shape)}; expected (B, 3, H, W){hint}")
        self.check_sides(*images.shape[2:])

    def check_sides(self, height: int, width: int):
        """Raise UserError where this encoder does not take images of so many pixels."""
        given, least = f"images are {height} x {width}, this encoder", self.smallest_side
        if self.image_sides and (height, width) != self.image_sides:
            size = height if height == width else (height, width)
            own = f"{self.image_sides[0]} x {self.image_sides[1]}"
            raise UserError(f"{given} was made for {own}; load_encoder(path, image_size={size}) or resize")
        if min(height, width) < least:
            raise UserError(f"{given} needs {least} x {least} or more; resize")
        if self.whole_cells and (height % least or width % least):
            raise UserError(f"{given} needs sides that are multiples of {least}; resize")


def home_of(encoder_class: type) -> tuple:
    """Where a class was written: the same for a file that is read twice, as a program and as a module or by reload."""
    module = encoder_class.__module__
    return getattr(sys.modules.get(module), "__file__", None) or module, encoder_class.__qualname__


def plain_fields(fields: dict) -> dict:
    return {name: plain(value, f"field {name}") for name, value in fields.items()}


def three_numbers(name: str, values, above: float = -math.inf) -> tuple:
    """A mean or deviation as three Python floats. Raises UserError where it is not, or one is not more than `above`."""
    found = plain(values, f"field {name}")
    fits = isinstance(found, tuple | list) and len(found) == 3 and all(isinstance(x, int | float) for x in found)
    if not fits or not all(above < x < math.inf for x in found):
        limit = f" above {above}" if math.isfinite(above) else ""
        raise UserError(f"{name} {found} makes no sense; expected three numbers{limit}, one a channel")
    return tuple(float(x) for x in found)


def height_and_width(image_size, patch: int = 0) -> tuple[int, int]:
    """A side or (height, width) as the two. Raises UserError where these are no whole numbers from 1.

    Where patches are given, also for more than 2^18 of them, which nothing could attend to.
    """
    both = tuple(image_size) if isinstance(image_size, tuple | list) else (image_size, image_size)
    if len(both) != 2 or not all(isinstance(side, int) and side >= 1 for side in both):
        raise UserError(f"image size {image_size!r} makes no sense; expected a side, or (height, width), in pixels")
    if patch and both[0] * both[1] > 2**18 * patch**2:
        raise UserError(f"image size {both[0]} x {both[1]} is too large for a patch size of {patch}")
    return both


def save_encoder(encoder: nn.Module, file):
    """Write an encoder, to a path or an open file, so that `load_encoder` can rebuild it from the file alone.

    Raises UserError for a field that no file can hold.
    """
    fields = plain_fields(getattr(encoder, "fields", {}))  # a module of a user's own may have none
    torch.save({"kind": type(encoder).__name__, "fields": fields, "weights": encoder.state_dict()}, file)


def load_encoder(path, image_size: int = 0) -> nn.Module:
    """The encoder of an encoder.pt file, in eval mode; a transformer for another size of images where one is given.

    The file that holds its class must have been imported: `common`, and for ConvNeXt and Swin `ebm_pretrain`.
    Raises UserError where the file is not one, or its encoder takes no images of that size.
    """
    path = Path(path)
    state = load_checkpoint(path)
    if not isinstance(state, dict) or not isinstance(state.get("kind"), str):
        raise UserError(f"{path} is not an encoder file; expected the encoder.pt of a run")
    if state["kind"] not in Encoder.kinds:
        raise UserError(f"{path} holds a {state['kind']}, not known here; import the file that has this class first")
    fields, weights = state.get("fields"), state.get("weights")
    if not isinstance(fields, dict) or not isinstance(weights, dict):
        raise UserError(f"{path} does not fit this version (it lacks fields or weights)")
    size = plain(image_size, "image size")
    sides = height_and_width(size) if size else None
    changes = {"image_size": size} if sides and "image_size" in fields else {}
    try:
        if sides and fields.get("learned_positions") and sides != height_and_width(fields["image_size"]):
            raise UserError(f"{path} has learned positions, none for {size}; they are of {fields['image_size']} pixels")
        encoder = build(Encoder.kinds[state["kind"]], fields | changes, path.stat().st_size)
        encoder.load_state_dict(weights)
    except UserError as error:
        if changes:  # what does not fit is what the user gave
            raise
        raise UserError(f"{path} does not fit this version ({error})") from None
    except Exception as error:  # noqa: BLE001 (fields from elsewhere can make a constructor fail in any way)
        reason = reason_of(error)
        raise UserError(f"{path} does not fit this version ({reason})") from None
    if sides:
        encoder.check_sides(*sides)
    return encoder.eval()


def build(kind: type, fields: dict, limit: int) -> nn.Module:
    """An encoder of these fields, given up before it takes more memory than its file can have asked for.

    A number takes a byte of the file or more, so `limit`, the bytes of the file, bounds the numbers of all weights.
    """
    count, thread = 0, threading.get_ident()  # a hook acts on modules of all threads

    def weigh(module, name, parameter):
        nonlocal count
        if threading.get_ident() == thread and parameter is not None:
            count += parameter.numel()
            if count > limit:
                raise UserError(f"its fields ask for more weights than the file can hold: {str(fields)[:120]}")

    hook = register_module_parameter_registration_hook(weigh)
    try:
        return kind(**fields)
    finally:
        hook.remove()


def check_encoder(path):
    """Rebuild the encoder of a file that was just written, so that what cannot be loaded is known in the first epoch.

    Draws no random number. A module of a user's own that is no `Encoder` is let pass.
    Raises UserError where it cannot be rebuilt, or has other fields then.
    """
    state = load_checkpoint(Path(path))
    kind, fields = state["kind"], state["fields"]
    del state  # with its weights
    if kind not in Encoder.kinds:
        return
    hint = f"{kind} must hand each argument of its __init__ on to that of Encoder, by its name"
    with torch.random.fork_rng(devices=[]):
        try:
            found = load_encoder(path)
        except UserError as error:
            raise UserError(f"{error}; {hint}") from None
    if found.fields != fields:
        raise UserError(f"{path} is rebuilt with the fields {found.fields}, it was saved with {fields}; {hint}")


def to_timm(encoder: nn.Module) -> dict:
    """The weights of a `ViT` as timm's VisionTransformer names and lays them out: {name: tensor}.

    Patches become a convolution, and the positions, fixed or learned, get one of zeros for the CLS token. timm's module
    must have the same width, depth and heads, and wants images that are normalised already (`encoder.normalize`).
    """
    weights, positions = encoder.state_dict(), encoder.positions.detach()
    weights.pop("positions", None)  # there where they are learned
    weights["patch_embed.proj.weight"] = rearrange(
        weights["patch_embed.proj.weight"], "d (p q c) -> d c p q", p=encoder.patch, c=3
    )
    weights["pos_embed"] = torch.cat([torch.zeros_like(positions[:1]), positions])[None]
    return weights


def from_release(path) -> dict:
    """The weights of MAE's release, or of timm's VisionTransformer, by the names and in the layout of `ViT`: {name:
    tensor}. A decoder of MAE's has the names of `MaskedAutoencoder`; `pos_embed` and `decoder_pos_embed` stay.

    `path` is a file of torch's, the weights bare or under "model" or "state_dict", or .safetensors. No code that it
    may hold is run. The head of a classifier is left out. Whether the weights fit a network is not asked here, but by
    `plumbing.start.start_from`.
    Raises UserError where the file holds no transformer of these.
    """
    return by_our_names(read_weights(path), path)


def read_weights(path):
    """What a file of weights holds, of torch's or .safetensors. Raises UserError where it cannot be read."""
    path = Path(path)
    if path.suffix != ".safetensors":
        # MAE's training saves its settings beside the weights, as a Namespace: a bag of attributes, which has no code
        # that reading it would run.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return load_checkpoint(path)
    try:
        from safetensors.torch import load_file  # not needed for anything else, so it need not be installed
    except ImportError:
        raise UserError(f"{path} needs the package safetensors: pip install safetensors; or give a .pth") from None
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception as error:  # noqa: BLE001 (as for a checkpoint)
        reason = reason_of(error)
        raise UserError(f"{path} is not a file of safetensors ({reason})") from None


def by_our_names(state, path) -> dict:
    """`from_release` of what was read from a file."""
    wrapped = [state[name] for name in ("model", "state_dict") if isinstance(state, dict) and name in state]
    weights = next(iter(wrapped), state)
    patches = weights.get("patch_embed.proj.weight") if isinstance(weights, dict) else None
    if patches is None or not all(isinstance(name, str) for name in weights):
        raise UserError(f"{path} holds no known weights; expected an encoder.pt or last.pt, MAE's, or timm's ViT")
    if not is_sound(patches) or patches.ndim != 4 or patches.shape[1] != 3 or patches.shape[2] != patches.shape[3]:
        raise UserError(f"{path} has a patch_embed.proj.weight that is no (width, 3, patch, patch) of floats")
    kept = {name: value for name, value in weights.items() if not name.startswith("head.")}
    kept["patch_embed.proj.weight"] = rearrange(patches, "d c p q -> d (p q c)")
    return {name.replace("decoder_pred.", "decoder_head."): value for name, value in kept.items()}


def is_sound(value) -> bool:
    """Whether this is a plain tensor of floats in memory, with a place of its own for each value."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    needed = value.numel() * value.element_size()
    return value.is_floating_point() and needed <= value.untyped_storage().nbytes()
