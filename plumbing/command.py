"""A command line whose failures are one line."""

import gc
import os
import sys

import torch
import torch.distributed as dist

from plumbing.errors import NonFiniteLoss, OtherProcessFailed, Stopped, UserError
from plumbing.processes import rank, world_size


def run_command(command, argv: list) -> int:
    """command(argv), with one clear line instead of a traceback; returns the exit code.

    0, 1 for a run that had to stop, 2 for a user's mistake, 128 + its number for a signal (130 for Ctrl-C).
    """
    try:
        command(argv)
    except KeyboardInterrupt:
        message, code = "\nstopped at once; go on from the last checkpoint with the same command and --resume", 130
    except Stopped as stopped:
        message, code = str(stopped) if rank() == 0 else "", 128 + stopped.number
    except Exception as error:
        known = (UserError, NonFiniteLoss, OtherProcessFailed, OSError, MemoryError)
        if not isinstance(error, known) and not (found := foreign_failure(error)):
            raise
        number = os.environ.get("RANK", "0")
        text = str(error) if isinstance(error, known) else found
        message = f"error{f' of process {number}' if number != '0' else ''}: {text or 'not enough memory'}"
        code = 2 if isinstance(error, UserError) else 1
    else:
        if dist.is_initialized():
            gc.collect()  # what still holds the group, before the group goes
            dist.destroy_process_group()
        return 0
    print(message, file=sys.stderr, flush=True, end="\n" if message else "")
    if dist.is_initialized():
        os._exit(code)  # leaving in order would wait for processes that may be waiting for this one
    return code


def foreign_failure(error: Exception) -> str:
    """What to say of an error of torch's that is no bug: too little memory, or a process that is gone; else nothing."""
    text = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return f"not enough memory ({text}); lower --batch-size, or raise --accumulate"
    if text.startswith("DataLoader worker"):  # torch raises this at whatever place the parent is
        return f"a process that decodes images died ({text.strip()}); try fewer --workers"
    if isinstance(error, RuntimeError) and world_size() > 1 and ("gloo" in text or isinstance(error, dist.DistError)):
        return f"another process is gone ({text})"
    return ""
