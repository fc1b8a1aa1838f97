"""Judge the encoder of a run: by its features as they are, by probes, by fine-tuning, and by pictures.

python evaluate.py RUN                                             kNN and a linear probe, on the run's own data
python evaluate.py RUN --protocol knn linear clusters --untrained --pixels     beside the two baselines
python evaluate.py RUN --protocol linear --data cifar100 --root DIR            transfer to another data set
python evaluate.py RUN --protocol linear --recipe mae --base-lrs 0.03 0.1 0.3  several learning rates in one pass
python evaluate.py RUN --protocol tran1 finetune --recipe finola   a transformer decoder, then all weights, from it
python evaluate.py RUN --protocol finetune --scratch               the same network from random weights
python evaluate.py RUN --protocol pictures                         reconstructions, attention, keys, features, curves
torchrun --nproc_per_node=8 evaluate.py RUN --protocol finetune    many GPUs, or many CPU processes
python evaluate.py --help                                          all flags

RUN is a run folder. Its encoder.pt is all that is needed, but for reconstructions, which take last.pt; config.json
tells the data and the method's recipe. Prints a table and appends one JSON line a protocol to RUN/eval.jsonl.

Protocol     what it does                                                   function or class
knn          votes of the nearest training images                           common.knn_accuracy
linear       one linear layer by gradient descent                           LinearHeads, fit_on_features
tran1/tran4  one or four transformer blocks on frozen tokens (FINOLA)       TransformerHead
finetune     every weight, with augmentation and layer-wise learning rates  Classifier, layer_groups
clusters     do classes form clusters: figures without any training         davies_bouldin, class_cosines
pictures     what there is to see                                           draw_pictures
finola       FINOLA's curvature, differential equations and embeddings      look_into_finola, draw_finola
energy       chains of an energy, what they leave of the error              look_into_energy, draw_energy

The recipes are the papers' (RECIPES names the tables); what they leave open, or what differs here:
* MAGMA gives no augmentation, momentum or decay for its linear probe. Here whole images are encoded once, and momentum
  is 0.9 without decay. `--no-cache` crops and flips, and encodes anew in each epoch. Accuracies are those of the last
  epoch.
* Davies-Bouldin index and class cosines are taken on the features themselves, of all classes and test images; MAGMA's
  Fig. 4 shows ten classes. MLO-MAE's average over pairs is taken over all pairs of one class or of two at once. Its
  ratio can be near 1 for features that share a large mean; the gap beside it is the difference of the two after that
  mean is taken off.
* FINOLA: no position code and no class token in the decoder, heads of width 64, a norm before the mean over positions,
  and its dropout acts on that mean. The width follows from the encoder's; in fine-tuning the decoder learns at the full
  rate. The mean over positions for its linear probe, momentum 0.9 and betas (0.9, 0.999) are choices. The printed Table
  14 is garbled between mixup and dropout; cutmix is read as 0, 0.25 and 1.0.
* MAE fine-tunes with a mean over patches, then a new norm; our encoder keeps its norm, then takes the mean. `mae` is
  its Table 9; `mae_code` has what its PyTorch release changes for ViT-B (base rate 5e-4, decay 0.65, random erasing),
  but for its smallest learning rate of 1e-6 and its learned positions.
* The energy model's warm-up (5) and epochs (100, those of ViT-B), MixedAE's layer decay (0.7, the middle of the three
  tried) and the mean over patches of both are choices. Crops and flips go before all other augmentation.
* A network from random weights is trained with the same recipe, but without layer-wise decay, which would all but
  freeze its lowest layers.
* mixup and cutmix draw their weight for each image, timm for each batch; RandAugment moves pixels bilinearly.
* Raw pixels are taken of at most 20,000 images of each split: all of ImageNet's would need 100 GB. Their linear
  accuracy is that of ridge regression in closed form, whatever the recipe: gradient descent at an encoder's learning
  rate can fall ten points short of it.
* With `--epochs`, a recipe's warm-up and milestones move in proportion.
* Images of another data set are resized to the encoder's own size and normalised by its own statistics. For another
  `--image-size` the position code counts on; MAE's code stretches it.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib
import json
import math
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import common
import ebm_pretrain
import finola
from common import Block, UserError, ViT, autocast, gradient_if, pooled_features, rank, unknown
from train import METHODS

# ---------------------------------------------------------------------------------------------------------------------
# Two figures of merit without training
# ---------------------------------------------------------------------------------------------------------------------


def davies_bouldin(features: Tensor, labels: Tensor) -> float:
    """How much classes overlap, >= 0, lower is better (Davies and Bouldin 1979; MAGMA, Fig. 4): (N, D), (N,).

    The mean over classes of the worst (s_i + s_j) / |c_i - c_j|, where s is the mean distance to the class centre c.
    """
    labels = labels.unique(return_inverse=True)[1]
    features, count = features.double(), torch.bincount(labels).double()
    sums = torch.zeros(len(count), features.shape[1], dtype=torch.float64, device=features.device)
    centres = sums.index_add(0, labels, features) / count[:, None]  # (classes, D)
    distance = (features - centres[labels]).norm(dim=1)  # (N,)
    spread = torch.zeros_like(count).index_add(0, labels, distance) / count  # (classes,)
    apart = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
    ratio = (spread[:, None] + spread[None]) / apart
    return float(ratio.fill_diagonal_(-math.inf).max(dim=1).values.mean())


def class_cosines(features: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cosine over all pairs of one class, and of two classes (MLO-MAE, Table 13, is their ratio): (N, D), (N,).

    From class sums: the squared length of a sum of unit vectors is the sum of all cosines among them.
    """
    labels = labels.unique(return_inverse=True)[1]
    unit, count = F.normalize(features.double(), dim=1), torch.bincount(labels).double()
    sums = torch.zeros(len(count), unit.shape[1], dtype=torch.float64, device=unit.device).index_add(0, labels, unit)
    within, everything = sums.square().sum(), sums.sum(dim=0).square().sum()
    same = (within - len(unit)) / (count * (count - 1)).sum()  # without each image and itself
    different = (everything - within) / (len(unit) ** 2 - count.square().sum())
    return float(same), float(different)


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation of labelled images, on the device, for the whole batch at once. Images (B, 3, H, W) in [0, 1].
# ---------------------------------------------------------------------------------------------------------------------


def mix_labels(images: Tensor, targets: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019): each image with the one at the other end of the batch.

    `mixup` and `cutmix` are the alphas of their Beta distributions, 0 for off; with both on, a coin decides for each
    image. Targets (B, classes) are mixed by the share of each image that is seen.
    """
    batch, _, height, width = images.shape
    like = {"device": images.device, "dtype": images.dtype}

    def beta(alpha):
        return torch.distributions.Beta(alpha, alpha).sample((batch, 1, 1)).to(**like)

    def span(side, length):  # pixels inside a window that is cut off at the rim of the image
        distance = (torch.arange(side, **like) + 0.5 - side * torch.rand(batch, 1, **like)).abs()  # (B, side)
        return distance < side * length[:, 0] / 2

    weight = torch.ones(batch, height, width, **like)  # of the image itself, pixel by pixel
    if mixup:
        weight = beta(mixup) * weight
    if cutmix:
        side = (1 - beta(cutmix)).sqrt()  # of the window, as a share of the image's
        window = span(height, side)[:, :, None] & span(width, side)[:, None, :]  # (B, H, W)
        cut = torch.rand(batch, 1, 1, device=images.device) < (0.5 if mixup else 1.0)
        weight = torch.where(cut, (~window).to(images.dtype), weight)
    share, weight = weight.mean(dim=(1, 2))[:, None], weight[:, None]  # (B, 1), (B, 1, H, W)
    return images * weight + images.flip(0) * (1 - weight), targets * share + targets.flip(0) * (1 - share)


def random_erase(images: Tensor, probability: float, mean: Tensor, std: Tensor) -> Tensor:
    """Fill one random box of some images with noise of the data's mean and deviation, cut off at 0 and 1.

    Zhong et al. 2020, with the sizes of timm: 2 to 33 % of the area, aspect 0.3 to 3.3.
    """
    batch, _, height, width = images.shape
    sides = (torch.full((batch,), float(side), device=images.device) for side in (height, width))
    top, left, h, w = common.crop_boxes(*sides, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3)).unbind(dim=1)

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


# ---------------------------------------------------------------------------------------------------------------------
# Heads, optimiser and what fine-tuning adds to an encoder
# ---------------------------------------------------------------------------------------------------------------------


class LinearHeads(nn.Module):
    """Linear classifiers side by side, each with a learning rate of its own: (B, D) -> logits (heads, B, classes).

    `batchnorm` standardises the features first, without learned scale (FINOLA and MAE).
    """

    def __init__(self, dim: int, classes: int, count: int = 1, batchnorm: bool = False, std: float = 0.01):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6) if batchnorm else nn.Identity()
        self.layers = nn.ModuleList(nn.Linear(dim, classes) for _ in range(count))
        for layer in self.layers:
            nn.init.trunc_normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        features = self.norm(features)
        return torch.stack([layer(features) for layer in self.layers])


class TransformerHead(nn.Module):
    """FINOLA's tran-1 and tran-4 decoders (Appendix B): tokens (B, N, D) -> logits (1, B, classes).

    A linear layer to `width`, transformer blocks with an MLP ratio of 4, a mean over positions, a linear layer.
    """

    def __init__(self, dim: int, width: int, depth: int, classes: int, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(Block(width, max(1, width // 64)) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(width, classes)
        self.apply(common.initialize)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)  # (B, N, width)
        for block in self.blocks:
            x = block(x)
        return self.classify(self.dropout(self.norm(x).mean(dim=1)))[None]


def decoder_width(dim: int) -> int:
    """Width of FINOLA's decoder: 192, 384, 768 for encoders of width 720, 1440, 2880, or at most that."""
    return 192 if dim <= 720 else 384 if dim <= 1440 else 768


