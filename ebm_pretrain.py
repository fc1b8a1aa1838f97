"""Energy-inspired pretraining: restore a corrupted image by descending a learned energy.

Wang, Wang, Liu and Qiu, "Energy-Inspired Self-Supervised Pretraining for Vision Models" (ICML workshop
2022, ICLR 2023; numbers of equations and tables are those of the workshop text).

The idea: put a linear head with one output on any vision model and call the output an energy. Corrupt an image: mask
it, blur it, add noise, take its colour. Follow the gradient of the energy *with respect to the pixels* downhill for a
step or two, and ask that the original comes out. The forward pass is the encoder and the backward pass is the decoder,
so nothing has to be added to the model, and nothing thrown away after training but the head.

Equation                                                      function
Sec. 2.2   energy of an image                                 Energy
Eq. 3, 4   gradient steps, stop-gradient between them         descent, restore
Eq. 4      error of every step                                restoration_loss
Eq. 2      corrupted images as negatives (N = 0, Fig. A)      contrast_loss
App. A.2   super-resolution, denoising                        super_resolution, noise
Sec. 3.1   colorization                                       grayscale
App. A.3   masks                                              gridded_mask, random_patches
Fig. 1     longer chains, and their energies                  sample
Table B    other backbones                                    ConvNeXt, Swin

Train it:  python train.py ebm_pretrain                                  on built-in pictures, on a laptop
           python train.py ebm_pretrain --model swin_micro               any backbone
           python train.py ebm_pretrain --data imagenet --root DIR       the paper's experiment (Table A)
Look at it: python evaluate.py runs/ebm_pretrain-shapes --protocol energy

No code was released. What the text leaves open, and our choice:
* The energy acts on images of zero mean and unit variance a channel, and so do masks (blank is 0, the mean colour) and
  noise. Colour is removed from images in [0, 1], by the luma weights of ITU-R BT.601. The feature under the head is the
  mean of the patch tokens after the final norm, as in MAE's fine-tuning.
* The step size alpha is learned, but where it starts is not told. Pixel gradients of a fresh network are about 1e-4, so
  with alpha = 0.1 no pixel would move for epochs. Here log alpha is learned, without weight decay, and
  starts such that the first step on the first batch has a root mean square of 0.3. The head starts as nn.Linear does.
* Eq. 4 has the squared error and divides by the number of steps; Listing 1 has SmoothL1 (beta 1) and adds the steps up.
  We follow the listing, but average over the steps: AdamW hardly sees a constant factor. `--criterion mse` is Eq. 4.
* All pixels count, as in Eq. 4 and the listing; `--scored changed` counts only those that the corruption changed.
* N = 0 is "using corrupted images as negative", but no loss is given. Ours is softplus(E(x) - E(corrupted)), whose
  gradient is that of Eq. 2, weighted by how far the two are from being told apart; Eq. 2 itself has no lower bound.
* Gridded masks: squares of `grid` pixels, cut off at the border where they do not divide the image; ratio 0.7.
* Random patches: the text draws "normalized sizes" from U(0.01, 0.025) for 75 small ones; we take sizes for shares of
  the area. For 25 large ones it prints U(0.5, 2.0), which would blank every image; it looks like a range of aspect
  ratios. Ours is U(0.03, 0.075): a third of the patches with three times the area. Aspects are log-uniform in 0.5 to 2.
* Super-resolution: bicubic with antialiasing, cut to the range of each channel; sides are rounded where s does not
  divide them.
* Mixed: one of masks, super-resolution, noise and grey, drawn for each image, each at the strength of its own setting.
* Warm-up 10 epochs; smallest crop 0.2, as in MAE.
* The autoencoders of Table 2 are the same encoder on the whole corrupted image, then MAE's decoder (8 blocks, width
  512); their loss is that of the energy, on normalised pixels.
* ConvNeXt-T and Swin-T have no stochastic depth here. ConvNeXt's last norm acts before the mean over places, not after
  it; the stems keep torch's own biases (`start_small` says why).
* Weights that the loss does not depend on, such as the bias of the last norm, are frozen.
Not here: ADE20K (Table C).
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import (
    VIT_SIZES,
    Block,
    MaskedAutoencoder,
    Method,
    MobileFormer,
    ViT,
    attend_plainly,
    reconstruction_loss,
    unpatchify,
)
from plumbing.encoders import Encoder
from plumbing.errors import UserError
from plumbing.probes import features_of, labelled, pooled_features, probe
from plumbing.processes import autocast, average
from plumbing.settings import TrainConfig, check_least, check_positive

# ---------------------------------------------------------------------------------------------------------------------
# Corruptions: images (B, C, H, W) -> corrupted images. All draws come from `generator`, for each image on its own.
# ---------------------------------------------------------------------------------------------------------------------


def gridded_mask(images: Tensor, patch: int, ratio: float, generator=None) -> Tensor:
    """Blank round(ratio * cells) of the squares of a grid, `patch` pixels a side, in each image (App. A.3).

    Squares at the right and lower border are cut off where `patch` does not divide the image.
    """
    height, width = images.shape[-2:]
    rows, columns = -(-height // patch), -(-width // patch)
    cells = rows * columns
    draw = torch.rand(len(images), cells, generator=generator, device=images.device)
    blank = draw.argsort(dim=1).argsort(dim=1) >= cells - round(ratio * cells)  # (B, cells), exact counts in each row
    blank = blank.unflatten(1, (1, rows, columns))
    blank = blank.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)[..., :height, :width]  # (B, 1, H, W)
    return images.masked_fill(blank, 0)  # the mean colour


def random_patches(
    images: Tensor,
    count: int,
    low: float,
    high: float,
    generator=None,
    aspect: tuple[float, float] = (0.5, 2.0),
) -> Tensor:
    """Blank `count` rectangles anywhere in each image, each with a share U(low, high) of its area (App. A.3).

    Height over width is log-uniform in `aspect`; no side is longer than the image. A pixel is blank if its centre is.
    """
    draw = torch.rand(4, len(images), count, generator=generator, device=images.device)  # each (B, count)
    area, ratio = low + (high - low) * draw[0], aspect[0] * (aspect[1] / aspect[0]) ** draw[1]

    def covered(share, place, side):  # which pixels of an axis each rectangle covers: (B, count, side)
        share = share.clamp_max(1)
        start = place * (1 - share) * side
        centre = torch.arange(side, device=images.device) + 0.5
        return (centre >= start[..., None]) & (centre < (start + share * side)[..., None])

    # A product of two thin matrices counts the rectangles over each pixel, without a map for each rectangle.
    shape = images.shape[-2] / images.shape[-1]  # of the image: areas and aspects are in pixels
    rows = covered((area * ratio / shape).sqrt(), draw[2], images.shape[-2]).float()
    columns = covered((area / ratio * shape).sqrt(), draw[3], images.shape[-1]).float()
    blank = torch.einsum("bkh,bkw->bhw", rows, columns) > 0.5
    return images.masked_fill(blank[:, None], 0)


def super_resolution(images: Tensor, scale: int) -> Tensor:
    """Shrink by `scale`, bicubic, and enlarge to the old size by repeating pixels (App. A.2).

    The small image has max(1, round(side / scale)) pixels a side. Bicubic overshoots at edges; values are cut to the
    range that the channel of the image had.
    """
    if scale == 1:
        return images
    height, width = images.shape[-2:]
    small = [max(1, round(side / scale)) for side in (height, width)]
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)  # of each channel
    shrunk = F.interpolate(images, small, mode="bicubic", antialias=True).clamp(low, high)
    return F.interpolate(shrunk, (height, width), mode="nearest-exact")


def noise(images: Tensor, gamma: Tensor | float | None = None, generator=None) -> Tensor:
    """sqrt(gamma) x + sqrt(1 - gamma) eps, eps ~ N(0, I); gamma ~ U(0, 1) for each image unless given (App. A.2)."""
    if gamma is None:
        gamma = torch.rand(len(images), generator=generator, device=images.device)
    gamma = torch.as_tensor(gamma, dtype=images.dtype, device=images.device).expand(len(images))[:, None, None, None]
    eps = torch.randn(images.shape, generator=generator, dtype=images.dtype, device=images.device)
    return gamma.sqrt() * images + (1 - gamma).sqrt() * eps


def grayscale(images: Tensor) -> Tensor:
    """RGB images (B, 3, H, W) without their colour: three equal channels (section 3.1, colorization)."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=images.dtype, device=images.device).view(3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True).expand_as(images)


