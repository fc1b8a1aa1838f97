"""Files that are whole or not there, and none that runs code."""

import contextlib
import os
from pathlib import Path

import torch

from plumbing.errors import UserError


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


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint without running any code that a file may hold. Raises UserError where it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception as error:  # noqa: BLE001 (a damaged file fails in any of a dozen ways)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} is not a checkpoint ({reason})") from None
