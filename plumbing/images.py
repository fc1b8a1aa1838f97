"""Images in memory or in files: which ones a step loads, and their batches."""

import itertools
import math
import os
import signal
from dataclasses import dataclass

import torch
from torch import Tensor

from plumbing.crops import Crop, crop_draws, mix_seed, padded_crop, random_resized_crop, resize
from plumbing.decoding import MAX_PIXELS, decode_image
from plumbing.errors import UserError, reason_of
from plumbing.processes import STOP_SIGNALS, rank, world_size


def shuffled(images: int, wanted: int, seed: int) -> Tensor:
    """So many indices of images: passes over all of them, each in a random order, the last one cut."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(images, generator=generator) for _ in range(math.ceil(wanted / images))]
    return torch.cat(passes)[:wanted]


class BatchPlan:
    """Which images each step loads; its length is the number of steps of an epoch: --epoch-steps, or one pass.

    Which images make up a global batch depends on (seed, step) alone, not on the number of processes.
    """

    def __init__(self, images: int, config):
        self.images, self.config = images, config

    def __len__(self):
        return self.config.epoch_steps or self.images // self.config.batch_size

    def steps_of(self, epoch: int) -> range:
        return range(epoch * len(self), (epoch + 1) * len(self))

    def draw(self, epoch: int) -> list:
        """The global batches of an epoch, in order: indices (parts, batch_size) a step, here of one part."""
        order = shuffled(self.images, len(self) * self.config.batch_size, mix_seed(self.config.seed, epoch, 0))
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

    `masks` (N, H, W), True on the object, exists for `shapes` alone. `listing` tells which files it was read from.
    """

    images: Tensor
    labels: Tensor
    classes: list
    mean: tuple
    std: tuple
    masks: Tensor | None = None
    listing: bytes = b""  # a line a file: its size and its name below the root

    def __len__(self):
        return len(self.labels)

    def train_batches(self, plan, size, crop=(0.08, 1.0), flip=0.5, views=1):
        """Augmented batches for a plan of (seed, indices): float (B, 3, size, size), or (B, V, 3, ...), and labels.

        `crop`: a `Crop`, or the least and largest share of the image that a resized crop keeps; or, as one number, the
        pixels around a padded one.
        """
        cut = random_resized_crop if isinstance(crop, tuple) else padded_crop
        generator = torch.Generator(self.images.device)
        for seed, indices in plan:
            indices = torch.as_tensor(indices).to(self.images.device, non_blocking=True)
            raw = self.images[indices].repeat_interleave(views, dim=0)  # (B * V, 3, H, W)
            images = cut(raw, size, crop, flip=flip, generator=generator.manual_seed(seed))
            images = images if views == 1 else images.unflatten(0, (-1, views))
            yield images, self.labels[indices]

    def plain_batches(self, indices, size, batch=500):
        """Whole images without augmentation, in order: float (B, 3, size, size) in [0, 1] and labels."""
        for part in torch.as_tensor(indices, device=self.images.device).split(batch):
            yield resize(self.images[part], size), self.labels[part]


@dataclass
class FolderImages:
    """A data set of image files, decoded, cropped and resized by `workers` processes, which `device` gets; with 0 by
    this one. See `read_folders`. `listing` tells which files these are.
    """

    paths: list
    labels: Tensor
    classes: list
    mean: tuple
    std: tuple
    listing: bytes = b""  # a line a file: its size and its name below the root; process 0 alone has it
    workers: int = 0
    device: torch.device | str = "cpu"
    max_pixels: int = MAX_PIXELS

    def __len__(self):
        return len(self.labels)

    def train_batches(self, plan, size, crop=(0.08, 1.0), flip=0.5, views=1):
        """As MemoryImages.train_batches, without padded crops. A step's seed and a place in the batch make a crop."""
        ahead, behind = itertools.tee(plan)  # the workers run ahead of the batches that come out
        keys = ([(i, seed, place) for place, i in enumerate(torch.as_tensor(part).tolist())] for seed, part in ahead)
        loaded = self._load(keys, _Decoder(self.paths, self.labels, size, crop, views, self.max_pixels))
        generator = torch.Generator(self.device)
        for (seed, _), (images, labels) in zip(behind, loaded, strict=True):
            images = images.flatten(0, 1)  # bytes (B * V, 3, size, size)
            mirror = torch.rand(len(images), device=images.device, generator=generator.manual_seed(seed)) < flip
            images = mirrored(images, mirror).float().div_(255)
            yield (images if views == 1 else images.unflatten(0, (-1, views))), labels

    def plain_batches(self, indices, size, batch=100):
        """Images without augmentation: the shorter side resized to size * 256 / 224, then the centre square."""
        parts = ([(i, None, 0) for i in part.tolist()] for part in torch.as_tensor(indices).split(batch))
        for images, labels in self._load(parts, _Decoder(self.paths, self.labels, size, max_pixels=self.max_pixels)):
            yield images[:, 0].float().div_(255), labels

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
            if isinstance(batch, RuntimeError):
                raise batch
            yield [x.to(self.device, non_blocking=True) for x in batch]


def mirrored(images: Tensor, mirror: Tensor) -> Tensor:
    """Bytes (B, 3, H, W), flipped left to right where `mirror` (B,) says so."""
    # Eight bytes at a time where they go into a picture: one by one, `where` takes five times as long.
    word = torch.int64 if images[0].numel() % 8 == 0 else torch.uint8
    there, here = (x.flatten(1).view(word) for x in (images.flip(-1), images))
    return torch.where(mirror[:, None], there, here).view(torch.uint8).view(images.shape)


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
    crop: tuple = Crop()
    views: int = 1
    max_pixels: int = MAX_PIXELS

    def __len__(self):
        return len(self.paths)

    def __getitems__(self, keys):
        """Of a whole batch: what is drawn for all at once takes a quarter of the time, and gives the same."""
        seeds = [
            mix_seed(seed, place, view) for _, seed, place in keys if seed is not None for view in range(self.views)
        ]
        draws = iter(crop_draws(seeds) if seeds else [])
        return [
            self._read(index, [None if seed is None else next(draws) for _ in range(self.views)])
            for index, seed, _ in keys
        ]

    def _read(self, index, draws):
        try:
            return decode_image(self.paths[index], self.size, self.crop, draws, self.max_pixels), self.labels[index]
        except Exception as error:  # noqa: BLE001 (a damaged file fails in any of a dozen ways)
            return f"{self.paths[index]} cannot be read as an image ({reason_of(error)}); mend or remove it"


def _stack(items):
    broken = next((item for item in items if isinstance(item, str)), None)
    if broken:
        return broken
    parts = tuple(torch.stack(part) for part in zip(*items, strict=True))
    try:
        # Else a thread of torch's does it, which prints what fails, and the parent waits for this batch for ever.
        return tuple(part.share_memory_() for part in parts) if torch.utils.data.get_worker_info() else parts
    except RuntimeError as error:
        return error
