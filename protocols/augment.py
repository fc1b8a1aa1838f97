"""Augmentation of labelled images after crop and flip, on their device, for the whole batch at once.

Images are (B, 3, H, W) with values in [0, 1]. Alphas, magnitudes and probabilities are those of the recipes in
`settings.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from plumbing.crops import crop_boxes


def mix_labels(images: Tensor, targets: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019): each image with the one at the other end of the batch.

    `mixup` and `cutmix` are the alphas of their Beta distributions, 0 for off; with both on, a coin decides for each
    image. Targets (B, classes) are mixed by the share of each image that is seen.
    """
    batch, _, height, width = images.shape
    like = {"device": images.device, "dtype": images.dtype}

    def beta(alpha):
        return torch.distributions.Beta(alpha, alpha).sample((batch, 1, 1)).to(**like)

    def span(length, share):  # pixels inside a window that is cut off at the rim of the image
        distance = (torch.arange(length, **like) + 0.5 - length * torch.rand(batch, 1, **like)).abs()  # (B, length)
        return distance < length * share[:, 0] / 2

    weight = torch.ones(batch, height, width, **like)  # of the image itself, pixel by pixel
    if mixup:
        weight = beta(mixup) * weight
    if cutmix:
        share = (1 - beta(cutmix)).sqrt()  # of the window's side in the image's
        window = span(height, share)[:, :, None] & span(width, share)[:, None, :]  # (B, H, W)
        cut = torch.rand(batch, 1, 1, device=images.device) < (0.5 if mixup else 1.0)
        weight = torch.where(cut, (~window).to(images.dtype), weight)
    seen, weight = weight.mean(dim=(1, 2))[:, None], weight[:, None]  # (B, 1), (B, 1, H, W)
    return images * weight + images.flip(0) * (1 - weight), targets * seen + targets.flip(0) * (1 - seen)


def random_erase(images: Tensor, probability: float, mean: Tensor, std: Tensor) -> Tensor:
    """Fill one random box of some images with noise of the data's mean and deviation, cut off at 0 and 1.

    Zhong et al. 2020, with the sizes of timm: 2 to 33 % of the area, aspect 0.3 to 3.3.
    """
    batch, _, height, width = images.shape
    sides = (torch.full((batch,), float(side), device=images.device) for side in (height, width))
    top, left, h, w = crop_boxes(*sides, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3)).unbind(dim=1)

    def inside(start, length, side):
        at = torch.arange(side, device=images.device) + 0.5
        return (at >= start[:, None]) & (at < (start + length)[:, None])  # (B, side)

    box = inside(top, h, height)[:, :, None] & inside(left, w, width)[:, None, :]  # (B, H, W)
    box &= torch.rand(batch, 1, 1, device=images.device) < probability
    noise = (mean + std * torch.randn_like(images)).clamp(0, 1)
    return torch.where(box[:, None], noise, images)


def warp(images: Tensor, matrix: Tensor, fill: Tensor) -> Tensor:
    """Output pixel (x, y) shows input pixel matrix (B, 2, 3) @ (x, y, 1); what lies outside is `fill` (3, 1, 1)."""
    _, _, height, width = images.shape
    y, x = torch.meshgrid(*[torch.arange(s, device=images.device) + 0.5 for s in (height, width)], indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)]).flatten(1)  # (3, H * W)
    place = (matrix @ points).view(-1, 2, height, width).permute(0, 2, 3, 1)  # (B, H, W, 2) in pixels
    grid = 2 * place / torch.tensor([width, height], device=images.device) - 1
    return F.grid_sample(images - fill, grid, align_corners=False) + fill


def affine(a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0) -> Tensor:
    """Rows (a, b, c) and (d, e, f) as matrices (B, 2, 3); entries are numbers or (B,), one of these at least."""
    like = next(v for v in (a, b, c, d, e, f) if torch.is_tensor(v))
    entries = torch.broadcast_tensors(*[torch.as_tensor(v, device=like.device) for v in (a, b, c, d, e, f)])
    return torch.stack(entries, dim=-1).unflatten(-1, (2, 3))


# The operations of RandAugment: images (B, 3, H, W), levels (B,) from -10 to 10, and the colour (3, 1, 1) of what a
# moved image uncovers -> images. Where an operation has one direction alone, the sign of its level counts for nothing.


def rotate(images, level, fill):
    """Turn anticlockwise about the centre by up to 30 degrees."""
    angle, (height, width) = torch.deg2rad(3 * level), images.shape[-2:]
    cos, sin, x, y = angle.cos(), angle.sin(), width / 2, height / 2
    return warp(images, affine(cos, -sin, x - x * cos + y * sin, sin, cos, y - x * sin - y * cos), fill)


