"""Every data set in its official layout, class folders, and what the readers refuse."""

import os

import numpy as np
import pytest
import torch
from make import write_cifar, write_folders, write_stl10, write_tinyimagenet
from PIL import Image

from plumbing.datasets import ARCHIVES, CIFAR, load_data, read_cifar
from plumbing.errors import UserError

# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["val", "valid", "Test", "", "labeled"])
def test_no_other_word_for_a_split_gives_training_pictures(split, tmp_path):
    for name in ("shapes", str(write_folders(tmp_path))):
        with pytest.raises(UserError, match=rf"^unknown split '{split}'; .*choose from train, labelled, test$"):
            load_data(name, split=split)


def test_a_data_set_may_be_a_path_and_nothing_is_none(tmp_path, monkeypatch):
    root = write_folders(tmp_path / "set")
    assert len(load_data(root)) == 6
    with pytest.raises(UserError, match="no folder .*none; give a folder of pictures"):
        load_data(root / "none")
    monkeypatch.chdir(root)
    with pytest.raises(UserError, match="unknown dataset ''; choose from shapes"):  # an empty variable of a shell
        load_data("")
    with pytest.raises(UserError, match=r"the data of a+ cannot be read \(.*too long"):
        load_data("a" * 300)


def test_a_folder_called_as_the_built_in_pictures_is_told_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(load_data("shapes", image_size=8)) == 4096
    assert capsys.readouterr().out == ""
    write_folders(tmp_path / "shapes")
    assert len(load_data("shapes", image_size=8)) == 4096
    assert capsys.readouterr().out == "note: shapes are the built-in pictures; the folder of this name is ./shapes\n"
    assert len(load_data("./shapes")) == 6


# --- CIFAR -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_reads_the_official_binary_layout(tmp_path, name):
    records = write_cifar(tmp_path, name)
    data = load_data(name, tmp_path)
    rows = np.concatenate([rows for file, rows in records.items() if not file.startswith("test")])
    skip = 1 if name == "cifar10" else 2
    assert data.labels.tolist() == rows[:, skip - 1].tolist()
    assert data.images[2, 1, 5, 7] == rows[2, skip + 1024 + 5 * 32 + 7]  # planes, then rows
    assert len(load_data(name, tmp_path, "test")) == 4
    assert len(load_data(name, tmp_path / ARCHIVES[name][0])) == 8  # the inner folder does as well
    assert len(data.classes) == CIFAR[name][2]


def test_cifar_reads_class_names(tmp_path):
    write_cifar(tmp_path, "cifar10")
    names = [f"name{i}" for i in range(10)]
    (tmp_path / "cifar-10-batches-bin" / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    assert load_data("cifar10", tmp_path).classes == names


@pytest.mark.parametrize(
    ("name", "part", "copies"),
    [
        ("cifar10", "data_batch_1.bin", ["data_batch_1 (1).bin", "data_batch_1_old.bin", "data_batch_.1.bin"]),
        ("cifar10", "test_batch.bin", ["test_batch (copy).bin"]),
        ("cifar100", "train.bin", ["train (1).bin", "train_.bin", "training.bin"]),
        ("cifar100", "test.bin", ["test-old.bin", "tests.bin"]),
    ],
)
def test_cifar_takes_no_copy_for_more_pictures(name, part, copies, tmp_path, capsys):
    write_cifar(tmp_path, name)
    home = tmp_path / ARCHIVES[name][0]
    for copy in copies:
        (home / copy).write_bytes((home / part).read_bytes())
    split = "test" if part.startswith("test") else "train"
    assert len(load_data(name, tmp_path, split)) == (4 if split == "test" else 8)
    said = capsys.readouterr().out
    assert said == f"note: {len(copies)} other files in {home} are left out, such as {min(copies)}\n"


def test_cifar_takes_files_of_any_number(tmp_path):
    write_cifar(tmp_path, "cifar10", counts=(1,) * 11)
    assert len(load_data("cifar10", tmp_path)) == 11


@pytest.mark.parametrize("name", ["cifar10", "stl10", "tinyimagenet"])
def test_the_folder_of_a_named_set_may_be_the_working_folder(name, tmp_path, monkeypatch):
    {"cifar10": lambda root: write_cifar(root, name), "stl10": write_stl10, "tinyimagenet": write_tinyimagenet}[name](
        tmp_path
    )
    listing = load_data(name, tmp_path).listing
    monkeypatch.chdir(tmp_path / ARCHIVES[name][0])
    assert load_data(name, ".").listing == listing != b""
    monkeypatch.chdir(tmp_path)
    assert load_data(name, ".").listing == listing


def test_a_folder_in_the_place_of_a_file_is_one_line(tmp_path):
    write_stl10(tmp_path)
    file = tmp_path / "stl10_binary" / "train_y.bin"
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=rf"^the data of stl10 cannot be read \(.*{file}'\)$"):
        load_data("stl10", tmp_path)


