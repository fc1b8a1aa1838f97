"""Protocols whose answers lie in places of a picture, on data of their own: built-in scenes unless --data is given."""

from collections.abc import Callable
from typing import NamedTuple

from plumbing.boxes import load_boxes
from plumbing.dense import load_dense
from plumbing.errors import UserError
from protocols.detect import run_detect
from protocols.rows import Subject
from protocols.segmentation import run_segment
from protocols.settings import DENSE_PROTOCOLS, Config
from protocols.training import run_protocol


class Dense(NamedTuple):
    """What such a protocol reads and does."""

    load: Callable  # (name, split=, ...), as `load_data`
    run: Callable  # (subject, config) -> {result: value}


DENSE = {"segment": Dense(load_dense, run_segment), "detect": Dense(load_boxes, run_detect)}
SIDES = {"detect": 800}  # --image-size of files, where none is given: FINOLA and DETR


def data_of(protocols: list, given: dict, usual: Callable) -> tuple[Callable, dict]:
    """What loads the data of some protocols, `usual` for those of classes, and the flags with the name of the data.

    Raises UserError where the protocols do not share their data.
    """
    dense = [protocol for protocol in protocols if protocol in DENSE_PROTOCOLS]
    if not dense:
        return usual, given
    if len(protocols) > 1:
        raise UserError(f"--protocol {dense[0]} has data of its own; give it alone")
    given = {"data": "scenes"} | given
    own = {"image_size": SIDES[dense[0]]} if dense[0] in SIDES and given["data"] != "scenes" else {}
    return DENSE[dense[0]].load, own | given


def run_any(protocol: str, subject: Subject, config: Config) -> dict:
    """One protocol on one subject -> {result: value}."""
    return DENSE[protocol].run(subject, config) if protocol in DENSE else run_protocol(protocol, subject, config)
