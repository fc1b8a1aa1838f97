"""STL-10 and Tiny-ImageNet in their official layouts, and downloads from a server on this machine."""

import hashlib
import http.server
import io
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from test_common import write_cifar

import common
from common import UserError


def write_stl10(root, train=6, test=4, unlabeled=5, seed=0):
    """A tiny data set in the official binary layout; returns the pictures of each part as (N, 3, row, column)."""
    home = root / "stl10_binary"
    home.mkdir()
    rng, pictures = np.random.default_rng(seed), {}
    for part, count in (("train", train), ("test", test), ("unlabeled", unlabeled)):
        pictures[part] = rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        pictures[part].transpose(0, 1, 3, 2).tofile(home / f"{part}_X.bin")  # column by column
        if part != "unlabeled":
            (np.arange(count, dtype=np.uint8) % 10 + 1).tofile(home / f"{part}_y.bin")
    (home / "class_names.txt").write_text("\n".join(f"name{i}" for i in range(10)) + "\n")
    return pictures


def test_stl10_reads_the_official_binary_layout(tmp_path):
    pictures = write_stl10(tmp_path)
    data = {split: common.load_data("stl10", tmp_path, split) for split in ("train", "labelled", "test")}
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
            common.load_data("stl10", tmp_path)
    (home / "train_y.bin").unlink()
    with pytest.raises(UserError, match=r"no .*train_y\.bin; remove"):
        common.load_data("stl10", tmp_path)
    (home / "train_y.bin").write_bytes(good)
    (home / "unlabeled_X.bin").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"unlabeled_X\.bin has 100 bytes, expected a multiple of 27648"):
        common.load_data("stl10", tmp_path)
    (home / "unlabeled_X.bin").unlink()
    with pytest.raises(UserError, match=r"no .*unlabeled_X\.bin; remove"):
        common.load_data("stl10", tmp_path)
    assert len(common.load_data("stl10", tmp_path, "labelled")) == 6


