"""The files of a run folder: whose they are, the lock, the log, which pictures."""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import sys
from pathlib import Path

import numpy as np
import torch

from plumbing.errors import UserError
from plumbing.files import json_text, load_checkpoint, write_atomically
from plumbing.processes import note, world_size
from plumbing.settings import FREE_FIELDS, TrainConfig, flag, words

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def data_name(data: str) -> str:
    """What a data set is called in the names of folders, where those of "." and "/" would be empty."""
    return Path(os.path.abspath(data)).name or "root"


def run_folder(name: str, config: TrainConfig) -> Path:
    """Where a method's run is written."""
    return Path(config.out or f"runs/{name}-{data_name(config.data)}")


LATER = {"epoch_steps": 0, "start": "", "crop_pad": 0, "decay_on": "matrices", "gather_graph": True}
LATER |= {"head_steps": 1, "fresh_head": False}
LATER |= {"log_layers": False, "shuffle_graph": False, "temperature": 0.0, "vote": "one", "freeze_encoder": False}
LATER |= {"interpolation": "", "crop_clamp": False, "positions": "fixed", "fc_norm": False}
LATER |= {"finetune": False, "aux_weight": 0.4, "queries": 100}
"""Settings that were added later, with the value that earlier runs had."""


def identity_of(method, train, config: TrainConfig, stepper) -> dict:
    """All that must be the same where a run goes on: else it would not end where an uninterrupted one does."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_FIELDS}
    if listing := getattr(train, "listing", b""):
        fields["pictures"] = digest_of(listing)
    return {
        "method": method.name,
        "origin": method.origin,
        "images": len(train),
        "processes": world_size(),
        "precision": str(stepper.dtype),
    } | fields


def digest_of(listing: bytes) -> str:
    return hashlib.sha256(listing).hexdigest()[:32]


def refuse_other_pictures(out: Path, listing: bytes):
    """Say which pictures are not those of the run, by its images.tsv. Raises UserError."""
    before, now = (
        dict(line.split(b"\t", 1)[::-1] for line in text.split(b"\n") if b"\t" in line)
        for text in ((out / "images.tsv").read_bytes() if (out / "images.tsv").exists() else b"", listing)
    )
    others = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
    text = f"{out} was trained on other pictures"
    if before and others:
        name = min(others)
        sizes = [f"{files[name].decode()} bytes" if name in files else "none" for files in (before, now)]
        text += f": {len(others)} differ, first {os.fsdecode(name)} ({sizes[0]} then, {sizes[1]} now)"
    raise UserError(f"{text}; give the --data of before, or another --out")


def refuse_among_pictures(out: Path, config: TrainConfig):
    """Raise UserError for a run folder that would be a class of its own data, with a picture, at the next start."""
    root = Path(config.data if os.path.isdir(config.data) else config.root)
    parts = [part for part in (root / "train", root / "val") if part.is_dir()]
    for part in parts or [root] * os.path.isdir(config.data):  # a folder without train is all pictures
        if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(part)):
            raise UserError(f"the folder {out} lies among the images of {part}; choose another by --out")


def taken(out: Path) -> bool:
    """Whether a run folder holds anything but what a start that was refused may have left."""
    return any(path.name != ".lock" and path.suffix != ".tmp" for path in (out.iterdir() if out.exists() else ()))


def refuse_taken(out: Path):
    """Raise UserError for a run folder that is taken."""
    if taken(out):
        raise UserError(f"{out} exists; add --resume to go on with it, or choose another folder by --out")


def lock_run(out: Path, resume: bool):
    """Make a run folder, or with --resume take the one that is there; lock it until the returned file closes.

    The lock is the operating system's: it ends with the process, however that ends. Raises UserError where the run
    exists, or another process is writing it.
    """
    try:
        if not resume:
            refuse_taken(out)
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "a")  # noqa: SIM115 (stays open for as long as the run)
    except OSError as error:
        raise UserError(f"cannot write the run folder {out} ({error.strerror}); choose another by --out") from None
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # either one means that somebody has it
        file.close()
        raise UserError(f"another process is writing {out}; wait for it, or choose another folder by --out") from None
    except OSError:
        pass  # some network file systems have no locks
    return file


def open_run(out: Path, identity: dict, config: TrainConfig, listing: bytes = b"") -> int:
    """Begin the run in a locked folder, or with --resume find its checkpoint; returns the step to go on from.

    `listing` tells which files it trains on. Raises UserError rather than overwrite a run, or go on with one that is
    not the same.
    """
    if config.resume and (out / "last.pt").exists():
        state = load_checkpoint(out / "last.pt")
        state = state if isinstance(state, dict) else {}
        old, step = state.get("identity"), state.get("step")
        if not isinstance(old, dict) or type(step) is not int or step < 0:
            raise UserError(f"{out / 'last.pt'} is not a checkpoint of a run; choose another folder by --out")
        old, identity = LATER | old, LATER | identity
        # Where files are listed, which ones they are counts, and not what their folder is called today.
        names = (identity.keys() | old.keys()) - ({"data", "pictures"} if "pictures" in old else {"pictures"})
        differing = sorted((x for x in names - {"images"} if old.get(x) != identity.get(x)), key=str)
        if not differing and "pictures" in old and old["pictures"] != identity.get("pictures"):
            refuse_other_pictures(out, listing)
        differing += ["images"] if old.get("images") != identity["images"] else []
        if differing:
            changes = ", ".join(f"{name} {old.get(name)} -> {identity.get(name)}" for name in differing)
            given = [x for x in differing if x in old and hasattr(config, str(x)) and words(old[x])]
            flags = "".join(f" {flag(x)} {words(old[x])}" for x in given if not isinstance(old[x], bool))
            raise UserError(f"{out} was trained otherwise ({changes}); go on with what it was trained with{flags}")
        return step
    if (out / "encoder.pt").exists():
        raise UserError(f"{out} holds an encoder but no last.pt to go on from; choose another folder by --out")
    if config.resume:
        note(f"no checkpoint in {out} yet, starting from the beginning")
    write_settings(out, identity["method"], config)
    write_atomically(out / "log.jsonl", lambda file: file.write(log_header(identity, config).encode()))
    if listing:
        write_atomically(out / "images.tsv", lambda file: file.write(listing))
    return 0


def write_settings(out: Path, method: str, config: TrainConfig):
    """config.json: the settings of the last start. Where a run goes on, its data may have moved."""
    settings = json_text({"method": method, **dataclasses.asdict(config)}, indent=2)
    write_atomically(out / "config.json", lambda file: file.write(f"{settings}\n".encode()))


def read_settings(path: Path) -> dict:
    """What a config.json says of a run; {} where there is none. Raises UserError where it is not one."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    kinds = {"data": str, "root": str, "method": str, "image_size": int}
    fits = isinstance(found, dict) and all(isinstance(found.get(name, kind()), kind) for name, kind in kinds.items())
    if not fits:
        raise UserError(f"{path} holds no settings of a run")
    return found


