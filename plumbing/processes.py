"""The device and its precision, several processes (torchrun), and the signals that stop them."""

import contextlib
import ctypes
import math
import os
import signal
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plumbing.errors import OtherProcessFailed, UserError, printable


def rank() -> int:
    """The number of this process, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


_by_itself = False  # whether this process computes what the others do not wait for


def world_size() -> int:
    """The number of processes, 1 without torchrun and within `by_itself`."""
    return dist.get_world_size() if dist.is_initialized() and not _by_itself else 1


@contextlib.contextmanager
def by_itself():
    """While this is on, this process takes itself for the only one: nothing is gathered from the others."""
    global _by_itself
    before, _by_itself = _by_itself, True
    try:
        yield
    finally:
        _by_itself = before


def note(text: str):
    """Tell the user what happens otherwise than they may expect; process 0 alone does."""
    if rank() == 0:
        print(f"note: {printable(text)}", flush=True)


def keep_freed_memory():
    """Make glibc keep the memory of freed tensors: mapping large ones anew each step can cost more than the crops."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: map nothing
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back


def give_back_memory():
    """Make glibc hand its holes back to the system: over many batches they can come to a multiple of what is in use."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}
"""Programs that start several processes without torchrun's variables, by what they say of the number:
{variable: program}. SLURM_NTASKS would not do: it is that of an allocation, in which a command may run once."""


def torchrun_number(variable: str, default: str, least: int, most: float = math.inf) -> int:
    """The value of one of torchrun's environment variables. Raises UserError where it is none of `least` to `most`."""
    text = os.environ.get(variable, default)
    try:
        if least <= (number := int(text)) <= most:
            return number
    except ValueError:
        pass
    limits = f"{least} or more" if most == math.inf else f"{least} to {most}"
    raise UserError(f"{variable} is {text!r} in the environment, not {limits}; mend or unset it, or start by torchrun")


def number_of_processes() -> int:
    """How many processes run this command, by torchrun's variables. Raises UserError where one lacks or is wrong."""
    if dist.is_initialized():
        return world_size()
    if "WORLD_SIZE" not in os.environ:
        for variable, program in LAUNCHERS.items():
            if (count := os.environ.get(variable, "")).isdecimal() and int(count) > 1:
                raise UserError(
                    f"{program} started {count} processes, but torchrun's variables are missing: start by torchrun, or "
                    f"set them from {program}'s (docs/runs.md); WORLD_SIZE=1 makes each a run of its own"
                )
    count = torchrun_number("WORLD_SIZE", "1", least=1)
    if count > 1:
        if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
            raise UserError(f"WORLD_SIZE is {count}, but there is no {' and no '.join(missing)}; start by torchrun")
        torchrun_number("RANK", "", 0, count - 1)
        torchrun_number("MASTER_PORT", "", 0, 65535)
    return count


def start_distributed(device: str = "auto") -> torch.device:
    """Join the other processes where torchrun started several (NCCL on GPUs, gloo on CPUs) and return the device.

    Raises UserError for a device that cannot be used here, and for processes that cannot find each other.
    """
    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    local, several = torchrun_number("LOCAL_RANK", "0", least=0), number_of_processes() > 1
    if several and name.startswith("cuda:"):
        raise UserError(f"device {device!r} would be shared by all processes; give --device cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device!r}: this torch sees no GPU; try --device cpu")
    if name == "cuda" and local >= (seen := torch.cuda.device_count()):
        raise UserError(
            f"LOCAL_RANK is {local}, but this process sees {seen} GPU(s): start one process for each GPU of a machine, "
            f"or set LOCAL_RANK=0 where each process sees one of its own"
        )
    try:
        chosen = torch.device("cuda", local) if name == "cuda" else torch.device(name)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
            torch.backends.cudnn.allow_tf32 = False  # see pick_precision; convolutions are in TF32 by default
        else:
            torch.zeros(1, device=chosen).item()  # "meta" can make tensors, but not compute
            keep_freed_memory()
    except (RuntimeError, AssertionError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device!r} cannot be used here ({reason}); try --device cpu") from None
    if several and not dist.is_initialized():
        # One day, since the others wait while rank 0 downloads, checks images or probes.
        try:
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(days=1))
        except dist.DistNetworkError as error:
            place, reason = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", str(error).splitlines()[0]
            raise UserError(
                f"the processes cannot meet at {place} ({reason}); give another MASTER_ADDR or MASTER_PORT"
            ) from None
    return chosen