def mixed(corrupted: list, generator=None) -> Tensor:
    """For each image one of K corrupted versions, each (B, C, H, W), drawn uniformly (section 3.2)."""
    versions, device = torch.stack(corrupted, dim=1), corrupted[0].device  # (B, K, C, H, W)
    task = torch.randint(len(corrupted), (len(versions),), generator=generator, device=device)
    return versions[torch.arange(len(versions), device=device), task]


# ---------------------------------------------------------------------------------------------------------------------
# Restoration
# ---------------------------------------------------------------------------------------------------------------------


def descent(energy, x: Tensor, step_size: Tensor | float = 1.0) -> Tensor:
    """alpha dE/dx at x (B, C, H, W), what a step downhill subtracts (Eq. 3); itself differentiable.

    `energy` maps images to (B,) or (B, 1). torch.compile cannot differentiate twice; a central difference of two
    gradients instead of the second derivative takes longer and is inexact (`python bench.py energy`).
    Raises RuntimeError, here or in the backward pass, where a kernel inside `energy` has no second derivative.
    """
    recording, x = torch.is_grad_enabled(), x.detach().requires_grad_()
    # torch's fused attention has no second derivative: where `energy` asks for attention, it gets the plain one.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        # The gradient of alpha E rather than alpha times that of E: the same number, but what travels back through the
        # network is of the size of a step. In fp16 the gradient of E itself, 1e-4 and less, would lose its digits, or
        # be zero.
        total = step_size * energy(x).sum()
    # The forward pass has settled the types. Autocast would cast to fp16 what is in float32 because it is large.
    with torch.autocast(x.device.type, enabled=False):
        return torch.autograd.grad(total, x, create_graph=recording)[0]


