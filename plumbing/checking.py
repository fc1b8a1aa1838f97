"""Picture files of a data set: which they are, and that each can be read."""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import os
from pathlib import Path

from tqdm import tqdm

from plumbing.decoding import MAX_PIXELS, read_whole
from plumbing.errors import UserError, reason_of
from plumbing.files import write_atomically
from plumbing.processes import agree, note, on_rank_zero, world_size


def survey(paths: list, root) -> tuple[list, str]:
    """One look at each file -> its size and its name below `root`, a line of bytes each; a digest, with dates too."""
    lines, digest = [], hashlib.sha256(os.fsencode(os.path.abspath(root)))
    start = len(str(Path(root, "x"))) - 1  # "." and "/" are not followed by a slash of their own
    for path in paths:
        try:
            status = os.stat(path)
            size, date = status.st_size, status.st_mtime_ns
        except OSError:
            size, date = -1, 0
        lines.append(b"%d\t%s\n" % (size, os.fsencode(path[start:]).replace(b"\n", b"\\n")))
        digest.update(b"%d\t%s" % (date, lines[-1]))
    return lines, digest.hexdigest()[:32]


def attempt_all(read, indices, verb: str) -> dict:
    """read(i) for some indices, in threads: {i: reason} of those that failed."""
    bad = {}

    def attempt(i):
        try:
            read(i)
        except Exception as error:  # noqa: BLE001 (a damaged file fails in any of a dozen ways)
            bad[i] = reason_of(error)

    bar = tqdm(total=len(indices), desc=f"{verb} {len(indices)} images", unit="img", leave=False, disable=None)
    with concurrent.futures.ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool, bar:
        for start in range(0, len(indices), 4096):  # a queue of a million tasks would need a gigabyte
            some = indices[start : start + 4096]
            try:
                list(pool.map(attempt, some))
            except RuntimeError as error:  # a limit on the threads of a user
                raise OSError(f"no thread to read images in: {error}") from error
            bar.update(len(some))
    return dict(sorted(bad.items()))


def check_same(names: list, device="cpu"):
    """Raise UserError on every process where these list different files: a folder changes, or disks differ."""
    if world_size() > 1:
        found = hashlib.sha256(os.fsencode("\0".join(names))).hexdigest()
        if agree(int(found != on_rank_zero(lambda: found)), device):
            raise UserError("the processes see different images; do the folders change, or differ between machines?")


def keep_good(paths: list, bad: dict, skip: bool) -> list:
    """The indices that remain without the bad images {index: reason}. Raises UserError unless these may be skipped."""
    if bad:
        shown = "; ".join(f"{paths[i]} ({reason})" for i, reason in itertools.islice(bad.items(), 5))
        shown += "; ..." if len(bad) > 5 else ""
        if not skip or len(bad) == len(paths):
            advice = "mend or remove them" + ("" if skip else ", or add --skip-bad-images")
            raise UserError(f"{len(bad)} of {len(paths)} images cannot be read: {shown}; {advice}")
        note(f"{len(bad)} of {len(paths)} images are left out, they cannot be read: {shown}")
    return [i for i in range(len(paths)) if i not in bad]


def cache_folder() -> Path | None:
    """The user's folder for what can be found out again; None without a home, as for a user id without an entry."""
    given, home = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~")
    if os.path.isabs(given):  # others are to be ignored, says the standard
        return Path(given)
    return Path(home, ".cache") if os.path.isabs(home) else None


def check_images(paths: list, digest: str, max_pixels: int = MAX_PIXELS) -> dict:
    """Decode every image file once: {index: reason} of those that cannot be read.

    Which ones are good is remembered in the user's cache folder under the digest of `survey` and `max_pixels`, so that
    a large data set is checked by the first run alone. Bad ones are looked at again: a disk may have failed only once.
    """
    folder, indices = cache_folder(), range(len(paths))
    cache = folder / "checked-images" / f"{digest}-{max_pixels}.json" if folder else None
    with contextlib.suppress(OSError, ValueError, TypeError, ArithmeticError):
        known = json.loads(cache.read_text()) if cache else indices
        indices = [int(i) for i in known if 0 <= int(i) < len(paths)]

    def read(i):
        read_whole(paths[i], max_pixels)

    bad = attempt_all(read, indices, "checking")
    with contextlib.suppress(OSError):
        if cache:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, lambda file: file.write(json.dumps(list(bad)).encode()))
    return bad
