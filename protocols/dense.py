"""Protocols whose answers lie in places of a picture, on data of their own: built-in scenes unless --data is given."""

from collections.abc import Callable

from plumbing.boxes import load_boxes
from plumbing.dense import load_dense
from plumbing.encoders import load_encoder
from plumbing.errors import UserError
from plumbing.processes import note
from plumbing.settings import flag
from protocols.detect import fitting, run_detect
from protocols.rows import Subject
from protocols.segmentation import run_segment
from protocols.settings import DENSE_PROTOCOLS, RECIPES, Config
from protocols.training import run_protocol

LOADS = {"segment": load_dense, "detect": load_boxes}  # (name, split=, ...), as `load_data`
RUNS = {"segment": run_segment, "detect": run_detect}  # (subject, config) -> {result: value}
SIDES = {"detect": 800}  # --image-size of files, where none is given: FINOLA and DETR


def data_of(protocols: list, given: dict, usual: Callable, path=None) -> tuple[Callable, dict]:
    """What loads the data of some protocols, `usual` for those of classes, and the flags with the name of the data.

    Files have the size of SIDES; but an encoder, read from `path`, that takes images of one size has its own, for 800
    pixels would be 10,000 patches of 8. Raises UserError where the protocols do not share their data.
    """
    dense = [protocol for protocol in protocols if protocol in DENSE_PROTOCOLS]
    if not dense:
        return usual, given
    if len(protocols) > 1:
        raise UserError(f"--protocol {dense[0]} has data of its own; give it alone")
    given = {"data": "scenes"} | given
    own = {}
    if dense[0] in SIDES and given["data"] != "scenes" and "image_size" not in given:
        sides = load_encoder(path).image_sides or (SIDES[dense[0]],) * 2
        own = {"image_size": sides[0]} if sides[0] == sides[1] else {}
    return LOADS[dense[0]], own | given


def fitted_to(encoder, protocol: str, config: Config) -> Config:
    """The settings as a protocol will take them for an encoder, so that these are recorded; tells of idle ones."""
    if protocol != "detect":
        return config
    config, idle = fitting(encoder, config), {}
    if config.head != "plain":
        idle["dropout"] = f"with --head {config.head}"
    if encoder.image_sides and config.data != "scenes":
        idle["crop_min"] = "with an encoder of pictures of one size, which are taken whole"
    for field, why in idle.items():
        if getattr(config, field) != RECIPES["detect"][config.recipe][field]:
            note(f"{flag(field)}: of no effect {why}")
    return config


def run_any(protocol: str, subject: Subject, config: Config) -> dict:
    """One protocol on one subject -> {result: value}."""
    return RUNS[protocol](subject, config) if protocol in RUNS else run_protocol(protocol, subject, config)