def restore(energy, images: Tensor, steps: int, step_size: Tensor | float) -> list:
    """x^n = x^(n-1) - alpha dE/dx(x^(n-1)) from x^0 = `images` (Eq. 3, 4): the list of x^1 to x^N, each (B, C, H, W).

    Each step starts from detached pixels, so the error of step n teaches step n alone. Gradients reach the weights of
    `energy` and `step_size` through `descent`, as a second derivative.
    """
    x, chain = images, []
    for _ in range(steps):
        x = x.detach() - descent(energy, x, step_size)
        chain.append(x)
    return chain


def restoration_loss(
    restored: list, images: Tensor, criterion: str = "smooth_l1", weight: Tensor | None = None
) -> Tensor:
    """Mean error of all steps, pixels and images (Eq. 4): N times (B, C, H, W) against (B, C, H, W) -> scalar.

    `criterion` is smooth_l1 (beta 1, Listing 1) or mse (Eq. 4). `weight` (B, C, H, W) or (B, 1, H, W) says which pixels
    count: then it is the mean over images of the mean over these.
    """
    function = {"smooth_l1": F.smooth_l1_loss, "mse": F.mse_loss}[criterion]
    if weight is None:
        return sum(function(x, images) for x in restored) / len(restored)
    weight = weight.expand_as(images)
    errors = sum((function(x, images, reduction="none") * weight).sum(dim=(1, 2, 3)) for x in restored)  # (B,)
    return (errors / weight.sum(dim=(1, 2, 3)).clamp_min(1)).mean() / len(restored)


def contrast_loss(clean: Tensor, corrupted: Tensor) -> Tensor:
    """softplus(E(x) - E(corrupted)), the mean over images: energies (B,), (B,) -> scalar; for N = 0.

    Its gradient is that of Eq. 2 with corrupted images as negatives, times sigmoid(E(x) - E(corrupted)).
    """
    return F.softplus(clean - corrupted).mean()


def first_step_size(energy, images: Tensor, target: float) -> Tensor:
    """The alpha for which the first step from `images` has the root mean square `target`."""
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):  # float32: these gradients are tiny
        return target / descent(energy, images).square().mean().sqrt().clamp_min(1e-12)


@torch.no_grad()
def sample(energy, images: Tensor, steps: int, step_size: Tensor | float) -> tuple[Tensor, Tensor]:
    """A chain of any length (Eq. 3): x^0 to x^T (T + 1, B, C, H, W), and their energies (T + 1, B)."""
    chain = torch.stack([images, *restore(energy, images, steps, step_size)])
    return chain, torch.stack([energy(x).flatten() for x in chain])