class LARS(torch.optim.Optimizer):
    """SGD with momentum; the gradient of each matrix is first scaled to 0.001 of the matrix's length (You et al. 2017).

    Biases take the plain gradient, as in MAE's linear probe.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.9):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                step = parameter.grad
                if parameter.ndim > 1:
                    step = step + group["weight_decay"] * parameter
                    weight, length = parameter.norm(), step.norm()
                    step = step * torch.where((weight > 0) & (length > 0), 0.001 * weight / length, 1.0)
                state = self.state[parameter]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(parameter)
                state["velocity"].mul_(group["momentum"]).add_(step)
                parameter.sub_(group["lr"] * state["velocity"])


def drop_path(x: Tensor, rate: float) -> Tensor:
    """Zero the whole of x for a random `rate` of the batch, and enlarge the rest so that the mean stays."""
    keep = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= rate
    return x * keep / (1 - rate)


def add_drop_path(encoder: ViT, rate: float):
    """Stochastic depth (Huang et al. 2016) while training: rates rise linearly from 0 in the first block to `rate`.

    It acts on what a block adds to its input: the outputs of these two layers.
    """

    def drop(share, module, inputs, output):
        return drop_path(output, share) if module.training else output

    depth = len(encoder.blocks)
    for i, block in enumerate(encoder.blocks):
        for layer in (block.attn["proj"], block.mlp["fc2"]):
            layer.register_forward_hook(functools.partial(drop, rate * i / max(1, depth - 1)))


def layer_groups(encoder: nn.Module | None, head: nn.Module, decay: float, weight_decay: float) -> list:
    """Parameter groups with layer-wise learning rates: `decay` to the power of the layers that lie above.

    What an encoder registers before its `blocks` (patches and tokens) is the lowest layer; what comes after them, and
    the head, is the highest. Biases, norms and tokens have no weight decay. Without an encoder, the head alone.
    Raises UserError where there is a decay but no blocks.
    """
    layers, groups = [(0, name, parameter) for name, parameter in head.named_parameters()], {}
    depth = len(getattr(encoder, "blocks", ()))
    if encoder is not None and decay < 1 and not depth:
        raise UserError("--layer-decay needs an encoder made of blocks; give --layer-decay 1")
    above = depth + 1
    for name, parameter in () if encoder is None else encoder.named_parameters():
        if name.startswith("blocks."):
            above = depth - int(name.split(".")[1])
        elif above <= depth:  # the blocks are over
            above = 0
        layers.append((above, name, parameter))
    for above, name, parameter in layers:
        plain = parameter.ndim < 2 or name.endswith(("token", "tokens", "bias"))
        groups.setdefault((above, plain), []).append(parameter)
    return [
        {"params": group, "lr_scale": decay**above, "weight_decay": 0.0 if plain else weight_decay}
        for (above, plain), group in groups.items()
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------

PROTOCOLS = ("knn", "linear", "clusters", "pictures", "finola", "energy", "tran1", "tran4", "finetune")


@dataclass
class Config(common.TrainConfig):
    """The settings of all protocols; a recipe of RECIPES fills them, and flags have the last word."""

    protocol: tuple[str, ...] = ("knn", "linear")  # knn linear tran1 tran4 finetune clusters pictures finola energy
    recipe: str = ""  # linear: magma finola mae; tran1, tran4: finola; finetune: mae mae_code finola ebm mixedae
    data: str = ""  # data set to evaluate on, by default that of the run
    image_size: int = 0  # side of the images, 0 for what the encoder was trained with
    probe_every: int = 0  # tran1, tran4, finetune: epochs between two tests, 0 for a test at the end alone
    out: str = ""  # folder of what the protocols write, by default RUN; eval.jsonl is always in RUN
    probe_images: int = 0  # knn, linear, clusters, finola, energy: most images of each split to take, 0 for all
    untrained: bool = False  # also evaluate the same architecture with random weights
    pixels: bool = False  # also evaluate raw pixels (knn, linear, clusters)
    scratch: bool = False  # finetune: start from random weights alone
    pool: str = ""  # features: cls or mean, of the patch tokens; by default the recipe's or the encoder's own
    k: int = 10  # knn: number of neighbours
    metric: str = "euclidean"  # knn: euclidean (MAGMA) or cosine
    cache: bool = True  # linear: encode whole images once, rather than crops and flips in each epoch
    base_lrs: tuple[float, ...] = ()  # linear: one head for each base learning rate, instead of --base-lr
    optimizer: str = "adamw"  # sgd, lars or adamw
    momentum: float = 0.9  # of sgd and lars
    batchnorm: bool = False  # linear: standardise the features by a batch norm without affine weights
    head: str = "linear"  # finetune: linear, tran1 or tran4
    dropout: float = 0.0  # of the head of tran1 and tran4
    layer_decay: float = 1.0  # finetune: factor of the learning rate from a layer to the one below
    drop_path: float = 0.0  # finetune: rate of stochastic depth in the last block
    smoothing: float = 0.0  # all that train: label smoothing
    mixup: float = 0.0  # tran1, tran4, finetune: alpha of mixup, 0 for off
    cutmix: float = 0.0  # tran1, tran4, finetune: alpha of cutmix, 0 for off
    randaugment: float = 0.0  # tran1, tran4, finetune: magnitude of RandAugment, of 10; 0 for off
    erase: float = 0.0  # tran1, tran4, finetune: probability of random erasing


OUTSIDE = ("untrained", "pixels", "scratch", "k", "metric")  # fields that no training depends on


def by_width(small, middle, large) -> dict:
    """A value of a table that depends on the width of FINOLA's decoder."""
    return {192: small, 384: middle, 768: large}


LINEAR = {"base_lr": 0.1, "weight_decay": 0.0, "crop_min": 0.08}
STRONG = {"randaugment": 9.0, "smoothing": 0.1}
FINETUNE = STRONG | {"betas": (0.9, 0.999), "weight_decay": 0.05, "batch_size": 1024, "epochs": 100, "warmup_epochs": 5}
FINETUNE |= {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.1, "pool": "mean"}
TRAN = STRONG | {"base_lr": 5e-4, "weight_decay": 0.1, "batch_size": 4096, "epochs": 200, "warmup_epochs": 10}
TRAN |= {"dropout": by_width(0.1, 0.2, 0.2), "erase": by_width(0.0, 0.0, 0.25), "betas": (0.9, 0.999)}
RECIPES = {
    "linear": {
        # MAGMA, "Evaluation protocol"
        "magma": LINEAR
        | {"optimizer": "sgd", "batch_size": 256, "epochs": 100, "warmup_epochs": 0, "milestones": (60, 80)},
        # FINOLA, Table 13
        "finola": LINEAR
        | {"optimizer": "sgd", "batch_size": 4096, "epochs": 90, "warmup_epochs": 10}
        | {"batchnorm": True, "cache": False, "pool": "mean"},
        # MAE, Table 10
        "mae": LINEAR
        | {"optimizer": "lars", "batch_size": 16384, "epochs": 90, "warmup_epochs": 10}
        | {"batchnorm": True, "cache": False, "pool": "cls"},
    },
    "tran1": {"finola": TRAN},  # FINOLA, Table 13
    "tran4": {"finola": TRAN},
    "finetune": {
        "mae": FINETUNE | {"base_lr": 1e-3, "layer_decay": 0.75},  # MAE, Table 9, ViT-B
        "mae_code": FINETUNE | {"base_lr": 5e-4, "layer_decay": 0.65, "erase": 0.25},  # its release, ViT-B
        "ebm": FINETUNE | {"base_lr": 1e-3, "layer_decay": 0.75},  # Energy-inspired pretraining, Table A
        "mixedae": FINETUNE | {"base_lr": 5e-4, "layer_decay": 0.7},  # MixedAE, Table A2, ViT-B
        # FINOLA, Table 14
        "finola": FINETUNE
        | {"base_lr": 5e-4, "batch_size": 512, "epochs": by_width(200, 150, 100), "drop_path": 0.0, "head": "tran1"}
        | {"layer_decay": by_width(0.9, 0.9, 0.85), "mixup": by_width(0.0, 0.2, 0.8), "dropout": 0.2, "erase": 0.25}
        | {"cutmix": by_width(0.0, 0.25, 1.0)},
    },
}
OWN_RECIPE = {  # of a method's own paper; others take MAE's, the field's common ground
    "linear": {"magma": "magma", "finola": "finola"},
    "finetune": {"finola": "finola", "ebm_pretrain": "ebm", "mixedae": "mixedae"},
}