def versions() -> dict:
    """What a result may depend on beside the code."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def log_header(identity: dict, config: TrainConfig) -> str:
    """The first line of a log: how to make the run again."""
    header = {"command": " ".join(sys.argv), "method": identity["method"], "config": dataclasses.asdict(config)}
    return json_text(header | {"precision": identity["precision"], "versions": versions()}) + "\n"


def read_log(path: Path) -> tuple[str, list]:
    """A log.jsonl: the text of its first line, "" where that is missing, and its epochs as dicts."""
    header, lines = "", []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a line that a kill cut short
            line = json.loads(text)
            if isinstance(line, dict) and "command" in line:
                header = text + "\n"
            elif isinstance(line, dict) and type(sound(line).get("epoch")) is int:
                lines.append(sound(line))
    return header, lines


def sound(values: dict) -> dict:
    """What of a dict of JSON can be a result: finite numbers that floats can count, texts, None, and dicts of these."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found[name] = sound(value)
        elif value is None or isinstance(value, str | bool) or (isinstance(value, int | float) and abs(value) < 2**53):
            found[name] = value
    return found


def read_evaluations(path: Path) -> list:
    """The lines of an eval.jsonl, as dicts: the last one of each protocol, data set and recipe.

    A row that it lacks (--scratch judges the untrained encoder alone) is that of the line before.
    """
    found = {}
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            line, kinds = json.loads(text), {"protocol": str, "results": dict}
            if isinstance(line, dict) and all(isinstance(line.get(name), kind) for name, kind in kinds.items()):
                settings = line["settings"] if isinstance(line.get("settings"), dict) else {}
                line["results"] = {row: x for row, x in sound(line["results"]).items() if isinstance(x, dict)}
                key = str((line["protocol"], line.get("data"), settings.get("recipe")))
                before = found.get(key, {})
                same = before.get("epoch") == line.get("epoch")
                results = (before.get("results", {}) if same else {}) | line["results"]
                found[key] = line | {"settings": settings, "results": results}
    return list(found.values())


def rewind_log(path: Path, last_epoch: int, header: str) -> list:
    """Drop the lines of a log after `last_epoch`, whose steps will be done again, and return the lines that stay."""
    first, lines = read_log(path)
    kept = [line for line in lines if line["epoch"] <= last_epoch]
    text = (first or header) + "".join(json_text(line) + "\n" for line in kept)
    write_atomically(path, lambda file: file.write(text.encode()))
    return kept


def measured(log: list, labels: bool, started: bool = False) -> dict:
    """What a log ends with: {"trained": {...}, "untrained": {...}, "pixels": {...}}, accuracies in percent.

    Of a run that `started` from weights, "started" stands for "untrained".

    Without labels these are the loss on held-out pictures and the effective rank of the features. {} without probes.
    """
    names = ("linear", "knn") if labels else ("held_out_loss", "effective_rank")
    probed = [line for line in log if names[1] in line and line["epoch"]]
    first = next((line for line in log if line["epoch"] == 0), {})
    pixels = first.get("pixels")
    found = {"trained": probed[-1] if probed else {}, "started" if started else "untrained": first}
    found |= {"pixels": pixels if isinstance(pixels, dict) else {}}
    return {row: {x: line.get(x) for x in names} for row, line in found.items() if names[1] in line}