def shear_x(images, level, fill):
    return warp(images, affine(b=0.03 * level), fill)


def shear_y(images, level, fill):
    return warp(images, affine(d=0.03 * level), fill)


def translate_x(images, level, fill):
    return warp(images, affine(c=0.045 * level * images.shape[-1]), fill)


def translate_y(images, level, fill):
    return warp(images, affine(f=0.045 * level * images.shape[-2]), fill)


def blend(other, images, level):
    """From `other` (factor 0) to the image (1) and beyond: the factor is 1 + 0.09 level, 0.1 to 1.9."""
    return torch.lerp(other, images, (1 + 0.09 * level)[:, None, None, None]).clamp(0, 1)


def grey(images):
    return (images * torch.tensor([0.299, 0.587, 0.114], device=images.device)[:, None, None]).sum(dim=1, keepdim=True)


def brightness(images, level, fill):
    return blend(torch.zeros_like(images), images, level)


def contrast(images, level, fill):
    return blend(grey(images).mean(dim=(2, 3), keepdim=True).expand_as(images), images, level)


def colour(images, level, fill):
    return blend(grey(images).expand_as(images), images, level)


def sharpness(images, level, fill):
    """Blend with a smoothed image; the outermost pixels stay."""
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=images.device) / 13
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = F.conv2d(images, kernel.expand(3, 1, 3, 3), groups=3)
    return blend(smooth, images, level)


def invert(images, level, fill):
    return 1 - images


def bytes_of(images: Tensor) -> Tensor:
    return (images * 255).round().long()


def posterize(images, level, fill):
    """Keep the four highest bits of each value at level 0, none at level 10."""
    dropped = (4 + (0.4 * level.abs()).long())[:, None, None, None]
    return (bytes_of(images) >> dropped << dropped) / 255


def solarize(images, level, fill):
    """Invert values of at least 256 (level 0: none) down to 0 (level 10: all)."""
    threshold = (256 - (25.6 * level.abs()).long())[:, None, None, None]
    return torch.where(bytes_of(images) >= threshold, 1 - images, images)


def solarize_add(images, level, fill):
    """Add up to 110 to values below 128."""
    added = (images + (11 * level.abs()).long()[:, None, None, None] / 255).clamp(0, 1)
    return torch.where(bytes_of(images) < 128, added, images)


def autocontrast(images, level, fill):
    """Stretch each channel to the whole range; a channel of one value stays."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp_min(1e-6), images).clamp(0, 1)


def equalize(images, level, fill):
    """Spread the values of each channel evenly over the range: histogram equalisation as in Pillow."""
    values = bytes_of(images).flatten(2)  # (B, 3, H * W)
    histogram = torch.zeros(*values.shape[:2], 256, dtype=torch.long, device=images.device)
    histogram.scatter_add_(2, values, torch.ones_like(values))
    last = histogram.gather(2, values.amax(dim=2, keepdim=True))  # of the largest value that occurs
    step = (values.shape[2] - last) // 255
    table = (step // 2 + histogram.cumsum(dim=2) - histogram) // step.clamp_min(1)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device)).clamp(0, 255)
    return table.gather(2, values).view_as(images) / 255


OPERATIONS = (autocontrast, equalize, invert, rotate, posterize, solarize, solarize_add, colour, contrast, brightness)
OPERATIONS += (sharpness, shear_x, shear_y, translate_x, translate_y)


def rand_augment(images: Tensor, fill: Tensor, magnitude: float = 9.0, std: float = 0.5) -> Tensor:
    """RandAugment (Cubuk et al. 2020), "(9, 0.5)" in the papers: timm's rand-m9-mstd0.5-inc1, as MAE's release uses it.

    Twice, each image draws one of OPERATIONS and applies it with probability 1/2, at a level from a normal distribution
    cut off at 0 and 10, in a random direction where there are two. `fill` (3, 1, 1) is the colour behind moved images.
    """
    images, batch = images.clone(), len(images)
    for _ in range(2):
        choice = torch.randint(len(OPERATIONS), (batch,))  # drawn on the CPU: reading it from a GPU would wait
        choice[torch.rand(batch) < 0.5] = -1
        level = (magnitude + std * torch.randn(batch)).clamp(0, 10) * (2 * torch.randint(2, (batch,)) - 1)
        level = level.to(images.device)
        for number, operation in enumerate(OPERATIONS):
            chosen = torch.nonzero(choice == number)[:, 0]
            if len(chosen):
                chosen = chosen.to(images.device)
                images[chosen] = operation(images[chosen], level[chosen], fill)
    return images