def test_cifar_refuses_bad_files_by_name(tmp_path):
    with pytest.raises(
        UserError,
        match=r"no cifar10 at .*cifar-10-batches-bin; give the --root .*add --download .*cifar-10-binary.tar.gz",
    ):
        load_data("cifar10", tmp_path)
    write_cifar(tmp_path, "cifar10")
    with pytest.raises(UserError, match=r"no cifar100 at .*train\*\.bin; remove"):
        read_cifar("cifar100", tmp_path, "train")
    file = tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin"
    good = file.read_bytes()
    for bad in (good[:-5], good + b"x", b""):
        file.write_bytes(bad)
        with pytest.raises(UserError, match=r"data_batch_2\.bin has \d+ bytes, expected a multiple of 3073"):
            load_data("cifar10", tmp_path)
    file.write_bytes(b"\x0b" + good[1:])
    with pytest.raises(UserError, match=r"data_batch_2\.bin holds the label 11, cifar10 ends at 9"):
        load_data("cifar10", tmp_path)


# --- STL-10 ----------------------------------------------------------------------------------------------------------


def test_stl10_reads_the_official_binary_layout(tmp_path):
    pictures = write_stl10(tmp_path)
    data = {split: load_data("stl10", tmp_path, split) for split in ("train", "labelled", "test")}
    assert data["train"].labels.tolist() == [0, 1, 2, 3, 4, 5, *[-1] * 5]
    assert torch.equal(
        data["train"].images, torch.from_numpy(np.concatenate([pictures["train"], pictures["unlabeled"]]))
    )
    assert torch.equal(data["labelled"].images, torch.from_numpy(pictures["train"]))
    assert torch.equal(data["test"].images, torch.from_numpy(pictures["test"]))
    assert data["test"].labels.tolist() == [0, 1, 2, 3]
    assert data["test"].classes[3] == "name3"


def test_stl10_refuses_bad_files_by_name(tmp_path):
    write_stl10(tmp_path)
    home = tmp_path / "stl10_binary"
    good = (home / "train_y.bin").read_bytes()
    for bad in (good[:-1], b"\x00" + good[1:], b"\x0b" + good[1:]):
        (home / "train_y.bin").write_bytes(bad)
        with pytest.raises(UserError, match=r"train_y\.bin must hold 6 labels from 1 to 10"):
            load_data("stl10", tmp_path)
    (home / "train_y.bin").unlink()
    with pytest.raises(UserError, match=r"no .*train_y\.bin; remove"):
        load_data("stl10", tmp_path)
    (home / "train_y.bin").write_bytes(good)
    (home / "unlabeled_X.bin").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"unlabeled_X\.bin has 100 bytes, expected a multiple of 27648"):
        load_data("stl10", tmp_path)
    (home / "unlabeled_X.bin").unlink()
    with pytest.raises(UserError, match=r"no .*unlabeled_X\.bin; remove"):
        load_data("stl10", tmp_path)
    assert len(load_data("stl10", tmp_path, "labelled")) == 6


# --- Tiny-ImageNet ---------------------------------------------------------------------------------------------------


