"""`load_data`: named data sets in their official layouts, and folders of one's own."""

import os
from pathlib import Path

import numpy as np
import torch

from plumbing.checking import attempt_all, check_same, keep_good, survey
from plumbing.class_folders import is_image, pick_classes, read_folders, read_tests
from plumbing.decoding import MAX_PIXELS, open_picture, to_rgb
from plumbing.download import fetch
from plumbing.errors import UserError, reason_of, unknown
from plumbing.images import MemoryImages
from plumbing.processes import note, on_rank_zero
from plumbing.shapes import SHAPES, render_shapes

STATISTICS = {  # of the training pixels, in [0, 1]
    "shapes": {"mean": (0.424, 0.423, 0.424), "std": (0.272, 0.275, 0.270)},
    "cifar10": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)},
    "cifar100": {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)},
    "stl10": {"mean": (0.4467, 0.4398, 0.4066), "std": (0.2603, 0.2566, 0.2713)},
    "tinyimagenet": {"mean": (0.4802, 0.4481, 0.3975), "std": (0.2770, 0.2691, 0.2821)},
}
ARCHIVES = {  # folder, where it comes from, MD5 of the archive
    "cifar10": (
        "cifar-10-batches-bin",
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
    ),
    "cifar100": (
        "cifar-100-binary",
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
    ),
    "stl10": (
        "stl10_binary",
        "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
        "91f7769df0f17e558f3565bffb0c7dfb",
    ),
    "tinyimagenet": (
        "tiny-imagenet-200",
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "90528d7ca1a48142e341f4ef8d21d0de",
    ),
}
SPLITS = ("train", "labelled", "test")
# Files a split (* is a number or nothing), label bytes before the pixels (the last one counts), classes, their names.
CIFAR = {
    "cifar10": ({"train": "data_batch_*.bin", "test": "test_batch*.bin"}, 1, 10, "batches.meta"),
    "cifar100": ({"train": "train*.bin", "test": "test*.bin"}, 2, 100, "fine_label_names"),
}
DATASETS = ("shapes", *ARCHIVES, "imagenet100", "imagenet")


def load_data(
    name: str,
    root="data",
    split: str = "train",
    image_size: int = 32,
    device="cpu",
    seed: int = 0,
    download: bool = False,
    skip_bad_images: bool = False,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
):
    """One split of a data set -> MemoryImages or FolderImages.

    `split` is "train" (all that one may train on; the label is -1 where there is none), "labelled" (those of it that
    have a label: fewer in `stl10` alone) or "test". `name` is one of DATASETS or a folder with train/<class>/* and
    val/<class>/*. `root` is the folder that holds the files of a named set; `download` fetches missing ones. Batches
    come on `device`: small sets lie there as one uint8 tensor, files are decoded by `workers` processes. Only `shapes`
    needs `image_size` and `seed`.
    Raises UserError where a name is unknown, or a file is missing, may not be read, or is not what it should be. Images
    that cannot be read are left out with `skip_bad_images`; one of more than `max_pixels` pixels is not read.
    """
    name = os.fspath(name)
    if split not in SPLITS:  # not to train on what one meant to test on
        raise UserError(unknown("split", split, SPLITS))
    if name == "shapes":
        if split == "train" and os.path.isdir("shapes/train"):
            note("shapes are the built-in pictures; the folder of this name is ./shapes")
        count = 1024 if split == "test" else 4096
        images, labels, masks = render_shapes(count, image_size, seed=2 * seed + (split == "test"))
        images, labels, masks = (x.to(device) for x in (images, labels, masks))
        return MemoryImages(images, labels, list(SHAPES), **STATISTICS[name], masks=masks)
    try:
        if name in ARCHIVES:
            home = find_home(name, Path(root), download)
            if name == "stl10":
                return read_stl10(home, split, device)
            if name == "tinyimagenet":
                return read_tinyimagenet(home, split, device, skip_bad_images)
            return read_cifar(name, home, split, device)
        if name in ("imagenet100", "imagenet"):
            return read_folders(Path(root), split, name, skip_bad_images, workers, device, max_pixels)
        if name and Path(name).is_dir():  # "" would be the working folder
            return read_folders(Path(name), split, "", skip_bad_images, workers, device, max_pixels)
    except OSError as error:  # no permission, a broken link, a folder that is gone
        raise UserError(f"the data of {name} cannot be read ({reason_of(error)})") from None
    if "/" in name:
        instead = "it is a file: give the folder it lies in" if Path(name).is_file() else "give a folder of pictures"
        raise UserError(f"no folder {name}; {instead}")
    raise UserError(unknown("dataset", name, DATASETS) + ", or give a folder of pictures")


