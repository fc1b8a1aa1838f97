"""Folders of pictures: ImageNet, with a folder for each class, and whatever a user has."""

import hashlib
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
UNREAD = (".heic", ".heif", ".avif", ".gif", ".bmp", ".tif", ".tiff")  # of pictures that are left out
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
        if os.path.islink(folder / entry):
            home, target = (Path(os.path.realpath(x)) for x in (folder, folder / entry))
            above, within = home.is_relative_to(target), target.is_relative_to(home)
            if above or (within and not is_leftover(target.relative_to(home).parts[0])):
                raise UserError(f"{folder / entry} is a link to {target}, whose images have a class already: remove it")
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


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_ENDINGS) and not is_leftover(name)


def images_below(folder: Path) -> tuple[list, list]:
    """Paths of the pictures in a folder at any depth, and of what else lies there.

    Linked folders are not entered: they could lead into another class, or round in a circle.
    """
    found, others = [], []

    def stop(error: OSError):
        raise error  # os.walk would pass a folder over that cannot be read

    for place, folders, files in os.walk(folder, onerror=stop):
        aside = [x for x in folders if is_leftover(x) or os.path.islink(os.path.join(place, x))]
        folders[:] = sorted(set(folders) - set(aside))
        for x in sorted([*files, *aside]):
            (found if is_image(x) and x not in aside else others).append(os.path.join(place, x))
    return found, others


def held_out(names: list) -> set:
    """Which of some pictures to test on where there is no val: 5 % of them, at most 5,000 and at least one.

    A hash of each name decides, so that a picture that is added moves no other one (but where the two limits bind).
    """
    hashes = {name: hashlib.sha256(os.fsencode(name)).digest() for name in names}
    order = sorted(names, key=hashes.get)
    share = [name for name in order if int.from_bytes(hashes[name][:8]) < 0.05 * 2**64]
    return set(share[:5000] or order[:1])


def split_folders(root: Path, name: str) -> tuple[Path, Path | None]:
    """Where the pictures to train on lie, and those to test on; None where a part of the former is held out for that.

    Raises UserError where a data set of this name ("" for a user's own) lacks a folder.
    """
    train, val = root / "train", root / "val"
    if not name and not val.is_dir():
        here = Path(os.path.abspath(root))
        if here.name == "train" and here.with_name("val").is_dir():
            raise UserError(f"{root} has val beside it: give the folder above, {here.parent}")
        return (train if train.is_dir() else root), None
    for part in (train, val):
        if not part.is_dir():
            instead = "; give the --root that holds them" if name else ""
            raise UserError(f"no folder {part}; expected {root}/train/<class>/* and {root}/val/<class>/*{instead}")
    return train, val


def read_folders(
    root: Path,
    split: str,
    name: str = "",
    skip_bad_images: bool = False,
    workers: int = 0,
    device="cpu",
    max_pixels: int = MAX_PIXELS,
) -> FolderImages:
    """train/<class>/* and val/<class>/* of a data set `name`; without a name, whatever folder of pictures a user has.

    Such a folder may lack val, and then a part of train is `held_out`; it may lack train, and then all of it is train.
    Two folders or more, and no picture beside them, are classes, numbered in the order of their sorted names in train,
    for both splits. Else there are none: every label is -1. Pictures may lie at any depth. Each is checked once.
    """
    root = root if root.parts else Path.cwd()  # "." has no name of its own to put before those of its files
    train, val = split_folders(root, name)
    tests, home = split == "test", train if val is None or split != "test" else val
    classes, beside = pick_classes(train, name, quiet=tests)
    flat = [x for x in beside if is_image(x)]
    if not name and (flat or len(classes) < 2):
        if flat and classes and not tests:
            first = f"pictures lie beside the folders of {train}, such as {flat[0]}"
            note(f"{first}: so the folders are not taken for classes")
        paths, others = images_below(home)
        classes, labels = [], [-1] * len(paths)
    else:
        paths, labels, others = read_classes(home, classes, name, tests)
        others += [str(train / x) for x in beside] if home == train else []
    if not paths:
        flat = sum(map(is_image, os.listdir(home)))
        instead = f", but {flat} beside these; move each into the folder of its class" if flat else ""
        if unread := [path for path in others if path.lower().endswith(UNREAD)]:
            instead = f", but {len(unread)} like {unread[0]}; convert them to JPEG"
        where = "in a class folder of" if classes else "below"
        raise UserError(f"no image ({' '.join(IMAGE_ENDINGS)}) {where} {home}{instead}")
    told = []
    if val is None:
        below = [path[len(str(train)) + 1 :] for path in paths]
        chosen = held_out(below)
        if len(chosen) == len(paths):
            raise UserError(f"{paths[0]} is the only picture below {train}; give one more, to test on")
        told.append(f"{len(chosen)} of {len(paths)} pictures are held out to test on, since there is no {root / 'val'}")
        kept = [i for i, x in enumerate(below) if (x in chosen) == tests]
        paths, labels = [paths[i] for i in kept], [labels[i] for i in kept]
        if len(chosen) < 30:
            told[0] += "; so few say little: a val of your own would say more"
    if not classes:
        told.append(f"no labels: {train} has no folders that are classes")
    told += what_is_left_out(root, home, others, aside=not name and train != root)
    if tests:
        told = []
        if val and val.samefile(train):
            told = [f"{val} is the folder {train}: the encoder is judged by images that it was trained on"]
    for text in told:
        note(text)
    data = checked(paths, labels, classes, root, skip_bad_images, workers, device, max_pixels)
    if lacking := sorted(set(range(len(classes))) - set(data.labels.tolist())):
        where = home if val or not tests else f"what is held out of {home}"
        note(f"{where} has no image of {len(lacking)} of the {len(classes)} classes, such as {classes[lacking[0]]!r}")
    return data


