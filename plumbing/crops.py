"""Crops and resampling, the whole batch at once on its device. Images (B, 3, H, W)."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Crop(NamedTuple):
    """How random resized crops are made, of images in memory and of files; (0.08, 1.0) alone will do for one."""

    least: float = 0.08  # smallest share of the image
    most: float = 1.0  # largest share of the image
    interpolation: str = ""  # a key of KERNELS; by default bilinear of images in memory, bicubic of files
    clamp: bool = False  # cut a box that does not fit, rather than draw again


def mix_seed(*numbers: int) -> int:
    """One well-mixed 63-bit seed from small numbers, the same on every machine. Zeros at the end do not count."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def crop_boxes(
    height: Tensor, width: Tensor, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), generator=None, clamp: bool = False
) -> Tensor:
    """Boxes of random resized crops: image sizes (B,), (B,) -> (B, 4) as (top, left, height, width), in pixels.

    Area is uniform in `scale` (share of the image), aspect log-uniform in `ratio`; the first of ten draws that fits is
    taken, otherwise the largest centred box of an allowed aspect (the rule of torchvision's RandomResizedCrop). With
    `clamp`, the first draw is cut to the sides of the image, whatever its aspect is then (MAE's code, util/crop.py).
    """
    device, batch = height.device, len(height)
    draw = torch.rand(4, batch, 10, device=device, generator=generator)  # ten tries an image
    area = (scale[0] + (scale[1] - scale[0]) * draw[0]) * (height * width)[:, None]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * draw[1])
    h, w = (area / aspect).sqrt(), (area * aspect).sqrt()  # (B, 10)
    if clamp:
        h, w = torch.minimum(h, height[:, None]), torch.minimum(w, width[:, None])
    fits = (h <= height[:, None]) & (w <= width[:, None])
    first = fits.int().argmax(dim=1, keepdim=True)
    image_aspect = (width / height).clamp(*ratio)
    fallback_w = torch.minimum(width, height * image_aspect)
    found = fits.any(dim=1)
    fallback_h = torch.minimum(height, fallback_w / image_aspect)
    h = torch.where(found, h.gather(1, first)[:, 0], fallback_h)
    w = torch.where(found, w.gather(1, first)[:, 0], fallback_w)
    place = torch.where(found, draw[2:, :, 0], 0.5)  # the fallback is centred
    return torch.stack([(height - h) * place[0], (width - w) * place[1], h, w], dim=1)


def crop_draws(seeds: list) -> np.ndarray:
    """What `crop_box` needs to be drawn, a picture a seed: (len(seeds), 4, 10), as `crop_boxes` would draw it."""
    generator, low, high = torch.Generator(), math.log(3 / 4), math.log(4 / 3)
    draws = torch.stack([torch.rand(4, 10, generator=generator.manual_seed(seed)) for seed in seeds])
    draws[:, 1] = torch.exp(low + (high - low) * draws[:, 1])
    return draws.numpy()


def crop_box(height: int, width: int, scale, draw: np.ndarray, clamp: bool = False) -> tuple:
    """The box that `crop_boxes` makes of one image, to the last bit: (top, left, height, width) in pixels.

    With numbers, since thirty operations on tensors of ten would take a tenth of what decoding a picture takes.
    """
    height, width = np.float32(height), np.float32(width)
    share, aspect, *places = draw
    area = (scale[0] + (scale[1] - scale[0]) * share) * (height * width)
    tries = torch.from_numpy(np.stack([area / aspect, area * aspect])).sqrt().numpy()  # numpy's roots differ in a bit
    for h, w in tries.T:
        if clamp:
            h, w = min(h, height), min(w, width)
        if h <= height and w <= width:
            place = places[0][0], places[1][0]
            break
    else:
        aspect = np.clip(width / height, np.float32(3 / 4), np.float32(4 / 3))
        w, place = min(width, height * aspect), (0.5, 0.5)
        h = min(height, w / aspect)
    return tuple(float(x) for x in ((height - h) * place[0], (width - w) * place[1], h, w))


def triangle(distance: Tensor) -> Tensor:
    """The kernel of bilinear interpolation: distances >= 0, in pixels -> weights."""
    return (1 - distance).clamp_min(0)


def cubic(distance: Tensor) -> Tensor:
    """The kernel of bicubic interpolation with a = -1/2 (Keys 1981), Pillow's: distances >= 0, in pixels -> weights.

    torch has a = -1/2 too where it takes a low-pass (`antialias`), else -3/4.
    """
    x = distance.clamp_max(2)
    return torch.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)


KERNELS = {"bilinear": triangle, "bicubic": cubic}


