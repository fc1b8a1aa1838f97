"""Fetch an archive, check it and unpack it, so that its folder appears whole or not at all."""

import hashlib
import http.client
import os
import shutil
import stat
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

from plumbing.errors import UserError


def fetch(url: str, md5: str, home: Path):
    """Download an archive, check its MD5 and unpack it, so that `home` appears whole or not at all.

    A download that was cut short goes on where it stopped when this is called again. Raises UserError.
    """
    home.parent.mkdir(parents=True, exist_ok=True)
    archive = home.parent / (url.rsplit("/", 1)[1] + ".part")
    try:
        download(url, archive)
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: headers that are no numbers
        raise UserError(f"{url} could not be fetched ({error}); run again to go on where it stopped") from None
    with open(archive, "rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        archive.unlink()
        raise UserError(f"{url} has the MD5 {found}, expected {md5}; it was thrown away, run again")
    unpack(archive, home, zipped=url.endswith(".zip"))
    archive.unlink()


def download(url: str, path: Path):
    """Fetch `url` to `path`, going on where the file there ends if possible. Raises OSError if it is cut short."""
    have = path.stat().st_size if path.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left to send
            return
        raise
    with response:
        have = have if response.status == 206 else 0  # a server that cannot go on sends everything
        total = have + int(response.headers.get("Content-Length", 0))
        bar = tqdm(desc=path.stem, total=total or None, initial=have, unit="B", unit_scale=True, disable=None)
        with open(path, "ab" if have else "wb") as file, bar:
            while block := response.read(2**18):
                have += file.write(block)
                bar.update(len(block))
    if have < total:
        raise OSError(f"the connection broke after {have} of {total} bytes")


def unpack(archive: Path, home: Path, zipped: bool):
    """Unpack the folder `home.name` of a tar or zip archive to `home`, which appears when all of it is there.

    Raises UserError for an archive that holds links, or files that would land elsewhere; nothing of it is kept.
    """
    scratch = home.parent / (home.name + ".unpacking")
    shutil.rmtree(scratch, ignore_errors=True)

    def check(name: str, plain: bool):
        parts = name.rstrip("/").split("/")
        if not plain or parts[0] != home.name or ".." in parts or "\\" in name:
            raise UserError(f"{archive} holds {name!r}, which does not belong there; it was not unpacked")

    def checked(entry: tarfile.TarInfo, path: str) -> tarfile.TarInfo:
        check(entry.name, entry.isfile() or entry.isdir())
        return tarfile.data_filter(entry, path)  # no foreign owners and modes, either

    try:
        if zipped:
            with zipfile.ZipFile(archive) as box:
                for entry in box.infolist():
                    check(entry.filename, stat.S_IFMT(entry.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR))
                box.extractall(scratch)
        else:
            with tarfile.open(archive) as box:
                box.extractall(scratch, filter=checked)
        os.replace(scratch / home.name, home)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, FileNotFoundError) as error:
        raise UserError(f"{archive} cannot be unpacked ({error})") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
