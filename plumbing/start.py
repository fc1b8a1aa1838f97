"""What a run starts from (`--start`): the weights of another run, of MAE's release, or of timm."""

import hashlib
import math
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from plumbing.class_folders import IMAGENET
from plumbing.encoders import Encoder, by_our_names, height_and_width, is_sound, read_weights, three_numbers
from plumbing.errors import UserError, printable


class Start(NamedTuple):
    """What a file has for a method, by the names of the method."""

    encoder: dict  # {name within the encoder: tensor}
    rest: dict  # {name within the method: tensor}, such as those of a decoder
    fields: dict  # of the encoder, as far as they are known: kind, sizes, mean, std
    whose: str  # mean and deviation these are
    positions: dict | None = None  # of a release: pos_embed, decoder_pos_embed


def start_from(method: nn.Module, config, sizes: dict | None = None) -> str:
    """Fill a method that was just made with the weights of the file `config.start` -> a digest of it; "" without one.

    The encoder must fit. Of the rest (the decoder, a head, FINOLA's matrices) each part goes along that fits as a
    whole, the others start anew. The encoder takes the mean and deviation that go with its weights. It keeps its own
    positions where these are fixed, so that for another size of images they are computed, not stretched. `sizes` are
    the networks of --model: {name: {"dim": ..., "depth": ..., "heads": ...}}. What happened is in `config.told`.
    Raises UserError, before anything is changed, where the file cannot be read or does not fit.
    """
    if not config.start:
        return ""
    encoder, path = method.encoder, Path(config.start)
    if not isinstance(encoder, Encoder):
        raise UserError(f"--start fills the encoders of this project, not a {type(encoder).__name__}")
    if path.is_dir():
        raise UserError(f"--start {path} is a folder; give a file, of a run its last.pt or encoder.pt")
    prefix = next(name for name, module in method.named_modules() if module is encoder) + "."
    given = read_start(path, encoder, prefix)
    refuse_other_size(path, encoder, given, config, sizes or {})
    learned = "positions" in encoder.state_dict()
    if learned and given.positions is not None:
        given = with_learned_positions(given)
    if reason := misfit(encoder.state_dict(), given.encoder):
        raise UserError(f"--start {path} does not fit this {type(encoder).__name__}: {reason}")
    side = given.fields.get("image_size", encoder.image_sides)
    if given.positions is not None and not learned:
        cells = cells_of(given.positions.get("pos_embed"), encoder.positions, encoder.grid)
        if not cells:
            raise UserError(
                f"--start {path} has learned positions, or none; ours are fixed sines and cosines, so give weights "
                f"that were trained with these, such as MAE's"
            )
        side = (cells[0] * encoder.patch, cells[1] * encoder.patch)
    taken = fitting_parts(method, prefix, given)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]

    encoder.load_state_dict(given.encoder)
    method.load_state_dict(taken, strict=False)
    if "mean" in given.fields:
        encoder.normalize_by(given.fields["mean"], given.fields["std"])
    config.told = (f"--start {path}: {what_happened(method, prefix, given, taken, side)}",)
    return f"--start {digest}"


def what_happened(method: nn.Module, prefix: str, given: Start, taken: dict, side) -> str:
    """The note of a start: what was taken over, how images are normalised, what was computed or assumed."""
    encoder, kept = method.encoder, {part_of(name) for name in taken}
    parts = dict.fromkeys(part_of(name) for name, _ in method.named_parameters() if not name.startswith(prefix))
    told = [f"{', '.join(['encoder', *(part for part in parts if part in kept)])} taken over"]
    if anew := [part for part in parts if part not in kept]:
        told.append(f"{', '.join(anew)} starts anew")
    told.append(f"images are normalised by {given.whose} mean and deviation")
    if side and height_and_width(side) != encoder.image_sides:
        old, new = ("{} x {}".format(*sides) for sides in (height_and_width(side), encoder.image_sides))
        told.append(f"fixed positions computed for {new} pixels, it was trained at {old}")
    if given.positions is not None and encoder.dim != 64 * encoder.fields["heads"]:
        told.append(f"{encoder.fields['heads']} heads, which the file does not tell")
    return "; ".join(told)


def part_of(name: str) -> str:
    """Which part of a method a weight belongs to, in words."""
    return name.split(".")[0].replace("autoencoder", "decoder")


# ---------------------------------------------------------------------------------------------------------------------
# What a file has
# ---------------------------------------------------------------------------------------------------------------------


