"""Every data set in its official layout, class folders, and what the readers refuse."""

import numpy as np
import pytest
import torch
from make import write_cifar, write_folders, write_stl10, write_tinyimagenet
from PIL import Image

from plumbing.datasets import ARCHIVES, CIFAR, load_data, read_cifar
from plumbing.errors import UserError

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