def write_tinyimagenet(root, wnids=("n02", "n01"), train=3, val=2):
    home = root / "tiny-imagenet-200"
    rows = []
    for label, wnid in enumerate(wnids):
        (home / "train" / wnid / "images").mkdir(parents=True)
        for i in range(train):
            mode = "L" if i == 0 else "RGB"  # some of the official files are grey
            Image.new(mode, (64, 64), 50 * label + 10 * i if mode == "L" else (50 * label + 10 * i, 200, 100)).save(
                home / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", quality=95
            )
        rows += [(f"val_{label + 2 * i}.JPEG", wnid, label) for i in range(val)]
    (home / "val" / "images").mkdir(parents=True)
    for file, _, label in rows:
        Image.new("RGB", (64, 64), (50 * label, 30, 30)).save(home / "val" / "images" / file, quality=95)
    lines = [f"{file}\t{wnid}\t0\t32\t44\t62\n" for file, wnid, _ in sorted(rows)]
    (home / "val" / "val_annotations.txt").write_text("".join(lines))
    (home / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\ttabby, tabby cat\n\n")
    return home


def test_tinyimagenet_reads_the_official_layout(tmp_path):
    write_tinyimagenet(tmp_path)
    train, test = (common.load_data("tinyimagenet", tmp_path, split) for split in ("train", "test"))
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
            common.load_data("tinyimagenet", tmp_path, "test")
    listing.unlink()
    with pytest.raises(UserError, match=r"no .*val_annotations\.txt"):
        common.load_data("tinyimagenet", tmp_path, "test")
    file = home / "train" / "n01" / "images" / "n01_1.JPEG"
    Image.new("RGB", (60, 64)).save(file)
    with pytest.raises(UserError, match=r"1 of 6 images .*n01_1\.JPEG \(60 x 64 pixels, expected 64 x 64\)"):
        common.load_data("tinyimagenet", tmp_path)
    data = common.load_data("tinyimagenet", tmp_path, skip_bad_images=True)
    assert data.labels.tolist() == [0, 0, 1, 1, 1]
    torch.testing.assert_close(data.images[:2, 0, 0, 0].float(), torch.tensor([50.0, 70]), atol=2, rtol=0)
    assert "1 of 6 images are left out" in capsys.readouterr().out


# --- downloads -------------------------------------------------------------------------------------------------------


class Server:
    """Serves files from memory on 127.0.0.1. `cut` breaks the next answer off; `ranges` says whether it can go on."""

    def __init__(self):
        outer, self.files, self.cut, self.ranges, self.asked = self, {}, None, True, []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                content = outer.files.get(self.path)
                start = self.headers.get("Range")
                outer.asked.append(start)
                if content is None:
                    self.send_error(404)
                    return
                if start and outer.ranges:
                    first = int(start.removeprefix("bytes=").removesuffix("-"))
                    if first >= len(content):
                        self.send_error(416)
                        return
                    self.send_response(206)
                    content = content[first:]
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                cut, outer.cut = outer.cut, None
                self.wfile.write(content[:cut])

            def log_message(self, *args):
                """Quiet."""

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def offer(self, monkeypatch, name, file, content, md5=None):
        self.files["/" + file] = content
        url = f"http://127.0.0.1:{self.http.server_port}/{file}"
        digest = md5 or hashlib.md5(content).hexdigest()
        monkeypatch.setitem(common.ARCHIVES, name, (common.ARCHIVES[name][0], url, digest))


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def tar_of(folder, *extra):
    """A .tar.gz of a folder, and of extra members (name, type, link)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as box:
        box.add(folder, folder.name)
        for name, kind, link in extra:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            content = b"evil" if kind == tarfile.REGTYPE else b""
            member.size = len(content)
            box.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(folder, *extra):
    """A .zip of a folder, and of extra members (name, mode)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as box:
        for path in sorted(folder.rglob("*")):
            box.write(path, path.relative_to(folder.parent))
        for name, mode in extra:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            box.writestr(entry, "evil")
    return buffer.getvalue()


def everything_in(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "tinyimagenet"])
def test_download_fetches_and_unpacks_every_archive(tmp_path, monkeypatch, server, name):
    source, root = tmp_path / "source", tmp_path / "data"
    source.mkdir()
    {"stl10": write_stl10, "tinyimagenet": write_tinyimagenet}.get(name, lambda r: write_cifar(r, name))(source)
    folder = source / common.ARCHIVES[name][0]
    pack, ending = (zip_of, "zip") if name == "tinyimagenet" else (tar_of, "tar.gz")
    server.offer(monkeypatch, name, f"archive.{ending}", pack(folder))
    data = common.load_data(name, root, download=True)
    assert torch.equal(data.images, common.load_data(name, source).images)
    assert [path.name for path in root.iterdir()] == [folder.name]  # no archive, nothing half-made
    asked = len(server.asked)
    common.load_data(name, root, download=True)
    assert len(server.asked) == asked  # what is there is not fetched again


@pytest.mark.parametrize("ranges", [True, False])
def test_download_goes_on_where_it_was_cut_and_takes_nothing_half_written_for_data(
    tmp_path, monkeypatch, server, ranges
):
    write_cifar(tmp_path / "source", "cifar10")
    content = tar_of(tmp_path / "source" / "cifar-10-batches-bin")
    server.offer(monkeypatch, "cifar10", "archive.tar.gz", content)
    server.ranges, server.cut = ranges, len(content) // 2
    root = tmp_path / "data"
    with pytest.raises(
        UserError, match=r"could not be fetched \(the connection broke after \d+ of \d+ bytes\); run again"
    ):
        common.load_data("cifar10", root, download=True)
    assert [path.name for path in root.iterdir()] == ["archive.tar.gz.part"]
    with pytest.raises(UserError, match="add --download"):
        common.load_data("cifar10", root)
    assert len(common.load_data("cifar10", root, download=True)) == 8
    assert server.asked == [None, f"bytes={len(content) // 2}-"]
    assert [path.name for path in root.iterdir()] == ["cifar-10-batches-bin"]


def test_download_uses_a_whole_archive_that_a_kill_left_behind(tmp_path, monkeypatch, server):
    write_cifar(tmp_path / "source", "cifar10")
    content = tar_of(tmp_path / "source" / "cifar-10-batches-bin")
    server.offer(monkeypatch, "cifar10", "archive.tar.gz", content)
    root = tmp_path / "data"
    (root / "cifar-10-batches-bin.unpacking" / "rest").mkdir(parents=True)
    (root / "archive.tar.gz.part").write_bytes(content)
    assert len(common.load_data("cifar10", root, download=True)) == 8
    assert [path.name for path in root.iterdir()] == ["cifar-10-batches-bin"]


