"""Pictures with boxes: built-in scenes, and folders in COCO's layout. Batches are padded to one size."""

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from plumbing.class_folders import IMAGENET
from plumbing.coco import cut_boxes, read_coco
from plumbing.crops import Crop, crop_with_windows, mix_seed, resize
from plumbing.decoding import MAX_PIXELS
from plumbing.dense import SCENES, PictureFiles, open_as, to_tensor
from plumbing.errors import UserError, reason_of
from plumbing.images import FolderImages
from plumbing.scenes import render_scenes
from plumbing.shapes import SHAPES

CELL = 32  # padded sides are multiples of it
LONGEST = 1333 / 800  # of the longer side to the shorter one, at most (DETR)


class Targets(NamedTuple):
    """What is in a batch of pictures: rows of M objects, filled up by the label -1."""

    labels: Tensor  # int64 (B, M)
    boxes: Tensor  # (B, M, 4) centre x, y, width, height, in shares of the picture
    filled: Tensor  # (B, 2) height and width of the picture, in shares of the padded one

    def chunk(self, parts: int) -> list:
        """So many parts of the batch."""
        return [Targets(*part) for part in zip(*(x.chunk(parts) for x in self), strict=True)]

    def to(self, *args, **options) -> "Targets":
        return Targets(*(x.to(*args, **options) for x in self))

    def mask(self, height: int, width: int) -> Tensor:
        """Which cells of a map of the padded picture have their centre in the picture: bool (B, height, width)."""
        rows, columns = (
            (torch.arange(side, device=share.device) + 0.5) / side < share[:, None]
            for side, share in zip((height, width), self.filled.T, strict=True)
        )
        return rows[:, :, None] & columns[:, None]


def targets_of(labels: Tensor, corners: Tensor, filled: Tensor) -> Targets:
    """Labels (B, M) and corners x0 y0 x1 y1 (B, M, 4) in shares of the picture, cut to it; what has no area is none."""
    corners = corners.clamp(0, 1)
    low, high = corners[..., :2], corners[..., 2:]
    there = (labels >= 0) & (high > low).all(dim=-1)
    boxes = torch.cat([(low + high) / 2, high - low], dim=-1)
    return Targets(torch.where(there, labels, -1), torch.where(there[..., None], boxes, 0.0), filled)


def load_boxes(
    name: str,
    root="data",
    split: str = "train",
    image_size: int = 64,
    device="cpu",
    seed: int = 0,
    download: bool = False,
    skip_bad_images: bool = False,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
):
    """One split of a data set with boxes -> BoxImages or BoxFolder; "test", or else to train on.

    `name` is "scenes", drawn at `image_size`; "coco", in `root`; or a folder of COCO's layout. The other arguments are
    those of `load_data`; there is no `download`. Raises UserError as it does.
    """
    name, tests = os.fspath(name), split == "test"
    if name == "scenes":
        return scenes_with_boxes(1024 if tests else 4096, image_size, 2 * seed + tests, device)
    if name != "coco" and not (name and Path(name).is_dir()):
        raise UserError(f"no pictures with boxes {name!r}; give scenes, coco, or a folder of COCO's layout")
    home = Path(root if name == "coco" else name)
    try:
        data = read_coco(home, split, skip_bad_images, device, max_pixels)
    except OSError as error:
        raise UserError(f"the data of {home} cannot be read ({reason_of(error)})") from None
    options = {"workers": workers, "device": device, "max_pixels": max_pixels}
    own = {name: getattr(data, name) for name in ("paths", "sizes", "objects", "classes", "listing")}
    return BoxFolder(**own, **IMAGENET, **options)


