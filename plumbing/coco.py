"""COCO's layout: pictures in folders, and JSON files that tell the objects in them, by boxes and by outlines."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from plumbing.checking import attempt_all, cache_folder, check_images, check_same, keep_good, survey
from plumbing.decoding import MAX_PIXELS, open_picture
from plumbing.errors import UserError, reason_of
from plumbing.files import write_atomically
from plumbing.processes import note, on_rank_zero

# ---------------------------------------------------------------------------------------------------------------------
# Outlines and runs -> masks
# ---------------------------------------------------------------------------------------------------------------------


def polygon_mask(polygon, height: int, width: int) -> np.ndarray:
    """A polygon x0 y0 x1 y1 ... filled as pycocotools fills it -> bool (height, width).

    Corners go to a grid five times as fine, and sides to points of it. Where they pass the middle of a column of pixels
    the mask turns over, from there downwards. A triangle 0,0 10,0 0,10 has 45 pixels; Pillow's drawing would have 66,
    all that a side touches. Areas are those of the file, and not of this mask.
    """
    corners = (5 * np.asarray(polygon, dtype=np.float64).reshape(-1, 2) + 0.5).astype(np.int64)
    points = []
    for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        along = int(abs(end - start).argmax())  # the axis that the side is longer on, x where it is equal
        low, high = (start, end) if start[along] <= end[along] else (end, start)  # so that both ways give the same
        length = high[along] - low[along]
        t = np.arange(length + 1) if low is start else np.arange(length, -1, -1)
        side = np.empty((len(t), 2), dtype=np.int64)
        side[:, along] = low[along] + t
        slope = (high[1 - along] - low[1 - along]) / max(length, 1)
        side[:, 1 - along] = low[1 - along] + slope * t + 0.5
        points.append(side)
    (x0, y0), (x1, y1) = np.concatenate(points)[:-1].T, np.concatenate(points)[1:].T
    column = (np.minimum(x0, x1) + 0.5) / 5 - 0.5
    passed = (x0 != x1) & (column == np.floor(column)) & (column >= 0) & (column < width)
    row = np.ceil(((np.minimum(y0, y1) + 0.5) / 5 - 0.5).clip(0, height))
    column, row = column[passed].astype(np.int64), row[passed].astype(np.int64)
    mask, first, last = np.zeros((height, width), dtype=bool), column.min(initial=width), column.max(initial=-1) + 1
    if first < last:
        turns = np.zeros((height + 1, last - first), dtype=np.uint8)  # odd or even is all that counts
        np.add.at(turns, (row, column - first), 1)
        mask[:, first:last] = turns[:-1].cumsum(axis=0, dtype=np.uint8) % 2
    return mask


def run_lengths(text: str) -> list:
    """COCO's packed run lengths as numbers: five bits a letter, the lowest first, from the third but one a difference.

    Raises ValueError for a text that is none.
    """
    counts, value, shift = [], 0, 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f"{letter!r} is no part of packed run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # more letters follow
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("packed run lengths are cut short")
    return counts


def run_counts(counts, height: int, width: int) -> list:
    """Runs of 0 and 1 in turn as numbers, packed where a text. Raises ValueError where they do not fill a picture."""
    counts = run_lengths(counts) if isinstance(counts, str) else counts
    if not all(type(x) is int and x >= 0 for x in counts) or sum(counts) != height * width:
        raise ValueError(f"its run lengths do not fill {height} x {width} pixels")
    return counts


def run_mask(counts, height: int, width: int) -> np.ndarray:
    """Runs of 0 and 1 in turn, down one column after the other -> bool (height, width); see `run_counts`."""
    counts = run_counts(counts, height, width)
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def check_mask(segmentation, height: int, width: int):
    """Raise ValueError for a field "segmentation" that `mask_of` cannot draw; nothing is drawn."""
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), list | str):
        if segmentation.get("size") != [height, width]:
            raise ValueError(f"its mask has a size of {segmentation.get('size')}, the picture of {[height, width]}")
        run_counts(segmentation["counts"], height, width)
        return
    if not isinstance(segmentation, list):
        raise ValueError("its segmentation is neither polygons nor runs")  # noqa: TRY004 (a file is wrong, not the code)
    for polygon in segmentation:
        whole = isinstance(polygon, list | np.ndarray) and all(is_number(x) and abs(x) <= LONGEST_SIDE for x in polygon)
        if not whole or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon of its segmentation is not x, y of three or more corners")


def mask_of(segmentation, height: int, width: int) -> np.ndarray:
    """What the field "segmentation" of an annotation covers -> bool (height, width): polygons, or runs.

    Raises ValueError for anything else.
    """
    check_mask(segmentation, height, width)
    if isinstance(segmentation, dict):
        return run_mask(segmentation["counts"], height, width)
    mask = np.zeros((height, width), dtype=bool)
    for polygon in segmentation:
        mask |= polygon_mask(polygon, height, width)
    return mask


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


LONGEST_SIDE = 10**6  # of a picture, in pixels


def is_number(x) -> bool:
    """Whether it is a number of a size that pixels can have, which "inf", "nan" and integers of 400 digits are not."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e15