def test_tinyimagenet_reads_pictures_of_any_ending_and_misses_no_class(tmp_path):
    home = write_tinyimagenet(tmp_path)
    images = home / "train" / "n01" / "images"
    (images / "n01_1.JPEG").rename(images / "n01_1.jpg")
    assert load_data("tinyimagenet", tmp_path).labels.tolist() == [0, 0, 0, 1, 1, 1]
    for path in sorted(images.iterdir()):
        path.rename(images.parent / path.name)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"^no image in {images}; remove .* and add --download"):
            load_data("tinyimagenet", tmp_path)
        if images.exists():
            images.rmdir()


@pytest.mark.parametrize(
    "change", [lambda x: b"\xef\xbb\xbf" + x, lambda x: x.replace(b"\n", b"\r\n"), lambda x: x + b"\n \n"]
)
def test_tinyimagenet_reads_annotations_that_an_editor_has_saved(change, tmp_path):
    home = write_tinyimagenet(tmp_path)
    annotations = home / "val" / "val_annotations.txt"
    old = os.fsencode(home / "val" / "images" / "val_2.JPEG")
    os.rename(old, old.replace(b"val_2", b"caf\xe9"))
    annotations.write_bytes(change(annotations.read_bytes().replace(b"val_2", b"caf\xe9")))
    (home / "words.txt").write_bytes(b"n01\tcaf\xe9, cup\r\nn02\ttabby\r\n")
    data = load_data("tinyimagenet", tmp_path, "test")
    assert data.labels.tolist() == [1, 0, 1, 0]
    assert data.classes == ["caf\ufffd", "tabby"]


def test_tinyimagenet_reads_the_official_layout(tmp_path):
    write_tinyimagenet(tmp_path)
    train, test = (load_data("tinyimagenet", tmp_path, split) for split in ("train", "test"))
    assert train.classes == ["goldfish", "tabby"]  # in the order of the sorted wnids
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    red = train.images[:, 0, 32, 32].float()
    torch.testing.assert_close(red, torch.tensor([50.0, 60, 70, 0, 10, 20]), atol=2, rtol=0)
    assert test.labels.tolist() == [1, 0, 1, 0]  # val_0, val_1, ... of n02, n01, ...
    torch.testing.assert_close(test.images[:, 0, 0, 0].float(), 50.0 * (test.labels == 0), atol=2, rtol=0)


def test_tinyimagenet_refuses_bad_files_by_name(tmp_path, capsys):
    home = write_tinyimagenet(tmp_path)
    listing = home / "val" / "val_annotations.txt"
    good = listing.read_text()
    for line in ("val_9.JPEG\tn99\t0\t0\t1\t1\n", "val_9.JPEG\n"):
        listing.write_text(good + line)
        with pytest.raises(UserError, match=r"val_annotations\.txt has the line 'val_9\.JPEG"):
            load_data("tinyimagenet", tmp_path, "test")
    listing.unlink()
    with pytest.raises(UserError, match=r"no .*val_annotations\.txt"):
        load_data("tinyimagenet", tmp_path, "test")
    file = home / "train" / "n01" / "images" / "n01_1.JPEG"
    Image.new("RGB", (60, 64)).save(file)
    with pytest.raises(UserError, match=r"1 of 6 images .*n01_1\.JPEG \(60 x 64 pixels, expected 64 x 64\)"):
        load_data("tinyimagenet", tmp_path)
    data = load_data("tinyimagenet", tmp_path, skip_bad_images=True)
    assert data.labels.tolist() == [0, 0, 1, 1, 1]
    torch.testing.assert_close(data.images[:2, 0, 0, 0].float(), torch.tensor([50.0, 70]), atol=2, rtol=0)
    assert "1 of 6 images are left out" in capsys.readouterr().out


# --- where batches come to -------------------------------------------------------------------------------------------


def test_load_data_tells_the_data_its_device_and_workers(tmp_path):
    write_folders(tmp_path / "set")
    folders = load_data(str(tmp_path / "set"), device="meta", workers=3)
    assert (folders.device, folders.workers) == ("meta", 3)
    write_cifar(tmp_path, "cifar10")
    write_stl10(tmp_path)
    write_tinyimagenet(tmp_path)
    for name in ("shapes", "cifar10", "stl10", "tinyimagenet"):
        data = load_data(name, tmp_path, "test", image_size=8, device="meta", workers=3)
        assert data.images.device.type == data.labels.device.type == "meta", name