# ---------------------------------------------------------------------------------------------------------------------
# Backbones (Table B)
# ---------------------------------------------------------------------------------------------------------------------


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of maps (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def start_small(module: nn.Module):
    """Weights of linear layers and convolutions from N(0, 0.02), biases 0, for `module.apply`.

    The stem keeps torch's own biases, a choice: a blank patch would become a vector of zeros otherwise, and the layer
    norm behind it would make the gradient of its pixels a thousand times that of others.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None and getattr(module, "in_channels", 0) != 3:
            nn.init.zeros_(module.bias)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 x 7, norm, a two-layer perceptron, scaled and added to the input (Liu et al. 2022)."""

    def __init__(self, dim: int):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:  # (B, D, H, W)
        y = self.norm(self.depthwise(x).movedim(1, -1))  # (B, H, W, D)
        return x + (self.scale * self.fc2(F.gelu(self.fc1(y)))).movedim(-1, 1)


class ConvNeXt(Encoder):
    """ConvNeXt (Liu et al. 2022): images (B, 3, H, W) in [0, 1] -> (B, D, h, w).

    A cell is stem * 2^(stages - 1) pixels wide. The defaults are ConvNeXt-T. 28.6 M parameters with 1000 classes.
    """

    def __init__(
        self,
        dims: tuple = (96, 192, 384, 768),
        depths: tuple = (3, 3, 9, 3),
        stem: int = 4,
        mean: tuple = (0.0, 0.0, 0.0),
        std: tuple = (1.0, 1.0, 1.0),
    ):
        super().__init__(mean, std, dims=tuple(dims), depths=tuple(depths), stem=stem)
        self.dim, self.stride = dims[-1], stem * 2 ** (len(dims) - 1)
        self.stem = nn.Sequential(nn.Conv2d(3, dims[0], stem, stem), ChannelNorm(dims[0], eps=1e-6))
        self.blocks = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            if i:
                self.blocks.append(nn.Sequential(ChannelNorm(dims[i - 1], eps=1e-6), nn.Conv2d(dims[i - 1], dim, 2, 2)))
            self.blocks += [ConvNeXtBlock(dim) for _ in range(depth)]
        self.norm = ChannelNorm(self.dim, eps=1e-6)
        self.apply(start_small)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(self.normalize(images))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class SwinBlock(nn.Module):
    """A transformer block inside windows, with a learned bias for each offset of two cells (Liu et al. 2021).

    With `shifted`, windows lie half a window off, and attention does not cross the seam where the map is rolled around.
    A map that is not larger than a window is one window, and nothing is shifted.
    """

    def __init__(self, dim: int, heads: int, window: int, shifted: bool):
        super().__init__()
        self.window, self.shifted = window, shifted
        self.block = Block(dim, heads)
        self.position_bias = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.position_bias, std=0.02)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, D)
        height, width = x.shape[1:3]
        side = min(self.window, height, width)
        if height % side or width % side:
            raise UserError(
                f"a map of {height} x {width} cells cannot be cut into windows of {side} x {side}; change --image-size"
            )
        shift, batch = side // 2 if self.shifted and max(height, width) > side else 0, len(x)

        def cut(x):
            return rearrange(x, "b (h p) (w q) d -> (b h w) (p q) d", p=side, q=side)  # (B * windows, side^2, D)

        place = torch.arange(side, device=x.device)
        row, column = place.repeat_interleave(side), place.repeat(side)
        offset = [axis[:, None] - axis + self.window - 1 for axis in (row, column)]  # 2 x (side^2, side^2)
        bias = self.position_bias[offset[0] * (2 * self.window - 1) + offset[1]].permute(2, 0, 1)  # (heads, s^2, s^2)
        if shift:
            # Cells that the roll brought from the other end of the map have a part of their own.
            part = [(torch.arange(n, device=x.device) >= n - shift).long() for n in (height, width)]
            part = cut((2 * part[0][:, None] + part[1])[None, ..., None])[..., 0]  # (windows, side^2)
            apart = (part[:, :, None] != part[:, None])[:, None]  # (windows, 1, side^2, side^2)
            bias = torch.where(apart, -torch.inf, bias)  # (windows, heads, side^2, side^2)

        def attention(q, k, v):  # each (B * windows, heads, side^2, d)
            scores = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).unflatten(0, (batch, -1)) + bias
            return scores.flatten(0, 1).softmax(dim=-1).to(v.dtype) @ v

        x = self.block(cut(x.roll((-shift, -shift), (1, 2))), attention)
        x = rearrange(x, "(b h w) (p q) d -> b (h p) (w q) d", h=height // side, w=width // side, p=side)
        return x.roll((shift, shift), (1, 2))


class PatchMerging(nn.Module):
    """Four neighbours to one cell of twice the channels: (B, H, W, D) -> (B, H / 2, W / 2, 2 D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(rearrange(x, "b (h p) (w q) d -> b h w (q p d)", p=2, q=2)))


class Swin(Encoder):
    """Swin transformer (Liu et al. 2021): images (B, 3, H, W) in [0, 1] -> (B, D, h, w).

    A cell is stem * 2^(stages - 1) pixels wide. The defaults are Swin-T. 28.3 M parameters with 1000 classes.
    """

    def __init__(
        self,
        dim: int = 96,
        depths: tuple = (2, 2, 6, 2),
        heads: tuple = (3, 6, 12, 24),
        window: int = 7,
        stem: int = 4,
        mean: tuple = (0.0, 0.0, 0.0),
        std: tuple = (1.0, 1.0, 1.0),
    ):
        fields = {"dim": dim, "depths": tuple(depths), "heads": tuple(heads), "window": window, "stem": stem}
        super().__init__(mean, std, **fields)
        self.stride = stem * 2 ** (len(depths) - 1)
        self.stem = nn.Sequential(nn.Conv2d(3, dim, stem, stem), ChannelNorm(dim))
        self.blocks = nn.ModuleList()
        for i, (depth, count) in enumerate(zip(depths, heads, strict=True)):
            if i:
                self.blocks.append(PatchMerging(dim))
                dim *= 2
            self.blocks += [SwinBlock(dim, count, window, shifted=j % 2 == 1) for j in range(depth)]
        self.dim, self.norm = dim, nn.LayerNorm(dim)
        self.apply(start_small)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(self.normalize(images)).movedim(1, -1)  # (B, H, W, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x).movedim(-1, 1)


BACKBONES = {
    "convnext_micro": (ConvNeXt, {"dims": (48, 96, 192), "depths": (2, 2, 2), "stem": 2}),  # for laptops
    "convnext_tiny": (ConvNeXt, {}),
    "swin_micro": (Swin, {"dim": 48, "depths": (2, 2, 2), "heads": (2, 4, 8), "window": 4, "stem": 2}),  # for laptops
    "swin_tiny": (Swin, {}),
    **{
        f"mobile_former_{width}": (MobileFormer, {"width": width, "norm": "group"})
        for width in ("micro", "720", "1440", "2880")
    },
}


# ---------------------------------------------------------------------------------------------------------------------
# The energy
# ---------------------------------------------------------------------------------------------------------------------


class Energy(nn.Module):
    """E(x) = h(psi(x)): a backbone's mean feature, and a linear head without bias (section 2.2).

    x (B, 3, H, W) has zero mean and unit variance a channel, by `mean` and `std`; -> (B,) float32. `encoder` is any
    module that maps images in [0, 1] to features (B, D) or a map (B, D, H, W).
    `images` are some that it can take: they tell how wide the features are.
    Raises UserError for an encoder with batch norm, where the energy of an image would depend on the others of its
    batch, and for one whose output has another shape.
    """

    def __init__(self, encoder: nn.Module, images: Tensor, mean: tuple = (0.0, 0.0, 0.0), std: tuple = (1.0, 1.0, 1.0)):
        super().__init__()
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.modules()):
            raise UserError(
                f"{type(encoder).__name__} has batch norms, which make the energy of an image depend on its batch; "
                f"replace them, for example by common.replace_batch_norms(encoder)"
            )
        with torch.no_grad():
            features = pooled_features(encoder, images)
        if features.ndim != 2:
            shape = " x ".join(map(str, features.shape))
            raise UserError(
                f"{type(encoder).__name__} returns {shape}; an energy needs features (B, D) or (B, D, H, W)"
            )
        self.encoder, self.head = encoder, nn.Linear(features.shape[1], 1, bias=False)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, D)."""
        if type(self.encoder) is ViT:
            return self.encoder.pooled(self.encoder.encode(self.encoder.embed(images), attend_plainly))
        return pooled_features(self.encoder, images)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x * self.std + self.mean)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(features.to(self.head.weight.dtype)).squeeze(1)


