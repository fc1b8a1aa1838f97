"""Sheets of pictures: rows and columns, with a caption over each column."""

import contextlib
from pathlib import Path

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from plumbing.errors import UserError
from plumbing.files import write_atomically

DPI, GAP = 100, 4  # pixels an inch, and between two pictures


@contextlib.contextmanager
def plain_style():
    """matplotlib as it comes: a user's own matplotlibrc would move captions and cut pictures off. Raises UserError."""
    check_drawing()
    import matplotlib  # here, since importing it takes a while

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def check_drawing():
    """Raise UserError where matplotlib cannot be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except (ImportError, ValueError) as error:
        raise UserError(
            f"pictures need matplotlib, which cannot be imported ({error}); "
            f"pip install -r requirements.txt, or train without them by --probe-every 0"
        ) from None


@plain_style()
def save_pictures(rows: Tensor, path, captions=(), title: str = "", side: int = 128):
    """Write rows of pictures (R, K, 3, H, W), values in [0, 1], as one PNG with a title and a caption over each column.

    Pictures smaller than `side` pixels are enlarged in whole steps, so that their pixels stay squares.
    """
    from matplotlib.figure import Figure

    zoom = max(1, side // rows.shape[-1])
    tiles = F.interpolate(rows.detach().flatten(0, 1).float().cpu().clamp(0, 1), scale_factor=zoom, mode="nearest")
    tiles = F.pad(tiles, (0, GAP, 0, GAP), value=1.0).unflatten(0, rows.shape[:2])
    sheet = (rearrange(tiles, "r k c h w -> (r h) (k w) c") * 255).round().byte().numpy()
    head = (20 if any(captions) else 0) + (26 if title else 0)  # pixels above the pictures
    width, height = sheet.shape[1] + GAP, sheet.shape[0] + GAP + head
    figure = Figure(figsize=((width + 0.1) / DPI, (height + 0.1) / DPI), dpi=DPI)  # rounded down to whole pixels
    figure.figimage(sheet, GAP, 0)  # pixel by pixel
    for k, caption in enumerate(captions[: rows.shape[1]]):
        middle = GAP + (k + 0.5) * tiles.shape[-1] - GAP / 2
        place = (middle / width, 1 - (head - 9) / height)
        figure.text(*place, caption, ha="center", va="center", fontsize=8, parse_math=False)
    if title:
        size = min(11, 125 * width / DPI / len(title))  # so that all of it is seen
        # Whatever stands between two $ in the name of a folder is no formula.
        figure.text(GAP / width, 1 - 13 / height, title, ha="left", va="center", fontsize=size, parse_math=False)
    write_atomically(Path(path), lambda file: figure.savefig(file, format="png"))