def resize_matrix(start: Tensor, length: Tensor, source: int, target: int, interpolation: str = "bilinear") -> Tensor:
    """Resampling of one axis as a matrix: windows (B,), (B,) of `source` pixels -> (B, target, source).

    Row i holds the weights of output pixel i. Windows that shrink are low-passed (the kernel grows with the step), as
    in Pillow. A negative length, with the start at the other end, flips.
    """
    step = (length / target)[:, None]  # (B, 1) source pixels an output pixel
    centre = start[:, None] + (torch.arange(target, device=start.device) + 0.5) * step  # (B, target)
    pixel = torch.arange(source, device=start.device) + 0.5
    distance = (pixel - centre[..., None]).abs() / step.abs().clamp_min(1)[..., None]  # (B, target, source)
    weight = KERNELS[interpolation](distance)
    return weight / weight.sum(dim=-1, keepdim=True)


def resample(images: Tensor, rows: Tensor, columns: Tensor, most: float | None = None) -> Tensor:
    """Apply a row matrix (B, h, H) and a column matrix (B, w, W) to images (B, C, H, W) -> (B, C, h, w).

    With `most`, what the columns give is cut to 0 to `most` before the rows follow, as in Pillow: cubics overshoot.
    """
    batch, channels, height, _ = images.shape
    x = torch.bmm(images.flatten(1, 2), columns.transpose(1, 2))  # (B, C * H, w)
    x = x if most is None else x.clamp(0, most)
    # Two plain batched products: matmul with a broadcast axis is five times slower on CPUs.
    x = torch.bmm(rows.repeat_interleave(channels, dim=0), x.view(batch * channels, height, -1))
    return x.view(batch, channels, rows.shape[1], -1)


def resize(images: Tensor, size: int) -> Tensor:
    """Whole images (B, 3, H, W), uint8 or float -> float (B, 3, size, size) in [0, 1]."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    if images.shape[-2:] == (size, size):
        return images
    zero = torch.zeros(1, device=images.device)
    rows, columns = (resize_matrix(zero, zero + side, side, size) for side in images.shape[-2:])
    return resample(images, rows.expand(len(images), -1, -1), columns.expand(len(images), -1, -1)).clamp(0, 1)


def random_resized_crop(images: Tensor, size: int, *args, **options) -> Tensor:
    """Each image with its own random crop and flip, the whole batch at once: uint8 (B, 3, H, W) -> float in [0, 1].

    The other arguments are those of `crop_with_windows`.
    """
    return crop_with_windows(images, size, *args, **options)[0]


def crop_with_windows(
    images: Tensor, size: int, crop=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip: float = 0.5, generator=None
) -> tuple:
    """`random_resized_crop`, and the windows that it takes: (start, length) of the rows and of the columns, each (B,).

    `crop` is a Crop, or the least and largest share of the image. By two batched matrix products, bilinear unless it
    says otherwise. `flip` is the probability of a mirror image; its columns have a negative length.
    """
    *scale, interpolation, clamp = Crop(*crop)
    (height, width), kernel = images.shape[2:], interpolation or "bilinear"
    sides = (torch.full((len(images),), float(side), device=images.device) for side in (height, width))
    top, left, h, w = crop_boxes(*sides, scale, ratio, generator, clamp).unbind(dim=1)
    flipped = torch.rand(len(images), device=images.device, generator=generator) < flip
    left, w = torch.where(flipped, left + w, left), torch.where(flipped, -w, w)
    rows, columns = resize_matrix(top, h, height, size, kernel), resize_matrix(left, w, width, size, kernel)
    images = resample(images.float(), rows, columns / 255, 1.0 if kernel == "bicubic" else None).clamp(0, 1)
    return images, (top, h), (left, w)


def padded_crop(images: Tensor, size: int, pad: int, flip: float = 0.5, generator=None) -> Tensor:
    """Each image, in a frame of `pad` black pixels, cropped to its own size anywhere: uint8 (B, 3, H, W) -> [0, 1].

    The usual crop of CIFAR. `flip` is the probability of a mirror image; another `size` is resized to.
    """
    batch, _, height, width = images.shape
    device = images.device
    corner = torch.randint(2 * pad + 1, (2, batch, 1), device=device, generator=generator)
    flipped = torch.rand(batch, 1, device=device, generator=generator) < flip
    rows = corner[0] + torch.arange(height, device=device)  # (B, H)
    columns = corner[1] + torch.arange(width, device=device)  # (B, W)
    columns = torch.where(flipped, columns.flip(1), columns)
    framed = F.pad(images, (pad, pad, pad, pad)).movedim(1, -1)  # (B, H + 2 pad, W + 2 pad, 3)
    number = torch.arange(batch, device=device)[:, None, None]
    return resize(framed[number, rows[:, :, None], columns[:, None]].movedim(-1, 1), size)