def read_start(path: Path, encoder: Encoder, prefix: str) -> Start:
    """What a file has for a method whose encoder's names begin with `prefix`. Raises UserError where it has nothing."""
    state = read_weights(path)
    weights = state.get("weights") if isinstance(state, dict) else None
    if isinstance(weights, dict) and "kind" in state:
        return Start(weights, {}, encoder_fields(path, state), "its own")
    if isinstance(weights, dict) and "identity" in state:
        return of_run(path, weights, encoder)
    weights = by_our_names(state, path)
    if "patch" not in encoder.fields:
        raise UserError(f"--start {path} holds a ViT, but this run trains a {type(encoder).__name__}")
    positions = {name: weights.pop(name) for name in ("pos_embed", "decoder_pos_embed") if name in weights}
    parent = prefix.removesuffix("encoder.")  # of the `MaskedAutoencoder`, where there is one
    rest = {parent + name: value for name, value in weights.items() if name.startswith(("decoder_", "mask_token"))}
    weights = {name: value for name, value in weights.items() if parent + name not in rest}
    return Start(weights, rest, dict(IMAGENET), "ImageNet's", positions)


def of_run(path: Path, weights: dict, encoder: Encoder) -> Start:
    """What a last.pt has, and what the encoder.pt beside it tells of the encoder."""
    first = next(iter(encoder.state_dict()))  # a name that all encoders of this kind have
    weights = {name: value for name, value in weights.items() if isinstance(name, str)}
    prefixes = [name.removesuffix(first) for name in weights if f".{name}".endswith(f".{first}")]
    if not prefixes:
        raise UserError(f"--start {path} holds no {type(encoder).__name__}, which this run trains")
    inside = {name.removeprefix(prefixes[0]): x for name, x in weights.items() if name.startswith(prefixes[0])}
    rest = {name: x for name, x in weights.items() if not name.startswith(prefixes[0])}
    beside = path.with_name("encoder.pt")
    if not beside.exists():
        return Start(inside, rest, {}, "the data's (no encoder.pt beside it tells its own)")
    return Start(inside, rest, encoder_fields(beside, read_weights(beside)), "its own")


def encoder_fields(path: Path, state: dict) -> dict:
    """Fields and kind of what an encoder.pt holds. Raises UserError where these are none."""
    fields, kind = state.get("fields"), state.get("kind")
    statistics = [fields.get(name) for name in IMAGENET] if isinstance(fields, dict) and isinstance(kind, str) else [()]
    try:
        # Types first: to look into a tensor of a foreign file, number by number, could take any time and memory.
        if not all(isinstance(x, tuple | list) and all(isinstance(y, int | float) for y in x) for x in statistics):
            raise UserError("no numbers")
        mean, std = three_numbers("mean", statistics[0]), three_numbers("std", statistics[-1], above=0)
        height_and_width(fields.get("image_size", 1))
    except UserError:
        raise UserError(f"{path} does not fit this version (it lacks fields, or they make no sense)") from None
    return fields | {"kind": printable(kind)[:40], "mean": mean, "std": std}


# ---------------------------------------------------------------------------------------------------------------------
# Whether it fits
# ---------------------------------------------------------------------------------------------------------------------

SIZE_WORDS = {"dim": "width {}", "depth": "{} blocks", "patch": "patch {}", "heads": "{} heads"}
NO_PLACE = {  # parts of a name, of networks that are no plain transformers, and what these are
    "positions": "learned ones, of --positions learned",
    "fc_norm": "a norm behind the mean, of fine-tuning",
    "dist": "a distillation token",
    "reg_token": "register tokens",
    ".ls": "layer scale",
    "gamma": "layer scale",
}


