"""Files that are whole or not there, and checkpoints that run no code."""

import io
import os
import zipfile

import pytest
import torch

from plumbing.errors import UserError
from plumbing.files import load_checkpoint, write_atomically


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