def recipe_of(protocol: str, given: dict, method: str, dim: int) -> dict:
    """The recipe of a protocol, with its name: the one that is given, or else the method's own. `dim` as in `settings`.

    With fewer or more epochs than its own, its warm-up and milestones move in proportion.
    """
    recipes = RECIPES.get(protocol, {"": {}})
    wanted = (given.get("recipe"), OWN_RECIPE.get(protocol, {}).get(method), "mae", next(iter(recipes)))
    name = next(name for name in wanted if name in recipes)
    width = decoder_width(dim)
    values = {k: v[width] if isinstance(v, dict) else v for k, v in recipes[name].items()}  # `by_width`
    if values and "epochs" in given:
        share = given["epochs"] / values["epochs"]
        values["warmup_epochs"] = round(share * values["warmup_epochs"])
        values["milestones"] = tuple(round(share * epoch) for epoch in values.get("milestones", ()))
    return values | {"recipe": name}


def settings(protocol: str, given: dict, method: str, dim: int, images: int) -> Config:
    """Defaults, the protocol's recipe, the given flags. `dim` is the encoder's width, `images` how many train.

    A batch that is larger than the data set becomes all of it. Raises UserError for what makes no sense.
    """
    recipe = recipe_of(protocol, given, method, dim)
    config = Config(**recipe | given | {"recipe": recipe["recipe"]})
    trained = protocol in RECIPES and not (protocol == "linear" and config.cache)  # in `common.fit`
    parts = common.world_size() * config.accumulate if trained else 1
    if config.batch_size > images:
        size = images - images % parts
        if protocol in RECIPES and rank() == 0:
            print(f"note: {protocol}: a batch of {config.batch_size} exceeds the {images} images, one of {size} it is")
        config.batch_size = size
    if protocol != "linear":
        config.base_lrs = ()
    common.check_config(config)
    if trained:
        common.check_batch(config)
    if config.batchnorm and config.batch_size < 2 * parts:
        raise UserError(f"--batchnorm needs two images in each part of a batch, {config.batch_size} are too few")
    choices = {"metric": ("euclidean", "cosine"), "optimizer": ("sgd", "lars", "adamw"), "pool": ("", "cls", "mean")}
    for field, allowed in (choices | {"head": ("linear", "tran1", "tran4")}).items():
        if getattr(config, field) not in allowed:
            raise UserError(unknown(f"--{field}", getattr(config, field), [name for name in allowed if name]))
    below_one = dict.fromkeys(("momentum", "dropout", "drop_path", "smoothing"), "at least 0, less than 1")
    limits = {"erase": 1, "layer_decay": 1, "randaugment": 10, "mixup": math.inf, "cutmix": math.inf}
    for field, expected in (below_one | {name: f"0 to {most}" for name, most in limits.items()}).items():
        value = getattr(config, field)
        if not 0 <= value <= limits.get(field, 1) or (field in below_one and value == 1) or value == math.inf:
            raise UserError(f"--{field.replace('_', '-')} {value} makes no sense; give {expected}")
    common.check_positive(config, "k", "base_lr")
    if not all(0 < rate < math.inf for rate in config.base_lrs):
        raise UserError(f"--base-lrs {config.base_lrs} makes no sense; give more than 0")
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Probes and fine-tuning
# ---------------------------------------------------------------------------------------------------------------------


def digest(module: nn.Module) -> str:
    """Ten characters that tell one set of weights from another."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        found.update(name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:10]


def token_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """All positions (B, N, D): the patch tokens of a transformer, without the CLS token, or a map (B, D, H, W)."""
    if isinstance(encoder, ViT):
        return encoder.encode(encoder.embed(images))[:, 1:]
    return rearrange(encoder(images), "b d h w -> b (h w) d")


def width_of(encoder: nn.Module) -> int:
    """The width that FINOLA's tables go by: that in a Mobile-Former's name, or of an encoder's features."""
    name = str(encoder.fields.get("width", ""))
    return int(name) if name.isdigit() else encoder.dim


def make_head(kind: str, dim: int, classes: int, config: Config, std: float = 0.01, width: int = 0) -> nn.Module:
    """The head of a protocol, "linear", "tran1" or "tran4", on features of width `dim`; `width` as in `width_of`."""
    if kind == "linear":
        return LinearHeads(dim, classes, len(columns("", config)), config.batchnorm, std)
    return TransformerHead(dim, decoder_width(width or dim), int(kind[-1]), classes, config.dropout)


def make_optimizer(groups: list, config: Config) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.base_lr, betas=tuple(config.betas), fused=True)
    kind = {"sgd": torch.optim.SGD, "lars": LARS}[config.optimizer]
    return kind(groups, lr=config.base_lr, momentum=config.momentum)


def head_groups(head: nn.Module, config: Config) -> list:
    """Parameter groups of a head over a frozen encoder; side by side linear heads each have their learning rate."""
    if isinstance(head, LinearHeads):
        rates = dict.fromkeys(config.base_lrs) or (config.base_lr,)
        return [
            {"params": list(layer.parameters()), "lr_scale": rate / config.base_lr, "weight_decay": config.weight_decay}
            for layer, rate in zip(head.layers, rates, strict=True)
        ]
    return layer_groups(None, head, 1.0, config.weight_decay)


def soft_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits (heads, B, classes) with soft targets (B, classes), summed over heads -> scalar."""
    return sum(F.cross_entropy(one.float(), targets) for one in logits)


def one_hot(labels: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """Labels (B,) -> (B, classes) with `smoothing` of the mass spread evenly over all classes (Szegedy et al. 2016)."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def fit_on_features(head: LinearHeads, features: Tensor, labels: Tensor, classes: int, config: Config):
    """Train linear heads on features that are computed once (N, D): no image is encoded twice.

    Batches, learning rates and loss are those of `Classifier` in `common.fit`. Raises NonFiniteLoss if no head is left.
    """
    optimizer, steps = make_optimizer(head_groups(head, config), config), len(labels) // config.batch_size
    head.train()
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(common.mix_seed(config.seed, epoch, 0))
        order = torch.randperm(len(labels), generator=generator).to(features.device)
        for step, index in enumerate(order[: steps * config.batch_size].split(config.batch_size)):
            rate = common.learning_rate(epoch * steps + step, steps, config)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            logits = head(features[index])
            optimizer.zero_grad(set_to_none=True)
            soft_loss(logits, one_hot(labels[index], classes, config.smoothing)).backward()
            optimizer.step()
        if not logits.isfinite().flatten(1).all(dim=1).any():
            raise common.NonFiniteLoss(f"linear, epoch {epoch + 1}: the loss is not finite; lower --base-lr")