def trainable(module: nn.Module) -> list:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def freeze_idle(method: Method, images: Tensor):
    """Freeze the weights that the loss of a method does not depend on: DDP would wait for their gradients for ever.

    They are found by a trial step. Raises UserError where it fails, for example for want of a second derivative of a
    kernel.
    """
    trial = copy.deepcopy(method).eval()
    try:
        gradients = torch.autograd.grad(trial(images)["loss"], trainable(trial), allow_unused=True)
    except RuntimeError as error:
        raise UserError(
            f"a trial step with {type(method.encoder).__name__} failed ({str(error).splitlines()[0]}); if that is for "
            f"want of a second derivative, write the fused or own kernel in plain operations"
        ) from None
    for parameter, gradient in zip(trainable(method), gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def check_second_derivative(energy: Energy, images: Tensor):
    """Raise UserError where the derivative of a step by the weights is wrong.

    A kernel whose backward pass is no operation of torch's may raise no error: its part of the derivative is just
    missing. So the derivative along one random direction is compared with a difference quotient, in float64.
    """
    energy, images = copy.deepcopy(energy).double().eval(), images.double()
    weights, generator = trainable(energy), torch.Generator().manual_seed(0)
    towards = [torch.randn(p.shape, generator=generator).to(p) * p.detach().square().mean().sqrt() for p in weights]

    def length():
        return descent(energy, images).square().sum().sqrt()

    gradients = torch.autograd.grad(length(), weights, allow_unused=True)
    slopes = [float((g * v).sum()) for g, v in zip(gradients, towards, strict=True) if g is not None]
    ends, shift = [], 1e-8  # so small that few kinks of ReLUs lie between the ends
    with torch.no_grad():
        for share in (shift, -2 * shift):
            for p, v in zip(weights, towards, strict=True):
                p += share * v
            ends.append(float(length()))
    measured = (ends[0] - ends[1]) / (2 * shift)
    rounding = 1e-6 * ends[0]
    if abs(measured - sum(slopes)) > 0.02 * sum(map(abs, slopes)) + rounding:
        raise UserError(
            f"{type(energy.encoder).__name__} has a wrong second derivative ({sum(slopes):.3g} along one direction, "
            f"{measured:.3g} measured); write its fused or own kernels in plain operations"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------

MIXTURE = ("gridded", "super_resolution", "noise", "grayscale")  # the tasks of `mixed`
TASKS = ("gridded", "random_small", "random_large", "super_resolution", "noise", "grayscale", "mixed")


@dataclass
class Config(TrainConfig):
    """The paper's self comparisons on ImageNet: ViT-S, 100 epochs, gridded masks (section 3.1, Table A)."""

    crop_min: float = 0.2  # smallest share of the image that a random resized crop keeps
    base_lr: float = 1e-4  # learning rate for a batch of 256
    model: Literal[(*VIT_SIZES, *BACKBONES)] = "vit_small"  # the backbone (Table B)
    patch: int = 16  # side of a patch of a vit, in pixels
    objective: Literal["energy", "autoencoder", "mae"] = "energy"  # or a baseline: Table 2, Table 1
    task: Literal[TASKS] = "gridded"  # how images are corrupted
    grid: int = 16  # gridded: side of the squares, in pixels; 16, 24 and 32 in Table 1
    mask_ratio: float = 0.7  # gridded, mae: share of the squares or patches that are blank (Table 1)
    scale: int = 16  # super_resolution: how many times the image shrinks; 14, 16, 24 and 32 in Table 2
    steps: int = 2  # N: gradient steps on each image; 0 takes corrupted images as negatives (Fig. A)
    criterion: Literal["smooth_l1", "mse"] = "smooth_l1"  # error of the restored pixels: Listing 1, or Eq. 4
    scored: Literal["all", "changed"] = "all"  # pixels that count in the loss: all, or those that were corrupted
    first_step: float = 0.3  # root mean square of the very first step; it sets alpha
    alpha_lr: float = 1.0  # learning rate of log alpha, relative to that of the weights
    decoder_dim: int = 512  # autoencoder, mae: width of the decoder
    decoder_depth: int = 8  # autoencoder, mae: blocks of the decoder
    decoder_heads: int = 16  # autoencoder, mae: attention heads of the decoder

    def check(self):
        super().check()
        check_least(self, grid=1, scale=1, steps=0, alpha_lr=0)
        check_positive(self, "first_step")
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"--mask-ratio {self.mask_ratio} blanks nothing or all; give more than 0, less than 1")
        if self.compile and self.objective == "energy":
            raise UserError("--compile does not work here: torch.compile has no second derivatives")
        squares = math.ceil(self.image_size / self.grid) ** 2
        if self.task in ("gridded", "mixed") and not 0 < round(self.mask_ratio * squares) < squares:
            raise UserError(
                f"--grid {self.grid} makes {squares} square(s), "
                f"of which --mask-ratio {self.mask_ratio} blanks none or all"
            )


LAPTOP = {"model": "vit_micro", "image_size": 32, "patch": 4, "grid": 4, "scale": 4, "batch_size": 64}
LAPTOP |= {"decoder_dim": 96, "decoder_depth": 2, "decoder_heads": 3, "task": "mixed", "warmup_epochs": 1}
LAPTOP |= {"base_lr": 16e-3, "crop_min": 0.5}
LONG = {"epochs": 200, "task": "mixed"}

RECIPES = {
    "imagenet": {},  # Tables 1 and 2, the defaults of Config
    "imagenet --objective mae": {"epochs": 400, "base_lr": 1.5e-4, "warmup_epochs": 40},  # Table 1; rate as in MAE
    "imagenet --model vit_base": LONG,  # Table 3; the longer row is --epochs 800
    "imagenet --model convnext_tiny": LONG,  # Table B
    "imagenet --model swin_tiny": LONG,
    # Laptop recipes of ours.
    "shapes": LAPTOP | {"epochs": 5, "probe_every": 5},
    "cifar10": LAPTOP | {"epochs": 10},
}


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------


def build_encoder(config: Config, data) -> nn.Module:
    """The backbone that --model names."""
    look = {"mean": data.mean, "std": data.std}
    if config.model in VIT_SIZES:
        return ViT(config.image_size, config.patch, **VIT_SIZES[config.model], **look)
    kind, fields = BACKBONES[config.model]
    encoder = kind(**fields, **look)
    if config.image_size % encoder.stride:
        raise UserError(
            f"--image-size {config.image_size} is not a multiple of {encoder.stride}, which {config.model} needs"
        )
    return encoder


class EnergyPretraining(Method):
    """An energy that restores images, or the autoencoders that the paper compares with.

    `encoder` is any module of yours that maps images in [0, 1] to features (B, D) or a map (B, D, H, W); by default,
    the one that `config.model` names. It must be twice differentiable, which is checked. Smooth activations are best:
    the pixel gradient of a network of ReLUs is constant in pieces.
    """

    name = "ebm_pretrain"

    def __init__(self, config: Config, data, encoder: nn.Module | None = None):
        super().__init__()
        self.config, own = config, encoder is not None
        encoder = encoder if own else build_encoder(config, data)
        images = torch.rand(2, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0))
        images = images.to(next(encoder.parameters()).device)
        self.register_buffer("mean", torch.tensor(data.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(data.std).view(3, 1, 1), persistent=False)
        if config.objective == "energy":
            self.energy = Energy(encoder, images, data.mean, data.std)
            self.log_alpha = nn.Parameter(torch.tensor(0.0))
            self.register_buffer("started", torch.tensor(False))  # whether log alpha has been set, by the first batch
        else:
            if type(encoder) is not ViT:
                raise UserError(f"--objective {config.objective} needs a vit, not {type(encoder).__name__}")
            decoder = (config.decoder_dim, config.decoder_depth, config.decoder_heads)
            self.autoencoder = MaskedAutoencoder(
                encoder, *decoder, config.mask_ratio, norm_pixels=config.objective == "mae"
            )
        self.to(images.device)
        self.ready = True  # the trial step takes alpha = 1
        freeze_idle(self, images)
        self.ready = False
        if own and config.objective == "energy":
            check_second_derivative(self.energy, images)

    @property
    def encoder(self) -> nn.Module:
        return (self.energy if self.config.objective == "energy" else self.autoencoder).encoder

    def optimizer(self, config: Config) -> torch.optim.Optimizer:
        """AdamW; log alpha in a group of its own, without decay."""
        optimizer = super().optimizer(config)
        if config.objective == "energy" and config.steps:
            plain = optimizer.param_groups[1]
            plain["params"] = [p for p in plain["params"] if p is not self.log_alpha]
            optimizer.add_param_group({"params": [self.log_alpha], "weight_decay": 0.0, "lr_scale": config.alpha_lr})
        return optimizer

    def corrupt(self, images: Tensor, task: str = "") -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> normalised ones, whole and corrupted; by default by `config.task`."""
        config, x = self.config, (images - self.mean) / self.std
        corruptions = {
            "gridded": lambda: gridded_mask(x, config.grid, config.mask_ratio),
            "random_small": lambda: random_patches(x, 75, 0.01, 0.025),
            "random_large": lambda: random_patches(x, 25, 0.03, 0.075),
            "super_resolution": lambda: super_resolution(x, config.scale),
            "noise": lambda: noise(x),
            "grayscale": lambda: (grayscale(images) - self.mean) / self.std,
            "mixed": lambda: mixed([corruptions[name]() for name in MIXTURE]),
        }
        return x, corruptions[task or config.task]()

    def step_size(self, corrupted: Tensor) -> Tensor:
        """alpha; the first batch of the training sets it."""
        self.ready = self.ready or bool(self.started)  # the buffer is slow to read from a GPU, so not in every step
        if self.ready:
            return self.log_alpha.exp()
        alpha = first_step_size(self.energy, corrupted, self.config.first_step)
        if not self.training:
            return alpha
        with torch.no_grad():
            self.log_alpha.copy_(average(alpha**-2).log() / -2)  # by the mean square of the gradients of all processes
        self.started.fill_(True)
        return self.log_alpha.exp()

    def restored(self, corrupted: Tensor, alpha: Tensor | None = None) -> list:
        """Corrupted images, normalised (B, 3, H, W) -> a list: what each step makes of them; an autoencoder has one."""
        if self.config.objective == "energy":
            alpha = self.step_size(corrupted) if alpha is None else alpha
            return restore(self.energy, corrupted, self.config.steps or 1, alpha)
        encoder, autoencoder = self.encoder, self.autoencoder
        encoded = encoder.encode(encoder.embed(corrupted * self.std + self.mean))  # (B, 1 + N, D)
        tokens = autoencoder.decoder_embed(encoded)  # (B, 1 + N, d)
        patches = autoencoder.predict(tokens[:, :1], tokens[:, 1:]).float()
        return [unpatchify(patches, encoder.patch, *corrupted.shape[-2:])]

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict:
        """Loss of images (B, 3, H, W), the share of squared error left at the end (1 = no change), and alpha."""
        config = self.config
        if config.objective == "mae":
            out = self.autoencoder(images)
            return {"loss": reconstruction_loss(out.prediction, out.target, out.mask)}
        clean, corrupted = self.corrupt(images)
        if config.objective == "energy" and not config.steps:
            energies = self.energy(clean), self.energy(corrupted)
            return {"loss": contrast_loss(*energies), "told_apart": (energies[0] < energies[1]).float().mean()}
        alpha = self.step_size(corrupted) if config.objective == "energy" else None
        chain = self.restored(corrupted, alpha)
        weight = (corrupted != clean).any(dim=1, keepdim=True).float() if config.scored == "changed" else None
        logged = {"loss": restoration_loss(chain, clean, config.criterion, weight)}
        with torch.no_grad():
            logged["left"] = F.mse_loss(chain[-1], clean) / F.mse_loss(corrupted, clean).clamp_min(1e-12)
        return logged if alpha is None else logged | {"alpha": alpha.detach()}

    @property
    def tasks(self) -> tuple:
        """The corruptions that are trained on."""
        return MIXTURE if self.config.task == "mixed" else (self.config.task,)

    def probe(self, encode, train, test, config: Config) -> dict:
        """kNN and linear accuracy, and what is left of the squared error of at most 2000 test images, task by task."""
        found = probe(encode, train, test, config.image_size, config.probe_images)
        if config.objective == "mae" or (config.objective == "energy" and not config.steps):
            return found
        chosen = labelled(test, min(config.probe_images or 2000, 2000))

        def measure(images):
            rows = []
            for task in self.tasks:
                clean, corrupted = self.corrupt(images, task)
                with autocast(config.amp, images.device):
                    last = self.restored(corrupted)[-1]
                rows += [(x - clean).square().mean(dim=(1, 2, 3)) for x in (corrupted, last)]
            return torch.stack(rows, dim=1)  # (B, 2 * tasks)

        torch.manual_seed(config.seed)  # the same corruptions each time
        errors = features_of(measure, test, chosen, config.image_size)[0].mean(dim=0).unflatten(0, (-1, 2))
        return found | {
            f"left_{task}": float(b / a.clamp_min(1e-12)) for task, (a, b) in zip(self.tasks, errors, strict=True)
        }

    @property
    def captions(self) -> tuple:
        if self.config.objective == "mae":
            return self.autoencoder.captions
        count = self.config.steps or 1
        steps = ["output"] if self.config.objective != "energy" else [f"step {i + 1}" for i in range(count)]
        return ("image", *[caption for task in self.tasks for caption in (task.replace("_", " "), *steps)])

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Tensor:
        """Rows of (image, then for each task the corrupted image and every step): (B, K, 3, H, W) in [0, 1]."""
        if self.config.objective == "mae":
            return self.autoencoder.pictures(images)
        columns = [(images - self.mean) / self.std]
        for task in self.tasks:
            _, corrupted = self.corrupt(images, task)
            columns += [corrupted, *self.restored(corrupted)]
        return (torch.stack(columns, dim=1) * self.std + self.mean).clamp(0, 1)
