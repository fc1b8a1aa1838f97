"""Features of all pictures in files that anything can read: rows of numbers, names of the pictures, labels.

features.npy grows row by row under another name and gets its own when it is whole. Its rows are written, not mapped: on
a full disk a map would end the process without a word, and its pages would count as memory of the process.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import ViT
from plumbing.datasets import DATASETS
from plumbing.errors import UserError, reason_of
from plumbing.files import json_text, write_atomically
from plumbing.images import FolderImages, MemoryImages
from plumbing.probes import pooled_features
from plumbing.processes import autocast, give_back_memory, note, pick_precision
from plumbing.run_files import data_name, digest_of, lock_run
from protocols.heads import token_features
from protocols.rows import Subject
from protocols.settings import Config
from protocols.training import digest


def write_features(run_folder: Path, known: dict, subject: Subject, config: Config) -> tuple[list, dict]:
    """Write the features of every picture, labelled or not, a folder for each split; returns the paths, and no figures.

    A folder that a kill left unfinished is gone on with, and a finished one is left as it is.
    Raises UserError where a folder holds other features, and for settings that this encoder has no use for.
    """
    kind = type(subject.encoder).__name__
    if config.untrained or config.pixels:
        raise UserError("--protocol features takes the run's encoder alone; leave --untrained and --pixels out")
    if config.pool and config.tokens:
        raise UserError(
            f"--tokens takes every patch, --pool {config.pool} makes one vector of them: give one of the two"
        )
    if config.pool and not isinstance(subject.encoder, ViT):
        raise UserError(f"--pool {config.pool} is for transformers, this encoder is a {kind}: leave it out")
    subject.use_pool(config)
    name, written = data_name(config.data), []
    for split in ("train", "test"):
        data, folder = getattr(subject, split), f"{name}-{split}" + "-tokens" * config.tokens
        if len(data):
            written += write_split(Path(config.out) / "features" / folder, data, subject, config)
    return written, {}


def write_split(out: Path, data: MemoryImages | FolderImages, subject: Subject, config: Config) -> list:
    """Write the folder of one split: names.txt, where there are labels labels.npy and classes.txt, then features.npy.

    features.json keeps what these depend on. Returns the path of the features; [] where they were there already.
    Raises UserError where the folder holds others.
    """
    path = out / "features.npy"
    with lock_run(out, resume=True):
        begin(out, identity_of(data, subject, config))
        files = {"names.txt": text_of(names_of(data, config))}
        if len(data.classes) > 1 and (data.labels >= 0).any():
            labels = data.labels.cpu().numpy().astype("<i8")
            files |= {"classes.txt": text_of(data.classes), "labels.npy": lambda file: np.save(file, labels)}
        for name, write in files.items():
            if not (out / name).exists():
                write_atomically(out / name, write)
        if path.exists():
            check_whole(path, len(data))
            note(f"{path} is finished already, nothing is left to do")
            return []
        fill(path, len(data), lambda done: rows_of(data, done, subject, config), out.name)
    return [path]


def identity_of(data, subject: Subject, config: Config) -> dict:
    """What features depend on: the encoder, which pictures, and how these are encoded; as JSON holds it."""
    fields = {name: value for name, value in subject.encoder.fields.items() if name != "pool" or not config.tokens}
    found = {"encoder": type(subject.encoder).__name__, "weights": digest(subject.encoder)} | fields
    found |= {"image_size": config.image_size, "tokens": config.tokens, "images": len(data)}
    found["precision"] = str(pick_precision(config.amp, subject.device) or torch.float32).removeprefix("torch.")
    found["pictures"] = digest_of(data.listing) if data.listing else config.data
    return json.loads(json_text(found))


def begin(out: Path, identity: dict):
    """Note in a folder what its features depend on. Raises UserError where it holds other ones, or anything else."""
    path = out / "features.json"
    if not path.exists():
        if others := [x.name for x in out.iterdir() if x.name != ".lock" and x.suffix != ".tmp"]:
            raise UserError(f"{out} holds {min(others)} but no features.json; choose another folder by --out")
        write_atomically(path, lambda file: file.write(json_text(identity, indent=2).encode() + b"\n"))
        return
    try:
        old = json.loads(path.read_text())
        changes = [x for x in sorted(identity.keys() | old.keys()) if old.get(x) != identity.get(x)]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another folder by --out") from None
    if changes:
        shown = ", ".join(f"{x} {old.get(x)} -> {identity.get(x)}" for x in changes)
        raise UserError(f"{out} holds other features ({shown}); choose another folder by --out")


def check_whole(path: Path, count: int):
    """Raise UserError where a file of features is damaged, or has another number of rows."""
    try:
        found = len(np.load(path, mmap_mode="r"))
    except (OSError, ValueError, EOFError, TypeError) as error:
        reason = reason_of(error, 100)
        raise UserError(f"{path} is damaged ({reason}); remove it to make it anew") from None
    if found != count:
        raise UserError(f"{path} has {found} rows for {count} images; remove it to make it anew")


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def rows_of(data, done: int, subject: Subject, config: Config):
    """The features of all images from number `done` on, a batch at a time: float32 arrays (B, D), or (B, T, D)."""
    encode = token_features if config.tokens else pooled_features
    batches = data.plain_batches(torch.arange(done, len(data)), config.image_size, config.batch_size)
    for number, (images, _) in enumerate(batches):
        with autocast(config.amp, images.device):
            rows = encode(subject.encoder, images)
        yield rows.float().cpu().contiguous().numpy().astype("<f4", copy=False)
        if number % 4 == 0:
            give_back_memory()


def rows_in(part: Path, count: int) -> tuple[int, int]:
    """How many whole rows of `count` an unfinished .npy file holds, and where they end in it; 0, 0 if it is none."""
    try:
        with open(part, "rb") as file:
            np.lib.format.read_magic(file)
            (images, *rest), fortran, dtype = np.lib.format.read_array_header_1_0(file)
            start, row = file.tell(), dtype.itemsize * int(np.prod(rest))
            done = (os.fstat(file.fileno()).st_size - start) // row
    except (FileNotFoundError, ValueError, ZeroDivisionError):
        return 0, 0
    return (done, start + done * row) if images == count and done <= count and not fortran else (0, 0)


def fill(path: Path, count: int, rows_from, title: str):
    """Write a .npy file of `count` rows, from where a kill has left it; rows_from(done) gives arrays of rows.

    Raises OSError where the disk is full; what is written stays.
    """
    part = path.with_name(path.name + ".part")
    (done, end), bad = rows_in(part, count), 0
    bar = tqdm(total=count, initial=done, desc=title, unit="img", unit_scale=True, disable=None)
    with bar, open(part, "ab", buffering=0) as file:
        file.truncate(end)
        for rows in rows_from(done) if done < count else ():
            if not end:
                header = {"descr": "<f4", "fortran_order": False, "shape": (count, *rows.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
                end = file.tell()
            append(file, rows)
            bad += int((~np.isfinite(rows).reshape(len(rows), -1).all(axis=1)).sum())
            bar.update(len(rows))
        os.fsync(file.fileno())
    os.replace(part, path)
    if bad:
        note(f"{path}: the features of {bad} images are not finite")


def append(file, rows: np.ndarray):
    """Add the bytes of an array to a file. Raises OSError, with what to do, where the disk is full."""
    rest = memoryview(np.ascontiguousarray(rows)).cast("B")
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        left = "what is written stays: make room and give the same command again"
        raise OSError(f"cannot write {file.name} ({error.strerror or error}); {left}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


def names_of(data: MemoryImages | FolderImages, config: Config) -> list:
    """What the rows are called: the names of the files below the data set's folder; of a set in memory, the numbers."""
    if not isinstance(data, FolderImages):
        return [str(i) for i in range(len(data))]
    root = config.root if config.data in DATASETS else config.data
    return [os.path.relpath(path, root).replace(os.sep, "/") for path in data.paths]


BREAKS = re.compile("[\\\\\n\r\v\f\x1c-\x1e\x85\u2028\u2029\ud800-\udfff]")  # line ends; what is no UTF-8


def text_of(names: list):
    """What writes names into a file, a line each."""
    return lambda file: file.writelines(map(one_line, names))


def one_line(name: str) -> bytes:
    """A name as one line of a UTF-8 file, with Python's escapes for what would break it, and for the backslash."""
    return BREAKS.sub(lambda found: found[0].encode("unicode_escape").decode(), name).encode() + b"\n"


def read_names(path) -> list:
    """The names in a names.txt or classes.txt, as `open` takes them."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    escape = re.compile(r"\\(\\|[nr]|x..|u....)")
    return [escape.sub(lambda found: found[0].encode().decode("unicode_escape"), line) for line in lines]
