"""Picture files: open, decode, turn upright, check."""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import os
import stat
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from plumbing.crops import crop_boxes
from plumbing.errors import UserError
from plumbing.files import write_atomically
from plumbing.processes import rank


def decode_image(path, size: int, scale=(0.08, 1.0), seeds=(None,)) -> Tensor:
    """Read one image file -> uint8 (V, 3, size, size): a random resized crop a seed, the centre square for None.

    JPEG, PNG and WebP; grey, palette, CMYK, 16-bit and turned (EXIF) files come out as upright RGB. Bicubic.
    Raises OSError, SyntaxError, ValueError or struct.error where the file is damaged.
    """
    with Image.open(path) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientation: on its side
        width, height = image.size[::-1] if turned else image.size
        boxes = []
        for seed in seeds:
            if seed is None:
                side = min(height, width) * 224 / 256
                boxes.append([(height - side) / 2, (width - side) / 2, side, side])
            else:
                sides, generator = torch.tensor([[height], [width]]).float(), torch.Generator().manual_seed(seed)
                boxes.append(crop_boxes(*sides, scale, generator=generator)[0].tolist())
        shrink = min(min(h, w) for _, _, h, w in boxes) / size
        if image.format == "JPEG" and shrink >= 2:  # let the decoder skip what the crops would throw away
            image.draft("RGB", (int(image.size[0] / shrink), int(image.size[1] / shrink)))
        upright = to_rgb(ImageOps.exif_transpose(image))
    sx, sy = upright.width / width, upright.height / height  # less than 1 after draft
    crops = []
    for top, left, h, w in boxes:
        box = (left * sx, top * sy, min((left + w) * sx, upright.width), min((top + h) * sy, upright.height))
        crops.append(np.asarray(upright.resize((size, size), Image.Resampling.BICUBIC, box=box)))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB; 16-bit grey is scaled rather than cut off, transparency is dropped."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        values = values / 257 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else values
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def attempt_all(read, indices, verb: str) -> dict:
    """read(i) for some indices, in threads: {i: reason} of those that failed."""
    bad = {}

    def attempt(i):
        try:
            read(i)
        except Exception as error:  # noqa: BLE001 (a damaged file fails in any of a dozen ways)
            bad[i] = " ".join(str(error).split()) or type(error).__name__

    bar = tqdm(total=len(indices), desc=f"{verb} {len(indices)} images", unit="img", leave=False, disable=None)
    with concurrent.futures.ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool, bar:
        for start in range(0, len(indices), 4096):  # a queue of a million tasks would need a gigabyte
            some = indices[start : start + 4096]
            list(pool.map(attempt, some))
            bar.update(len(some))
    return dict(sorted(bad.items()))


def keep_good(paths: list, bad: dict, skip: bool) -> list:
    """The indices that remain without the bad images {index: reason}. Raises UserError unless these may be skipped."""
    if bad:
        shown = "; ".join(f"{paths[i]} ({reason})" for i, reason in itertools.islice(bad.items(), 5))
        shown += "; ..." if len(bad) > 5 else ""
        if not skip or len(bad) == len(paths):
            advice = "mend or remove them" + ("" if skip else ", or add --skip-bad-images")
            raise UserError(f"{len(bad)} of {len(paths)} images cannot be read: {shown}; {advice}")
        if rank() == 0:
            print(f"note: {len(bad)} of {len(paths)} images are left out, they cannot be read: {shown}", flush=True)
    return [i for i in range(len(paths)) if i not in bad]


def check_images(paths: list) -> dict:
    """Decode every image file once: {index: reason} of those that cannot be read.

    Which ones are good is remembered in the user's cache folder for as long as no file changes its name, size or date,
    so that a large data set is checked by the first run alone. Bad ones are looked at again: a disk may have failed
    only once.
    """
    key = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(path)
            seen = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            seen = "missing"
        key.update(f"{os.path.abspath(path)}\0{seen}\n".encode())
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    cache, indices = home / "checked-images" / f"{key.hexdigest()[:32]}.json", range(len(paths))
    with contextlib.suppress(OSError, ValueError, TypeError):
        indices = [int(i) for i in json.loads(cache.read_text()) if 0 <= int(i) < len(paths)]

    def read(i):
        if not stat.S_ISREG(os.stat(paths[i]).st_mode):
            raise OSError("not a plain file")  # a pipe or a device could be read for ever
        with Image.open(paths[i]) as image:
            image.draft("RGB", (1, 1))  # a JPEG at an eighth of its resolution: faster, and shows the same damage
            to_rgb(ImageOps.exif_transpose(image))

    bad = attempt_all(read, indices, "checking")
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, lambda file: file.write(json.dumps(list(bad)).encode()))
    return bad
