"""What a run folder tells a protocol, and the line that a protocol leaves in it."""

import dataclasses
import os
import sys
from pathlib import Path

from plumbing.errors import UserError, printable
from plumbing.probes import labelled
from plumbing.processes import note
from plumbing.run_files import read_log, read_settings, versions
from plumbing.tables import ROWS
from protocols.rows import Subject
from protocols.settings import Config
from protocols.training import trains_on_images

TESTED = ("knn", "linear", "clusters", "tran1", "tran4", "finetune")  # protocols that --test-data is for
UNLABELLED = ("pictures", "finola", "energy", "layers", "relatives", "features", "export")  # these ask for no labels


def note_other_pictures(run_folder: Path, listing: bytes):
    """Tell of images that are not the run's: a relative --data may be another folder here."""
    path = run_folder / "images.tsv"
    known = set(path.read_bytes().split(b"\n")) if path.exists() else ()
    if known and (others := set(listing.split(b"\n")) - known):
        first = printable(os.fsdecode(min(others).partition(b"\t")[2]))
        note(f"{len(others)} training images, such as {first}, are not those of {run_folder}; give another --data")


def check_labels(protocols: list, train):
    """Raise UserError where a protocol needs labels and the images have none."""
    if needy := [protocol for protocol in protocols if protocol not in UNLABELLED and not len(train.classes)]:
        raise UserError(f"{' '.join(needy)}: these images have no labels; --protocol features or pictures need none")


def check_tests(protocols: list, test_data: str):
    """Raise UserError for a protocol that has no tests on other pictures, which --test-data names."""
    if test_data and (others := [protocol for protocol in protocols if protocol not in TESTED]):
        raise UserError(f"--test-data is for {' '.join(TESTED)}, not for {' '.join(others)}; give --data")


def check_finished(protocol: str, out: Path, config: Config):
    """Raise UserError where a protocol that trains has not ended: other pictures are no part of its log."""
    log = read_log(out / "log.jsonl")[1]
    wanted = read_settings(out / "config.json").get("epochs", config.epochs)  # --max-steps may have made it fewer
    if not log or log[-1]["epoch"] < wanted:
        raise UserError(f"{out} is not at its end; run --protocol {protocol} without --test-data first")


def record(run_folder: Path, protocol: str, config: Config, subject: Subject, results: dict, seconds: float) -> dict:
    """A line of eval.jsonl: what was found, after which epoch of the run, of how many images, how to find it again."""
    limit = 0 if trains_on_images(protocol, subject, config) else config.probe_images
    line = {"protocol": protocol, "data": config.test_data or config.data}
    line |= {f"{split}_images": len(labelled(getattr(subject, split), limit)) for split in ("train", "test")}
    line |= {"epoch": log[-1]["epoch"]} if (log := read_log(run_folder / "log.jsonl")[1]) else {}
    line |= {"results": results, "seconds": round(seconds, 1), "versions": versions()}
    return line | {"command": " ".join(sys.argv), "settings": dataclasses.asdict(config)}


def classes_told(row: str, values: dict) -> str:
    """The IoU of each class in a line; of more than a dozen the five best and the five worst. "" without any."""
    ious = {name.removeprefix("iou_"): value for name, value in values.items() if name.startswith("iou_")}
    order = sorted(ious, key=ious.get, reverse=True) if len(ious) > 12 else list(ious)
    words = [f"{name} {ious[name]:.1f}" for name in order]
    words = [*words[:5], "...", *words[-5:]] if len(words) > 12 else words
    return f"IoU, {ROWS[row]}: {', '.join(words)}" if words else ""


def notes_on(table: dict, protocols: list) -> list:
    """What one should know when reading the table."""
    notes = []
    if "davies_bouldin" in table["trained"]:
        notes.append("Davies-Bouldin: lower is better")
    if any(name.startswith("linear") for name in table.get("pixels", ())):
        notes.append("linear of raw pixels: by ridge regression, whatever the recipe")
    notes += [told for row, values in table.items() if (told := classes_told(row, values))]
    if "untrained" not in table and set(protocols) - {"pictures", "energy", "hypergradient"}:
        notes.append("--untrained adds what the encoder knew before")
    if "pixels" not in table and {"knn", "linear", "clusters", "segment"} & set(protocols):
        notes.append("--pixels adds what raw pixels say")
    elif "pixels" in table and not table["pixels"]:
        notes.append("--pixels is for knn, linear, clusters and segment alone")
    return notes
