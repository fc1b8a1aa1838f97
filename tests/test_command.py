"""A command line's failures: one line on stderr, an exit code for each kind, and no bug hidden."""

import signal

import pytest
import torch
import torch.distributed as dist

import plumbing.command
from plumbing.command import foreign_failure, run_command
from plumbing.errors import NonFiniteLoss, OtherProcessFailed, Stopped, UserError

AT_ONCE = "\nstopped at once; go on from the last checkpoint with the same command and --resume\n"


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
