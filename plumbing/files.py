"""Files that are whole or not there, and none that runs code."""

import contextlib
import json
import math
import numbers
import os
from pathlib import Path

import numpy as np
import torch

from plumbing.errors import UserError, printable


def write_atomically(path: Path, write):
    """write(open binary file), then move it over `path`: a kill at any moment leaves the old file or the new one.

    Raises OSError where the disk is full or the folder cannot be written; the old file is still there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError of its own
        cause = error
        while cause.__context__ and not isinstance(cause, OSError):
            cause = cause.__context__
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        kept = "the file of before is intact" if path.exists() else "nothing was written"
        raise OSError(f"cannot write {path} ({getattr(cause, 'strerror', None) or cause}); {kept}") from error


def append_line(path: Path, text: str):
    """Add a line to a file, whole or not at all, behind what a kill may have left of the line before.

    Raises OSError where the disk is full or the file cannot be written; what was there stays.
    """
    try:
        with open(path, "ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            cut = end > 0 and file.seek(end - 1) >= 0 and file.read(1) != b"\n"
            rest = b"\n" * cut + text.encode() + b"\n"
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)  # else the next line would be glued to a piece of this one, and both be lost
                raise
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror or error}); what was there stays") from error


def plain(value, name: str = "a value"):
    """A value as files hold it: Python's own numbers, texts and None, and dicts, lists and tuples of these.

    Numbers of numpy and torch, however they are nested, keep their exact values; arrays become tuples, paths texts.
    Raises UserError, with the name, for anything else: `load_checkpoint` would not read it back.
    """
    if isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 0:
        value = value.item()
    if value is None:
        return None
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)  # without what a subclass, such as an Enum, makes of it
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {plain(key, name): plain(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item, name) for item in value]
    if isinstance(value, tuple | np.ndarray | torch.Tensor):
        return tuple(plain(item, name) for item in value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    raise UserError(f"{name} is a {kind}, which a file of weights cannot hold; give numbers, texts, or tuples of them")


def json_text(value, indent: int | None = None) -> str:
    """A value as JSON, which knows neither nan nor infinity: null stands for them. Raises UserError as `plain`."""

    def finite(value):
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(plain(value)), indent=indent)


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint without running any code that a file may hold. Raises UserError where it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception as error:  # noqa: BLE001 (a damaged file fails in any of a dozen ways)
        # What torch puts before this tells how to run the code of a file.
        text = str(error).rpartition("WeightsUnpickler error: ")[2]
        reason = next(iter(text.split(" Please use")[0].splitlines()), "") or type(error).__name__
        raise UserError(f"{path} is not a checkpoint ({printable(reason)[:200]})") from None