def load_tests(folder, classes: list, **options):
    """Pictures of a folder to test on, of classes that a training knows by their names -> FolderImages.

    The folder holds one for each class, or has a `val` that does. `options` are device, skip_bad_images, workers and
    max_pixels, as those of `load_data`. Raises UserError where there is nothing to test on, or it cannot be read.
    """
    if not (folder and Path(folder).is_dir()):
        raise UserError(f"no folder {folder}; --test-data takes a folder that holds one for each class")
    try:
        return read_tests(Path(folder), classes, **options)
    except OSError as error:
        raise UserError(f"the data of {folder} cannot be read ({reason_of(error)})") from None


def find_home(name: str, root: Path, download: bool = False) -> Path:
    """The folder of a named data set in `root`, or `root` itself; fetched into place where it is missing."""
    folder, url, md5 = ARCHIVES[name]
    home = root if Path(os.path.abspath(root)).name == folder else root / folder
    if download:  # asked on every process alike: what one of them sees may differ
        on_rank_zero(lambda: home.is_dir() or fetch(url, md5, home))
    if not home.is_dir():
        raise UserError(
            f"no {name} at {home}; give the --root that holds {folder}, or add --download to get it from {url}"
        )
    return home


def read_cifar(name: str, home: Path, split: str, device="cpu") -> MemoryImages:
    """The official binary files of CIFAR-10 or CIFAR-100, any number of records a file."""
    patterns, label_bytes, count, names = CIFAR[name]
    pattern = patterns["test" if split == "test" else "train"]
    found = sorted(home.glob(pattern))
    files = [file for file in found if file.stem.rstrip("0123456789") == pattern.removesuffix("*.bin")]
    if copies := sorted(set(found) - set(files)):  # such as data_batch_1 (1).bin
        note(f"{len(copies)} other files in {home} are left out, such as {copies[0].name}")
    if not files:
        raise UserError(f"no {name} at {home / pattern}; remove {home} and add --download, or give --root")
    record = label_bytes + 3072
    parts = []
    for file in files:
        raw = np.fromfile(file, dtype=np.uint8)
        if len(raw) == 0 or len(raw) % record:
            raise UserError(f"{file} has {len(raw)} bytes, expected a multiple of {record}: cut short or not {name}")
        parts.append(raw.reshape(-1, record))
        largest = parts[-1][:, label_bytes - 1].max()
        if largest >= count:
            raise UserError(f"{file} holds the label {largest}, {name} ends at {count - 1}")
    records = torch.from_numpy(np.concatenate(parts)).to(device)
    labels, images = records[:, label_bytes - 1].long(), records[:, label_bytes:].reshape(-1, 3, 32, 32)
    classes = class_names(next(home.glob(names + "*.txt"), None), count)
    return MemoryImages(images, labels, classes, **STATISTICS[name], listing=listing_of(files, home))


def listing_of(files: list, home: Path) -> bytes:
    return b"".join(survey([str(file) for file in files], home)[0])


def class_names(listed: Path | None, count: int) -> list:
    """The words of a text file, one a class, or numbers without a file. Raises UserError if their count is wrong."""
    if not listed or not listed.exists():
        return [str(i) for i in range(count)]
    names = listed.read_text(errors="replace").split()
    if len(names) != count:
        raise UserError(f"{listed} lists {len(names)} classes, expected {count}; mend or remove it")
    return names