def is_name(text: str) -> bool:
    """Whether a file can have it as its name: without 0, and without half a character of two."""
    with suppress(UnicodeEncodeError):
        return b"\0" not in os.fsencode(text)
    return False


@dataclass
class Objects:
    """The objects of one picture, as the file has them, in its order."""

    boxes: np.ndarray  # float64 (n, 4): x, y, width, height in pixels, not cut to the picture
    labels: np.ndarray  # int64 (n,): places in the list of classes
    area: np.ndarray  # float64 (n,): of the mask, as the file tells it
    crowd: np.ndarray  # bool (n,)
    segmentations: list  # of each what `mask_of` takes, or None

    def __len__(self):
        return len(self.labels)


@dataclass
class CocoSplit:
    """The pictures of one split, in the order of their ids, and what is in them."""

    paths: list
    sizes: list  # (height, width) of each
    objects: list  # of Objects
    classes: list  # names, in the order of the ids of the file
    listing: bytes = b""  # a line a file: its size and its name below the root; process 0 alone has it

    def __len__(self):
        return len(self.paths)

    def masks(self, i: int) -> np.ndarray:
        """The masks of the objects of picture i -> bool (n, H, W); an object without one has its box.

        Raises ValueError for what `mask_of` refuses.
        """
        height, width = self.sizes[i]
        found = np.zeros((len(self.objects[i]), height, width), dtype=bool)
        boxes = cut_boxes(self.objects[i].boxes, height, width)[0]
        for mask, (x0, y0, x1, y1), segmentation in zip(found, boxes, self.objects[i].segmentations, strict=True):
            own = [[x0, y0, x1, y0, x1, y1, x0, y1]] if segmentation is None else segmentation
            mask[:] = mask_of(own, height, width)
        return found

    def class_map(self, i: int) -> np.ndarray:
        """The class of each pixel of picture i -> uint8 (H, W): 0 for none, k + 1 for class k, 255 in crowds alone.

        Where masks overlap, that of fewer pixels lies on top, of equal ones the later; for the file tells no order, and
        a large object would hide what it holds. Crowds lie behind all objects. For at most 254 classes.
        """
        masks, objects = self.masks(i), self.objects[i]
        found = np.zeros(self.sizes[i], dtype=np.uint8)
        for n in sorted(range(len(masks)), key=lambda n: (not objects.crowd[n], -masks[n].sum())):
            found[masks[n]] = 255 if objects.crowd[n] else objects.labels[n] + 1
        return found


def find_split(root: Path, split: str) -> tuple[Path, Path]:
    """The file annotations/instances_<name>.json of a split, and the folder <name> or images/<name> of its pictures.

    <name> begins with "train" or, to test on, with "val". Raises UserError where there is not one of each.
    """
    home = next((x for x in (root, root / "coco") if (x / "annotations").is_dir()), None)
    if home is None:
        raise UserError(f"no folder {root / 'annotations'}; expected COCO's instances_train2017.json and others in it")
    word = "val" if split == "test" else "train"
    found = sorted((home / "annotations").glob(f"instances_{word}*.json"))
    if len(found) != 1:
        what = f"both {found[0].name} and {found[1].name}; keep one" if found else f"no instances_{word}*.json"
        raise UserError(f"{home / 'annotations'} holds {what}")
    name = found[0].stem.removeprefix("instances_")
    folders = [home / name, home / "images" / name]
    folder = next((x for x in folders if x.is_dir()), None)
    if folder is None:
        raise UserError(f"no folder {folders[0]} with the pictures of {found[0]}")
    return found[0], folder


