"""A command line's failures: one line on stderr, an exit code for each kind, and no bug hidden."""

import errno
import io
import os
import signal
import sys

import pytest
import torch
import torch.distributed as dist
from make import write_folders

import plumbing.command
from plumbing.command import foreign_failure, run_command
from plumbing.datasets import load_data
from plumbing.errors import NonFiniteLoss, OtherProcessFailed, Stopped, UserError

AT_ONCE = "\nstopped at once; what trains goes on from its last checkpoint, if any, by --resume\n"


def raising(error):
    def command(argv):
        raise error

    return command


def test_a_command_that_ends_well_says_nothing_and_gets_its_arguments(capsys):
    seen = []
    assert run_command(seen.extend, ["a", "b"]) == 0
    assert seen == ["a", "b"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("give 1 or more"), 2, "error: give 1 or more\n"),
        (NonFiniteLoss("step 3: loss nan"), 1, "error: step 3: loss nan\n"),
        (OtherProcessFailed("process 0 failed"), 1, "error: process 0 failed\n"),
        (OSError("cannot write"), 1, "error: cannot write\n"),
        (MemoryError(), 1, "error: not enough memory\n"),
        (Stopped("stopped by SIGTERM", signal.SIGTERM), 143, "stopped by SIGTERM\n"),
        (KeyboardInterrupt(), 130, AT_ONCE),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: not enough memory (CUDA out of memory); lower "),
        (RuntimeError("DataLoader worker (pid 7) is killed. \nmore"), 1, "error: a process that decodes images died ("),
    ],
)
def test_each_failure_has_its_code_and_one_line(error, code, text, capsys):
    assert run_command(raising(error), []) == code
    shown = capsys.readouterr().err
    assert shown.startswith(text)
    assert shown.strip("\n").count("\n") == 0 and shown.endswith("\n")


def test_what_was_printed_before_is_not_lost_among_several_processes(monkeypatch):
    """`os._exit` leaves without emptying buffers; a pipe's is 8 kB."""
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", lambda code: None)

    def command(argv):
        print("a table")
        raise UserError("give 1 or more")

    assert run_command(command, []) == 2
    assert pipe.getvalue() == b"a table\n"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("a bug"), ValueError("a bug"), TypeError()])
def test_a_bug_keeps_its_traceback(error, capsys):
    with pytest.raises(type(error)):
        run_command(raising(error), [])
    assert capsys.readouterr().err == ""


def test_a_process_of_several_says_its_number_and_is_silent_where_the_first_one_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert run_command(raising(UserError("give 1 or more")), []) == 2
    assert capsys.readouterr().err == "error of process 3: give 1 or more\n"
    monkeypatch.setattr(plumbing.command, "rank", lambda: 3)
    assert run_command(raising(Stopped("stopped by SIGINT", signal.SIGINT)), []) == 130
    assert capsys.readouterr().err == ""


def test_a_lost_connection_is_no_bug_where_there_are_others(monkeypatch):
    errors = [RuntimeError("[/gloo/transport/tcp/pair.cc:1] closed by peer"), dist.DistBackendError("NCCL")]
    assert [foreign_failure(error) for error in errors] == ["", ""]
    monkeypatch.setattr(plumbing.command, "world_size", lambda: 2)
    assert all(foreign_failure(error).startswith("another process is gone (") for error in errors)
    assert foreign_failure(RuntimeError("a bug")) == foreign_failure(RuntimeError()) == ""


# --- too little of something -----------------------------------------------------------------------------------------

SMALL = "unable to allocate shared memory(shm) for file </torch_531_3248116410_0>: No space left on device (28)"
SHARED = "shared memory (/dev/shm) is too small for the pictures that the workers hand over ("
FILES = "too many open files ("


@pytest.mark.parametrize(
    ("error", "text", "advice"),
    [
        (RuntimeError(SMALL), SHARED, "raise it (docker run --shm-size=1g) or give --workers 0"),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
                "are out of shared memory. Please try to raise your shared memory limit."
            ),
            SHARED,
            "raise it (docker run --shm-size=1g) or give --workers 0",
        ),
        (RuntimeError("unable to write to file </torch_18_1>: No space left on device (28)"), SHARED, "--workers 0"),
        (
            RuntimeError("unable to mmap 96 bytes from file </torch_1>: Cannot allocate memory (12)"),
            SHARED,
            "--workers 0",
        ),
        (
            RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)"),
            FILES,
            "",
        ),
        (
            RuntimeError("Too many open files. Communication with the workers is no longer possible."),
            FILES,
            "--workers",
        ),
        (
            RuntimeError("received 0 items of ancdata"),
            FILES,
            "raise the limit (ulimit -n 8192) or give fewer --workers",
        ),
        (OSError(errno.EMFILE, "Too many open files"), FILES, "fewer --workers"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "no memory or no place for another", "fewer --workers"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no memory or no place", "fewer --workers"),
    ],
)
def test_too_little_of_something_is_named_with_what_to_do(error, text, advice, capsys):
    assert run_command(raising(error), []) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {text}") and shown.endswith(f"{advice}\n")
    assert shown.count("\n") == 1 and len(shown) < 330


def test_what_the_user_or_another_process_has_said_is_left_as_it_is(capsys):
    for error in (
        UserError(SMALL),
        OtherProcessFailed(f"process 0 failed: {SMALL}"),
        OSError(errno.ENOSPC, "no space"),
    ):
        run_command(raising(error), [])
        assert capsys.readouterr().err == f"error: {error}\n"
    assert foreign_failure(KeyError(SMALL)) == foreign_failure(ValueError("shared memory")) == ""


@pytest.mark.parametrize("method", ["train", "plain"])
def test_a_worker_without_room_in_shared_memory_ends_the_command_by_one_line(method, tmp_path, monkeypatch, capfd):
    """What a thread of torch's would print, for the parent to wait for ever, is said by the worker to the parent."""
    write_folders(tmp_path)
    data = load_data(str(tmp_path), split="train", workers=1)
    here, hit = os.getpid(), tmp_path / "hit"

    def fail(tensor):
        assert os.getpid() != here  # in a worker
        hit.touch()
        raise RuntimeError(SMALL)

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)

    def command(argv):
        batches = (
            data.train_batches([(0, torch.arange(4))], 8) if method == "train" else data.plain_batches(range(4), 8)
        )
        list(batches)

    assert run_command(command, []) == 1
    assert hit.exists()
    shown = capfd.readouterr().err
    assert (
        shown.startswith(f"error: {SHARED}unable to allocate shared memory(shm) for file </torch_531")
        and SMALL in shown
    )
    assert shown.count("\n") == 1
    data.workers = 0
    command([])  # does without


def test_workers_hand_over_what_one_process_decodes(tmp_path):
    write_folders(tmp_path)
    several, alone = (load_data(str(tmp_path), split="train", workers=workers) for workers in (2, 0))
    for (images, labels), (same, numbers) in zip(
        several.plain_batches(range(6), 8, batch=2), alone.plain_batches(range(6), 8, batch=2), strict=True
    ):
        assert torch.equal(images, same) and torch.equal(labels, numbers)
