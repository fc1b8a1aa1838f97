"""Folders of pictures, one a class: which classes and pictures there are, what is left out, what is refused."""

import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make import write_folders, write_tinyimagenet

from plumbing.checking import cache_folder, survey
from plumbing.class_folders import IMAGENET100, is_leftover
from plumbing.datasets import load_data
from plumbing.errors import UserError, printable


def test_folders_name_the_files_that_are_left_out(tmp_path, capsys):
    write_folders(tmp_path)
    (tmp_path / "train" / "ant" / "note.txt").write_text("an ant")
    (tmp_path / "train" / "bee" / "bee.gif").write_bytes(b"GIF89a")
    assert len(load_data(str(tmp_path))) == 6
    assert re.match(
        r"note: 2 other files or folders below .*train are left out, such as .*note.txt\n$", capsys.readouterr().out
    )
    assert len(load_data(str(tmp_path), split="test")) == 4
    assert capsys.readouterr().out == ""


def test_folders_list_classes_and_files_in_order(tmp_path):
    write_folders(tmp_path)
    train, test = (load_data(str(tmp_path), split=split) for split in ("train", "test"))
    assert train.classes == test.classes == ["ant", "bee"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(test) == 4
    images, labels = next(train.plain_batches(range(6), 8))
    assert images.shape == (6, 3, 8, 8)
    assert torch.equal(labels, train.labels)
    torch.testing.assert_close(images[:, 0, 4, 4] * 255, 40.0 + 60 * labels)


def test_folders_refuse_what_is_not_a_data_set(tmp_path):
    with pytest.raises(UserError, match="unknown dataset 'cifar11'; did you mean 'cifar10'"):
        load_data("cifar11")
    with pytest.raises(UserError, match="no folder .*train; expected"):
        load_data(str(tmp_path))
    write_folders(tmp_path)
    (tmp_path / "val" / "wasp").mkdir()
    with pytest.raises(UserError, match="class 'wasp' of .*val is not in .*train"):
        load_data(str(tmp_path), split="test")
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(UserError, match=r"class folder .*empty holds no image \(.jpg .jpeg .png .webp\)"):
        load_data(str(tmp_path))


def test_imagenet100_picks_its_classes_from_a_larger_set(tmp_path, capsys):
    assert len(set(IMAGENET100)) == 100
    write_folders(tmp_path, ("n01440764", "n02869837", "n01749939"))
    data = load_data("imagenet100", tmp_path)
    assert data.classes == ["n01749939", "n02869837"]
    assert "holds 2 of the 100 classes" in capsys.readouterr().out
    assert {Path(path).parent.name for path in data.paths} == set(data.classes)
    assert len(load_data("imagenet", tmp_path).classes) == 3


def test_imagenet100_needs_one_of_its_classes(tmp_path):
    with pytest.raises(UserError, match="holds none of the 100 classes"):
        load_data("imagenet100", write_folders(tmp_path))


# --- what lies among the pictures ------------------------------------------------------------------------------------

LEFT_BY_OTHERS = [".ipynb_checkpoints", ".git", ".AppleDouble", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"]


@pytest.mark.parametrize("name", LEFT_BY_OTHERS)
def test_what_programs_leave_behind_is_no_class_and_no_picture(name, tmp_path, capsys):
    root = write_folders(tmp_path)
    picture = next((root / "train" / "ant").iterdir()).read_bytes()
    for part in ("train", "val"):
        (root / part / name).mkdir()
        (root / part / name / "0 é-checkpoint.png").write_bytes(picture)
    (root / "train" / "bee" / name).mkdir()  # as notebooks do in each folder that they open a file of
    (root / "train" / "bee" / name / "1.png").write_bytes(picture)
    (root / "train" / "bee" / "._0.png").write_bytes(b"\x00\x05\x16\x07")  # what macOS keeps beside a file
    (root / "train" / "bee" / "Thumbs.db").write_bytes(b"")
    data = load_data(str(root))
    assert data.classes == ["ant", "bee"]
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert f"note: 4 other files or folders below {root / 'train'} are left out" in capsys.readouterr().out
    assert len(load_data(str(root), split="test")) == 4


@pytest.mark.parametrize("name", LEFT_BY_OTHERS)
def test_what_programs_leave_behind_is_no_class_of_tinyimagenet(name, tmp_path, capsys):
    home = write_tinyimagenet(tmp_path)
    for folder in (home / "train" / name / "images", home / "train" / "n01" / "images" / name):
        folder.mkdir(parents=True)
        (folder / "n01_0.JPEG").write_bytes((home / "train" / "n01" / "images" / "n01_0.JPEG").read_bytes())
    (home / "train" / "n02" / "images" / "._n02_0.JPEG").write_bytes(b"\x00\x05\x16\x07")
    assert load_data("tinyimagenet", tmp_path).labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert f"1 other files or folders in {home / 'train'} are left out, such as {name}" in capsys.readouterr().out
    assert load_data("tinyimagenet", tmp_path, "test").labels.tolist() == [1, 0, 1, 0]


def test_names_of_classes_are_no_leftovers():
    assert not any(map(is_leftover, (*IMAGENET100, "cat", "a.b", "_", "__init__", "eadir", "trash", "~cat")))


@pytest.mark.parametrize(("name", "count"), [("imagenet", 1000), ("tinyimagenet", 200)])
def test_a_named_set_has_no_more_classes_than_it_has(name, count, tmp_path, capsys):
    home = write_tinyimagenet(tmp_path).parent if name == "tinyimagenet" else write_folders(tmp_path, ("n01", "n02"))
    train = home / "tiny-imagenet-200" / "train" if name == "tinyimagenet" else home / "train"
    load_data(name, home)
    assert f"holds 2 of the {count} classes of {name}" in capsys.readouterr().out
    for i in range(count - 1):
        (train / f"n1{i:05}").mkdir()
    with pytest.raises(UserError, match=rf"train holds {count + 1} class folders, {name} has {count} classes; remove"):
        load_data(name, home)


def test_pictures_one_level_deeper_are_named_with_their_number(tmp_path, capsys):
    root = write_folders(tmp_path)
    deeper = root / "train" / "bee" / "images"
    deeper.mkdir()
    for path in sorted((root / "train" / "bee").glob("*.png"))[:2]:
        path.rename(deeper / path.name)
    assert len(load_data(str(root))) == 4
    assert (
        f"note: pictures below a class folder are left out, such as 2 in the folder {deeper}" in capsys.readouterr().out
    )
    for path in (root / "train" / "bee").glob("*.png"):
        path.rename(deeper / path.name)
    with pytest.raises(UserError, match=rf"bee holds no image \(.*\), but 3 in the folder {deeper}; move them up$"):
        load_data(str(root))


# --- names -----------------------------------------------------------------------------------------------------------

NAMES = [b"caf\xe9", b"\xff\xfe", b"a\nb", b"\x1b[31mred", b"tab\t", "\u200b".encode(), b"'\"$(x);", b" ", b"%s{0}"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_that_the_system_allows_is_read_and_shown(name, tmp_path, capsys):
    root = write_folders(tmp_path / "set")
    old = os.fsencode(root / "train" / "bee")
    os.rename(old, old[:-3] + name)
    os.rename(os.fsencode(root / "val" / "bee"), os.fsencode(root / "val") + b"/" + name)
    folder = root / "train" / "ant"
    os.rename(folder / "0 é.png", os.fsencode(folder) + b"/" + name + b".png")
    with open(os.fsencode(folder) + b"/" + name + b".txt", "w"):
        pass
    train, test = (load_data(str(root), split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (6, 4)
    assert os.fsdecode(name) in train.classes
    assert train.listing.count(b"\n") == 6
    next(train.plain_batches(range(6), 8))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("note: 1 other files")
    said.encode()
    broken = os.fsencode(folder) + b"/" + name + b".png"
    with open(broken, "wb") as file:
        file.write(b"no picture")
    with pytest.raises(UserError) as error:
        load_data(str(root))
    shown = printable(str(error.value))
    assert shown.isprintable()
    shown.encode()


@given(st.binary(max_size=20))
def test_printable_keeps_what_can_be_shown_and_escapes_the_rest(raw):
    text = os.fsdecode(raw)
    shown = printable(text)
    assert shown.isprintable()
    assert [c for c in text if c.isprintable()] == [c for c in shown if c in text] or not text.isprintable()
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text


def test_printable_writes_a_byte_as_its_number():
    assert printable(os.fsdecode(b"caf\xe9 \n\x1b[0m")) == r"caf\xe9 \n\x1b[0m"
    assert printable("café 日本") == "café 日本"


# --- where it is remembered which pictures are good, and which pictures they are -------------------------------------


def test_without_a_home_nothing_is_remembered_and_no_folder_is_made(tmp_path, monkeypatch, capsys):
    root = write_folders(tmp_path / "set")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user id without an entry, and no HOME
    assert cache_folder() is None
    assert [len(load_data(str(root), split=split)) for split in ("train", "test")] == [6, 4]
    assert list((tmp_path / "work").iterdir()) == []
    assert capsys.readouterr().out.count("note: there is no home folder") == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() is None


@given(data=st.data())
def test_survey_tells_names_and_sizes_below_the_root_alone(tmp_path_factory, data):
    sizes = data.draw(st.dictionaries(st.text("abé", min_size=1, max_size=3), st.integers(0, 50), min_size=1))
    listings, digests = [], []
    for _ in range(2):
        root = tmp_path_factory.mktemp("set")
        for name, size in sizes.items():
            (root / name).write_bytes(b"x" * size)
        lines, digest = survey([str(root / name) for name in sizes], root)
        listings.append(lines)
        digests.append(digest)
    assert listings[0] == listings[1] == [f"{size}\t{name}\n".encode() for name, size in sizes.items()]
    assert digests[0] != digests[1]  # which are good is remembered for one folder
    changed = root / data.draw(st.sampled_from(sorted(sizes)))
    os.utime(changed, ns=(1, 1))
    lines, digest = survey([str(root / name) for name in sizes], root)
    assert lines == listings[1] and digest != digests[1]
    changed.unlink()
    assert survey([str(root / name) for name in sizes], root)[0] != listings[1]
