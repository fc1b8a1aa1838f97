"""Folders of pictures, one folder a class: ImageNet, and a user's own."""

import os
import stat
from pathlib import Path

import torch

from plumbing.checking import cache_folder, check_images, check_same, keep_good, survey
from plumbing.decoding import MAX_PIXELS
from plumbing.errors import UserError
from plumbing.images import FolderImages
from plumbing.processes import note, on_rank_zero

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLASSES = {"tinyimagenet": 200, "imagenet100": 100, "imagenet": 1000}  # of sets whose classes are folders
IMAGE_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
# What macOS, Windows, network drives and Python leave in folders, besides all that begins with a dot.
LEFTOVERS = {"__macosx", "$recycle.bin", "system volume information", "lost+found", "@eadir", "#recycle", "@recycle"}
LEFTOVERS |= {"@__thumb", "#snapshot", "~snapshot", "__pycache__", "thumbs.db", "desktop.ini"}
# The 100 classes that Tian et al. (2020, CMC) chose from ImageNet.
IMAGENET100 = """
    02869837 01749939 02488291 02107142 13037406 02091831 04517823 04589890 03062245 01773797 01735189 07831146
    07753275 03085013 04485082 02105505 01983481 02788148 03530642 04435653 02086910 02859443 13040303 03594734
    02085620 02099849 01558993 04493381 02109047 04111531 02877765 04429376 02009229 01978455 02106550 01820546
    01692333 07714571 02974003 02114855 03785016 03764736 03775546 02087046 07836838 04099969 04592741 03891251
    02701002 03379051 02259212 07715103 03947888 04026417 02326432 03637318 01980166 02113799 02086240 03903868
    02483362 04127249 02089973 03017168 02093428 02804414 02396427 04418357 02172182 01729322 02113978 03787032
    02089867 02119022 03777754 04238763 02231487 03032252 02138441 02104029 03837869 03494278 04136333 03794056
    03492542 02018207 04067472 03930630 03584829 02123045 04229816 02100583 03642806 04336792 03259280 02116738
    02108089 03424325 01855672 02090622
""".split()  # noqa: SIM905


def is_leftover(name: str) -> bool:
    """Whether notebooks, systems or network drives leave files or folders of this name among pictures."""
    return name.startswith((".", "~$")) or name.casefold() in LEFTOVERS


def pick_classes(folder: Path, name: str, quiet: bool) -> tuple[list, list]:
    """The class folders in a folder, sorted, as data set `name` has them ("" for any), and what else lies there.

    Raises UserError where these cannot be the classes of that data set, OSError where one leads nowhere.
    """
    classes, others, known = [], [], {}
    for entry in sorted(os.listdir(folder)):
        # A link that leads nowhere may be a class: OSError.
        status = None if is_leftover(entry) else os.stat(folder / entry)
        if status is None or not stat.S_ISDIR(status.st_mode):
            others.append(entry)
            continue
        classes.append(entry)
        if (twin := known.setdefault((status.st_dev, status.st_ino), entry)) != entry:
            raise UserError(f"{folder / twin} and {folder / entry} are one folder, linked: remove one of them")
    if name == "imagenet100":
        classes = [x for x in classes if x.removeprefix("n") in set(IMAGENET100)]
    if not (expected := CLASSES.get(name)):
        return classes, others
    if not classes:
        raise UserError(f"{folder} holds none of the {expected} classes of {name} (n02869837, ...)")
    if len(classes) > expected:
        raise UserError(
            f"{folder} holds {len(classes)} class folders, {name} has {expected} classes; "
            f"remove what is none, or give a folder of your own by --data"
        )
    if len(classes) < expected and not quiet:
        note(f"{folder} holds {len(classes)} of the {expected} classes of {name}")
    return classes, others


def count_images(folder) -> int:
    """How many pictures lie in a folder, at any depth."""
    names = (name for _, _, names in os.walk(folder) for name in names)
    return sum(is_image(name) for name in names)


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_ENDINGS) and not is_leftover(name)


def read_folders(
    root: Path,
    split: str,
    name: str = "",
    skip_bad_images: bool = False,
    workers: int = 0,
    device="cpu",
    max_pixels: int = MAX_PIXELS,
) -> FolderImages:
    """A folder with train/<class>/* and val/<class>/*, of a data set `name` or of one's own.

    Classes are numbered in the order of the sorted folder names of train, for both splits. Every image is checked once.
    """
    home = root / ("val" if split == "test" else "train")
    for part in dict.fromkeys((root / "train", home)):
        if not part.is_dir():
            instead = "; give the --root that holds them" if name else ""
            if (here := Path(os.path.abspath(root))).name in ("train", "val"):
                instead = f"; give the folder above, {here.parent}"
            raise UserError(f"no folder {part}; expected {root}/train/<class>/* and {root}/val/<class>/*{instead}")
    classes, beside = pick_classes(root / "train", name, quiet=split == "test")
    if split == "test":
        own, beside = pick_classes(home, "", quiet=True)
        if not name and (strange := sorted(set(own) - set(classes))):
            raise UserError(
                f"class {strange[0]!r} of {home} is not in {root / 'train'}; the splits must have the same classes"
            )
        if home.samefile(root / "train"):
            note(f"{home} is the folder {root / 'train'}: the encoder is judged by images that it was trained on")
    paths, labels, others = [], [], [str(home / x) for x in beside]
    flat = sum(map(is_image, beside))
    for label, class_name in enumerate(classes):
        folder = home / class_name
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name) if folder.is_dir() else []
        found = [entry.path for entry in entries if is_image(entry.name)]
        rest = [entry for entry in entries if not is_image(entry.name)]
        inner = {x.path: count_images(x.path) for x in rest if not is_leftover(x.name) and os.path.isdir(x.path)}
        deeper = next((f"{count} in the folder {path}" for path, count in inner.items() if count), "")
        if not found and (split != "test" or deeper):
            instead = f", but {deeper}; move them up" if deeper else ""
            raise UserError(f"class folder {folder} holds no image ({' '.join(IMAGE_ENDINGS)}){instead}")
        if deeper:
            note(f"pictures below a class folder are left out, such as {deeper}; move them up to have them")
        others += [entry.path for entry in rest if entry.path not in inner]
        paths += found
        labels += [label] * len(found)
    if not paths:
        instead = f", but {flat} beside these; move each into the folder of its class" if flat else ""
        raise UserError(f"no image ({' '.join(IMAGE_ENDINGS)}) in a class folder of {home}{instead}")
    if others:
        note(f"{len(others)} other files or folders below {home} are left out, such as {others[0]}")
    if split != "test" and cache_folder() is None:
        note("there is no home folder to remember in which pictures are good: each run looks at all of them")
    lines = []

    def look() -> dict:  # of process 0
        nonlocal lines
        lines, digest = survey(paths, root)
        return check_images(paths, digest, max_pixels)

    check_same(paths, device)
    good = keep_good(paths, on_rank_zero(look), skip_bad_images)
    if lacking := sorted(set(range(len(classes))) - {labels[i] for i in good}):
        note(f"{home} has no image of {len(lacking)} of the {len(classes)} classes, such as {classes[lacking[0]]!r}")
    listing = b"".join(lines[i] for i in good if lines)
    paths, numbers = [paths[i] for i in good], torch.tensor([labels[i] for i in good])
    options = {"workers": workers, "device": device, "max_pixels": max_pixels}
    return FolderImages(paths, numbers, classes, **IMAGENET, listing=listing, **options)