class Classifier(common.Method):
    """An encoder, frozen or not, and a head, trained on labels by the loop that all methods share."""

    captions = ("image", *["augmented"] * 4)

    def __init__(self, protocol: str, encoder: nn.Module, head: nn.Module, classes: int, config: Config):
        super().__init__()
        self.name, self.config, self.classes = protocol, config, classes
        self.encoder, self.head, self.frozen = encoder, head, protocol != "finetune"
        self.origin = digest(encoder) if self.frozen else digest(encoder) + digest(head)
        self.features = pooled_features if isinstance(head, LinearHeads) else token_features
        encoder.requires_grad_(not self.frozen)
        if not self.frozen and config.drop_path:
            if not isinstance(encoder, ViT):
                raise UserError("--drop-path needs a transformer; this encoder has none, give --drop-path 0")
            add_drop_path(encoder, config.drop_path)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.frozen:
            self.encoder.eval()  # its norms keep their statistics
        return self

    def optimizer(self, config: Config) -> torch.optim.Optimizer:
        if self.frozen:
            return make_optimizer(head_groups(self.head, config), config)
        return make_optimizer(layer_groups(self.encoder, self.head, config.layer_decay, config.weight_decay), config)

    def statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (3, 1, 1) of the data that the encoder knows."""
        return self.encoder.mean.to(images), self.encoder.std.to(images)

    @torch.no_grad()
    def augment(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What comes after crop and flip: RandAugment, erasing, then mixup or cutmix with their targets."""
        config, (mean, std) = self.config, self.statistics(images)
        with torch.autocast(images.device.type, enabled=False):
            if config.randaugment:
                images = rand_augment(images, mean, config.randaugment)
            if config.erase:
                images = random_erase(images, config.erase, mean, std)
            if config.mixup or config.cutmix:
                images, targets = mix_labels(images, targets, config.mixup, config.cutmix)
        return images, targets

    def logits(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (heads, B, classes)."""
        with gradient_if(not self.frozen):
            features = self.features(self.encoder, images)
        return self.head(features)

    def forward(self, images: Tensor, labels: Tensor) -> dict:
        images, targets = self.augment(images, one_hot(labels, self.classes, self.config.smoothing))
        return {"loss": soft_loss(self.logits(images), targets)}

    def probe(self, encode, train, test, config, **loading) -> dict:
        """Accuracy on the test images: {"accuracy": ...}, or one for each of several learning rates."""

        def classify(images):
            with autocast(config.amp, images.device):
                return self.logits(images).transpose(0, 1)  # (B, heads, classes)

        chosen = common.labelled(test)
        logits, labels = common.features_of(classify, test, chosen, config.image_size, **loading)
        return dict(zip(columns("accuracy", config), accuracies(logits.unbind(dim=1), labels), strict=True))

    def pictures(self, images: Tensor) -> Tensor:
        """Rows of an image and four of its augmentations (flips and crops come before): (B, 5, 3, H, W)."""
        targets = torch.zeros(len(images), 1, device=images.device)
        return torch.stack([images] + [self.augment(images, targets)[0] for _ in range(4)], dim=1).clamp(0, 1)


def accuracies(logits, labels: Tensor) -> list:
    """Accuracy in percent of each head: logits, a sequence of (N, classes); nan for a head that diverged."""
    right = [100 * float((one.argmax(dim=1) == labels).float().mean()) for one in logits]
    return [value if one.isfinite().all() else math.nan for value, one in zip(right, logits, strict=True)]


def columns(name: str, config: Config) -> list:
    """The names of the heads' results: one, or one for each of several learning rates."""
    return [f"{name} {rate:g}" for rate in dict.fromkeys(config.base_lrs)] or [name]


# ---------------------------------------------------------------------------------------------------------------------
# The protocols. Each returns {column: value} for one row of the table.
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What is judged: the trained encoder, the untrained one, or raw pixels (no encoder). Keeps what it computed."""

    name: str
    encoder: nn.Module | None
    train: common.MemoryImages | common.FolderImages
    test: common.MemoryImages | common.FolderImages
    device: torch.device
    kept: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.own_pool = getattr(self.encoder, "pool", "")

    def loading(self, config: Config) -> dict:
        return {"workers": config.workers, "device": self.device}

    def use_pool(self, config: Config):
        """Let a transformer return the features that the settings ask for, or else those of its own."""
        if isinstance(self.encoder, ViT):
            self.encoder.pool = self.encoder.fields["pool"] = config.pool or self.own_pool

    def features(self, split: str, config: Config) -> tuple[Tensor, Tensor]:
        """Features (N, D) and labels (N,) of the images that have one; computed once for each kind of feature."""
        self.use_pool(config)
        data, key = getattr(self, split), (split, getattr(self.encoder, "pool", ""))

        def encode(images):
            if self.encoder is None:
                return common.raw_pixels(images)
            with autocast(config.amp, images.device):
                return pooled_features(self.encoder, images)

        if key not in self.kept:
            limit = config.probe_images or (20_000 if self.encoder is None else 0)
            chosen = common.labelled(data, limit)
            self.kept[key] = common.features_of(encode, data, chosen, config.image_size, **self.loading(config))
        return self.kept[key]


def run_knn(row: Row, config: Config) -> dict:
    (bank, bank_labels), (queries, labels) = row.features("train", config), row.features("test", config)
    if config.k > len(bank):
        raise UserError(f"--k {config.k} is more than the {len(bank)} training images that could be neighbours")
    if config.metric == "cosine":  # on the unit sphere, the nearest is the one with the largest cosine
        bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    return {"knn": common.knn_accuracy(bank, bank_labels, queries, labels, config.k)}


def run_clusters(row: Row, config: Config) -> dict:
    features, labels = row.features("test", config)
    if len(labels.unique()) < 2 or len(labels) == len(labels.unique()):
        raise UserError(f"clusters needs two classes or more, and one with two test images, not {len(labels)} images")
    same, different = class_cosines(features, labels)
    centred = class_cosines(features - features.mean(dim=0), labels)
    return {
        "davies_bouldin": davies_bouldin(features, labels),
        "same_class_cosine": same,
        "other_class_cosine": different,
        "cosine_ratio": same / different if different else math.nan,
        "cosine_gap": centred[0] - centred[1],
    }


def run_linear(row: Row, config: Config) -> dict:
    classes, names = len(row.train.classes), columns("linear", config)

    def probe():
        (features, labels), (queries, truth) = row.features("train", config), row.features("test", config)
        if row.encoder is None:
            return [common.ridge_accuracy(features, labels, queries, truth, classes)] * len(names)
        torch.manual_seed(config.seed)
        head = make_head("linear", features.shape[1], classes, config).to(row.device)
        few = dataclasses.replace(config, batch_size=min(config.batch_size, len(labels)))
        fit_on_features(head, features, labels, classes, few)
        with torch.no_grad():
            return accuracies(head.eval()(queries), truth)

    return dict(zip(names, common.on_rank_zero(probe), strict=True))


def folder_of(protocol: str, row: Row, config: Config) -> Path:
    """The run folder of a protocol that trains on images."""
    return Path(config.out) / (
        f"{protocol}-{Path(config.data).name}" + ("" if row.name == "trained" else f"-{row.name}")
    )


def train_classifier(protocol: str, row: Row, config: Config) -> dict:
    """The protocols that encode each image anew: linear without cache, tran1, tran4, finetune.

    Each is a run of its own, in a folder <protocol>-<data> of the run's: with a log, checkpoints, and --resume.
    """
    row.use_pool(config)
    row.kept.clear()  # features that are kept would take memory from the training
    classes, kind = len(row.train.classes), config.head if protocol == "finetune" else protocol
    torch.manual_seed(config.seed)
    std, width = 2e-5 if protocol == "finetune" else 0.01, width_of(row.encoder)
    head = make_head(kind, row.encoder.dim, classes, config, std, width)
    if protocol == "finetune" and kind != "linear":  # FINOLA: from where the probe of the same decoder ended
        probed = folder_of(kind, row, config) / "last.pt"
        state = common.load_checkpoint(probed) if probed.exists() else {"identity": {}}
        found, last = state["identity"], 0
        if found:
            last = found["images"] // found["batch_size"] * found["epochs"]
        if (found.get("origin"), found.get("data"), state.get("step")) == (digest(row.encoder), config.data, last):
            weights = state["weights"]
            head.load_state_dict({name[5:]: value for name, value in weights.items() if name.startswith("head.")})
        elif rank() == 0:
            print(f"note: {probed} holds no finished probe of this encoder; --protocol {kind} makes one to start from")
    method = Classifier(protocol, copy.deepcopy(row.encoder), head, classes, config).to(row.device)
    # What the training does not depend on must not keep it from being resumed.
    fields = {name: getattr(Config, name) for name in OUTSIDE} | {"out": str(folder_of(protocol, row, config))}
    config = dataclasses.replace(config, protocol=(protocol,), **fields)
    common.fit(method, row.train, row.test, config)
    method.eval()
    result = common.on_rank_zero(lambda: method.probe(None, row.train, row.test, config, **row.loading(config)))
    return {name.replace("accuracy", protocol): value for name, value in result.items()}


def trains_on_images(protocol: str, row: Row, config: Config) -> bool:
    """Whether a protocol encodes images anew in each epoch, as a run of its own."""
    return row.encoder is not None and (
        protocol in ("tran1", "tran4", "finetune") or (protocol == "linear" and not config.cache)
    )


def applies(protocol: str, row: Row, config: Config) -> bool:
    """Whether a protocol has a meaning for a row."""
    if row.encoder is None:
        return protocol in ("knn", "linear", "clusters")
    if row.name == "untrained" and not config.untrained:
        return protocol == "finetune"  # the row is there for --scratch alone
    return not (protocol == "finetune" and config.scratch and row.name == "trained")


def run(protocol: str, row: Row, config: Config) -> dict:
    """One protocol on one row -> {column: value}."""
    if trains_on_images(protocol, row, config):
        if protocol == "finetune" and row.name == "untrained":
            config = dataclasses.replace(config, layer_decay=1.0)  # it would all but freeze random lower layers
        return train_classifier(protocol, row, config)
    if protocol == "linear":
        return run_linear(row, config)
    return common.on_rank_zero(lambda: {"knn": run_knn, "clusters": run_clusters}[protocol](row, config))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # five points of the colour map
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222222", "#ff9933", "#885522")
SCALE = 3  # charts are drawn this much larger and then reduced, for smooth lines


def heat(values: Tensor) -> Tensor:
    """Values in [0, 1] (..., H, W) as colours (..., 3, H, W) in [0, 1], dark blue to yellow."""
    points = torch.tensor(VIRIDIS) / 255
    place = values.clamp(0, 1) * (len(points) - 1)
    low = place.long().clamp_max(len(points) - 2)
    return torch.lerp(points[low], points[low + 1], (place - low)[..., None]).movedim(-1, -3)


def font(size: int):
    return ImageFont.load_default(size)


def write_sheet(path: Path, title: str, columns, rows: Tensor, side: int = 112):
    """A PNG of pictures (R, K, 3, H, W) in [0, 1] in rows and columns, with a title and a caption over each column."""
    gap, head, width = 6, 64, rows.shape[1]
    canvas = Image.new("RGB", (gap + width * (side + gap), head + rows.shape[0] * (side + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    size = 18
    while size > 9 and draw.textlength(title, font(size)) > canvas.width - 2 * gap:
        size -= 1
    draw.text((gap, 8), title, "black", font(size))
    pixels = (rows.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).movedim(2, -1).numpy()
    for k in range(width):
        x = gap + k * (side + gap)
        caption = columns[k] if k < len(columns) else ""
        draw.text((x + side / 2, head - 14), caption, "#444444", font(13), anchor="mm")
        for r in range(rows.shape[0]):
            # Small images stay made of squares, photographs are reduced smoothly.
            method = Image.Resampling.NEAREST if pixels.shape[2] < side else Image.Resampling.LANCZOS
            canvas.paste(Image.fromarray(pixels[r, k]).resize((side, side), method), (x, head + r * (side + gap)))
    canvas.save(path)


@torch.no_grad()
def look_inside(encoder: ViT, images: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of the CLS token in the last block (B, heads, N), and the keys of every block (blocks, B, N, D)."""
    keys, last = [], []

    def attention(q, k, v):
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, heads, 1 + N, 1 + N)
        keys.append(rearrange(k[:, :, 1:], "b h n d -> b n (h d)").float().cpu())
        last[:] = [weights[:, :, 0, 1:].float().cpu()]
        return weights @ v

    encoder.encode(encoder.embed(images), attention)
    return last[0], torch.stack(keys)