# ---------------------------------------------------------------------------------------------------------------------
# In memory
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class BoxImages:
    """Pictures uint8 (N, 3, H, W) in memory, each with at most M objects."""

    images: Tensor
    objects: Tensor  # int64 (N, M): the class of each, -1 for none
    corners: Tensor  # (N, M, 4) x0 y0 x1 y1 in pixels
    area: Tensor  # (N, M) in pixels, of what is seen
    classes: list
    mean: tuple
    std: tuple
    listing: bytes = b""

    def __len__(self):
        return len(self.images)

    @property
    def labels(self) -> Tensor:
        """One 0 a picture, which says that it has labels."""
        return torch.zeros(len(self), dtype=torch.long, device=self.images.device)

    def size(self, i: int) -> tuple[int, int]:
        return tuple(self.images.shape[2:])

    def truth(self, i: int) -> dict:
        """What `average_precision` takes of picture i."""
        there = self.objects[i] >= 0
        low, high = self.corners[i][there].split(2, dim=1)
        area = self.area[i][there]
        boxes = torch.cat([low, high - low], dim=1)
        return {"boxes": boxes, "labels": self.objects[i][there], "area": area, "crowd": torch.zeros_like(area)}

    def train_batches(self, plan, size, crop=(0.08, 1.0), flip=0.5, views=1):
        """Cropped and flipped batches for a plan of (seed, indices): float (B, 3, size, size) and Targets.

        `crop` as in `random_resized_crop`, which makes the same pictures. There is one view.
        """
        options = {"crop": crop, "flip": flip, "generator": torch.Generator(self.images.device)}
        for seed, indices in plan:
            indices = torch.as_tensor(indices).to(self.images.device, non_blocking=True)
            options["generator"].manual_seed(seed)
            images, (top, h), (start, step) = crop_with_windows(self.images[indices], size, **options)
            x0, y0, x1, y1 = self.corners[indices].unbind(dim=-1)  # (B, M) each
            x = torch.stack([x0, x1]).sub(start[:, None]).div(step[:, None]).sort(dim=0).values  # a flip swaps them
            y = torch.stack([y0, y1]).sub(top[:, None]).div(h[:, None])
            corners = torch.stack([x[0], y[0], x[1], y[1]], dim=-1)
            yield images, targets_of(self.objects[indices], corners, torch.ones(len(images), 2, device=images.device))

    def plain_batches(self, indices, size, batch=100):
        """Whole pictures without augmentation: float (B, 3, size, size) and Targets."""
        height, width = self.images.shape[2:]
        for part in torch.as_tensor(indices, device=self.images.device).split(batch):
            corners = self.corners[part] / torch.tensor([width, height] * 2, device=part.device)
            filled = torch.ones(len(part), 2, device=part.device)
            yield resize(self.images[part], size), targets_of(self.objects[part], corners, filled)


def scenes_with_boxes(count: int, size: int, seed: int = 0, device="cpu") -> BoxImages:
    """Scenes with the box around what is seen of each object."""
    images, instances, objects = render_scenes(count, size, seed)
    seen = instances[:, None] == torch.arange(1, objects.shape[1] + 1, dtype=torch.uint8).view(1, -1, 1, 1)
    ends = []
    for line in (seen.any(dim=2), seen.any(dim=3)):  # (N, M, S) columns, rows
        first = line.to(torch.uint8).argmax(dim=-1)
        ends.append((first, size - line.flip(-1).to(torch.uint8).argmax(dim=-1)))
    corners = torch.stack([ends[0][0], ends[1][0], ends[0][1], ends[1][1]], dim=-1).float()
    area = seen.sum(dim=(2, 3)).float()
    found = (x.to(device) for x in (images, objects, corners, area))
    return BoxImages(*found, list(SHAPES), **SCENES)


# ---------------------------------------------------------------------------------------------------------------------
# In files
# ---------------------------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """A part of a picture, in its pixels, and the size that it is brought to."""

    top: float
    left: float
    height: float
    width: float
    rows: int
    columns: int


def fitted(height: float, width: float, size: int, longest: int) -> tuple[int, int]:
    """The size (rows, columns) of a picture whose shorter side becomes `size`, or its longer one `longest` (DETR).

    The shorter side is rounded, so the longer one could come out a bit longer than `longest`: it is cut to it.
    """
    short, long = min(height, width), max(height, width)
    size = max(1, min(size, round(longest * short / long)))
    other = min(longest, max(1, int(size * long / short)))
    return (size, other) if height < width else (other, size)


def draw_window(height: int, width: int, size: int, seed: int) -> Window:
    """DETR's training pictures, its numbers being those of a `size` of 800.

    The shorter side becomes 480, 512, ... or 800, the longer one 1333 at most. For half of the pictures a window is cut
    out before: its sides are 384 to 600 each, where the shorter side of the picture is 400, 500 or 600.
    """
    draw, unit = np.random.default_rng(seed), size / 800
    top, left, h, w = 0.0, 0.0, float(height), float(width)
    if draw.random() < 0.5:
        scale = draw.choice([400, 500, 600]) * unit / min(height, width)
        h, w = (min(side, draw.uniform(384, 600) * unit / scale) for side in (h, w))
        top, left = draw.uniform(0, height - h), draw.uniform(0, width - w)
    wanted = int(draw.choice(range(480, 801, 32)) * unit)
    return Window(top, left, h, w, *fitted(h, w, max(1, wanted), round(size * LONGEST)))