def read_stl10(home: Path, split: str, device="cpu") -> MemoryImages:
    """The official binary files of STL-10, any number of pictures; "train" is the labelled and the unlabelled ones."""
    picture = 3 * 96 * 96
    parts, labels = {"train": ("train", "unlabeled"), "labelled": ("train",), "test": ("test",)}[split], []
    files = [home / f"{part}_X.bin" for part in parts]
    for file in files:
        size = file.stat().st_size if file.exists() else -1
        if size < 0:
            raise UserError(f"no {file}; remove {home} and add --download, or give --root")
        if size == 0 or size % picture:
            raise UserError(f"{file} has {size} bytes, expected a multiple of {picture}: cut short or not stl10")
        count, listed = size // picture, file.with_name(file.name.replace("_X", "_y"))
        if file.name == "unlabeled_X.bin":
            labels.append(torch.full((count,), -1))
            continue
        if not listed.exists():
            raise UserError(f"no {listed}; remove {home} and add --download, or give --root")
        numbers = np.fromfile(listed, dtype=np.uint8)
        if len(numbers) != count or numbers.min() < 1 or numbers.max() > 10:
            raise UserError(f"{listed} must hold {count} labels from 1 to 10, one a picture of {file.name}")
        labels.append(torch.from_numpy(numbers).long() - 1)
    images, done = torch.empty(sum(map(len, labels)), 3, 96, 96, dtype=torch.uint8), 0
    for file, part in zip(files, labels, strict=True):
        stored = np.memmap(file, dtype=np.uint8, mode="c").reshape(-1, 3, 96, 96)  # each plane column by column
        for chunk in torch.from_numpy(stored).split(4096):  # the unlabelled file is large: never hold it twice
            images[done : done + len(chunk)] = chunk.transpose(2, 3)
            done += len(chunk)
    classes = class_names(home / "class_names.txt", 10)
    listing, numbers = listing_of(files, home), torch.cat(labels).to(device)
    return MemoryImages(images.to(device), numbers, classes, **STATISTICS["stl10"], listing=listing)


def read_tinyimagenet(home: Path, split: str, device="cpu", skip_bad_images: bool = False) -> MemoryImages:
    """The official folder of Tiny-ImageNet, decoded once and held in memory (1.2 GB for all of its training images)."""
    train = home / "train"
    if not train.is_dir():
        raise UserError(f"no folder {train}; remove {home} and add --download, or give --root")
    wnids, leftovers = pick_classes(train, "tinyimagenet", quiet=split == "test")
    if leftovers and split != "test":
        note(f"{len(leftovers)} other files or folders in {train} are left out, such as {leftovers[0]}")
    number = {wnid: i for i, wnid in enumerate(wnids)}
    if split == "test":  # the 10,000 official test images have no labels: as in every paper, validation is tested on
        listing = home / "val" / "val_annotations.txt"
        if not listing.exists():
            raise UserError(f"no {listing}; remove {home} and add --download, or give --root")
        text = listing.read_text(encoding="utf-8-sig", errors="surrogateescape")  # Windows may put a mark before it
        rows = [line.split("\t") for line in text.splitlines() if line.strip()]
        strange = next((row for row in rows if len(row) < 2 or row[1] not in number), None)
        if strange:
            raise UserError(f"{listing} has the line {' '.join(strange)!r}, expected a file and a class of {train}")
        files = [(str(home / "val" / "images" / row[0]), number[row[1]]) for row in rows]
    else:
        files = []
        for folder, label in ((train / wnid / "images", label) for wnid, label in number.items()):
            names = sorted(filter(is_image, os.listdir(folder) if folder.is_dir() else ()))
            if not names:
                raise UserError(f"no image in {folder}; remove {home} and add --download, or give --root")
            files += [(str(folder / name), label) for name in names]
    if not files:
        raise UserError(f"no image in {home}; remove it and add --download, or give --root")
    images = torch.empty(len(files), 3, 64, 64, dtype=torch.uint8)

    def read(i):
        with open_picture(files[i][0]) as image:
            if image.size != (64, 64):
                raise ValueError(f"{image.size[0]} x {image.size[1]} pixels, expected 64 x 64")
            images[i] = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)

    bad = attempt_all(read, range(len(files)), "reading")
    good = keep_good([path for path, _ in files], bad, skip_bad_images)
    check_same([files[i][0] for i in good], device)
    words = home / "words.txt"
    lines = words.read_text(errors="replace").splitlines() if words.exists() else []
    names = dict(line.split("\t", 1) for line in lines if "\t" in line)
    classes = [names.get(wnid, wnid).split(",")[0] for wnid in wnids]
    labels = torch.tensor([files[i][1] for i in good])
    images = images if len(good) == len(images) else images[torch.tensor(good)]
    listing = listing_of([files[i][0] for i in good], home)
    return MemoryImages(images.to(device), labels.to(device), classes, **STATISTICS["tinyimagenet"], listing=listing)