def principal_components(x: Tensor, count: int) -> Tensor:
    """The leading principal components of rows (N, D) -> (N, count), each with its larger tail on the positive side."""
    x = x.double() - x.double().mean(dim=0)
    _, vectors = torch.linalg.eigh(x.T @ x)
    scores = x @ vectors[:, -count:].flip(1)
    return scores * torch.where(scores.pow(3).sum(dim=0) < 0, -1.0, 1.0)


def stretch(x: Tensor, dims) -> Tensor:
    """Shift and scale to [0, 1] over some dimensions."""
    low, high = x.amin(dim=dims, keepdim=True), x.amax(dim=dims, keepdim=True)
    return (x - low) / (high - low).clamp_min(1e-12)


def ticks(low: float, high: float, count: int = 5) -> list:
    """Round numbers that span [low, high]."""
    rough = (high - low) / count
    step = 10 ** math.floor(math.log10(rough))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= rough)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Chart:
    """One panel with axes, drawn by Pillow: lines or points in data coordinates."""

    def __init__(self, title: str, x_label: str, y_label: str, x_range, y_range, size=(520, 380), margin=(64, 44)):
        (self.x0, self.x1), (self.y0, self.y1) = [
            (a, b) if b > a else (a - 0.5, a + 0.5) for a, b in (x_range, y_range)
        ]
        self.width, self.height = (SCALE * side for side in size)
        self.left, self.bottom = SCALE * margin[0], SCALE * margin[1]
        self.top, self.right = SCALE * 36, SCALE * 16
        self.image = Image.new("RGB", (self.width, self.height), "white")
        self.draw = ImageDraw.Draw(self.image)
        small, plain = font(11 * SCALE), font(13 * SCALE)
        self.draw.text((self.width / 2, 18 * SCALE), title, "black", font(15 * SCALE), anchor="mm")
        for value in ticks(self.x0, self.x1) if x_label else ():
            x, _ = self.place(value, self.y0)
            self.draw.text((x, self.height - self.bottom + 12 * SCALE), f"{value:g}", "#444444", small, anchor="mm")
        for value in ticks(self.y0, self.y1) if y_label else ():
            _, y = self.place(self.x0, value)
            self.draw.line([(self.left, y), (self.width - self.right, y)], "#e4e4e4", SCALE)
            self.draw.text((self.left - 6 * SCALE, y), f"{value:g}", "#444444", small, anchor="rm")
        self.draw.text((self.width / 2, self.height - 14 * SCALE), x_label, "#444444", plain, anchor="mm")
        label = Image.new("L", (int(plain.getlength(y_label)) + 1, 18 * SCALE), 255)
        ImageDraw.Draw(label).text((0, 9 * SCALE), y_label, 68, plain, anchor="lm")
        label = label.rotate(90, expand=True)
        self.image.paste(label, (4 * SCALE, (self.top + self.height - self.bottom - label.height) // 2))
        corner = (self.left, self.top, self.width - self.right, self.height - self.bottom)
        self.draw.rectangle(corner, outline="#888888", width=SCALE)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Data coordinates -> pixels."""
        across = (x - self.x0) / (self.x1 - self.x0) * (self.width - self.left - self.right)
        up = (y - self.y0) / (self.y1 - self.y0) * (self.height - self.top - self.bottom)
        return self.left + across, self.height - self.bottom - up

    def line(self, points, colour: str):
        pixels = [self.place(*point) for point in points]
        self.draw.line(pixels, colour, 2 * SCALE, joint="curve")
        for x, y in pixels if len(pixels) < 40 else ():
            self.dot(x, y, colour, 3)

    def dot(self, x: float, y: float, colour: str, radius: float = 3):
        r = radius * SCALE
        self.draw.ellipse((x - r, y - r, x + r, y + r), colour)

    def legend(self, names, low: bool = False):
        """Names in their colours, in the upper or lower right corner."""
        text = font(12 * SCALE)
        wide, line = max(text.getlength(name) for name, _ in names) + 26 * SCALE, 17 * SCALE
        left, tall = self.width - self.right - wide - 6 * SCALE, line * len(names) + 6 * SCALE
        top = self.height - self.bottom - tall - 6 * SCALE if low else self.top + 6 * SCALE
        box = (left, top, left + wide, top + tall)
        self.draw.rectangle(box, fill="white", outline="#cccccc", width=SCALE)
        for i, (name, colour) in enumerate(names):
            y = top + line * (i + 0.5) + 3 * SCALE
            self.dot(left + 10 * SCALE, y, colour, 4)
            self.draw.text((left + 20 * SCALE, y), name, "black", text, anchor="lm")


def save_charts(path: Path, charts: list):
    """Write panels of one size side by side, three in a row."""
    across = min(3, len(charts))
    wide, high = charts[0].width, charts[0].height
    canvas = Image.new("RGB", (across * wide, math.ceil(len(charts) / across) * high), "white")
    for i, chart in enumerate(charts):
        canvas.paste(chart.image, (i % across * wide, i // across * high))
    canvas.reduce(SCALE).save(path)


def draw_curves(log: list, title: str, path: Path) -> bool:
    """All that a log.jsonl follows over the epochs, the accuracies in one panel; False where it has too few epochs."""
    curves = {}
    for line in log:
        for name, value in line.items():
            if isinstance(value, int | float) and name not in ("epoch", "lr", "images_per_second"):
                curves.setdefault(name, []).append((line["epoch"], value))
    if len(curves.get("loss", ())) < 2:
        return False
    probes = {name: curves.pop(name) for name in ("knn", "linear", "accuracy") if name in curves}
    last, charts = log[-1]["epoch"], []
    for name, points in curves.items():
        values = [value for _, value in points]
        spread = 0.05 * (max(values) - min(values))
        chart = Chart(f"{title}: {name}", "epoch", name, (0, last), (min(values) - spread, max(values) + spread))
        chart.line(points, COLOURS[0])
        charts.append(chart)
    if probes:
        top = max(y for points in probes.values() for _, y in points)
        charts.insert(1, Chart(f"{title}: probes", "epoch", "accuracy (%)", (0, last), (0, 1.1 * top + 1)))
        names = [(name, colour) for name, colour in zip(probes, COLOURS[1:], strict=False)]
        for name, colour in names:
            charts[1].line(probes[name], colour)
        charts[1].legend([(TITLES.get(name, name), colour) for name, colour in names], low=True)
    save_charts(path, charts)
    return True


def draw_feature_map(features: Tensor, labels: Tensor, classes: list, title: str, path: Path):
    """The features of at most ten classes in their two leading principal components, coloured by class."""
    shown = labels.unique()[:10]
    chosen = torch.isin(labels, shown)
    features, labels = features[chosen].cpu(), labels[chosen].cpu()
    points = principal_components(features, 2)
    low, high = points.amin(dim=0), points.amax(dim=0)
    pad = 0.04 * (high - low)
    ranges = list(zip((low - pad).tolist(), (high + pad + torch.tensor([0.3, 0]) * (high - low)).tolist(), strict=True))
    chart = Chart(title, "", "", *ranges, size=(640, 520), margin=(16, 16))
    for (x, y), label in zip(points.tolist(), labels.tolist(), strict=True):
        chart.dot(*chart.place(x, y), COLOURS[shown.tolist().index(label)], 2.2)
    chart.legend([(classes[label], colour) for label, colour in zip(shown.tolist(), COLOURS, strict=False)])
    save_charts(path, [chart])


def load_method(run: Path, settings: dict, data) -> common.Method:
    """The whole method of a run, from config.json and last.pt."""
    module = importlib.import_module(settings["method"])
    known = {field.name for field in dataclasses.fields(module.Config)}
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items() if name in known}
    if fields.get("start"):  # the file that the run went on from may be gone
        fields["start"] = str(run / "encoder.pt")
    method = getattr(module, METHODS[settings["method"]])(module.Config(**fields), data)
    method.load_state_dict(common.load_checkpoint(run / "last.pt")["weights"])
    return method.eval()


def one_a_class(row: Row, config: Config) -> Tensor:
    """The first test image of each of at most eight classes (B, 3, H, W)."""
    labels = row.test.labels.cpu()
    first = [int(torch.nonzero(labels == label)[0]) for label in labels[labels >= 0].unique()[:8]]
    return next(iter(row.test.plain_batches(first, config.image_size, **row.loading(config))))[0]


def draw_pictures(run: Path, settings: dict, row: Row, config: Config) -> tuple[list, dict]:
    """Write all that there is to see of a run into its folder `pictures`; returns the paths, and no figures."""
    out = Path(config.out) / "pictures"
    out.mkdir(parents=True, exist_ok=True)
    encoder, written, notes = row.encoder, [], []
    row.use_pool(config)
    images = one_a_class(row, config)
    name = settings.get("method", "encoder")
    title, trained_on = f"{name} on {Path(config.data).name}", f"{name} on {Path(settings.get('data', '')).name}"

    method = None
    if settings.get("method") in METHODS and (run / "last.pt").exists():
        data = dataclasses.replace(row.test, mean=encoder.fields["mean"], std=encoder.fields["std"])
        try:
            method = load_method(run, settings, data).to(row.device)
        except (UserError, KeyError, TypeError, RuntimeError) as error:
            notes.append(f"no reconstructions, last.pt and config.json do not fit ({str(error).splitlines()[0]})")
    else:
        notes.append("no reconstructions, these need the config.json and last.pt of a method's run")
    if method is not None:
        if method.config.image_size == config.image_size:
            torch.manual_seed(config.seed)
            with autocast(config.amp, row.device):
                rows = method.pictures(images)
            written.append(out / "reconstructions.png")
            write_sheet(written[-1], f"{title}: reconstructions", method.captions, rows)
        else:
            notes.append(f"reconstructions are drawn at the run's own size, {method.config.image_size}, alone")
    if isinstance(encoder, ViT):
        height, width = encoder.grid
        attention, keys = look_inside(encoder, images)
        small = common.resize(images, images.shape[-1]).cpu()

        def beside(maps):  # (B, K, h, w) in [0, 1] -> (B, 1 + K, 3, H, W) with the image first
            size = [side * encoder.patch for side in encoder.grid]
            maps = heat(F.interpolate(maps.float(), size, mode="nearest"))
            return torch.cat([small[:, None], maps], dim=1)

        maps = attention.unflatten(2, (height, width))  # (B, heads, h, w)
        columns = ["image", *[f"head {i + 1}" for i in range(maps.shape[1])]]
        written.append(out / "attention.png")
        rows = beside(stretch(maps, (2, 3)))
        write_sheet(written[-1], f"{title}: attention of the CLS token, last block", columns, rows)
        blocks = [principal_components(part.flatten(0, 1), 1).view(len(images), height, width) for part in keys]
        maps = stretch(torch.stack(blocks, dim=1), (0, 2, 3))  # (B, blocks, h, w)
        columns = ["image", *[f"block {i + 1}" for i in range(len(keys))]]
        written.append(out / "keys.png")
        write_sheet(written[-1], f"{title}: leading component of the keys", columns, beside(maps))
    else:
        notes.append("attention and keys are drawn for transformers alone")
    features, labels = row.features("test", config)
    written.append(out / "features.png")
    draw_feature_map(features, labels, row.test.classes, f"{title}: test features, two components", written[-1])
    if (run / "log.jsonl").exists() and draw_curves(read_log(run / "log.jsonl"), trained_on, out / "curves.png"):
        written.append(out / "curves.png")
    else:
        notes.append("log.jsonl has no two epochs, so no curves")
    for note in notes:
        print(f"note: {note}")
    return written, {}


# What FINOLA's own analysis looks at (its Fig. 5 and appendix E).

COMPONENTS = (1, 4, 16, 64, 192, 768)  # of Fig. 15


@torch.no_grad()
def look_into_finola(method: finola.FinolaAutoencoder, row: Row, config: Config) -> dict:
    """What the analysis of FINOLA needs of all test images: {name: tensor}, one row an image.

    PSNR of the reconstruction and of the mean training image, both outside the visible block in masked variants, where
    it lies in the middle; the residuals of Eq. 2, and of Eq. 4 in the quadrant right of and below q where it has three
    cells a side; each image's peak curvatures, sorted, at most 256; the vectors q.
    """
    size, found = config.image_size, {}
    loading = row.loading(config)

    def batches(data):
        chosen = common.labelled(data, config.probe_images)
        return ((images, len(chosen)) for images, _ in data.plain_batches(chosen, size, **loading))

    mean = sum(images.double().sum(dim=0) / count for images, count in batches(row.train)).float()  # (3, H, W)
    right, down = method.finola.right, method.finola.down
    row_0, column_0 = method.start
    for images, _ in batches(row.test):
        corner = method.middle(images)
        with autocast(config.amp, row.device):
            z = method.feature_map(images, corner)
            others = method.decode(z)
        mask, z = method.scored(images, corner), z.float()
        part = {"psnr": finola.psnr(images, others, mask)}
        part["psnr of mean"] = finola.psnr(images, mean.expand_as(images), mask)
        if method.config.variant != "masked_b":
            with autocast(config.amp, row.device):
                part["q"] = method.embed(images, corner).float()
        if method.config.variant != "masked_b" and method.finola.norm == "channel":
            part["dz/dx"], part["dz/dy"] = finola.pde_residuals(z, method.finola, method.start)
            if min(method.size - row_0, method.size - column_0) >= 3:  # the quadrant that A and B unroll
                part["laplacian"] = finola.laplacian_residual(z[:, :, row_0:, column_0:], right, down)
        if method.size >= 3:
            part["curvature"] = finola.peak_curvature(z).sort(dim=1, descending=True).values[:, :256]
        for name, value in part.items():
            found.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


@torch.no_grad()
def draw_embeddings(
    method: finola.FinolaAutoencoder, q: Tensor, own: Tensor, images: Tensor, title: str, out: Path
) -> list:
    """Appendix E: what the upsampler makes of embeddings that belong to no image.

    q (N, C) are those of all test images, `own` (B, C) those of `images`.
    """
    device, corner, count = images.device, method.middle(images), len(images)
    q, mean, written = q.to(device), q.mean(dim=0).to(device), []

    def decode(vectors):  # (..., C) -> (..., 3, H, W), in [0, 1]
        flat = vectors.flatten(0, -2)
        places = None if corner is None else corner[:1].expand(len(flat), -1)
        return method.decode(method.unroll(flat, places)).clamp(0, 1).unflatten(0, vectors.shape[:-1])

    def sheet(name, heading, columns, rows):
        written.append(out / f"{name}.png")
        write_sheet(written[-1], f"{title}: {heading}", columns, rows)

    def beside(vectors):  # (K, B, C) -> (B, 1 + K, 3, H, W)
        return torch.cat([images[:, None], decode(vectors).transpose(0, 1)], dim=1)

    line = finola.interpolate(own, finola.mirror(own, mean), 5)
    sheet(
        "mean", "from q over the mean embedding to its mirror", ["image", "q", "", "mean", "", "mirror"], beside(line)
    )
    other = own.roll(-1, dims=0)
    steps = finola.interpolate(own, other, 5)
    rows = torch.cat([beside(steps), images.roll(-1, dims=0)[:, None]], dim=1)
    sheet("interpolations", "between two embeddings", ["first", *["" for _ in steps], "second"], rows)
    samples = finola.gaussian_samples(q, 6 * count, torch.Generator().manual_seed(0)).unflatten(0, (6, count))
    sheet("samples", "an image, and Gaussian samples", ["image", *["sample"] * 6], beside(samples))
    counts = [k for k in COMPONENTS if k < q.shape[1]] + [q.shape[1]]
    vectors = finola.principal_reconstructions(own, mean, torch.cov(q.T), counts)
    sheet("components", "the top K principal components", ["image", *[f"K = {k}" for k in counts]], beside(vectors))
    return written


def draw_finola(run: Path, settings: dict, row: Row, config: Config) -> tuple[list, dict]:
    """FINOLA's analysis of a run, into its folder `finola`; returns the paths and the figures for the table."""
    if settings.get("method") != "finola" or not (run / "last.pt").exists():
        raise UserError(
            f"--protocol finola looks into a run of finola with its config.json and last.pt, not into {run}"
        )
    data = dataclasses.replace(row.test, mean=row.encoder.fields["mean"], std=row.encoder.fields["std"])
    method = load_method(run, settings, data).to(row.device)
    if method.config.image_size != config.image_size:
        raise UserError(f"--protocol finola needs the run's own --image-size {method.config.image_size}")
    out = Path(config.out) / "finola"
    out.mkdir(parents=True, exist_ok=True)
    title, images, written = f"{method.config.variant} on {Path(config.data).name}", one_a_class(row, config), []
    found = look_into_finola(method, row, config)
    if "q" in found:
        with torch.no_grad(), autocast(config.amp, row.device):
            own = method.embed(images, method.middle(images)).float()
        written += draw_embeddings(method, found["q"], own, images, title, out)
    else:
        print("note: masked_b has no vector q, so no embeddings and no residuals")
    if method.finola.norm != "channel":
        print("note: residuals are those of Eq. 2, which has the channel norm, so there are none")
    residuals = {name: found[name].sort().values for name in ("dz/dx", "dz/dy", "laplacian") if name in found}
    if residuals:
        top, last = max(float(values[-1]) for values in residuals.values()), len(found["psnr"])
        chart = Chart(
            f"{title}: residuals of Eq. 2 and 4", "test images, sorted", "relative residual", (1, last), (0, top)
        )
        lines = [(name, values, f"{name}: median {values.median():.2f}") for name, values in residuals.items()]
        written.append(out / "residuals.png")
        draw_lines(chart, lines, written[-1])
    if "curvature" in found:
        curvature = found["curvature"].quantile(torch.tensor([0.25, 0.5, 0.75]), dim=0)  # (3, K)
        chart = Chart(
            f"{title}: curvature",
            "channels, sorted",
            "peak curvature",
            (1, curvature.shape[1]),
            (0, float(curvature.max())),
        )
        names = ("lower quartile", "median of the images", "upper quartile")
        written.append(out / "curvature.png")
        draw_lines(chart, zip(names, curvature, names, strict=True), written[-1])
        with torch.no_grad():
            z = method.feature_map(images, method.middle(images)).float()
        top = finola.peak_curvature(z).topk(min(6, z.shape[1]), dim=1).indices  # (B, K)
        maps = stretch(z[torch.arange(len(z))[:, None], top], (2, 3)).cpu()  # (B, K, S, S)
        maps = heat(F.interpolate(maps, images.shape[-1], mode="nearest"))
        written.append(out / "surfaces.png")
        columns = ["image", *[f"rank {i + 1}" for i in range(top.shape[1])]]
        rows = torch.cat([images[:, None].cpu(), maps], dim=1)
        write_sheet(written[-1], f"{title}: channels of the largest curvature", columns, rows)
    else:
        print(f"note: a map of {method.size} x {method.size} is too small for curvature; give a larger --image-size")
    figures = {"psnr": float(found["psnr"].mean()), "psnr_of_mean": float(found["psnr of mean"].mean())}
    figures |= {name: float(values.median()) for name, values in residuals.items()}
    if "curvature" in found:
        figures["curvature"] = float(found["curvature"][:, 0].median())
    return written, figures


# What energy-inspired pretraining learned: how its chains go, and what energies they have (its Fig. 1, 3 and 4).

CHAIN = 8  # steps that are drawn; training takes two


@torch.no_grad()
def look_into_energy(method: ebm_pretrain.EnergyPretraining, row: Row, config: Config) -> dict:
    """Chains of all test images, {task: {"error": (N, T + 1), "energy": (N, T + 1), "clean": (N,)}}, rows are images.

    `error` is the mean squared error of normalised pixels along the chain, `clean` the energy of the whole image.
    """
    chosen, found = common.labelled(row.test, config.probe_images), {}
    torch.manual_seed(config.seed)
    for images, _ in row.test.plain_batches(chosen, config.image_size, **row.loading(config)):
        for task in method.tasks:
            clean, corrupted = method.corrupt(images, task)
            with autocast(config.amp, row.device):
                chain, energies = ebm_pretrain.sample(method.energy, corrupted, CHAIN, method.step_size(corrupted))
                energy = method.energy(clean)
            error = (chain - clean).square().mean(dim=(2, 3, 4))
            part = {"error": error.T.cpu(), "energy": energies.T.cpu(), "clean": energy.cpu()}
            for name, value in part.items():
                found.setdefault(task, {}).setdefault(name, []).append(value)
    return {task: {name: torch.cat(parts) for name, parts in values.items()} for task, values in found.items()}


def draw_energy(run: Path, settings: dict, row: Row, config: Config) -> tuple[list, dict]:
    """Chains, errors and energies of a run, into its folder `energy`; returns paths and the figures for the table."""
    if settings.get("method") != "ebm_pretrain" or not (run / "last.pt").exists():
        raise UserError(
            f"--protocol energy looks into a run of ebm_pretrain with its config.json and last.pt, not into {run}"
        )
    data = dataclasses.replace(
        row.test, mean=row.encoder.mean.flatten().tolist(), std=row.encoder.std.flatten().tolist()
    )
    method = load_method(run, settings, data).to(row.device)
    if method.config.objective != "energy" or not method.config.steps:
        raise UserError(
            "--protocol energy needs --objective energy with --steps 1 or more: this run has no chain to follow"
        )
    if method.config.image_size != config.image_size:
        raise UserError(f"--protocol energy needs the run's own --image-size {method.config.image_size}")
    out = Path(config.out) / "energy"
    out.mkdir(parents=True, exist_ok=True)
    title, images, written, figures = f"energy on {Path(config.data).name}", one_a_class(row, config), [], {}
    for task in method.tasks:
        torch.manual_seed(config.seed)
        _, corrupted = method.corrupt(images, task)
        with autocast(config.amp, row.device):
            chain, _ = ebm_pretrain.sample(method.energy, corrupted, CHAIN, method.step_size(corrupted))
        rows = torch.cat([images[:, None], (chain.transpose(0, 1) * method.std + method.mean).clamp(0, 1)], dim=1)
        written.append(out / f"chain_{task}.png")
        columns = ["image", "corrupted", *[f"step {i + 1}" for i in range(CHAIN)]]
        write_sheet(written[-1], f"{title}: {task.replace('_', ' ')}", columns, rows.cpu())
    found, steps = look_into_energy(method, row, config), method.config.steps
    curves = {"error": {}, "energy": {}}
    for task, values in found.items():
        error = values["error"].mean(dim=0)
        left = error / error[0].clamp_min(1e-12)  # (T + 1,)
        curves["error"][task] = left
        curves["energy"][task] = (values["energy"] - values["clean"][:, None]).mean(dim=0)
        figures[f"left_{task}"] = float(left[steps])
        lower = {"restored": values["energy"][:, steps], "clean": values["clean"]}
        shares = {name: float((value < values["energy"][:, 0]).float().mean()) for name, value in lower.items()}
        figures |= {f"{name}_lower_{task}": share for name, share in shares.items()}
        print(
            f"{task}: of the corrupted images' squared error {100 * left[steps]:.0f} % is left after step {steps}; "
            f"energy below that of the corrupted image: restored {100 * shares['restored']:.0f} %, "
            f"clean {100 * shares['clean']:.0f} % of the images"
        )
    charts, names = [], {"error": "squared error, 1 = corrupted", "energy": "energy above that of the clean image"}
    for name, lines in curves.items():
        every = torch.stack([*lines.values(), torch.zeros(CHAIN + 1)])
        low, high = float(every.min()), float(every.max())
        span = (low, high + 0.4 * (high - low))  # with room for the legend
        charts.append(Chart(f"{title}: {name} along the chain", "step", names[name], (0, CHAIN), span))
        legend = []
        for (task, values), colour in zip(lines.items(), COLOURS, strict=False):
            charts[-1].line(list(enumerate(values.tolist())), colour)
            legend.append((task.replace("_", " "), colour))
        charts[-1].legend(legend)
    written.append(out / "chains.png")
    save_charts(written[-1], charts)
    return written, figures


def draw_lines(chart: Chart, lines, path: Path):
    """Curves (key, values, legend) over 1, 2, 3, ... in one panel."""
    legend = []
    for (_, values, name), colour in zip(lines, COLOURS, strict=False):
        chart.line(list(enumerate(values.tolist(), 1)), colour)
        legend.append((name, colour))
    chart.legend(legend)
    save_charts(path, [chart])


def read_log(path: Path) -> list:
    """The epochs of a log.jsonl."""
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a line that a kill cut short
            line = json.loads(text)
            if isinstance(line, dict) and "epoch" in line:
                lines.append(line)
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

DRAWING = {"pictures": draw_pictures, "finola": draw_finola, "energy": draw_energy}
TITLES = {
    "psnr": "PSNR",
    "psnr_of_mean": "mean image",
    "knn": "kNN",
    "davies_bouldin": "Davies-Bouldin",
    "cosine_ratio": "cosine ratio",
    "cosine_gap": "cosine gap",
}
DIGITS = {"dz/dx": 3, "dz/dy": 3, "laplacian": 3, "curvature": 3} | {
    "davies_bouldin": 2,
    "cosine_ratio": 3,
    "cosine_gap": 3,
}
DIGITS |= dict.fromkeys([f"left_{task}" for task in ebm_pretrain.TASKS], 3)
TITLES |= {f"left_{task}": f"left of {task.replace('_', ' ')}" for task in ebm_pretrain.TASKS}
UNTITLED = ("same_class_cosine", "other_class_cosine", "restored_lower_", "clean_lower_")  # starts; in eval.jsonl only


def format_table(results: dict) -> str:
    """{row: {column: value}} as text; rows that have no value in a column show a dash."""
    names = {"trained": "trained encoder", "untrained": "untrained encoder", "pixels": "raw pixels"}
    columns = list(dict.fromkeys(c for row in results.values() for c in row if not c.startswith(UNTITLED)))
    titles = [TITLES.get(column, column) for column in columns]
    widths = [max(10, len(title) + 3) for title in titles]
    lines = [f"{'':<20}" + "".join(f"{t:>{w}}" for t, w in zip(titles, widths, strict=True))]
    for row, values in results.items():
        cells = []
        for column in columns:
            value = values.get(column, "-")
            cells.append("nan" if value is None else value if value == "-" else f"{value:.{DIGITS.get(column, 1)}f}")
        cells = "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
        lines.append(f"{names[row]:<20}{cells}")
    return "\n".join(lines)


def read_settings(run: Path) -> dict:
    """What config.json says of a run; {} where there is none."""
    try:
        found = json.loads((run / "config.json").read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{run / 'config.json'} cannot be read ({error})") from None
    kinds = {"data": str, "root": str, "method": str, "image_size": int}
    if not isinstance(found, dict) or not all(
        isinstance(found.get(name, kind()), kind) for name, kind in kinds.items()
    ):
        raise UserError(f"{run / 'config.json'} holds no settings of a run")
    return found


def evaluate(argv: list):
    """Run the command line. Raises UserError for a run, data or protocol that is wrong."""
    if not argv or argv[0].startswith("-"):
        if argv and argv[0] not in ("-h", "--help"):
            raise UserError(f"give the run folder first: python evaluate.py RUN {' '.join(argv)}")
        usage = "python evaluate.py RUN [--protocol NAME ...] [--any-field value]"
        common.flag_parser(Config, usage, "Recipes of the protocols change many of these defaults.").print_help()
        return
    run_folder, given = Path(argv[0]), common.given_flags(Config, argv[1:])
    if not run_folder.is_dir():
        raise UserError(f"no run folder {run_folder}; give one that train.py wrote, such as runs/magma-shapes")
    if not (run_folder / "encoder.pt").exists():
        raise UserError(f"{run_folder} holds no encoder.pt: a run writes it at the end of its first epoch")
    protocols = given.get("protocol", Config.protocol)
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise UserError(unknown("protocol", protocol, PROTOCOLS))
    protocols = sorted(set(protocols), key=PROTOCOLS.index)  # a decoder is probed before it is fine-tuned
    recipes = sorted({name for protocol in protocols for name in RECIPES.get(protocol, ())})
    if given.get("recipe") and given["recipe"] not in recipes:
        raise UserError(unknown(f"recipe of {' '.join(protocols)}", given["recipe"], recipes or ["none"]))
    known = read_settings(run_folder)
    if "data" not in given:
        if "data" not in known:
            raise UserError(f"{run_folder} has no config.json to tell the data set; give --data")
        given = {"data": known["data"], "root": given.get("root", known.get("root", "data"))} | given
    device = common.start_distributed(given.get("device", Config.device))
    encoder = common.load_encoder(run_folder / "encoder.pt", image_size=given.get("image_size", 0)).to(device)
    size = encoder.fields.get("image_size", given.get("image_size") or known.get("image_size"))
    if size is None:
        raise UserError(f"{run_folder} has no config.json to tell the size of the images; give --image-size")
    if not isinstance(size, int):
        raise UserError(f"{run_folder} has an encoder of {size[0]} x {size[1]} images; give a square --image-size")
    given |= {"image_size": size}
    given = {"out": str(run_folder)} | given
    options = {name: given[name] for name in ("root", "image_size", "download", "skip_bad_images") if name in given}
    train, test = (common.load_data(given["data"], split=s, device=device, **options) for s in ("labelled", "test"))
    configs = {p: settings(p, given, known.get("method", ""), width_of(encoder), len(train)) for p in protocols}
    config = configs[protocols[0]]
    rows = [Row("trained", encoder, train, test, device)]
    if config.untrained or (config.scratch and "finetune" in protocols):
        torch.manual_seed(config.seed)
        rows.append(Row("untrained", type(encoder)(**encoder.fields).to(device).eval(), train, test, device))
    if config.pixels:
        rows.append(Row("pixels", None, train, test, device))

    for protocol, config in configs.items():
        for row in rows:
            out = folder_of(protocol, row, config)
            if not (applies(protocol, row, config) and trains_on_images(protocol, row, config)):
                continue
            if not config.resume and common.on_rank_zero(out.exists):  # before hours are spent on what comes first
                raise UserError(f"{out} exists; add --resume to go on with it, or choose another folder by --out")
    table = {row.name: {} for row in rows}
    try:
        run_all(configs, rows, table, run_folder, known)
    finally:
        if rank() == 0 and any(table.values()):
            print(format_table({name: values for name, values in table.items() if values}))
            for note in notes_on(table, protocols):
                print(note)


def notes_on(table: dict, protocols: list) -> list:
    """What one should know when reading the table."""
    notes = []
    if "davies_bouldin" in table["trained"]:
        notes.append("Davies-Bouldin: lower is better")
    if any(column.startswith("linear") for column in table.get("pixels", ())):
        notes.append("linear of raw pixels: by ridge regression, whatever the recipe")
    if "untrained" not in table and set(protocols) - {"pictures", "energy"}:
        notes.append("--untrained adds what the encoder knew before")
    if "pixels" not in table and {"knn", "linear", "clusters"} & set(protocols):
        notes.append("--pixels adds what raw pixels say")
    elif "pixels" in table and not table["pixels"]:
        notes.append("--pixels is for knn, linear and clusters alone")
    return notes


def run_all(configs: dict, rows: list, table: dict, run_folder: Path, known: dict):
    """Every protocol on every row: fills the table and eval.jsonl."""
    for protocol, config in configs.items():
        started, results = time.perf_counter(), {}
        if protocol in DRAWING:
            draw = functools.partial(DRAWING[protocol], run_folder, known, rows[0], config)
            written, found = common.on_rank_zero(draw)
            for path in written if rank() == 0 else ():
                print(f"wrote {path}")
            if not found:
                continue
            results["trained"] = found
            table["trained"] |= found
        for row in rows if protocol not in DRAWING else ():
            if applies(protocol, row, config):
                found = run(protocol, row, config)
                # JSON knows no nan: a head that diverged, a ratio over zero.
                results[row.name] = {name: value if math.isfinite(value) else None for name, value in found.items()}
                table[row.name] |= results[row.name]
        if rank() == 0:
            versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
            limit = 0 if trains_on_images(protocol, rows[0], config) else config.probe_images
            line = {"protocol": protocol, "data": config.data}
            line |= {
                f"{split}_images": len(common.labelled(getattr(rows[0], split), limit)) for split in ("train", "test")
            }
            line |= {"results": results, "seconds": round(time.perf_counter() - started, 1), "versions": versions}
            line |= {"command": " ".join(sys.argv), "settings": dataclasses.asdict(config)}
            with open(run_folder / "eval.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")


def main(argv: list) -> int:
    return common.run_command(evaluate, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
