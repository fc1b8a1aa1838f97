"""A command line whose failures are one line."""

import errno
import gc
import os
import sys

import torch
import torch.distributed as dist

from plumbing.errors import NonFiniteLoss, OtherProcessFailed, Stopped, UserError, printable
from plumbing.processes import rank, world_size


def run_command(command, argv: list) -> int:
    """command(argv), with one clear line instead of a traceback; returns the exit code.

    0, 1 for a run that had to stop, 2 for a user's mistake, 128 + its number for a signal (130 for Ctrl-C).
    """
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is escaped, and stops nothing
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        command(argv)
    except KeyboardInterrupt:
        message, code = "\nstopped at once; what trains goes on from its last checkpoint, if any, by --resume", 130
    except Stopped as stopped:
        message, code = str(stopped) if rank() == 0 else "", 128 + stopped.number
    except Exception as error:
        found = "" if isinstance(error, UserError | NonFiniteLoss | OtherProcessFailed) else foreign_failure(error)
        if not found and not isinstance(error, UserError | NonFiniteLoss | OtherProcessFailed | OSError | MemoryError):
            raise
        number = os.environ.get("RANK", "0")
        text = found or str(error)
        message = f"error{f' of process {number}' if number != '0' else ''}: {printable(text or 'not enough memory')}"
        code = 2 if isinstance(error, UserError) else 1
    else:
        if dist.is_initialized():
            gc.collect()  # what still holds the group, before the group goes
            dist.destroy_process_group()
        return 0
    print(message, file=sys.stderr, flush=True, end="\n" if message else "")
    if dist.is_initialized():
        sys.stdout.flush()  # `_exit` throws away what is still in the buffer
        os._exit(code)  # leaving in order would wait for processes that may be waiting for this one
    return code


def foreign_failure(error: Exception) -> str:
    """What to say of an error of torch's or the system's that is no bug: too little of something, or a process that is
    gone; else nothing."""
    text = str(error).splitlines()[0].strip() if str(error) else ""
    if not isinstance(error, RuntimeError | OSError):
        return ""
    if "Too many open files" in text or "items of ancdata" in text:  # the second says it of a file that was sent
        return f"too many open files ({text[:140]}); raise the limit (ulimit -n 8192) or give fewer --workers"
    if "</torch_" in text or "shared memory" in text:  # the file of a tensor in /dev/shm, or of a worker killed at it
        small = "shared memory (/dev/shm) is too small for the pictures that the workers hand over"
        return f"{small} ({text[:140]}); raise it (docker run --shm-size=1g) or give --workers 0"
    if getattr(error, "errno", None) in (errno.ENOMEM, errno.EAGAIN):  # at a fork
        return f"no memory or no place for another process ({text}); give fewer --workers"
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "Storage size" in text:
        return f"not enough memory ({text}); lower --batch-size, or raise --accumulate"
    if text.startswith("DataLoader worker"):  # torch raises this at whatever place the parent is
        return f"a process that decodes images died ({text}); try fewer --workers"
    if isinstance(error, RuntimeError) and world_size() > 1 and ("gloo" in text or isinstance(error, dist.DistError)):
        return f"another process is gone ({text})"
    return ""
