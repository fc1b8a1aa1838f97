"""Pictures with a class for every pixel: built-in scenes, ADE20K, COCO's masks, folders of pictures and labels."""

import functools
import itertools
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from plumbing.checking import attempt_all, cache_folder, check_images, check_same, keep_good, survey
from plumbing.class_folders import IMAGENET, held_out, images_below
from plumbing.coco import is_coco, read_coco
from plumbing.crops import Crop, crop_boxes, crop_with_windows, mix_seed, resize
from plumbing.decoding import MAX_PIXELS, TURNS, open_picture, to_rgb
from plumbing.errors import UserError, printable, reason_of
from plumbing.files import write_atomically
from plumbing.images import FolderImages
from plumbing.processes import note, on_rank_zero
from plumbing.scenes import render_scenes
from plumbing.shapes import SHAPES

IGNORED = 255  # the label of pixels that neither train nor count
PARTS = {"train": ("training", "train"), "test": ("validation", "val")}  # folders of a split: ADE20K's, others'
SCENES = {"mean": (0.415, 0.414, 0.415), "std": (0.266, 0.269, 0.266)}  # of the training pixels


def load_dense(
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
    """One split of a data set with a class for every pixel -> DenseImages or DenseFolder; "test", or else to train on.

    `name` is "scenes", drawn at `image_size`; "ade20k", in `root` or its folder ADEChallengeData2016; "coco", in
    `root`; or a folder, see `read_pairs` and `read_masks`. The other arguments are those of `load_data`; there is no
    `download`. Raises UserError as it does.
    """
    name, tests = os.fspath(name), split == "test"
    if name == "scenes":
        return scenes(1024 if tests else 4096, image_size, 2 * seed + tests, device)
    if name == "ade20k":
        home = next((x for x in (Path(root), Path(root, "ADEChallengeData2016")) if (x / "annotations").is_dir()), None)
        if home is None:
            raise UserError(f"no ade20k at {root}; give the --root that holds its images and annotations")
    elif name == "coco":
        home = Path(root)
    elif name and Path(name).is_dir():
        home = Path(name)
    else:
        raise UserError(f"no pictures with labels of pixels {name!r}; give scenes, ade20k, coco, or a folder of both")
    options = {"workers": workers, "device": device, "max_pixels": max_pixels}
    try:
        if name == "coco" or is_coco(home):
            return read_masks(home, tests, skip_bad_images, **options)
        return read_pairs(home, tests, skip_bad_images, **options, zero_is_nothing=name == "ade20k")
    except OSError as error:
        raise UserError(f"the data of {home} cannot be read ({reason_of(error)})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Nearest pixels, and crops of pictures and labels alike
# ---------------------------------------------------------------------------------------------------------------------


def nearest_pixels(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """Which pixel of an axis each output pixel takes: windows (B,), (B,) of `source` pixels -> int64 (B, target).

    It is the one that the centre of the output pixel lies in, the next one where it lies on a border. A negative length
    flips, as in `resize_matrix`.
    """
    step = (length / target)[:, None]
    centre = start[:, None] + (torch.arange(target, device=start.device) + 0.5) * step  # (B, target)
    return centre.floor().long().clamp(0, source - 1)


def take_nearest(labels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The pixels at rows (B, h) and columns (B, w) of label pictures (B, H, W) -> (B, h, w)."""
    number = torch.arange(len(labels), device=labels.device)[:, None, None]
    return labels[number, rows[:, :, None], columns[:, None]]


def resize_labels(labels: Tensor, height: int, width: int) -> Tensor:
    """Whole label pictures (B, H, W) -> (B, height, width) by their nearest pixels."""
    zero = torch.zeros(1, device=labels.device)
    rows, columns = (
        nearest_pixels(zero, zero + old, old, new).expand(len(labels), -1)
        for old, new in zip(labels.shape[-2:], (height, width), strict=True)
    )
    return take_nearest(labels, rows, columns)


def crop_pairs(images: Tensor, labels: Tensor, size: int, crop=(0.08, 1.0), flip: float = 0.5, generator=None):
    """Each picture and its labels with one random resized crop and flip: uint8 (B, 3, H, W), integers (B, H, W)
    -> float (B, 3, size, size) in [0, 1], int64 (B, size, size).

    `crop` as in `random_resized_crop`, which makes the same picture from the same generator.
    """
    images, *windows = crop_with_windows(images, size, crop, flip=flip, generator=generator)
    places = (nearest_pixels(*window, side, size) for window, side in zip(windows, labels.shape[1:], strict=True))
    return images, take_nearest(labels, *places).long()


# ---------------------------------------------------------------------------------------------------------------------
# Scenes, and others in memory
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class DenseImages:
    """Pictures (N, 3, H, W) and a class for each of their pixels (N, H, W), both uint8, in memory.

    `instances` and `objects`, of scenes alone, are the other two things that `render_scenes` gives.
    """

    images: Tensor
    maps: Tensor
    classes: list  # of pixels
    mean: tuple
    std: tuple
    instances: Tensor | None = None  # (N, H, W)
    objects: Tensor | None = None  # (N, 5), indices of SHAPES
    listing: bytes = b""

    def __len__(self):
        return len(self.images)

    @property
    def labels(self) -> Tensor:
        """One 0 a picture, which says that it has labels."""
        return torch.zeros(len(self), dtype=torch.long, device=self.images.device)

    def train_batches(self, plan, size, crop=(0.08, 1.0), flip=0.5, views=1):
        """Cropped and flipped batches for a plan of (seed, indices): pictures float (B, 3, size, size), labels int64.

        The latter, (B, size, size), have IGNORED where there is none. There is one view.
        """
        generator = torch.Generator(self.images.device)
        for seed, indices in plan:
            indices = torch.as_tensor(indices).to(self.images.device, non_blocking=True)
            pair = self.images[indices], self.maps[indices]
            yield crop_pairs(*pair, size, crop, flip, generator.manual_seed(seed))

    def plain_batches(self, indices, size, batch=500):
        """Whole pictures and labels without augmentation: float (B, 3, size, size) and int64 (B, size, size)."""
        for part in torch.as_tensor(indices, device=self.images.device).split(batch):
            yield resize(self.images[part], size), resize_labels(self.maps[part], size, size).long()

    def whole_batches(self, indices, size, batch=100):
        """Pictures to judge by, resized to float (B, 3, size, size), and labels at their own size."""
        for part in torch.as_tensor(indices, device=self.images.device).split(batch):
            yield resize(self.images[part], size), self.maps[part].long()


def scenes(count: int, size: int, seed: int = 0, device="cpu") -> DenseImages:
    """Scenes with the class of every pixel: 0 is the background, then come the ten shapes."""
    images, instances, objects = (x.to(device) for x in render_scenes(count, size, seed))
    kinds = torch.cat([torch.zeros_like(objects[:, :1]), objects + 1], dim=1).to(torch.uint8)  # (N, 6)
    maps = kinds.gather(1, instances.flatten(1).long()).view_as(instances)
    return DenseImages(images, maps, ["background", *SHAPES], **SCENES, instances=instances, objects=objects)


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


def read_labels(path, max_pixels: int = MAX_PIXELS, zero_is_nothing: bool = False) -> np.ndarray:
    """A PNG of labels -> uint8 (H, W): a palette's indices as they are, grey of 8 or 16 bits; IGNORED where there is
    none, which is 255, in 16 bits 65535 too. With `zero_is_nothing`, 0 is none as well and 1 is the first class.

    Raises ValueError for another kind of picture, and for a label beyond 254, and what `open_picture` does.
    """
    with open_picture(path, max_pixels) as image:
        depth = bits_of(path)
        if image.format != "PNG" or image.mode not in ("L", "P") and not image.mode.startswith("I"):
            kind = f"{image.format} of mode {image.mode}"
            raise ValueError(f"a {kind} holds no labels, expected a PNG, grey or with a palette")
        if depth < 8 and image.mode != "P":  # Pillow scales grey of few bits, and leaves a palette's indices
            raise ValueError(f"grey labels of {depth} bits, expected 8 or 16")
        labels = np.asarray(image).astype(np.int64)  # of a palette the indices
    if depth == 16:
        labels[labels == 65535] = IGNORED
    if zero_is_nothing:
        labels = np.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1)
    if labels.max() > IGNORED:
        raise ValueError(f"the label {labels.max()} is beyond 254")
    return labels.astype(np.uint8)


def bits_of(path) -> int:
    """Bits of a value of a PNG; 8 for any other file."""
    with open(path, "rb") as file:
        head = file.read(25)
    return head[24] if head[12:16] == b"IHDR" else 8


def read_pairs(
    root: Path,
    tests: bool,
    skip_bad_images: bool = False,
    workers: int = 0,
    device="cpu",
    max_pixels: int = MAX_PIXELS,
    zero_is_nothing: bool = False,
) -> "DenseFolder":
    """The pictures of root/images and the labels of root/annotations, PNG files of the same names below it.

    Both hold `training` and `validation`, as ADE20K's, or `train` and `val`; or neither, and then a part is `held_out`
    to test on. A file objectInfo150.txt makes it ADE20K, whose 0 is nothing; classes.txt names the classes, a line
    each; without either they are numbers, up to the largest label to train on.
    Raises UserError for a picture or labels that cannot be read or do not fit each other; with `skip_bad_images` such
    pairs are left out.
    """
    for part in ("images", "annotations"):
        if not (root / part).is_dir():
            raise UserError(f"no folder {root / part}; expected pictures in images and labels in annotations")
    zero_is_nothing |= (root / "objectInfo150.txt").exists()
    names = names_of(root)
    if not names and tests:  # the labels that one trains on tell how many classes there are
        names = read_pairs(root, False, skip_bad_images, workers, device, max_pixels, zero_is_nothing).classes
    pictures, labels = pairs_of(root, tests)
    lines, bad, largest = [], {}, -1

    def look():  # of process 0
        nonlocal lines
        lines, digest = survey(pictures + labels, root)
        bad = check_images(pictures, digest, max_pixels)
        found = check_labels(pictures, labels, digest, max_pixels, zero_is_nothing)
        bad |= {i: text for i, text in enumerate(found) if isinstance(text, str) and i not in bad}
        most = len(names) - 1
        beyond = {i: x for i, x in enumerate(found) if names and not isinstance(x, str) and x > most}
        bad |= {i: f"{labels[i]} has the label {x}, there are {len(names)} classes" for i, x in beyond.items()}
        return bad, max((x for i, x in enumerate(found) if i not in bad), default=-1)

    check_same(pictures + labels, device)
    bad, largest = on_rank_zero(look)
    good = keep_good(pictures, bad, skip_bad_images)
    if largest < 0:
        which = f"the {len(good)} pictures to {'test' if tests else 'train'} on of {root}"
        ignored = "0 and 255 are ignored" if zero_is_nothing else "255 is ignored"
        raise UserError(f"no pixel of {which} has a label: {ignored}; give labels in {root / 'annotations'}")
    shift = 1 if zero_is_nothing else 0
    names = names or [str(i + shift) for i in range(largest + 1)]
    listing = b"".join(lines[i] for i in [*good, *(len(pictures) + i for i in good)] if lines)
    pictures, labels = [pictures[i] for i in good], [labels[i] for i in good]
    read = functools.partial(read_labels, max_pixels=max_pixels, zero_is_nothing=zero_is_nothing)
    options = {"workers": workers, "device": device, "max_pixels": max_pixels, "listing": listing}
    return DenseFolder(paths=pictures, annotations=labels, read=read, classes=names, **IMAGENET, **options)


def read_masks(
    root: Path,
    tests: bool,
    skip_bad_images: bool = False,
    workers: int = 0,
    device="cpu",
    max_pixels: int = MAX_PIXELS,
) -> "DenseFolder":
    """The pictures of a folder in COCO's layout, and class maps of the masks of their objects: `CocoSplit.class_map`.

    Class 0 is the background, then come the categories in the order of their ids, whatever gaps these have.
    Raises UserError as `read_coco` does, for a mask that cannot be drawn, and for more than 254 categories.
    """
    data = read_coco(root, "test" if tests else "train", skip_bad_images, device, max_pixels, masks=True)
    names = told_apart(["background", *map(printable, data.classes)], first=0)
    if len(names) > IGNORED or len(set(names)) < len(names):
        raise UserError(f"{root} lists {len(names) - 1} categories, expected at most {IGNORED - 1} of different names")
    options = {"workers": workers, "device": device, "max_pixels": max_pixels, "listing": data.listing}
    numbers = list(range(len(data)))
    return DenseFolder(paths=data.paths, annotations=numbers, read=data.class_map, classes=names, **IMAGENET, **options)


def told_apart(names: list, first: int = 1) -> list:
    """Names of classes; where several have one, each with its number too, counted from `first`."""
    return [name if names.count(name) == 1 else f"{name} {i}".strip() for i, name in enumerate(names, start=first)]


def names_of(root: Path) -> list:
    """Names of the classes, from ADE20K's table or a line each; [] without a file. Raises UserError for an odd one.

    A class of the table is called by its first name, and by its number too where another one has that name.
    """
    table, listed = root / "objectInfo150.txt", root / "classes.txt"
    if table.exists():
        path, rows = table, [line.split("\t") for line in lines_of(table) if line]
        rows = rows[1:] if rows and not rows[0][0].strip().isdigit() else rows
        if not rows or any(len(row) < 2 for row in rows):
            raise UserError(f"{table} is not ADE20K's table of classes; expected columns, the last one with names")
        names = told_apart([row[-1].split(",")[0].strip() for row in rows])
    elif listed.exists():
        path, names = listed, lines_of(listed)
        if "" in names:
            raise UserError(f"line {names.index('') + 1} of {listed} is blank; give a name in each, from label 0 on")
    else:
        return []
    if not 1 <= len(names) <= IGNORED or len(set(names)) < len(names) or "" in names:
        raise UserError(f"{path} lists {len(names)} classes, expected 1 to {IGNORED} different names, a line each")
    return [printable(name) for name in names]


def lines_of(path: Path) -> list:
    """The lines of a text without what is blank around each; blank ones at its end are left out."""
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape").rstrip()
    return [line.strip() for line in text.split("\n")] if text else []


def pairs_of(root: Path, tests: bool) -> tuple[list, list]:
    """Paths of the pictures of a split, and of their labels. Raises UserError where there is none."""
    home = root / "images"
    train, test = (next((x for x in PARTS[split] if (home / x).is_dir()), "") for split in ("train", "test"))
    if bool(train) != bool(test):
        raise UserError(f"{home} holds {train or test} alone; expected training and validation, or neither")
    home = home / (test if tests else train)
    found, others = images_below(home)
    if others and not tests:
        note(f"{len(others)} other files or folders below {home} are left out, such as {others[0]}")
    if not train:
        if len(found) == 1:
            raise UserError(f"{found[0]} is the only picture below {home}; give one more, to test on")
        aside = held_out([os.path.relpath(path, home) for path in found])
        found = [path for path in found if (os.path.relpath(path, home) in aside) == tests]
    if not found:
        raise UserError(f"no image below {home}; expected JPEG, PNG or WebP files")
    below = [Path(os.path.relpath(path, root / "images")) for path in found]
    return found, [str(root / "annotations" / path.with_suffix(".png")) for path in below]


def check_labels(pictures: list, labels: list, digest: str, max_pixels: int, zero_is_nothing: bool) -> list:
    """The largest label of each file, -1 where all is ignored; or why it cannot be used. Remembered as in
    `check_images`.
    """
    folder, found = cache_folder(), {}
    cache = folder / "checked-images" / f"{digest}-{max_pixels}-labels{int(zero_is_nothing)}.json" if folder else None
    with suppress(OSError, ValueError, TypeError, AttributeError):
        known = json.loads(cache.read_text()) if cache else {}
        found = {int(i): int(x) for i, x in known.items() if 0 <= int(i) < len(labels)}

    def read(i):
        path = labels[i]
        if not os.path.exists(path):
            raise ValueError(f"it has no labels, no file {path}")
        try:
            own = read_labels(path, max_pixels, zero_is_nothing)
        except Exception as error:  # noqa: BLE001 (a damaged file fails in any of a dozen ways)
            raise ValueError(f"its labels {path}: {reason_of(error)}") from None
        with open_picture(pictures[i], max_pixels) as image:
            width, height = image.size[::-1] if image.info["orientation"] >= 5 else image.size
        if own.shape != (height, width):
            shown = f"{own.shape[1]} x {own.shape[0]}"
            raise ValueError(f"its labels {path} are {shown}, the picture is {width} x {height}")
        real = own[own != IGNORED]
        found[i] = int(real.max()) if real.size else -1

    bad = attempt_all(read, [i for i in range(len(labels)) if i not in found], "checking the labels of")
    with suppress(OSError):
        if cache:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, lambda file: file.write(json.dumps(found).encode()))
    return [bad.get(i, found.get(i)) for i in range(len(labels))]


@dataclass(kw_only=True)
class PictureFiles:
    """Pictures in files, read by `workers` processes; what stands in them is a subclass's."""

    paths: list
    classes: list
    mean: tuple
    std: tuple
    listing: bytes = b""
    workers: int = 0
    device: torch.device | str = "cpu"
    max_pixels: int = MAX_PIXELS

    def __len__(self):
        return len(self.paths)

    @property
    def labels(self) -> Tensor:
        return torch.zeros(len(self), dtype=torch.long)


@dataclass(kw_only=True)
class DenseFolder(PictureFiles):
    """Pictures and their labels. See `read_pairs` and `read_masks`; batches are as of DenseImages."""

    annotations: list  # of each picture what `read` takes
    read: Callable  # -> labels uint8 (H, W)

    def train_batches(self, plan, size, crop=(0.08, 1.0), flip=0.5, views=1):
        """As DenseImages.train_batches. A step's seed and a place in the batch make a crop."""
        ahead, behind = itertools.tee(plan)
        keys = ([(i, seed, place) for place, i in enumerate(torch.as_tensor(part).tolist())] for seed, part in ahead)
        generator = torch.Generator(self.device)
        for (seed, _), (images, labels) in zip(behind, self._load(keys, size, "crop", crop), strict=True):
            mirror = torch.rand(len(images), device=images.device, generator=generator.manual_seed(seed)) < flip
            images = torch.where(mirror[:, None, None, None], images.flip(-1), images).float() / 255
            yield images, torch.where(mirror[:, None, None], labels.flip(-1), labels).long()

    def plain_batches(self, indices, size, batch=100):
        """The centre square, its side resized to `size`, of pictures and labels alike."""
        keys = ([(i, None, 0) for i in part.tolist()] for part in torch.as_tensor(indices).split(batch))
        for images, labels in self._load(keys, size, "square"):
            yield images.float() / 255, labels.long()

    def whole_batches(self, indices, size, batch=1):
        """Pictures to judge by, one each, (1, 3, h, w) with a shorter side of `size`, and labels at their own size."""
        keys = ([(i, None, 0)] for i in torch.as_tensor(indices).tolist())
        for images, labels in self._load(keys, size, "whole"):
            yield images.float() / 255, labels.long()

    def _load(self, keys, size, kind, crop=Crop()):  # noqa: B008
        reader = _PairReader(self.paths, self.annotations, self.read, size, kind, crop, self.max_pixels)
        return FolderImages._load(self, keys, reader)


@dataclass
class _PairReader(torch.utils.data.Dataset):
    """A worker's task: (index, seed, place) -> uint8 (3, h, w) and labels uint8 (h, w), or the text of an error."""

    paths: list
    annotations: list
    read: Callable
    size: int
    kind: str  # crop, square or whole
    crop: tuple
    max_pixels: int

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        index, seed, place = key
        try:
            labels = torch.from_numpy(self.read(self.annotations[index]))
            image = open_as(self.paths[index], *labels.shape, self.max_pixels)
        except Exception as error:  # noqa: BLE001 (a damaged file fails in any of a dozen ways)
            return f"{self.paths[index]} or its labels cannot be read ({reason_of(error)}); mend or remove it"
        width, height = image.size
        if self.kind == "whole":
            scale = self.size / min(height, width)
            wanted = (max(self.size, round(width * scale)), max(self.size, round(height * scale)))
            return to_tensor(image.resize(wanted, Image.Resampling.BICUBIC)), labels
        if self.kind == "square":
            side = min(height, width)
            box = torch.tensor([(height - side) / 2, (width - side) / 2, side, side])
            kernel = "bicubic"
        else:
            *scale, interpolation, clamp = Crop(*self.crop)
            generator = torch.Generator().manual_seed(mix_seed(seed, place, 0))
            sides, kernel = torch.tensor([[height], [width]]).float(), interpolation or "bicubic"
            box = crop_boxes(*sides, scale, generator=generator, clamp=clamp)[0]
        top, left, h, w = box.tolist()
        corners = (left, top, min(left + w, width), min(top + h, height))
        image = image.resize((self.size, self.size), Image.Resampling[kernel.upper()], box=corners)
        rows = nearest_pixels(box[0:1], box[2:3], height, self.size)
        columns = nearest_pixels(box[1:2], box[3:4], width, self.size)
        return to_tensor(image), take_nearest(labels[None], rows, columns)[0]


def open_as(path, height: int, width: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a file, RGB and upright; as it is stored where it has that size alone, as some annotations do.

    Raises ValueError for a picture of another size, and what `open_picture` does.
    """
    with open_picture(path, max_pixels) as image:
        turn, image = image.info["orientation"], to_rgb(image)
    upright = image.transpose(TURNS[turn]) if turn in TURNS else image
    image = upright if upright.size == (width, height) else image
    if image.size != (width, height):
        raise ValueError(f"it has {image.width} x {image.height} pixels, its annotations are for {width} x {height}")
    return image


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
