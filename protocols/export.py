"""An encoder's weights in a file that others read: for now a transformer's, for timm."""

from pathlib import Path

import torch
from torch import Tensor

from common import ViT
from plumbing.encoders import height_and_width, load_encoder, to_timm
from plumbing.errors import UserError
from plumbing.files import load_checkpoint, write_atomically
from plumbing.processes import on_rank_zero, rank, start_distributed
from protocols.settings import Config


def export_encoder(run_folder: Path, given: dict):
    """Write timm.pth, the weights as timm's VisionTransformer names them, and print the lines that load it.

    It needs encoder.pt alone, no data. Of the flags `given`, it takes out, image_size, pool and device.
    Raises UserError for an encoder that is no `ViT`, and where another timm.pth is in the way.
    """
    Config(**given | {"image_size": given.get("image_size") or 1})  # refuses what makes no sense
    start_distributed(given.get("device", Config.device))
    encoder = load_encoder(run_folder / "encoder.pt", image_size=given.get("image_size", 0))
    if type(encoder) is not ViT:
        kind = type(encoder).__name__
        raise UserError(
            f"--protocol export writes transformers (ViT) for timm, {run_folder} holds a {kind}: not that one"
        )
    path = Path(given.get("out") or run_folder) / "timm.pth"
    on_rank_zero(lambda: write_weights(timm_weights(encoder), path))
    if rank() == 0:
        print("what follows loads it where timm is installed:\n")
        print(loading_lines(encoder.fields | {"pool": given.get("pool") or encoder.pool}, path))


def timm_weights(encoder: ViT) -> dict[str, Tensor]:
    """`to_timm` as a plain dict, each tensor with a memory of its own."""
    return {name: value.detach().contiguous().clone() for name, value in to_timm(encoder).items()}


def write_weights(weights: dict[str, Tensor], path: Path):
    """Write a state dict, unless it is there. Raises UserError where the file holds something else."""
    if path.exists():
        old = load_checkpoint(path)
        if not isinstance(old, dict) or not same(old, weights):
            raise UserError(f"{path} holds other weights; move it away, or choose another folder by --out")
        print(f"{path} is there already, with these weights")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path.parent} ({error.strerror}); choose another by --out") from None
    write_atomically(path, lambda file: torch.save(weights, file))
    print(f"wrote {path}")


def same(old: dict, new: dict) -> bool:
    """Whether two state dicts hold the same tensors."""
    tensors = all(isinstance(value, Tensor) for value in old.values())
    return tensors and old.keys() == new.keys() and all(torch.equal(value, new[name]) for name, value in old.items())


def loading_lines(fields: dict, path: Path) -> str:
    """Python that puts the file into timm and computes features of `images`: the encoder's own, or of the other pool.

    Without `fc_norm=False` timm's mean has its norm behind it, under another name. Its module normalises no images.
    """
    height, width = height_and_width(fields["image_size"])
    size = {"img_size": height if height == width else (height, width), "patch_size": fields["patch"]}
    size |= {"embed_dim": fields["dim"], "depth": fields["depth"], "num_heads": fields["heads"]}
    size |= {"mlp_ratio": fields["mlp_ratio"]} if fields["mlp_ratio"] != 4 else {}
    size = ", ".join(f"{name}={value}" for name, value in size.items())
    pool, other = ('"avg"', '"token": the CLS token') if fields["pool"] == "mean" else ('"token"', '"avg": the mean')
    return f"""import torch
from timm.models.vision_transformer import VisionTransformer

vit = VisionTransformer(
    {size},
    num_classes=0, global_pool={pool}, fc_norm=False,  # or {other}
)
vit.load_state_dict(torch.load({str(path)!r}, weights_only=True))
vit.eval()
mean = torch.tensor({list(fields["mean"])}).view(3, 1, 1)
std = torch.tensor({list(fields["std"])}).view(3, 1, 1)
features = vit((images - mean) / std)  # (B, 3, {height}, {width}) in [0, 1] -> (B, {fields["dim"]})"""