def pick_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None for plain float32.

    float32 products keep full precision (no TF32): under autocast the heavy ones are in bf16 or fp16 already, and what
    is left in float32, such as a loss on nearly equal features, is there because it needs every digit.
    """
    if amp != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has_bf16 = device.type == "cpu" and any(
        capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16")
    )
    return torch.bfloat16 if has_bf16 else None  # emulated bf16 is slower than float32


def autocast(amp: str, device: torch.device):
    """The context in which --amp computes on a device."""
    dtype = pick_precision(amp, device)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def on_rank_zero(function):
    """Run a function on rank 0 alone and give its result, or its UserError, to every rank."""
    return on_every_rank(function if rank() == 0 else lambda: None)[0]


def on_every_rank(function) -> list:
    """Run a function on every rank and give all their results, in rank order, or the first UserError, to each."""
    if world_size() == 1:
        return [function()]
    result, mistake, failure, shared = None, None, None, [None] * world_size()
    try:
        result = function()
    except UserError as error:
        mistake = str(error)
    except Exception as error:  # noqa: BLE001 (raised again below; the others must not wait for ever)
        failure = error
    dist.all_gather_object(shared, [result, mistake, repr(failure) if failure else None])
    if failure:
        raise failure
    for number, (_, _, reason) in enumerate(shared):
        if reason:
            raise OtherProcessFailed(f"process {number} failed: {reason}")
    if mistakes := [mistake for _, mistake, _ in shared if mistake]:
        raise UserError(mistakes[0])
    return [result for result, _, _ in shared]


def broadcast_buffers(module: nn.Module):
    """Give all processes the buffers of process 0: on CPUs the batch norms of each have seen its own images last."""
    for buffer in module.buffers() if world_size() > 1 else ():
        shared = buffer.detach().contiguous()
        dist.broadcast(shared, 0)
        buffer.copy_(shared)


def average(x: Tensor) -> Tensor:
    """The mean of a tensor over the processes, without gradient; x itself in one process."""
    if world_size() > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
        x /= world_size()
    return x


def agree(number: int, device="cpu") -> int:
    """The largest of the numbers that the processes give."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def synchronize_norms(module: nn.Module, device: torch.device) -> nn.Module:
    """Batch norms that see the images of all processes, where these have GPUs; call it before the optimiser is made."""
    if world_size() > 1 and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return module


def distribute(module: nn.Module, device: torch.device) -> nn.Module:
    """The module whose backward pass averages gradients over the processes (DDP); itself in one process."""
    if world_size() == 1:
        return module
    devices = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # Every rank's loss depends on this rank's rows: sum what all of them send back, then take our rows.
        gradient = gradient.contiguous().clone()  # autograd may hold the same tensor elsewhere
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def gather(x: Tensor) -> Tensor:
    """Rows of all processes in rank order: (B, ...) -> (ranks * B, ...), differentiable; x itself in one process.

    Where every rank computes the same loss of the gathered rows, the mean of the ranks' gradients (what DDP takes) is
    the gradient of that loss in one process.
    """
    return _Gather.apply(x) if world_size() > 1 else x


STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
"""Ctrl-C, a polite kill, and what Slurm can be told to send before a job's time is over."""


@contextlib.contextmanager
def noted_signals():
    """Signals that stop a run only add their number to the list that this gives; a second Ctrl-C stops at once."""
    noted, first = [], 0.0

    def note(number, frame):
        nonlocal first
        # torchrun passes Ctrl-C on to processes that have it already: that one is no second one.
        if number == signal.SIGINT and signal.SIGINT in noted and time.monotonic() - first > 1:
            raise KeyboardInterrupt
        first = first or time.monotonic()
        noted.append(number)

    if threading.current_thread() is not threading.main_thread():  # Python lets no other one do this
        yield noted
        return
    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