def test_download_throws_away_what_has_another_md5(tmp_path, monkeypatch, server):
    write_cifar(tmp_path / "source", "cifar10")
    content = tar_of(tmp_path / "source" / "cifar-10-batches-bin")
    server.offer(monkeypatch, "cifar10", "archive.tar.gz", content, md5="0" * 32)
    with pytest.raises(UserError, match=f"has the MD5 {hashlib.md5(content).hexdigest()}, expected {'0' * 32}"):
        common.load_data("cifar10", tmp_path / "data", download=True)
    assert everything_in(tmp_path / "data") == []


def test_download_says_what_the_server_said(tmp_path, monkeypatch, server):
    server.offer(monkeypatch, "cifar10", "archive.tar.gz", b"")
    server.files.clear()
    with pytest.raises(UserError, match=r"archive\.tar\.gz could not be fetched \(HTTP Error 404: Not Found\)"):
        common.load_data("cifar10", tmp_path / "data", download=True)
    assert everything_in(tmp_path / "data") == []


EVIL_TAR = {
    "absolute": ("/evil", tarfile.REGTYPE, ""),
    "parent": ("cifar-10-batches-bin/../../evil", tarfile.REGTYPE, ""),
    "elsewhere": ("evil", tarfile.REGTYPE, ""),
    "symbolic link": ("cifar-10-batches-bin/evil", tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": ("cifar-10-batches-bin/evil", tarfile.LNKTYPE, "cifar-10-batches-bin/test_batch.bin"),
    "device": ("cifar-10-batches-bin/evil", tarfile.CHRTYPE, ""),
}


@pytest.mark.parametrize("kind", EVIL_TAR)
def test_unpack_refuses_a_malicious_tar_and_keeps_nothing_of_it(tmp_path, kind):
    write_cifar(tmp_path / "source", "cifar10")
    archive = tmp_path / "data" / "archive"
    archive.parent.mkdir()
    archive.write_bytes(tar_of(tmp_path / "source" / "cifar-10-batches-bin", EVIL_TAR[kind]))
    with pytest.raises(UserError, match="holds '.*evil', which does not belong there; it was not unpacked"):
        common.unpack(archive, tmp_path / "data" / "cifar-10-batches-bin", zipped=False)
    assert everything_in(tmp_path / "data") == ["archive"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "source"]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("/evil", 0o100644),
        ("tiny-imagenet-200/../../evil", 0o100644),
        ("tiny-imagenet-200\\..\\evil", 0o100644),
        ("evil", 0o100644),
        ("tiny-imagenet-200/evil", 0o120777),  # a symbolic link
    ],
)
def test_unpack_refuses_a_malicious_zip_and_keeps_nothing_of_it(tmp_path, name, mode):
    write_tinyimagenet(tmp_path / "source")
    archive = tmp_path / "data" / "archive"
    archive.parent.mkdir()
    archive.write_bytes(zip_of(tmp_path / "source" / "tiny-imagenet-200", (name, mode)))
    with pytest.raises(UserError, match="evil', which does not belong there; it was not unpacked"):
        common.unpack(archive, tmp_path / "data" / "tiny-imagenet-200", zipped=True)
    assert everything_in(tmp_path / "data") == ["archive"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "source"]


@pytest.mark.parametrize("zipped", [True, False])
def test_unpack_refuses_a_damaged_archive(tmp_path, zipped):
    write_cifar(tmp_path / "source", "cifar10")
    folder = tmp_path / "source" / "cifar-10-batches-bin"
    content = zip_of(folder) if zipped else tar_of(folder)
    archive = tmp_path / "archive"
    for damaged in (content[:-200], b"not an archive", b""):
        archive.write_bytes(damaged)
        with pytest.raises(UserError, match="archive cannot be unpacked"):
            common.unpack(archive, tmp_path / "cifar-10-batches-bin", zipped)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "source"]