def read_tests(
    root: Path,
    classes: list,
    skip_bad_images: bool = False,
    workers: int = 0,
    device="cpu",
    max_pixels: int = MAX_PIXELS,
) -> FolderImages:
    """<class>/* of a folder, or val/<class>/*: pictures to test on, of the classes of a training, known by their names.

    Folders of other names are left out, which is told. Raises UserError where there is no picture of these classes.
    """
    root = root if root.parts else Path.cwd()
    home = root / "val" if (root / "val").is_dir() else root
    own, _ = pick_classes(home, "", quiet=True)
    known, paths, labels = [name for name in own if name in classes], [], []
    for name in known:
        found, _ = images_below(home / name)
        paths += found
        labels += [classes.index(name)] * len(found)
    if not paths:
        raise UserError(
            f"{home} has no folder with images that is named as a class of training is, such as {classes[0]!r}"
        )
    note(f"tested on {len(paths)} images of {home}, of {len(set(labels))} of the {len(classes)} classes of training")
    if others := [name for name in own if name not in classes]:
        note(f"{len(others)} folders of {home}, such as {others[0]}, are no class of training: left out")
    return checked(paths, labels, classes, root, skip_bad_images, workers, device, max_pixels)


def checked(
    paths: list, labels: list, classes: list, root: Path, skip_bad_images: bool, workers: int, device, max_pixels: int
) -> FolderImages:
    """Pictures below `root` as a data set. Each is looked at once, and bad ones are refused or left out."""
    lines = []

    def look() -> dict:  # of process 0
        nonlocal lines
        lines, digest = survey(paths, root)
        return check_images(paths, digest, max_pixels)

    check_same(paths, device)
    good = keep_good(paths, on_rank_zero(look), skip_bad_images)
    listing = b"".join(lines[i] for i in good if lines)
    paths, numbers = [paths[i] for i in good], torch.tensor([labels[i] for i in good])
    options = {"workers": workers, "device": device, "max_pixels": max_pixels}
    return FolderImages(paths, numbers, classes, **IMAGENET, listing=listing, **options)


def what_is_left_out(root: Path, home: Path, others: list, aside: bool) -> list:
    """What to tell of files and folders below `home` that are none of its pictures, and of those `aside` of train."""
    told, unread = [], [path for path in others if path.lower().endswith(UNREAD)]
    folders = [x for x in sorted(root.iterdir()) if x.name not in ("train", "val") and x.is_dir()] if aside else []
    if full := [x for x in folders if not is_leftover(x.name) and any(map(is_image, os.listdir(x)))]:
        told.append(f"train and val alone are read of {root}, and not {full[0]}, where pictures lie too")
    if unread:
        told.append(f"{len(unread)} pictures like {unread[0]} are left out: convert them to JPEG to have them")
    if rest := [path for path in others if not path.lower().endswith(UNREAD)]:
        told.append(f"{len(rest)} other files or folders below {home} are left out, such as {rest[0]}")
    if cache_folder() is None:
        told.append("there is no home folder to remember in which pictures are good: each run looks at all of them")
    return told


def read_classes(home: Path, classes: list, name: str, tests: bool) -> tuple[list, list, list]:
    """Paths of the pictures in some class folders, their labels, and what else lies there.

    Raises UserError for a class without a picture to train on, and for one that training lacks.
    """
    own, others = pick_classes(home, "", quiet=True)
    if not name and (strange := sorted(set(own) - set(classes))):
        raise UserError(f"class {strange[0]!r} of {home} is not in train; the splits must have the same classes")
    paths, labels, others = [], [], [str(home / x) for x in others] if tests else []
    for label, class_name in enumerate(classes):
        found, rest = images_below(home / class_name) if (home / class_name).is_dir() else ([], [])
        if not found and not tests:
            raise UserError(f"class folder {home / class_name} holds no image ({' '.join(IMAGE_ENDINGS)})")
        paths += found
        labels += [label] * len(found)
        others += rest
    return paths, labels, others