@dataclass(kw_only=True)
class BoxFolder(PictureFiles):
    """Pictures and the objects in them; see `CocoSplit` for the lists.

    With `square`, for encoders of images of one size, every padded picture is `size` x `size`.
    """

    sizes: list
    objects: list
    square: bool = False

    def size(self, i: int) -> tuple[int, int]:
        return self.sizes[i]

    def truth(self, i: int) -> dict:
        """What `average_precision` takes of picture i: all as the file has it."""
        return {name: getattr(self.objects[i], name) for name in ("boxes", "labels", "area", "crowd")}

    def train_batches(self, plan, size, crop=(0.08, 1.0), flip=0.5, views=1):
        """Batches for a plan of (seed, indices): float (B, 3, h, w), padded at the right and below, and Targets.

        `draw_window` for each picture where `crop` keeps less than all, else whole. Crowds do not train. One view.
        """
        whole = Crop(*crop).least >= 1 or self.square

        def tasks():
            for seed, indices in plan:
                draws = [(i, mix_seed(seed, n)) for n, i in enumerate(torch.as_tensor(indices).tolist())]
                windows = [self.whole(i, size) if whole else draw_window(*self.sizes[i], size, own) for i, own in draws]
                mirrors = [bool(np.random.default_rng([own, 1]).random() < flip) for _, own in draws]
                yield list(zip([i for i, _ in draws], windows, mirrors, strict=True))

        yield from self._batches(tasks(), size)

    def plain_batches(self, indices, size, batch=1):
        """Whole pictures, their shorter side brought to `size`, the longer one to 5 / 3 of it at most; and Targets."""
        parts = torch.as_tensor(indices).split(batch)
        yield from self._batches(([(i, self.whole(i, size), False) for i in part.tolist()] for part in parts), size)

    def whole(self, i: int, size: int) -> Window:
        height, width = self.sizes[i]
        return Window(0, 0, height, width, *fitted(height, width, size, size if self.square else round(size * LONGEST)))

    def _batches(self, tasks, size: int):
        """Tasks, lists of (index, window, mirrored) -> padded pictures and Targets."""
        ahead, behind = itertools.tee(tasks)  # the workers run ahead
        keys = ([(*item, self._canvas(task, size)) for item in task] for task in ahead)
        loaded = FolderImages._load(self, keys, _BoxReader(self.paths, self.sizes, self.max_pixels))
        for task, (images, _) in zip(behind, loaded, strict=True):
            yield images.float() / 255, self._targets(task, images.shape[2:]).to(images.device)

    def _canvas(self, task: list, size: int) -> tuple[int, int]:
        if self.square:
            return size, size
        most = (max(getattr(window, side) for _, window, _ in task) for side in ("rows", "columns"))
        return tuple(-(-side // CELL) * CELL for side in most)

    def _targets(self, task: list, canvas: tuple) -> Targets:
        rows = max(1, *(len(self.objects[i]) for i, *_ in task))
        labels, corners = torch.full((len(task), rows), -1), torch.zeros(len(task), rows, 4)
        for n, (i, window, mirrored) in enumerate(task):
            objects = self.objects[i]
            boxes, left = cut_boxes(objects.boxes, *self.sizes[i])
            kept = left & ~objects.crowd
            boxes = (boxes[kept] - [window.left, window.top] * 2) / ([window.width, window.height] * 2)
            boxes = boxes.clip(0, 1)
            if mirrored:
                boxes = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1)
            labels[n, : len(boxes)] = torch.from_numpy(objects.labels[kept])
            corners[n, : len(boxes)] = torch.from_numpy(boxes).float()
        filled = torch.tensor([[w.rows / canvas[0], w.columns / canvas[1]] for _, w, _ in task])
        return targets_of(labels, corners, filled)


@dataclass
class _BoxReader(torch.utils.data.Dataset):
    """A worker's task: (index, window, mirrored, canvas) -> uint8 (3, h, w) and the index, or the text of an error."""

    paths: list
    sizes: list
    max_pixels: int

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        index, window, mirrored, canvas = key
        path, (height, width) = self.paths[index], self.sizes[index]
        try:
            image = open_as(path, height, width, self.max_pixels)
        except Exception as error:  # noqa: BLE001 (a damaged file fails in any of a dozen ways)
            return f"{path} cannot be read as an image ({reason_of(error)}); mend or remove it"
        box = (window.left, window.top, window.left + window.width, window.top + window.height)
        box = (box[0], box[1], min(box[2], width), min(box[3], height))
        image = image.resize((window.columns, window.rows), Image.Resampling.BILINEAR, box=box)
        picture = to_tensor(image)
        picture = picture.flip(-1) if mirrored else picture
        return F.pad(picture, (0, canvas[1] - window.columns, 0, canvas[0] - window.rows)), torch.tensor(index)
