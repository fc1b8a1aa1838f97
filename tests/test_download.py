"""Downloads from a server on this machine: cut off, gone on with, wrong, or malicious."""

import hashlib
import http.server
import io
import tarfile
import threading
import zipfile

import pytest
import torch
from make import write_cifar, write_stl10, write_tinyimagenet

from plumbing.datasets import ARCHIVES, load_data
from plumbing.download import unpack
from plumbing.errors import UserError


class Server:
    """Serves files from memory on 127.0.0.1. `cut` breaks the next answer off; `ranges` says whether it can go on."""

    def __init__(self):
        outer, self.files, self.cut, self.ranges, self.asked, self.length = self, {}, None, True, [], ""

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
                self.send_header("Content-Length", outer.length or str(len(content)))
                self.end_headers()
                cut, outer.cut = outer.cut, None
                self.wfile.write(content[:cut])

            def log_message(self, *args):
                """Quiet."""

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def offer(self, monkeypatch, name, file, content, md5=None):
        self.files["/" + file] = content
        url = f"http://127.0.0.1:{self.http.server_port}/{file}"
        digest = md5 or hashlib.md5(content).hexdigest()
        monkeypatch.setitem(ARCHIVES, name, (ARCHIVES[name][0], url, digest))


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
    folder = source / ARCHIVES[name][0]
    pack, ending = (zip_of, "zip") if name == "tinyimagenet" else (tar_of, "tar.gz")
    server.offer(monkeypatch, name, f"archive.{ending}", pack(folder))
    data = load_data(name, root, download=True)
    assert torch.equal(data.images, load_data(name, source).images)
    assert [path.name for path in root.iterdir()] == [folder.name]  # no archive, nothing half-made
    asked = len(server.asked)
    load_data(name, root, download=True)
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
        load_data("cifar10", root, download=True)
    assert [path.name for path in root.iterdir()] == ["archive.tar.gz.part"]
    with pytest.raises(UserError, match="add --download"):
        load_data("cifar10", root)
    assert len(load_data("cifar10", root, download=True)) == 8
    assert server.asked == [None, f"bytes={len(content) // 2}-"]
    assert [path.name for path in root.iterdir()] == ["cifar-10-batches-bin"]


def test_download_uses_a_whole_archive_that_a_kill_left_behind(tmp_path, monkeypatch, server):
    write_cifar(tmp_path / "source", "cifar10")
    content = tar_of(tmp_path / "source" / "cifar-10-batches-bin")
    server.offer(monkeypatch, "cifar10", "archive.tar.gz", content)
    root = tmp_path / "data"
    (root / "cifar-10-batches-bin.unpacking" / "rest").mkdir(parents=True)
    (root / "archive.tar.gz.part").write_bytes(content)
    assert len(load_data("cifar10", root, download=True)) == 8
    assert [path.name for path in root.iterdir()] == ["cifar-10-batches-bin"]


def test_download_throws_away_what_has_another_md5(tmp_path, monkeypatch, server):
    write_cifar(tmp_path / "source", "cifar10")
    content = tar_of(tmp_path / "source" / "cifar-10-batches-bin")
    server.offer(monkeypatch, "cifar10", "archive.tar.gz", content, md5="0" * 32)
    with pytest.raises(UserError, match=f"has the MD5 {hashlib.md5(content).hexdigest()}, expected {'0' * 32}"):
        load_data("cifar10", tmp_path / "data", download=True)
    assert everything_in(tmp_path / "data") == []


def test_download_says_what_the_server_said(tmp_path, monkeypatch, server):
    server.offer(monkeypatch, "cifar10", "archive.tar.gz", b"")
    server.files.clear()
    with pytest.raises(UserError, match=r"archive\.tar\.gz could not be fetched \(HTTP Error 404: Not Found\)"):
        load_data("cifar10", tmp_path / "data", download=True)
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
        unpack(archive, tmp_path / "data" / "cifar-10-batches-bin", zipped=False)
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
        unpack(archive, tmp_path / "data" / "tiny-imagenet-200", zipped=True)
    assert everything_in(tmp_path / "data") == ["archive"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "source"]


def test_unpack_takes_no_owner_and_no_rights_from_an_archive(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as box:
        member = tarfile.TarInfo("cifar-10-batches-bin/file")
        member.mode, member.uid, member.size = 0o6777, 12345, 4
        box.addfile(member, io.BytesIO(b"data"))
    (tmp_path / "archive").write_bytes(buffer.getvalue())
    unpack(tmp_path / "archive", tmp_path / "cifar-10-batches-bin", zipped=False)
    status = (tmp_path / "cifar-10-batches-bin" / "file").stat()
    assert status.st_mode & 0o6022 == 0  # it takes nobody's place, and only its owner may write it
    assert status.st_uid == tmp_path.stat().st_uid


@pytest.mark.parametrize("zipped", [True, False])
def test_unpack_refuses_a_damaged_archive(tmp_path, zipped):
    write_cifar(tmp_path / "source", "cifar10")
    folder = tmp_path / "source" / "cifar-10-batches-bin"
    content = zip_of(folder) if zipped else tar_of(folder)
    archive = tmp_path / "archive"
    for damaged in (content[:-200], b"not an archive", b""):
        archive.write_bytes(damaged)
        with pytest.raises(UserError, match="archive cannot be unpacked"):
            unpack(archive, tmp_path / "cifar-10-batches-bin", zipped)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "source"]


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ("many", "could not be fetched .*'many'.*; run again"),
        ("9999999", "could not be fetched .the connection broke after .* of 9999999 bytes.; run again"),
        ("9", "has the MD5 .*, expected .*; it was thrown away, run again"),
    ],
)
def test_a_wrong_length_is_one_line_and_in_the_way_of_nothing(length, message, tmp_path, monkeypatch, server):
    write_cifar(tmp_path / "source", "cifar10")
    server.offer(monkeypatch, "cifar10", "c.tar.gz", tar_of(tmp_path / "source" / "cifar-10-batches-bin"))
    server.length = length
    with pytest.raises(UserError, match=message):
        load_data("cifar10", tmp_path / "data", download=True)
    server.length = ""
    assert len(load_data("cifar10", tmp_path / "data", download=True)) == 8


def test_what_is_left_of_another_file_is_thrown_away(tmp_path, monkeypatch, server):
    write_cifar(tmp_path / "source", "cifar10")
    server.offer(monkeypatch, "cifar10", "c.tar.gz", tar_of(tmp_path / "source" / "cifar-10-batches-bin"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "c.tar.gz.part").write_bytes(b"<html>")
    with pytest.raises(UserError, match="it was thrown away, run again"):
        load_data("cifar10", tmp_path / "data", download=True)
    assert everything_in(tmp_path / "data") == []
    assert len(load_data("cifar10", tmp_path / "data", download=True)) == 8
