"""The built-in scenes: one to five of the ten shapes, one before the other, and which pixels each of them shows."""

import numpy as np
import torch
from torch import Tensor

from plumbing.errors import UserError
from plumbing.shapes import SHAPES, Brush, contrast_push, outlines, to_bytes

MOST = 5  # objects of a scene
DRAWS = 1 + 9 + 12 * MOST  # random numbers of a scene: how many objects, the background, each object


def render_scenes(count: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw `count` scenes -> uint8 images (N, 3, S, S), uint8 instances (N, S, S), int64 labels (N, 5).

    An instance map is 0 on the background and i where the i-th object of the picture is seen; the label of this object,
    an index of SHAPES, stands in column i - 1, and -1 where there are fewer. Later objects lie before earlier ones. One
    that would show less than a tenth of itself, or a 400th of the picture, is not painted at all. Colours, light,
    texture, place, scale and rotation are as in `render_shapes`. Picture i depends on (seed, i) alone.
    Raises UserError for sides of less than 16 pixels.
    """
    if size < 16:
        raise UserError(f"scenes of {size} x {size} pixels are too small to show shapes; give --image-size 16 or more")
    draws = np.random.Generator(np.random.Philox(seed)).random((count, DRAWS))  # filled row by row: rows never change
    draws, outline = torch.from_numpy(draws).float(), outlines()
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    instances = torch.empty(count, size, size, dtype=torch.uint8)
    labels = torch.empty(count, MOST, dtype=torch.long)
    step = max(1, 2**18 // size**2)  # keep the working set in the cache
    for i in range(0, count, step):
        part = slice(i, i + step)
        images[part], instances[part], labels[part] = _compose(draws[part], size, *outline)
    return images, instances, labels


def _compose(draws: Tensor, size: int, radius: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Render one part of `render_scenes`: draws (N, DRAWS) -> images, instances, labels."""
    first, *columns = draws.split([10] + [12] * MOST, dim=1)
    wanted = 1 + (first[:, 0] * MOST).long()  # (N,)
    back = Brush(first[:, 1:], size, radius, slope)
    behind = back.colour()
    image = back.backdrop(behind)
    objects = []
    for j, column in enumerate(columns):
        have = torch.nonzero(wanted > j)[:, 0]  # the pictures that have a j-th object
        brush = Brush(column[have], size, radius, slope)
        kind = (brush.vary(0, len(SHAPES))).long().flatten()
        place = brush.vary(0.3, 0.65), brush.vary(-0.3, 0.3), brush.vary(-0.65, 0.65), brush.vary(-0.65, 0.65)
        objects.append((have, brush, kind, place, *brush.inside(kind, *place)))
    # From the front to the back: what would show too little of itself is left out.
    covered, kept = (
        torch.zeros(len(draws), size, size, dtype=torch.bool),
        torch.zeros(len(draws), MOST, dtype=torch.bool),
    )
    for j, (have, _, _, _, body, _, _) in reversed(list(enumerate(objects))):
        seen = (body > 0.5) & ~covered[have]
        share = seen.sum(dim=(1, 2)) / (body > 0.5).sum(dim=(1, 2)).clamp_min(1)
        good = (share >= 0.1) & (seen.sum(dim=(1, 2)) >= max(3, size**2 / 400))
        kept[have, j] = good
        covered[have] |= seen & good[:, None, None]
    instances = torch.zeros(len(draws), size, size, dtype=torch.uint8)
    labels = torch.full((len(draws), MOST), -1)
    for j, (have, brush, kind, place, body, u, v) in enumerate(objects):
        good = kept[have, j]
        here, number = have[good], kept[have[good], : j + 1].sum(dim=1)  # from 1
        front = brush.colour()
        front = brush.lit(front + contrast_push(behind[have], front), u, v)
        shaded = image[here] * (1 - 0.45 * brush.shadow(kind, *place)[good])[:, None]
        image[here] = shaded + (front[good] - shaded) * body[good][:, None]
        instances[here] = torch.where(body[good] > 0.5, number[:, None, None].to(torch.uint8), instances[here])
        labels[here, number - 1] = kind[good]
    return to_bytes(image), instances, labels