def read_annotations(path: Path, folder: Path, masks: bool = False) -> CocoSplit:
    """A file of annotations, checked, with `masks` these too; none of its pictures is opened.

    Raises UserError with the id of what is wrong: of an image, a category or an annotation.
    """

    def refuse(text: str):
        raise UserError(f"{path}: {text}; mend or remove it")

    def nothing(word: str):
        raise ValueError(f"{word} is no number")

    try:
        content = json.loads(path.read_bytes(), parse_constant=nothing)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({reason_of(error)})") from None
    lists = {name: content.get(name) if isinstance(content, dict) else None for name in ("images", "categories")}
    lists["annotations"] = content.get("annotations") if isinstance(content, dict) else None
    for name, rows in lists.items():
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path} has no list {name!r}; expected COCO's images, annotations and categories")
    by_id = {}
    for name, kinds in (("images", {"file_name": str, "width": int, "height": int}), ("categories", {"name": str})):
        by_id[name] = {}
        for row in lists[name]:
            number = row.get("id")
            if type(number) is not int:
                refuse(f"one of {name} has the id {number!r}, which is no whole number")
            if number in by_id[name]:
                refuse(f"two of {name} have the id {number}")
            for field, kind in kinds.items():
                value = row.get(field)
                if type(value) is not kind or (kind is int and not 1 <= value <= LONGEST_SIDE) or value == "":
                    refuse(f"id {number} of {name} has the {field} {value!r:.200}")
            by_id[name][number] = row
    images, places = by_id["images"], {number: i for i, number in enumerate(sorted(by_id["categories"]))}
    for number, row in images.items():
        parts = PurePosixPath(row["file_name"])
        if parts.is_absolute() or ".." in parts.parts or not is_name(row["file_name"]):
            refuse(f"id {number} of images has the file_name {row['file_name']!r}, which no file in its folder has")
    rows, seen = {number: [] for number in sorted(images)}, set()
    for place, row in enumerate(lists["annotations"]):
        number, box = row.get("id", f"number {place}"), row.get("bbox")
        what = f"annotation {number}"
        if not isinstance(number, int | str) or number in seen:
            refuse(f"{what} has an id that is taken, or none")
        seen.add(number)
        for field, known in (("image_id", images), ("category_id", places)):
            if type(row.get(field)) is not int or row[field] not in known:
                refuse(f"{what} has the {field} {row.get(field)!r}, which is not listed")
        if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
            refuse(f"{what} has the bbox {box!r:.200}, expected x, y, width, height")
        area, crowd = row.get("area", box[2] * box[3]), row.get("iscrowd", 0)
        if not is_number(area) or area < 0 or crowd not in (0, 1):
            refuse(f"{what} has the area {area!r:.200} and iscrowd {crowd!r:.200}")
        segmentation = row.get("segmentation")
        if masks and segmentation:
            image = images[row["image_id"]]
            try:
                check_mask(segmentation, image["height"], image["width"])
            except ValueError as error:
                refuse(f"{what}: {error}")
            if isinstance(segmentation, list):  # a third of the memory, of which each worker comes to have its own
                segmentation = [np.array(polygon, dtype=np.float64) for polygon in segmentation]
        rows[row["image_id"]].append((box, places[row["category_id"]], area, crowd, segmentation))
    if not lists["annotations"] or not images:
        raise UserError(f"{path} holds {len(images)} images and {len(seen)} annotations: there is nothing to find")
    return CocoSplit(
        paths=[str(folder / images[number]["file_name"]) for number in rows],
        sizes=[(images[number]["height"], images[number]["width"]) for number in rows],
        objects=[objects_of(some) for some in rows.values()],
        classes=[by_id["categories"][number]["name"] for number in places],
    )


