"""Files that are whole or not there, and checkpoints that run no code."""

import enum
import io
import json
import math
import os
import resource
import typing
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from plumbing.errors import UserError
from plumbing.files import append_line, json_text, load_checkpoint, plain, write_atomically


def test_write_atomically_leaves_the_old_file_when_the_write_dies(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def die(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, die)
    assert path.read_text() == "old"
    # The last moment before the new file is there.
    monkeypatch.setattr(os, "replace", lambda *_: die(io.BytesIO()))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_text() == "old"


@pytest.mark.parametrize("before", [b"", b"1\n2\n", b"1\n2\n{'a': ", None])
def test_a_line_is_added_behind_what_a_kill_has_left(before, tmp_path):
    path = tmp_path / "log"
    if before is not None:
        path.write_bytes(before)
    append_line(path, "é")
    append_line(path, "next")
    old = (before or b"").splitlines()
    assert path.read_bytes().splitlines() == [*old, "é".encode(), b"next"]
    assert path.read_bytes().endswith(b"next\n")


def test_a_line_that_has_no_room_leaves_no_piece(tmp_path):
    path = tmp_path / "log"
    append_line(path, "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (10, limits[1])
    )  # bytes: six are there, and the line needs more than four
    try:
        with pytest.raises(OSError, match=r"cannot write .*log \(File too large\); what was there stays$"):
            append_line(path, "more than fits")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "whole\n"
    append_line(path, "next")
    assert path.read_text() == "whole\nnext\n"
    with pytest.raises(OSError, match="cannot write .*Is a directory"):
        append_line(tmp_path, "x")


def test_load_checkpoint_runs_no_code_and_names_a_bad_file(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    path = tmp_path / "last.pt"
    torch.save({"weights": Payload()}, path)
    with pytest.raises(UserError, match=r"last\.pt is not a checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "pwned").exists()
    torch.save({"weights": torch.zeros(1000)}, path)
    good = path.read_bytes()
    assert zipfile.is_zipfile(path)
    for bad in (good[:500], b"", b"text"):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"last\.pt is not a checkpoint"):
            load_checkpoint(path)


# --- plain values ----------------------------------------------------------------------------------------------------


class Choice(enum.StrEnum):
    A = "a"


class Pair(typing.NamedTuple):
    left: object
    right: object


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (np.float32(0.1), 0.10000000149011612),
        (np.float64(0.1), 0.1),
        (np.longdouble(0.5), 0.5),
        (np.int64(2**40), 2**40),
        (np.uint8(3), 3),
        (np.bool_(True), True),
        (True, True),
        (np.str_("a"), "a"),
        (Choice.A, "a"),
        (Path("a/b"), "a/b"),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([1, 2]), (1, 2)),
        (torch.nn.Parameter(torch.tensor(0.25)), 0.25),
        (np.array([[1.5], [2.5]]), ((1.5,), (2.5,))),
        (np.array(7), 7),
        (Pair(np.int32(1), [np.float16(0.5)]), (1, [0.5])),
        ({np.str_("a"): (np.int8(1), None)}, {"a": (1, None)}),
        (torch.Size([2, 3]), (2, 3)),
    ],
)
def test_plain_values_are_equal_and_of_pythons_own_kinds(value, want, tmp_path):
    found = plain(value)
    assert found == want
    torch.save(found, tmp_path / "value.pt")
    assert load_checkpoint(tmp_path / "value.pt") == want

    def kinds(x):
        inside = [*x, *x.values()] if isinstance(x, dict) else x if isinstance(x, list | tuple) else []
        return {type(x)}.union(*map(kinds, inside))

    assert kinds(found) <= {dict, list, tuple, bool, int, float, str, type(None)}
    assert kinds(found) == kinds(want)


@pytest.mark.parametrize("value", [torch.nn.Linear(1, 1), {1, 2}, 1j, b"a", np.array(["2020"], dtype="M8"), object])
def test_plain_refuses_what_a_file_of_weights_cannot_hold(value):
    kind = "torch.nn.modules.linear.Linear" if isinstance(value, torch.nn.Linear) else ""
    with pytest.raises(UserError, match=rf"field model is a {kind}.*, which a file of weights cannot hold; give"):
        plain(value, "field model")
    with pytest.raises(UserError, match=r"config\['a'\] is a "):
        plain({"a": value}, "config")


def test_json_is_read_by_those_who_know_no_nan():
    text = json_text(
        {"a": np.float32(0.5), "b": [math.nan, -math.inf], "c": (np.int64(1), {"d": torch.tensor(math.inf)})}
    )
    assert text == '{"a": 0.5, "b": [null, null], "c": [1, {"d": null}]}'

    def refuse(name):
        raise AssertionError(name)

    assert json.loads(text, parse_constant=refuse)
    assert json_text({"a": 1}, indent=2) == '{\n  "a": 1\n}'