def refuse_other_size(path: Path, encoder: Encoder, given: Start, config, sizes: dict):
    """Raise UserError, with the flags that would fit, where the encoder of a file is of another kind or size."""
    ours = type(encoder).__name__
    if (kind := given.fields.get("kind", ours)) != ours:
        raise UserError(f"--start {path} holds a {kind}, but this run trains a {ours}")
    patches = given.encoder.get("patch_embed.proj.weight")
    if "patch" not in encoder.fields or not is_sound(patches) or patches.ndim != 2:
        return  # `misfit` tells what is wrong
    depth = len({name.split(".")[1] for name in map(str, given.encoder) if name.startswith("blocks.")})
    found = {"dim": len(patches), "depth": depth, "patch": math.isqrt(patches.shape[1] // 3)}
    if type(given.fields.get("heads")) is int:  # else no one knows
        found["heads"] = given.fields["heads"]
    own = {name: encoder.fields[name] for name in found}
    if found == own:
        return
    free = {"patch"} | ({"heads"} if hasattr(config, "heads") else set())  # have a flag of their own
    names = [name for name, size in sizes.items() if all(size[x] == found[x] for x in found.keys() - free)]
    its, ours = (", ".join(SIZE_WORDS[name].format(x) for name, x in size.items()) for size in (found, own))
    hint = f"give --model {names[0]} --patch {found['patch']}" if names else f"no --model has it: {', '.join(sizes)}"
    if names and "heads" in free & found.keys() and found["heads"] != own["heads"]:
        hint += f" --heads {found['heads']}"
    raise UserError(f"--start {path} has {its}, but this run {ours}; {hint}")


def misfit(own: dict, given: dict) -> str:
    """Why given weights do not fill a module whose state is `own`; "" where they do."""
    if strange := [str(name) for name in given if name not in own]:
        what = next((f" ({what})" for part, what in NO_PLACE.items() if part in strange[0]), "")
        return f"it has {printable(strange[0])[:80]}{what}, for which there is no place"
    for name, value in own.items():
        if name not in given:
            return f"it lacks {name}" + (", its own are fixed; give --positions fixed" if name == "positions" else "")
        x = given[name]
        if not isinstance(x, Tensor) or x.shape != value.shape:
            shape = f"of {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            return f"{name} is {shape[:80]}, not of {tuple(value.shape)}"
        if not (is_sound(x) if value.is_floating_point() else x.dtype == value.dtype and x.device.type == "cpu"):
            return f"{name} holds {x.dtype}, {x.layout} on {x.device}, not plain numbers"
        if not x.to(value.dtype).isfinite().all():
            return f"{name} is not finite"
    return ""


def cells_of(given, own: Tensor, grid: tuple) -> tuple:
    """The grid (rows, columns) of positions (1, 1 + N, D) that are the fixed ones; () where they are others.

    `own` (N, D) are ours on a `grid`. Where theirs is another one, it is square. The code of a place depends on its row
    and column alone, so it is enough to compare the places that both have. The first one, of the CLS token, is 0.
    """
    if not is_sound(given) or given.ndim != 3 or len(given) != 1 or given.shape[2] != own.shape[1]:
        return ()
    count = given.shape[1] - 1
    cells = grid if count == grid[0] * grid[1] else (math.isqrt(max(count, 0)),) * 2
    if count < 1 or cells[0] * cells[1] != count:
        return ()
    theirs, ours = (x.unflatten(0, y)[: grid[0], : grid[1]] for x, y in ((given[0, 1:].float(), cells), (own, grid)))
    error = (theirs - ours.to(theirs.device)[: cells[0], : cells[1]]).abs().max()
    limit = 0.01  # what bfloat16 makes of them; learned ones are off by about 1
    return cells if error <= limit and given[0, 0].abs().max() <= limit else ()


def with_learned_positions(given: Start) -> Start:
    """A release for an encoder that learns its positions: pos_embed (1, 1 + N, D) among the encoder's weights.

    The first of them is added to the CLS token, where it always stands. Left as it is where these are no such tensors.
    """
    table, cls = given.positions.get("pos_embed"), given.encoder.get("cls_token")
    if not is_sound(table) or not is_sound(cls) or table.ndim != 3 or table[:, :1].shape != cls.shape:
        return given
    rest = {name: x for name, x in given.positions.items() if name != "pos_embed"}
    encoder = given.encoder | {"positions": table[0, 1:], "cls_token": cls + table[:, :1]}
    return given._replace(encoder=encoder, positions=rest)


def fitting_parts(method: nn.Module, prefix: str, given: Start) -> dict:
    """The weights outside of the encoder of those parts of a method that the file fills as a whole."""
    rest = {name: value for name, value in given.rest.items() if isinstance(value, Tensor)}
    own = {name: value for name, value in method.state_dict().items() if not name.startswith(prefix)}
    decoder = next((x for x in method.modules() if hasattr(x, "decoder_positions")), None)
    if given.positions is not None and decoder is not None:
        found = given.positions.get("decoder_pos_embed")
        if not cells_of(found, decoder.decoder_positions, method.encoder.grid):
            rest = {}  # a decoder with positions of another kind
    taken = {}
    for part in dict.fromkeys(map(part_of, own)):
        values, found = ({n: x for n, x in state.items() if part_of(n) == part} for state in (own, rest))
        taken |= {} if misfit(values, found) else found
    return taken
