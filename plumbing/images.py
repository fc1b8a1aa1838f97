"""Images in memory or in files: which ones a step loads, decoding, checking, batches."""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import os
import signal
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from plumbing.crops import crop_boxes, mix_seed, random_resized_crop, resize
from plumbing.errors import UserError
from plumbing.files import write_atomically
from plumbing.processes import STOP_SIGNALS, rank, world_size


class BatchPlan:
    """Which images each step loads; its length is the number of steps of an epoch.

    Which images make up a global batch depends on (seed, step) alone, not on the number of processes.
    """

    def __init__(self, images: int, config):
        self.images, self.config = images, config

    def __len__(self):
        return self.images // self.config.batch_size

    def steps_of(self, epoch: int) -> range:
        return range(epoch * len(self), (epoch + 1) * len(self))

    def draw(self, epoch: int) -> list:
        """The global batches of an epoch, in order: indices (parts, batch_size) a step, here of one part."""
        generator = torch.Generator().manual_seed(mix_seed(self.config.seed, epoch, 0))
        order = torch.randperm(self.images, generator=generator)[: len(self) * self.config.batch_size]
        return list(order.view(len(self), 1, self.config.batch_size))

    def after(self, first_step: int):
        """What this process loads from `first_step` on: (seed, indices) a step."""
        share = self.config.batch_size // world_size()
        for epoch in range(first_step // len(self), self.config.epochs):
            for step, batch in zip(self.steps_of(epoch), self.draw(epoch), strict=True):
                if step >= first_step:
                    mine = batch[:, rank() * share : (rank() + 1) * share].flatten()
                    yield mix_seed(self.config.seed, step, rank(), 1), mine


@dataclass
class MemoryImages:
    """A data set held as one uint8 tensor (N, 3, H, W); batches are made where it lives, all images at once.

    `masks` (N, H, W), True on the object, exists for `shapes` alone.
    """

    images: Tensor
    labels: Tensor
    classes: list
    mean: tuple
    std: tuple
    masks: Tensor | None = None

    def __len__(self):
        return len(self.labels)

    def train_batches(self, plan, size, scale=(0.08, 1.0), flip=0.5, views=1):
        """Augmented batches for a plan of (seed, indices): float (B, 3, size, size), or (B, V, 3, ...), and labels."""
        generator = torch.Generator(self.images.device)
        for seed, indices in plan:
            indices = torch.as_tensor(indices).to(self.images.device, non_blocking=True)
            raw = self.images[indices].repeat_interleave(views, dim=0)  # (B * V, 3, H, W)
            images = random_resized_crop(raw, size, scale, flip=flip, generator=generator.manual_seed(seed))
            images = images if views == 1 else images.unflatten(0, (-1, views))
            yield images, self.labels[indices]

    def plain_batches(self, indices, size, batch=500):
        """Whole images without augmentation, in order: float (B, 3, size, size) in [0, 1] and labels."""
        for part in torch.as_tensor(indices, device=self.images.device).split(batch):
            yield resize(self.images[part], size), self.labels[part]


@dataclass
class FolderImages:
    """A data set of image files, decoded, cropped and resized by `workers` processes, which `device` gets; with 0 by
    this one. See `read_folders`.
    """

    paths: list
    labels: Tensor
    classes: list
    mean: tuple
    std: tuple
    workers: int = 0
    device: torch.device | str = "cpu"

    def __len__(self):
        return len(self.labels)

    def train_batches(self, plan, size, scale=(0.08, 1.0), flip=0.5, views=1):
        """As MemoryImages.train_batches. Each crop depends on the seed of its step and its place in the batch alone."""
        ahead, behind = itertools.tee(plan)  # the workers run ahead of the batches that come out
        keys = ([(i, seed, place) for place, i in enumerate(torch.as_tensor(part).tolist())] for seed, part in ahead)
        loaded = self._load(keys, _Decoder(self.paths, self.labels, size, scale, views))
        generator = torch.Generator(self.device)
        for (seed, _), (images, labels) in zip(behind, loaded, strict=True):
            images = images.flatten(0, 1).float() / 255  # (B * V, 3, size, size)
            mirror = torch.rand(len(images), device=images.device, generator=generator.manual_seed(seed)) < flip
            images = torch.where(mirror[:, None, None, None], images.flip(-1), images)
            yield (images if views == 1 else images.unflatten(0, (-1, views))), labels

    def plain_batches(self, indices, size, batch=100):
        """Images without augmentation: the shorter side resized to size * 256 / 224, then the centre square."""
        parts = [[(i, None, 0) for i in part.tolist()] for part in torch.as_tensor(indices).split(batch)]
        for images, labels in self._load(parts, _Decoder(self.paths, self.labels, size)):
            yield images[:, 0].float() / 255, labels

    def _load(self, keys, decoder):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else self.workers
        loader = torch.utils.data.DataLoader(
            decoder,
            batch_sampler=keys,
            num_workers=min(self.workers, cores),
            collate_fn=_stack,
            pin_memory=torch.device(self.device).type == "cuda",
            generator=torch.Generator(),
            worker_init_fn=_leave_signals_to_the_parent,
        )
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
            yield [x.to(self.device, non_blocking=True) for x in batch]


def _leave_signals_to_the_parent(_):
    """Ctrl-C and a cluster's SIGTERM reach every process; the parent still wants the images of its current step."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # A parent that ends in disorder sends SIGTERM too, and waits: so this process lives on for half a minute at most.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


@dataclass
class _Decoder(torch.utils.data.Dataset):
    """A worker's task: (index, seed, place) -> uint8 (V, 3, size, size) and the label; without seed no augmentation.

    An image that cannot be read comes back as the text of the error: an exception would lose its one clear line.
    """

    paths: list
    labels: Tensor
    size: int
    scale: tuple = (0.08, 1.0)
    views: int = 1

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        index, seed, place = key
        seeds = [None if seed is None else mix_seed(seed, place, view) for view in range(self.views)]
        try:
            return decode_image(self.paths[index], self.size, self.scale, seeds), self.labels[index]
        except Exception as error:  # noqa: BLE001 (a damaged file fails in any of a dozen ways)
            return f"{self.paths[index]} cannot be read as an image ({error}); mend or remove it"


def _stack(items):
    broken = next((item for item in items if isinstance(item, str)), None)
    return broken or tuple(torch.stack(part) for part in zip(*items, strict=True))


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