def objects_of(rows: list) -> Objects:
    boxes, labels, area, crowd, segmentations = zip(*rows, strict=True) if rows else [[]] * 5
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    numbers = np.array(labels, dtype=np.int64), np.array(area, dtype=np.float64), np.array(crowd, dtype=bool)
    return Objects(boxes, *numbers, [x or None for x in segmentations])


def cut_boxes(boxes: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes x y width height (n, 4), cut to the picture, as corners x0 y0 x1 y1; and which of them are left, (n,)."""
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    corners = np.concatenate([low, high], axis=1).clip(0, [width, height, width, height])
    return corners, (corners[:, 2:] > corners[:, :2]).all(axis=1)


def check_sizes(data: CocoSplit, digest: str, max_pixels: int) -> dict:
    """{index: reason} of the pictures that have another size than their annotations, as stored and as EXIF turns them.

    Which ones fit is remembered as in `check_images`.
    """
    folder, indices = cache_folder(), range(len(data))
    cache = folder / "checked-images" / f"{digest}-{max_pixels}-sizes.json" if folder else None
    with suppress(OSError, ValueError, TypeError, ArithmeticError):
        known = json.loads(cache.read_text()) if cache else indices
        indices = [int(i) for i in known if 0 <= int(i) < len(data)]

    def read(i):
        with open_picture(data.paths[i], max_pixels) as image:
            (width, height), turned = image.size, image.info["orientation"] >= 5
        if data.sizes[i] != (height, width) and not (turned and data.sizes[i] == (width, height)):
            rows, columns = data.sizes[i]
            raise ValueError(f"it has {width} x {height} pixels, its annotations are for {columns} x {rows}")

    bad = attempt_all(read, indices, "checking the sizes of")
    with suppress(OSError):
        if cache:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, lambda file: file.write(json.dumps(list(bad)).encode()))
    return bad


def is_coco(root: Path) -> bool:
    """Whether there is a file of annotations in COCO's layout, of whatever split."""
    return any(next(Path(x, "annotations").glob("instances_*.json"), None) for x in (root, root / "coco"))


def read_coco(
    root: Path,
    split: str,
    skip_bad_images: bool = False,
    device="cpu",
    max_pixels: int = MAX_PIXELS,
    masks: bool = False,
) -> CocoSplit:
    """One split of a folder in COCO's layout, "test" or else to train on; each picture is decoded once (`checking`).

    Tells how many boxes have no area within their picture: these cannot train, and are never found; with `masks`, which
    are then checked too, how many objects have none. Pictures without objects stay. Raises UserError for what is
    missing or wrong, and where no object is left but crowds; with `skip_bad_images` pictures that cannot be read, or
    are not of the size of their annotations, are left out.
    """
    path, folder = find_split(root, split)
    data = read_annotations(path, folder, masks)
    lines = []

    def look() -> dict:  # of process 0
        nonlocal lines
        lines, digest = survey([str(path), *data.paths], root)
        bad = check_images(data.paths, digest, max_pixels)
        return dict(sorted((check_sizes(data, digest, max_pixels) | bad).items()))

    check_same(data.paths, device)
    good = keep_good(data.paths, on_rank_zero(look), skip_bad_images)
    data.listing = b"".join(lines[i] for i in [0, *(1 + i for i in good)] if lines)
    data.paths, data.sizes, data.objects = ([x[i] for i in good] for x in (data.paths, data.sizes, data.objects))
    if masks:
        bare = [x.segmentations[n] is None for x in data.objects for n in np.flatnonzero(~x.crowd)]
        if not bare:
            raise UserError(f"{path}: no object lies in a picture that is there (crowds do not count)")
        if any(bare):
            note(f"{path}: {sum(bare)} of {len(bare)} objects have no mask: their boxes stand for it")
        return data
    left = [cut_boxes(x.boxes, *size)[1][~x.crowd] for x, size in zip(data.objects, data.sizes, strict=True)]
    count, whole = sum(map(len, left)), sum(int(x.sum()) for x in left)
    if not whole:
        raise UserError(f"{path}: none of its {count} boxes lies in a picture that is there (crowds do not count)")
    if whole < count:
        fate = "these are never found" if split == "test" else "these do not train"
        note(f"{path}: {count - whole} of {count} boxes have no area within their picture: {fate}")
    return data
