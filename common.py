"""What every method shares: patches, vision transformer, masked autoencoder, data, probes and the training loop.

Axis letters, used in every shape comment of the project:
    B batch   V views   C channels   H W height, width   N patches   M visible ones   D width of a token
    P values of a patch (p p C)   d width of a head, of a decoder, or of Mobile-Former's tokens

Each section can be read alone:
    1. Patches and positions      patchify, unpatchify, sincos_positions, random_mask, take
    2. Vision transformer         attend, ViT, VIT_SIZES
    3. Mobile-Former              MobileFormer, MOBILE_FORMERS
    4. Masked autoencoder         MaskedAutoencoder (He et al. 2022), the baseline of four papers
    5. Several processes          start_distributed, gather
    6. Augmentation               crop_boxes, resize_matrix, random_resized_crop
    7. Data                       load_data -> MemoryImages or FolderImages, render_shapes
    8. Probes                     knn_accuracy, ridge_accuracy, probe
    9. Configuration              TrainConfig, read_flags
    10. The loop                  Method, Stepper, fit

Images are float tensors in [0, 1] everywhere. The encoder normalises them itself, with the mean and standard deviation
that it carries, so that nobody who lifts it out can forget to.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import difflib
import functools
import gc
import hashlib
import http.client
import inspect
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import stat
import sys
import tarfile
import threading
import time
import typing
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class UserError(ValueError):
    """A mistake that the user can mend. Its text is one line: what was given, what was expected, what to do."""


class OtherProcessFailed(RuntimeError):
    """Process 0 failed at what the others were waiting for, and says why."""


# ---------------------------------------------------------------------------------------------------------------------
# 1. Patches and positions
# ---------------------------------------------------------------------------------------------------------------------


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut (B, C, H, W) images into (B, N, patch * patch * C) patches: row-major, each patch in the order (p q c).

    Raises ValueError where the patch does not divide the image.
    """
    height, width = images.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(f"an image of {height} x {width} cannot be cut into patches of {patch} x {patch}")
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(patches: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Put (B, N, patch * patch * C) patches together to (B, C, height, width) images: the inverse of `patchify`."""
    return rearrange(
        patches, "b (h w) (p q c) -> b c (h p) (w q)", h=height // patch, w=width // patch, p=patch, q=patch
    )


def sincos_positions(height: int, width: int, dim: int) -> Tensor:
    """Fixed 2-D sine-cosine code of a height x width grid -> (height * width, dim); dim is a multiple of 4.

    The first half of the channels encodes the column, the second half the row, as the MAE code does (He et al. 2022).
    """
    if dim % 4:
        raise UserError(f"a 2-D sine-cosine code needs a width divisible by 4, not {dim}")
    frequency = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in (columns, rows)]  # 2 x (N, D/4)
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()  # (N, D)


def mask_from_noise(noise: Tensor, ratio: float) -> Tensor:
    """Mask the round(ratio * N) patches with the largest noise in each row: (B, N) -> bool (B, N), True = masked."""
    rank = noise.argsort(dim=1).argsort(dim=1)  # (B, N) 0 for the smallest
    return rank >= noise.shape[1] - round(ratio * noise.shape[1])


def random_mask(batch: int, patches: int, ratio: float, generator=None, device="cpu") -> Tensor:
    """A bool (batch, patches) mask, True = masked, exactly round(ratio * patches) in each row, uniform over subsets."""
    return mask_from_noise(torch.rand(batch, patches, generator=generator, device=device), ratio)


def visible_patches(mask: Tensor, count: int) -> Tensor:
    """The `count` patches that each row of a mask (B, N) leaves: their indices (B, count) in row-major order."""
    return mask.int().argsort(dim=1, stable=True)[:, :count]


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Pick tokens (B, N, D) by index (B, M) -> (B, M, D)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


# ---------------------------------------------------------------------------------------------------------------------
# 2. Vision transformer
# ---------------------------------------------------------------------------------------------------------------------

VIT_SIZES = {
    "vit_micro": {"dim": 96, "depth": 6, "heads": 3},  # for laptops
    "vit_tiny": {"dim": 192, "depth": 12, "heads": 3},
    "vit_small": {"dim": 384, "depth": 12, "heads": 6},
    "vit_base": {"dim": 768, "depth": 12, "heads": 12},
    "vit_large": {"dim": 1024, "depth": 24, "heads": 16},
}


def attend_plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: (B, heads, M, d), keys and values (B, heads, N, d); it has a second derivative.

    No fused kernel has one: neither that of CPUs nor those of GPUs. torch's own plain form has, but computes in float32
    what is in bf16, so this is the attention of energies on every device.
    """
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v on (B, heads, N, d).

    The fused kernel is the fastest on GPUs, and on CPUs in float32. In bf16 on CPUs it takes about six times as long as
    the three plain steps (`python bench.py attention` shows both).
    """
    if q.is_cuda or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v)
    return attend_plainly(q, k, v)


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a two-layer perceptron, each added to its input."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        if heads < 1 or dim % heads:
            raise UserError(f"a width of {dim} does not divide into {heads} heads")
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x: Tensor, attention=attend) -> Tensor:
        qkv = self.attn["qkv"](self.norm1(x))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)  # each (B, heads, N, d)
        x = x + self.attn["proj"](rearrange(attention(q, k, v), "b h n d -> b n (h d)"))  # (B, N, D)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))  # (B, N, D)


def initialize(module: nn.Module):
    """Xavier-uniform linear layers with zero bias, for `module.apply` (the init of MAE)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class ViT(nn.Module):
    """Vision transformer: linear patches, fixed 2-D sine-cosine positions, CLS token, pre-norm blocks, a final norm.

    Images are (B, 3, H, W) in [0, 1]; `mean` and `std` normalise them. Parameter names are those of timm's
    VisionTransformer, so weights move over by name (README, "Lift out a piece").
    `image_size` is a side or (height, width); `pool` says what `forward` returns: the mean of the patch tokens ("mean")
    or the CLS token ("cls"), both after the final norm.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        patch: int = 16,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        pool: str = "mean",
        mean: tuple = (0.0, 0.0, 0.0),
        std: tuple = (1.0, 1.0, 1.0),
    ):
        super().__init__()
        self.fields = {
            "image_size": image_size,
            "patch": patch,
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
        }
        self.fields |= {"pool": pool, "mean": tuple(mean), "std": tuple(std)}  # all that rebuilds this module
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(patch, dim, depth, heads, height, width) < 1:
            raise UserError(
                f"a transformer of width {dim}, {depth} blocks, {heads} heads and patch {patch} cannot be built"
            )
        if height % patch or width % patch:
            raise UserError(f"image size {height} x {width} is not a multiple of the patch size {patch}")
        if pool not in ("mean", "cls"):
            raise UserError(f"unknown pool {pool!r}; choose 'mean' or 'cls'")
        self.patch, self.dim, self.pool = patch, dim, pool
        self.grid = (height // patch, width // patch)
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(3 * patch * patch, dim)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.register_buffer("positions", sincos_positions(*self.grid, dim), persistent=False)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.apply(initialize)
        nn.init.normal_(self.cls_token, std=0.02)

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1] -> zero mean and unit variance a channel over the data set."""
        return (images - self.mean) / self.std

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> patch tokens with positions (B, N, D), without the CLS token."""
        return self.patch_embed["proj"](patchify(self.normalize(images), self.patch)) + self.positions

    def encode(self, tokens: Tensor, attention=attend, hidden: bool = False):
        """Put the CLS token before (B, M, D) patch tokens, run the blocks and the final norm -> (B, 1 + M, D).

        `attention(q, k, v)` on (B, heads, 1 + M, d) may be any function. With `hidden`, also return the list of every
        block's output before the final norm, each (B, 1 + M, D).
        """
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
        outputs = []
        for block in self.blocks:
            x = block(x, attention)
            outputs.append(x)
        return (self.norm(x), outputs) if hidden else self.norm(x)

    def pooled(self, encoded: Tensor) -> Tensor:
        """The feature vector of each image: (B, 1 + M, D) -> (B, D)."""
        return encoded[:, 0] if self.pool == "cls" else encoded[:, 1:].mean(dim=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.pooled(self.encode(self.embed(images)))  # (B, D)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Mobile-Former
# ---------------------------------------------------------------------------------------------------------------------


def table_9(factor: float) -> list:
    """Rows (block, #exp, #out) of MF-W2880 (FINOLA, Table 9), their widths times `factor`; stem and stage 1 to 4."""
    rows = [("stem", 0, 64), ("lite", 128, 64), ("down", 384, 112), ("same", 336, 112)]
    rows += [("down", 672, 192), ("same", 576, 192), ("same", 576, 192)]
    rows += [("down", 1152, 352), ("same", 1408, 352), ("same", 1408, 352)]
    rows += [("same", 2112, 480), ("same", 2880, 480), ("same", 2880, 480)]
    return [(kind, int(expanded * factor), int(out * factor)) for kind, expanded, out in rows]


MOBILE_FORMERS = {
    # For laptops, not in the paper: half the blocks, a quarter to an eighth of the width.
    "micro": {"token_dim": 64, "head": 256}
    | {
        "rows": [("stem", 0, 16), ("lite", 32, 16), ("down", 64, 32), ("down", 128, 48), ("same", 144, 48)]
        + [("down", 192, 64), ("same", 192, 64)]
    },
    "720": {"token_dim": 192, "head": 720, "rows": table_9(1 / 4)},
    "1440": {"token_dim": 256, "head": 1440, "rows": table_9(1 / 2)},
    "2880": {"token_dim": 256, "head": 2880, "rows": table_9(1)},
    "4320": {"token_dim": 256, "head": 2880, "rows": table_9(3 / 2)},  # wider heads would miss the published counts
    "5760": {"token_dim": 256, "head": 2880, "rows": table_9(2)},
}
MOBILE_FORMERS["720"]["rows"][7:10] = [("down", 240, 80), ("same", 320, 88), ("same", 480, 88)]  # as printed
"""Mobile-Former by width. W1440's first row of stage 4 is printed as 288, 96: that network misses what is published by
far (11.4 of 11.7 M parameters, 19.3 of 20.4 G multiply-adds). Half of W2880's row meets both, so we have 576, 176."""


def cross_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Multi-head attention of queries (B, M, D) to keys and values (B, N, D) -> (B, M, D), without projections.

    In plain steps, which can be differentiated twice: one side has a few tokens only, so a fused kernel gains nothing.
    """
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
    return rearrange(attend_plainly(q, k, v), "b h m d -> b m (h d)")


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias and its batch norm."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


def hard_sigmoid(x: Tensor) -> Tensor:
    """A sigmoid of three straight pieces, 0 to 1; unlike `F.hardsigmoid`, it can be differentiated twice."""
    return (x / 6 + 0.5).clamp(0, 1)


class DynamicReLU(nn.Module):
    """max(a x, b x), slopes of each channel given by a token: a in [0, 2], b in [-1, 1]; at first they are 1 and 0."""

    def __init__(self, token_dim: int, channels: int):
        super().__init__()
        self.hidden, self.slopes = nn.Linear(token_dim, token_dim // 4), nn.Linear(token_dim // 4, 2 * channels)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:  # (B, C, H, W), (B, d)
        slopes = hard_sigmoid(self.slopes(F.relu(self.hidden(token))))[..., None, None]  # (B, 2C, 1, 1)
        a, b = slopes.chunk(2, dim=1)
        return torch.maximum(2 * a * x, (2 * b - 1) * x)


class Mobile(nn.Module):
    """The convolutions of a Mobile-Former block: widen, 3 x 3 a channel, narrow, with dynamic ReLUs between.

    "same" keeps the size and adds the input where the widths agree. "down" halves it: a depthwise convolution of stride
    2 widens, and a second pair of convolutions (four times wider within) is added to the result.
    """

    def __init__(self, kind: str, inputs: int, expanded: int, outputs: int, token_dim: int):
        super().__init__()
        self.down = kind == "down"
        self.skip = not self.down and inputs == outputs
        if self.down:
            self.widen = conv(inputs, expanded, 3, stride=2, groups=inputs)
            self.narrow = conv(expanded, outputs)
            self.widen2, self.narrow2 = conv(outputs, 4 * outputs, 3, groups=outputs), conv(4 * outputs, outputs)
        else:
            self.widen, self.depthwise = conv(inputs, expanded), conv(expanded, expanded, 3, groups=expanded)
            self.narrow = conv(expanded, outputs)
        self.relu1 = DynamicReLU(token_dim, expanded)
        self.relu2 = DynamicReLU(token_dim, 4 * outputs if self.down else expanded)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:  # (B, C, H, W), (B, d)
        wide = self.relu1(self.widen(x), token)
        if self.down:
            x = self.narrow(wide)  # (B, C', H/2, W/2)
            return x + self.narrow2(self.relu2(self.widen2(x), token))
        out = self.narrow(self.relu2(self.depthwise(wide), token))
        return x + out if self.skip else out


class LiteBottleneck(nn.Module):
    """bneck-lite: a depthwise 3 x 3 convolution that widens, ReLU6, and a 1 x 1 convolution that narrows."""

    def __init__(self, inputs: int, expanded: int, outputs: int):
        super().__init__()
        self.skip = inputs == outputs
        self.widen, self.narrow = conv(inputs, expanded, 3, groups=inputs), conv(expanded, outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = self.narrow(F.relu6(self.widen(x)))
        return x + out if self.skip else out


class MobileToFormer(nn.Module):
    """Tokens look at the map: cross attention with two heads, a gate, post-norm. Keys and values are the map itself."""

    def __init__(self, channels: int, token_dim: int):
        super().__init__()
        self.query, self.gate = nn.Linear(token_dim, channels), nn.Linear(token_dim, channels)
        self.out, self.norm = nn.Linear(channels, token_dim), nn.LayerNorm(token_dim)

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:  # (B, T, d), (B, C, H, W) -> (B, T, d)
        x = rearrange(x, "b c h w -> b (h w) c")
        seen = cross_attention(self.query(tokens), x, x, heads=2)  # (B, T, C)
        return self.norm(tokens + self.out(seen * 2 * hard_sigmoid(self.gate(tokens))))


class Former(nn.Module):
    """Tokens look at each other: self-attention, four heads, only queries are projected; then an FFN; post-norm."""

    def __init__(self, token_dim: int):
        super().__init__()
        self.query, self.out = nn.Linear(token_dim, token_dim), nn.Linear(token_dim, token_dim)
        self.norm1, self.norm2 = nn.LayerNorm(token_dim), nn.LayerNorm(token_dim)
        self.ffn = nn.Sequential(nn.Linear(token_dim, 2 * token_dim), nn.GELU(), nn.Linear(2 * token_dim, token_dim))

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T, d)
        tokens = self.norm1(tokens + self.out(cross_attention(self.query(tokens), tokens, tokens, heads=4)))
        return self.norm2(tokens + self.ffn(tokens))


class FormerToMobile(nn.Module):
    """The map looks at the tokens: cross attention with two heads, the map itself being the queries."""

    def __init__(self, token_dim: int, channels: int):
        super().__init__()
        self.key, self.value = nn.Linear(token_dim, channels), nn.Linear(token_dim, channels)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:  # (B, C, H, W), (B, T, d) -> (B, C, H, W)
        queries = rearrange(x, "b c h w -> b (h w) c")
        seen = cross_attention(queries, self.key(tokens), self.value(tokens), heads=2)  # (B, H * W, C)
        return x + rearrange(seen, "b (h w) c -> b c h w", h=x.shape[2])


class MobileFormerBlock(nn.Module):
    """Mobile to Former, Former, Mobile, Former to Mobile: a map (B, C, H, W) and tokens (B, T, d) -> the same."""

    def __init__(self, kind: str, inputs: int, expanded: int, outputs: int, token_dim: int):
        super().__init__()
        self.to_former, self.former = MobileToFormer(inputs, token_dim), Former(token_dim)
        self.mobile = Mobile(kind, inputs, expanded, outputs, token_dim)
        self.to_mobile = FormerToMobile(token_dim, outputs)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.former(self.to_former(tokens, x))
        return self.to_mobile(self.mobile(x, tokens[:, 0]), tokens), tokens


def replace_batch_norms(module: nn.Module):
    """Put a new group norm of one group in the place of every batch norm inside: no image depends on others any more.

    Scales and shifts start anew, so this is for networks before their training.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, nn.GroupNorm(1, child.num_features))
        else:
            replace_batch_norms(child)


class MobileFormer(nn.Module):
    """Mobile-Former (Chen et al. 2022), a MobileNet with six tokens beside it, as FINOLA uses it (Table 9).

    `width` is "micro", 720, 1440, 2880, 4320 or 5760. Images (B, 3, H, W) in [0, 1], sides a multiple of 16, ->
    (B, head, H / 16, W / 16); `head` is the width of the last 1 x 1 convolution, 0 for that of the table.
    `norm` is "batch", or "group" where no image may depend on others (`replace_batch_norms`).
    The block is that of the released Mobile-Former. No activation follows the last convolution; that is a choice.
    Parameters lie within 1.2 % of FINOLA's 4.9, 11.7, 25.0 (Table 4), 43.5 and 67.6 M (Table 2b).
    """

    stride = 16  # pixels of a cell, which sides are multiples of

    def __init__(
        self,
        width: int | str = 2880,
        head: int = 0,
        mean: tuple = (0.0, 0.0, 0.0),
        std: tuple = (1.0, 1.0, 1.0),
        norm: str = "batch",
    ):
        super().__init__()
        if str(width) not in MOBILE_FORMERS:
            raise UserError(unknown("Mobile-Former", str(width), MOBILE_FORMERS))
        size = MOBILE_FORMERS[str(width)]
        token_dim, (stem, lite, *rows) = size["token_dim"], size["rows"]
        self.fields = {"width": width, "head": head, "mean": tuple(mean), "std": tuple(std), "norm": norm}
        if norm not in ("batch", "group"):
            raise UserError(unknown("norm", norm, ("batch", "group")))
        self.dim, channels = head or size["head"], stem[2]
        self.tokens = nn.Parameter(torch.empty(6, token_dim))
        self.stem, self.lite = conv(3, channels, 3, stride=2), LiteBottleneck(channels, *lite[1:])
        channels, self.blocks = lite[2], nn.ModuleList()
        for kind, expanded, out in rows:
            self.blocks.append(MobileFormerBlock(kind, channels, expanded, out, token_dim))
            channels = out
        self.head = conv(channels, self.dim)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        nn.init.normal_(self.tokens)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=(2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        if norm == "group":
            replace_batch_norms(self)

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1] -> zero mean and unit variance a channel over the data set."""
        return (images - self.mean) / self.std

    def forward(self, images: Tensor, hidden: bool = False):
        """Images (B, 3, H, W) -> (B, head, H/16, W/16); with `hidden`, also the list of every block's map."""
        x = self.lite(F.relu6(self.stem(self.normalize(images))))  # (B, C, H/2, W/2)
        tokens, maps = self.tokens.expand(len(x), -1, -1), []  # (B, T, d)
        for block in self.blocks:
            x, tokens = block(x, tokens)
            maps.append(x)
        return (self.head(x), maps) if hidden else self.head(x)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Masked autoencoder
# ---------------------------------------------------------------------------------------------------------------------


class Reconstruction(typing.NamedTuple):
    """What a masked autoencoder makes of a batch; M = visible patches of each image."""

    prediction: Tensor  # (B, N, P) pixels of every patch, in the units of `target`
    target: Tensor  # (B, N, P) pixels of the normalised images, each patch normalised where the model does so
    mask: Tensor  # (B, N) bool, True = masked
    encoded: Tensor  # (B, 1 + M, D) CLS and visible tokens after the final norm
    hidden: list  # of (B, 1 + M, D): the output of every encoder block


def normalize_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each patch with zero mean and unit (unbiased) variance, and that mean and standard deviation (B, N, 1)."""
    mean, variance = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    std = (variance + 1e-6).sqrt()
    return (patches - mean) / std, mean, std


def reconstruction_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the masked patches only (He et al. 2022); (B, N, P), (B, N, P), bool (B, N) -> scalar."""
    error = (prediction.float() - target.float()).square().mean(dim=-1)  # (B, N)
    return (error * mask).sum() / mask.sum()


class MaskedAutoencoder(nn.Module):
    """MAE (He et al. 2022): the encoder sees only visible patches, a light decoder predicts the pixels of all patches.

    The target of each patch is normalised by its own mean and variance unless `norm_pixels` is False.
    """

    captions = ("image", "masked image", "reconstruction")  # what `pictures` and `pictures_of` show

    def __init__(
        self,
        encoder: ViT,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mask_ratio: float = 0.75,
        norm_pixels: bool = True,
    ):
        super().__init__()
        patches = encoder.grid[0] * encoder.grid[1]
        if not 0 < mask_ratio < 1 or not 0 < round(mask_ratio * patches) < patches:
            raise UserError(f"a mask ratio of {mask_ratio} leaves no patch masked or none visible out of {patches}")
        if decoder_dim < 1 or decoder_heads < 1 or decoder_depth < 0:
            raise UserError(
                f"a decoder of width {decoder_dim}, {decoder_depth} blocks, {decoder_heads} heads cannot be built"
            )
        self.encoder, self.mask_ratio, self.norm_pixels = encoder, mask_ratio, norm_pixels
        self.decoder_embed = nn.Linear(encoder.dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_head = nn.Linear(decoder_dim, 3 * encoder.patch**2)
        positions = sincos_positions(*encoder.grid, decoder_dim)
        self.register_buffer("decoder_positions", positions, persistent=False)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_head):
            module.apply(initialize)
        nn.init.normal_(self.mask_token, std=0.02)

    def target(self, images: Tensor) -> Tensor:
        """The pixels to predict: images (B, 3, H, W) in [0, 1] -> (B, N, P)."""
        patches = patchify(self.encoder.normalize(images), self.encoder.patch)
        return normalize_patches(patches)[0] if self.norm_pixels else patches

    def decode(self, encoded: Tensor, visible: Tensor) -> Tensor:
        """CLS and visible tokens (B, 1 + M, D) with their patch index (B, M) -> predicted patches (B, N, P)."""
        x = self.decoder_embed(encoded)  # (B, 1 + M, d)
        full = self.mask_token.to(x.dtype).expand(len(x), len(self.decoder_positions), -1)  # (B, N, d)
        full = full.scatter(1, visible[..., None].expand(-1, -1, x.shape[-1]), x[:, 1:])  # visible ones in their places
        return self.predict(x[:, :1], full)

    def predict(self, cls: Tensor, full: Tensor) -> Tensor:
        """Decode the CLS token (B, 1, d) and all patches, mask tokens among them (B, N, d) -> pixels (B, N, P)."""
        x = torch.cat([cls, full + self.decoder_positions], dim=1)  # (B, 1 + N, d)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_head(self.decoder_norm(x[:, 1:]))  # (B, N, P)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Reconstruction:
        """Images (B, 3, H, W) in [0, 1], a bool mask (B, N) or None to draw one -> Reconstruction.

        Raises ValueError where the rows of the mask do not hide the same number of patches.
        """
        tokens = self.encoder.embed(images)  # (B, N, D)
        batch, patches = tokens.shape[:2]
        if mask is None:
            mask = random_mask(batch, patches, self.mask_ratio, device=images.device)
            masked = round(self.mask_ratio * patches)
        else:
            masked = int(mask[0].sum())
            if not (mask.sum(dim=1) == masked).all():
                raise ValueError("the rows of a mask must hide the same number of patches, these differ")
        visible = visible_patches(mask, patches - masked)  # (B, M)
        encoded, hidden = self.encoder.encode(take(tokens, visible), hidden=True)
        return Reconstruction(self.decode(encoded, visible), self.target(images), mask, encoded, hidden)

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Tensor:
        """Rows of (image, masked image, reconstruction): (B, 3, H, W) -> (B, 3, 3, H, W), values in [0, 1]."""
        prediction, _, mask, _, _ = self(images)
        return self.pictures_of(images, prediction, mask)

    def pictures_of(self, images: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
        """`pictures` for predicted patches (B, N, P) and a mask (B, N)."""
        height, width = images.shape[-2:]
        patches = patchify(self.encoder.normalize(images), self.encoder.patch)  # (B, N, P)
        if self.norm_pixels:  # give each predicted patch the brightness and contrast of the true one
            _, mean, std = normalize_patches(patches)
            prediction = prediction.float() * std + mean
        grey = torch.zeros_like(patches)  # the mean colour of the data set
        rows = [patches, torch.where(mask[..., None], grey, patches), torch.where(mask[..., None], prediction, patches)]
        rows = [unpatchify(x, self.encoder.patch, height, width) * self.encoder.std + self.encoder.mean for x in rows]
        return torch.stack(rows, dim=1).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Several processes
# ---------------------------------------------------------------------------------------------------------------------


def rank() -> int:
    """The number of this process, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def keep_freed_memory():
    """Make glibc keep the memory of freed tensors: mapping large ones anew each step can cost more than the crops."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: map nothing
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back


def start_distributed(device: str = "auto") -> torch.device:
    """Join the other processes where torchrun started several (NCCL on GPUs, gloo on CPUs) and return the device."""
    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    local, several = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and name.startswith("cuda:"):
        raise UserError(f"device {device!r} would be shared by all processes; give --device cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device!r}: this torch sees no GPU; try --device cpu")
    try:
        chosen = torch.device("cuda", local) if name == "cuda" else torch.device(name)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        else:
            torch.empty(0, device=chosen)
            keep_freed_memory()
    except (RuntimeError, AssertionError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device!r} cannot be used here ({reason}); try --device cpu") from None
    if several and not dist.is_initialized():
        # One day, since the others wait while rank 0 downloads, checks images or probes.
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(days=1))
    return chosen


def on_rank_zero(function):
    """Run a function on rank 0 alone and give its result, or its UserError, to every rank."""
    if world_size() == 1:
        return function()
    result, mistake, failure = None, None, None
    if rank() == 0:
        try:
            result = function()
        except UserError as error:
            mistake = str(error)
        except Exception as error:  # noqa: BLE001 (raised again below; the others must not wait for ever)
            failure = error
    shared = [result, mistake, repr(failure) if failure else None]
    dist.broadcast_object_list(shared)
    if failure:
        raise failure
    if shared[2]:
        raise OtherProcessFailed(f"process 0 failed: {shared[2]}")
    if shared[1]:
        raise UserError(shared[1])
    return shared[0]


def average(x: Tensor) -> Tensor:
    """The mean of a tensor over the processes, without gradient; x itself in one process."""
    if world_size() > 1:
        dist.all_reduce(x := x.detach().clone())
        x /= world_size()
    return x


def agree(number: int, device="cpu") -> int:
    """The largest of the numbers that the processes give."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        # Every rank's loss depends on this rank's rows: sum what all of them send back, then take our rows.
        gradient = gradient.contiguous().clone()  # autograd may hold the same tensor elsewhere
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def gather(x: Tensor) -> Tensor:
    """Rows of all processes in rank order: (B, ...) -> (ranks * B, ...), differentiable; x itself in one process.

    Where every rank computes the same loss of the gathered rows, the mean of the ranks' gradients (what DDP takes) is
    the gradient of that loss in one process.
    """
    return _Gather.apply(x) if world_size() > 1 else x


# ---------------------------------------------------------------------------------------------------------------------
# 6. Augmentation
# ---------------------------------------------------------------------------------------------------------------------


def mix_seed(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several small numbers, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def crop_boxes(height: Tensor, width: Tensor, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), generator=None) -> Tensor:
    """Boxes of random resized crops: image sizes (B,), (B,) -> (B, 4) as (top, left, height, width), in pixels.

    Area is uniform in `scale` (share of the image), aspect log-uniform in `ratio`; the first of ten draws that fits is
    taken, otherwise the largest centred box of an allowed aspect (the rule of torchvision's RandomResizedCrop).
    """
    device, batch = height.device, len(height)
    draw = torch.rand(4, batch, 10, device=device, generator=generator)  # ten tries an image
    area = (scale[0] + (scale[1] - scale[0]) * draw[0]) * (height * width)[:, None]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * draw[1])
    h, w = (area / aspect).sqrt(), (area * aspect).sqrt()  # (B, 10)
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


def resize_matrix(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """Bilinear resampling of one axis as a matrix: windows (B,), (B,) of `source` pixels -> (B, target, source).

    Row i holds the weights of output pixel i. Windows that shrink are low-passed (the triangle grows with the step), as
    in Pillow. A negative length, with the start at the other end, flips.
    """
    step = (length / target)[:, None]  # (B, 1) source pixels an output pixel
    centre = start[:, None] + (torch.arange(target, device=start.device) + 0.5) * step  # (B, target)
    pixel = torch.arange(source, device=start.device) + 0.5
    distance = (pixel - centre[..., None]).abs() / step.abs().clamp_min(1)[..., None]  # (B, target, source)
    weight = (1 - distance).clamp_min(0)
    return weight / weight.sum(dim=-1, keepdim=True)


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply a row matrix (B, h, H) and a column matrix (B, w, W) to images (B, C, H, W) -> (B, C, h, w)."""
    batch, channels, height, _ = images.shape
    x = torch.bmm(images.flatten(1, 2), columns.transpose(1, 2))  # (B, C * H, w)
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


def random_resized_crop(
    images: Tensor, size: int, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip: float = 0.5, generator=None
) -> Tensor:
    """Each image with its own random crop and flip, the whole batch at once: uint8 (B, 3, H, W) -> float in [0, 1].

    Bilinear, by two batched matrix products. `flip` is the probability of a mirror image.
    """
    batch, _, height, width = images.shape
    sides = (torch.full((batch,), float(side), device=images.device) for side in (height, width))
    top, left, h, w = crop_boxes(*sides, scale, ratio, generator).unbind(dim=1)
    flipped = torch.rand(batch, device=images.device, generator=generator) < flip
    rows = resize_matrix(top, h, height, size)
    columns = resize_matrix(torch.where(flipped, left + w, left), torch.where(flipped, -w, w), width, size)
    return resample(images.float(), rows, columns / 255).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Data
# ---------------------------------------------------------------------------------------------------------------------

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
STATISTICS = {  # of the training pixels, in [0, 1]
    "shapes": {"mean": (0.424, 0.423, 0.424), "std": (0.272, 0.275, 0.270)},
    "cifar10": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)},
    "cifar100": {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)},
    "stl10": {"mean": (0.4467, 0.4398, 0.4066), "std": (0.2603, 0.2566, 0.2713)},
    "tinyimagenet": {"mean": (0.4802, 0.4481, 0.3975), "std": (0.2770, 0.2691, 0.2821)},
}
ARCHIVES = {  # folder, where it comes from, MD5 of the archive
    "cifar10": (
        "cifar-10-batches-bin",
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
    ),
    "cifar100": (
        "cifar-100-binary",
        "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
    ),
    "stl10": (
        "stl10_binary",
        "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
        "91f7769df0f17e558f3565bffb0c7dfb",
    ),
    "tinyimagenet": (
        "tiny-imagenet-200",
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "90528d7ca1a48142e341f4ef8d21d0de",
    ),
}
CIFAR = {  # files a split, label bytes before the pixels (the last one counts), classes, file of class names
    "cifar10": ({"train": "data_batch_*.bin", "test": "test_batch*.bin"}, 1, 10, "batches.meta"),
    "cifar100": ({"train": "train*.bin", "test": "test*.bin"}, 2, 100, "fine_label_names"),
}
DATASETS = ("shapes", *ARCHIVES, "imagenet100", "imagenet")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
SHAPES = ("circle", "ring", "square", "triangle", "star", "cross", "heart", "arrow", "flower", "drop")
# The 100 classes that Tian et al. (2020, CMC) chose from ImageNet.
IMAGENET100 = re.findall(
    r"\d{8}",
    """
    02869837 01749939 02488291 02107142 13037406 02091831 04517823 04589890 03062245 01773797 01735189 07831146
    07753275 03085013 04485082 02105505 01983481 02788148 03530642 04435653 02086910 02859443 13040303 03594734
    02085620 02099849 01558993 04493381 02109047 04111531 02877765 04429376 02009229 01978455 02106550 01820546
    01692333 07714571 02974003 02114855 03785016 03764736 03775546 02087046 07836838 04099969 04592741 03891251
    02701002 03379051 02259212 07715103 03947888 04026417 02326432 03637318 01980166 02113799 02086240 03903868
    02483362 04127249 02089973 03017168 02093428 02804414 02396427 04418357 02172182 01729322 02113978 03787032
    02089867 02119022 03777754 04238763 02231487 03032252 02138441 02104029 03837869 03494278 04136333 03794056
    03492542 02018207 04067472 03930630 03584829 02123045 04229816 02100583 03642806 04336792 03259280 02116738
    02108089 03424325 01855672 02090622
    """,
)


def unknown(kind: str, given: str, choices) -> str:
    """The message for a name that does not exist, with the nearest one that does."""
    close = difflib.get_close_matches(given.lower(), list(choices), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown {kind} {given!r}; {hint}choose from {', '.join(choices)}"


def load_data(
    name: str,
    root="data",
    split: str = "train",
    image_size: int = 32,
    device="cpu",
    seed: int = 0,
    download: bool = False,
    skip_bad_images: bool = False,
):
    """One split of a data set -> MemoryImages or FolderImages.

    `split` is "train" (all that one may train on; the label is -1 where there is none), "labelled" (those of it that
    have a label: fewer in `stl10` alone) or "test". `name` is one of DATASETS or a folder with train/<class>/* and
    val/<class>/*. `root` is the folder that holds the files of a named set; `download` fetches missing ones. Small sets
    come as one uint8 tensor on `device`. Only `shapes` needs `image_size` and `seed`.
    Raises UserError where the name is unknown, or a file is missing or not what it should be. Images that cannot be
    read are left out with `skip_bad_images`.
    """
    if name == "shapes":
        count = 1024 if split == "test" else 4096
        images, labels, masks = render_shapes(count, image_size, seed=2 * seed + (split == "test"))
        images, labels, masks = (x.to(device) for x in (images, labels, masks))
        return MemoryImages(images, labels, list(SHAPES), **STATISTICS[name], masks=masks)
    if name in ARCHIVES:
        home = find_home(name, Path(root), download)
        if name == "stl10":
            return read_stl10(home, split, device)
        if name == "tinyimagenet":
            return read_tinyimagenet(home, split, device, skip_bad_images)
        return read_cifar(name, home, split, device)
    if name in ("imagenet100", "imagenet"):
        return read_folders(Path(root), split, IMAGENET100 if name == "imagenet100" else None, skip_bad_images)
    if Path(name).is_dir():
        return read_folders(Path(name), split, skip_bad_images=skip_bad_images)
    if "/" in name:
        raise UserError(f"no folder {name}; expected one with train/<class>/* and val/<class>/*")
    raise UserError(unknown("dataset", name, DATASETS) + ", or give a folder with train/<class>/* and val/<class>/*")


def find_home(name: str, root: Path, download: bool = False) -> Path:
    """The folder of a named data set in `root`, or `root` itself; fetched into place where it is missing."""
    folder, url, md5 = ARCHIVES[name]
    home = root if root.name == folder else root / folder
    if download:  # asked on every process alike: what one of them sees may differ
        on_rank_zero(lambda: home.is_dir() or fetch(url, md5, home))
    if not home.is_dir():
        raise UserError(
            f"no {name} at {home}; give the --root that holds {folder}, or add --download to get it from {url}"
        )
    return home


def fetch(url: str, md5: str, home: Path):
    """Download an archive, check its MD5 and unpack it, so that `home` appears whole or not at all.

    A download that was cut short goes on where it stopped when this is called again. Raises UserError.
    """
    home.parent.mkdir(parents=True, exist_ok=True)
    archive = home.parent / (url.rsplit("/", 1)[1] + ".part")
    try:
        download(url, archive)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url} could not be fetched ({error}); run again to go on where it stopped") from None
    digest = hashlib.md5(usedforsecurity=False)
    with open(archive, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    if digest.hexdigest() != md5:
        archive.unlink()
        raise UserError(f"{url} has the MD5 {digest.hexdigest()}, expected {md5}; it was thrown away, run again")
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

    def write(name: str, plain: bool, file):
        parts = name.rstrip("/").split("/")
        if not plain or parts[0] != home.name or ".." in parts or "\\" in name:
            raise UserError(f"{archive} holds {name!r}, which does not belong there; it was not unpacked")
        target = scratch.joinpath(*parts)
        if file is None:
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            with file, open(target, "wb") as out:
                shutil.copyfileobj(file, out)

    try:
        if zipped:
            with zipfile.ZipFile(archive) as box:
                for entry in box.infolist():
                    plain = stat.S_IFMT(entry.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
                    write(entry.filename, plain, None if entry.is_dir() else box.open(entry))
        else:
            with tarfile.open(archive) as box:
                for entry in box:
                    file = box.extractfile(entry) if entry.isfile() else None
                    write(entry.name, entry.isfile() or entry.isdir(), file)
        os.replace(scratch / home.name, home)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, FileNotFoundError) as error:
        raise UserError(f"{archive} cannot be unpacked ({error})") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_cifar(name: str, home: Path, split: str, device="cpu") -> "MemoryImages":
    """The official binary files of CIFAR-10 or CIFAR-100, any number of records a file."""
    patterns, label_bytes, count, names = CIFAR[name]
    pattern = patterns["test" if split == "test" else "train"]
    files = sorted(home.glob(pattern))
    if not files:
        raise UserError(f"no {name} at {home / pattern}; remove {home} and add --download, or give --root")
    record = label_bytes + 3072
    parts = []
    for file in files:
        raw = np.fromfile(file, dtype=np.uint8)
        if len(raw) == 0 or len(raw) % record:
            raise UserError(f"{file} has {len(raw)} bytes, expected a multiple of {record}: cut short or not {name}")
        parts.append(raw.reshape(-1, record))
        if parts[-1][:, label_bytes - 1].max() >= count:
            raise UserError(f"{file} holds the label {parts[-1][:, label_bytes - 1].max()}, {name} ends at {count - 1}")
    records = torch.from_numpy(np.concatenate(parts)).to(device)
    labels, images = records[:, label_bytes - 1].long(), records[:, label_bytes:].reshape(-1, 3, 32, 32)
    classes = class_names(next(home.glob(names + "*.txt"), None), count)
    return MemoryImages(images, labels, classes, **STATISTICS[name])


def class_names(listed: Path | None, count: int) -> list:
    """The words of a text file, one a class, or numbers without a file. Raises UserError if their count is wrong."""
    if not listed or not listed.exists():
        return [str(i) for i in range(count)]
    names = listed.read_text(errors="replace").split()
    if len(names) != count:
        raise UserError(f"{listed} lists {len(names)} classes, expected {count}; mend or remove it")
    return names


def read_stl10(home: Path, split: str, device="cpu") -> "MemoryImages":
    """The official binary files of STL-10, any number of pictures; "train" is the labelled and the unlabelled ones."""
    picture = 3 * 96 * 96
    parts, labels = {"train": ("train", "unlabeled"), "labelled": ("train",), "test": ("test",)}[split], []
    files = [home / f"{part}_X.bin" for part in parts]
    for file in files:
        size = file.stat().st_size if file.exists() else -1
        if size < 0:
            raise UserError(f"no {file}; remove {home} and add --download, or give --root")
        if size == 0 or size % picture:
            raise UserError(f"{file} has {size} bytes, expected a multiple of {picture}: cut short or not stl10")
        count, listed = size // picture, file.with_name(file.name.replace("_X", "_y"))
        if file.name == "unlabeled_X.bin":
            labels.append(torch.full((count,), -1))
            continue
        if not listed.exists():
            raise UserError(f"no {listed}; remove {home} and add --download, or give --root")
        numbers = np.fromfile(listed, dtype=np.uint8)
        if len(numbers) != count or numbers.min() < 1 or numbers.max() > 10:
            raise UserError(f"{listed} must hold {count} labels from 1 to 10, one a picture of {file.name}")
        labels.append(torch.from_numpy(numbers).long() - 1)
    images, done = torch.empty(sum(map(len, labels)), 3, 96, 96, dtype=torch.uint8), 0
    for file, part in zip(files, labels, strict=True):
        stored = np.memmap(file, dtype=np.uint8, mode="c").reshape(-1, 3, 96, 96)  # each plane column by column
        for chunk in torch.from_numpy(stored).split(4096):  # the unlabelled file is large: never hold it twice
            images[done : done + len(chunk)] = chunk.transpose(2, 3)
            done += len(chunk)
    classes = class_names(home / "class_names.txt", 10)
    return MemoryImages(images.to(device), torch.cat(labels).to(device), classes, **STATISTICS["stl10"])


def read_tinyimagenet(home: Path, split: str, device="cpu", skip_bad_images: bool = False) -> "MemoryImages":
    """The official folder of Tiny-ImageNet, decoded once and held in memory (1.2 GB for all of its training images)."""
    train = home / "train"
    if not train.is_dir():
        raise UserError(f"no folder {train}; remove {home} and add --download, or give --root")
    wnids = sorted(entry.name for entry in os.scandir(train) if entry.is_dir())
    number = {wnid: i for i, wnid in enumerate(wnids)}
    if split == "test":  # the 10,000 official test images have no labels: as in every paper, validation is tested on
        listing = home / "val" / "val_annotations.txt"
        if not listing.exists():
            raise UserError(f"no {listing}; remove {home} and add --download, or give --root")
        rows = [line.split("\t") for line in listing.read_text(errors="replace").splitlines() if line.strip()]
        strange = next((row for row in rows if len(row) < 2 or row[1] not in number), None)
        if strange:
            raise UserError(f"{listing} has the line {' '.join(strange)!r}, expected a file and a class of {train}")
        files = [(str(home / "val" / "images" / row[0]), number[row[1]]) for row in rows]
    else:
        folders = [(train / wnid / "images", label) for wnid, label in number.items()]
        files = [(str(path), label) for folder, label in folders for path in sorted(folder.glob("*.JPEG"))]
    if not files:
        raise UserError(f"no image in {home}; remove it and add --download, or give --root")
    images = torch.empty(len(files), 3, 64, 64, dtype=torch.uint8)

    def read(i):
        with Image.open(files[i][0]) as image:
            if image.size != (64, 64):
                raise ValueError(f"{image.size[0]} x {image.size[1]} pixels, expected 64 x 64")
            images[i] = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)

    bad = attempt_all(read, range(len(files)), "reading")
    good = keep_good([path for path, _ in files], bad, skip_bad_images)
    words = home / "words.txt"
    lines = words.read_text(errors="replace").splitlines() if words.exists() else []
    names = dict(line.split("\t", 1) for line in lines if "\t" in line)
    classes = [names.get(wnid, wnid).split(",")[0] for wnid in wnids]
    labels = torch.tensor([files[i][1] for i in good])
    images = images if len(good) == len(images) else images[torch.tensor(good)]
    return MemoryImages(images.to(device), labels.to(device), classes, **STATISTICS["tinyimagenet"])


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


def read_folders(root: Path, split: str, keep=None, skip_bad_images: bool = False) -> "FolderImages":
    """A folder with train/<class>/* and val/<class>/*; `keep` lists the class numbers ("01440764") to pick.

    Classes are numbered in the order of the sorted folder names of train, for both splits. Every image is checked once.
    """
    home = root / ("val" if split == "test" else "train")
    names = {}
    for part in dict.fromkeys((root / "train", home)):
        if not part.is_dir():
            raise UserError(f"no folder {part}; expected {root}/train/<class>/* and {root}/val/<class>/*")
        names[part] = sorted(entry.name for entry in os.scandir(part) if entry.is_dir())
    classes = names[root / "train"]
    if keep is not None:
        chosen = [name for name in classes if name.removeprefix("n") in set(keep)]
        if not chosen:
            raise UserError(f"{root / 'train'} holds none of the {len(keep)} classes of ImageNet-100 (n02869837, ...)")
        if len(chosen) < len(keep) and split != "test" and rank() == 0:
            print(f"note: {root / 'train'} holds {len(chosen)} of the {len(keep)} classes of ImageNet-100", flush=True)
        classes = chosen
    elif strange := sorted(set(names[home]) - set(classes)):
        raise UserError(
            f"class {strange[0]!r} of {home} is not in {root / 'train'}; the splits must have the same classes"
        )
    paths, labels, others = [], [], []
    for label, name in enumerate(classes):
        folder = home / name
        seen = sorted(entry.path for entry in os.scandir(folder)) if folder.is_dir() else []
        found = [path for path in seen if path.lower().endswith(IMAGE_ENDINGS)]
        others += [path for path in seen if not path.lower().endswith(IMAGE_ENDINGS)]
        if not found and split != "test":
            raise UserError(f"class folder {folder} holds no image ({' '.join(IMAGE_ENDINGS)})")
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise UserError(f"no image ({' '.join(IMAGE_ENDINGS)}) below {home}")
    if others and rank() == 0:
        print(f"note: {len(others)} other files below {home} are left out, such as {others[0]}", flush=True)
    good = keep_good(paths, on_rank_zero(lambda: check_images(paths)), skip_bad_images)
    return FolderImages([paths[i] for i in good], torch.tensor([labels[i] for i in good]), classes, **IMAGENET)


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

    def train_batches(self, plan, size, scale=(0.08, 1.0), flip=0.5, views=1, **_):
        """Augmented batches for a plan of (seed, indices): float (B, 3, size, size), or (B, V, 3, ...), and labels."""
        generator = torch.Generator(self.images.device)
        for seed, indices in plan:
            indices = torch.as_tensor(indices).to(self.images.device, non_blocking=True)
            raw = self.images[indices].repeat_interleave(views, dim=0)  # (B * V, 3, H, W)
            images = random_resized_crop(raw, size, scale, flip=flip, generator=generator.manual_seed(seed))
            images = images if views == 1 else images.unflatten(0, (-1, views))
            yield images, self.labels[indices]

    def plain_batches(self, indices, size, batch=500, **_):
        """Whole images without augmentation, in order: float (B, 3, size, size) in [0, 1] and labels."""
        for part in torch.as_tensor(indices, device=self.images.device).split(batch):
            yield resize(self.images[part], size), self.labels[part]


@dataclass
class FolderImages:
    """A data set of image files, decoded, cropped and resized by worker processes; see `read_folders`."""

    paths: list
    labels: Tensor
    classes: list
    mean: tuple
    std: tuple

    def __len__(self):
        return len(self.labels)

    def train_batches(self, plan, size, scale=(0.08, 1.0), flip=0.5, views=1, workers=0, device="cpu"):
        """As MemoryImages.train_batches. Each crop depends on the seed of its step and its place in the batch alone."""
        ahead, behind = itertools.tee(plan)  # the workers run ahead of the batches that come out
        keys = ([(i, seed, place) for place, i in enumerate(torch.as_tensor(part).tolist())] for seed, part in ahead)
        loaded = self._load(keys, _Decoder(self.paths, self.labels, size, scale, views), workers, device)
        generator = torch.Generator(device)
        for (seed, _), (images, labels) in zip(behind, loaded, strict=True):
            images = images.flatten(0, 1).float() / 255  # (B * V, 3, size, size)
            mirror = torch.rand(len(images), device=images.device, generator=generator.manual_seed(seed)) < flip
            images = torch.where(mirror[:, None, None, None], images.flip(-1), images)
            yield (images if views == 1 else images.unflatten(0, (-1, views))), labels

    def plain_batches(self, indices, size, batch=100, workers=0, device="cpu"):
        """Images without augmentation: the shorter side resized to size * 256 / 224, then the centre square."""
        parts = [[(i, None, 0) for i in part.tolist()] for part in torch.as_tensor(indices).split(batch)]
        for images, labels in self._load(parts, _Decoder(self.paths, self.labels, size), workers, device):
            yield images[:, 0].float() / 255, labels

    @staticmethod
    def _load(keys, decoder, workers, device):
        loader = torch.utils.data.DataLoader(
            decoder,
            batch_sampler=keys,
            num_workers=min(workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else workers),
            collate_fn=_stack,
            pin_memory=torch.device(device).type == "cuda",
            generator=torch.Generator(),
            worker_init_fn=_leave_signals_to_the_parent,
        )
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
            yield [x.to(device, non_blocking=True) for x in batch]


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


def render_shapes(count: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw `count` pictures of ten shapes -> uint8 (N, 3, size, size), labels (N,), bool object masks (N, size, size).

    Only the outline tells the class. Colours, light, texture, place, scale and rotation of the shape and the background
    behind it vary. Picture i depends on (seed, i) alone, whatever the count.
    """
    draws = np.random.Generator(np.random.Philox(seed)).random((count, 24))  # filled row by row: rows never change
    draws = torch.from_numpy(draws).float()
    labels = torch.arange(count) % len(SHAPES)
    radius, slope = _outlines()
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    masks = torch.empty(count, size, size, dtype=torch.bool)
    step = max(1, 2**20 // size**2)  # keep the working set in the cache
    for i in range(0, count, step):
        part = slice(i, i + step)
        images[part], masks[part] = _paint(draws[part], labels[part], size, radius, slope)
    return images, labels, masks


def _outlines(angles: int = 720) -> tuple[Tensor, Tensor]:
    """Each shape as the distance of its outline from its centre, by angle (0 = up): radius and slope (10, angles)."""
    angle = np.arange(angles) * 2 * np.pi / angles
    turn = 2 * np.pi

    def polygon(*corners):  # (right, up) pairs, anticlockwise, every point in sight of the centre
        distance = np.full(angles, np.inf)
        for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
            dx, dy = -np.sin(angle), np.cos(angle)
            cross = dx * (y2 - y1) - dy * (x2 - x1)
            with np.errstate(divide="ignore", invalid="ignore"):
                along = (x1 * (y2 - y1) - y1 * (x2 - x1)) / cross
                share = (x1 * dy - y1 * dx) / cross
            hit = (along > 0) & (share >= -1e-9) & (share <= 1 + 1e-9)
            distance = np.where(hit & (along < distance), along, distance)
        return distance

    def spikes(count, inner):  # outer corners at radius 1, inner ones between them
        at = [(1.0 if i % 2 == 0 else inner, i * np.pi / count) for i in range(2 * count)]
        return polygon(*[(-r * np.sin(a), r * np.cos(a)) for r, a in at])

    bar = np.minimum(0.34 / np.abs(np.sin(angle)).clip(1e-6), 1 / np.abs(np.cos(angle)).clip(1e-6))
    beam = np.minimum(1 / np.abs(np.sin(angle)).clip(1e-6), 0.34 / np.abs(np.cos(angle)).clip(1e-6))
    away = np.minimum(angle, turn - angle)  # angle from "up", 0 to pi
    t = -angle[::10]
    heart = list(zip(np.sin(t) ** 3, (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16))
    outlines = {
        "circle": np.full(angles, 0.8),
        "ring": np.full(angles, 0.9),  # with a hole, see `_paint`
        "square": polygon((0.75, 0.75), (-0.75, 0.75), (-0.75, -0.75), (0.75, -0.75)),
        "triangle": spikes(3, 0.5),
        "star": spikes(5, 0.42),
        "cross": np.maximum(bar, beam),
        "heart": polygon(*heart),
        "arrow": polygon((0, 1), (-0.8, 0.2), (-0.3, 0.2), (-0.3, -0.9), (0.3, -0.9), (0.3, 0.2), (0.8, 0.2)),
        "flower": 0.72 + 0.24 * np.cos(6 * angle),
        "drop": 0.62 + 0.45 * np.exp(-((away / 0.42) ** 2)),
    }
    radius = torch.from_numpy(np.stack([outlines[name] for name in SHAPES])).float()
    slope = (radius.roll(-1, 1) - radius.roll(1, 1)) / (2 * turn / angles)
    return radius, slope


def _paint(draws: Tensor, labels: Tensor, size: int, radius: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Render one part of `render_shapes`: draws (N, 24), labels (N,) -> uint8 (N, 3, S, S), bool (N, S, S)."""
    column = iter(draws.unbind(dim=1))

    def vary(low, high):
        return (low + (high - low) * next(column))[:, None, None]  # (N, 1, 1)

    x, y = torch.meshgrid(*[(torch.arange(size) + 0.5) / size * 2 - 1] * 2, indexing="xy")  # (S, S) in [-1, 1]
    extent, tilt = vary(0.5, 0.75), vary(-0.3, 0.3)
    x0, y0 = vary(-0.28, 0.28), vary(-0.28, 0.28)

    def inside(dx, dy, softness):  # share of each pixel that the shape covers, with soft edges for the shadow
        u = ((x - x0 - dx) * tilt.cos() + (y - y0 - dy) * tilt.sin()) / extent
        v = ((y - y0 - dy) * tilt.cos() - (x - x0 - dx) * tilt.sin()) / extent  # (N, S, S), v points down
        distance = (u * u + v * v).sqrt().clamp_min(1e-3)
        bins = radius.shape[1]
        at = (torch.atan2(-u, -v) * (bins / (2 * math.pi))).round().long() % bins + bins * labels[:, None, None]
        edge, lean = radius.flatten()[at], (slope.flatten()[at] / distance).clamp(-1.5, 1.5)
        depth = (edge - distance) * torch.rsqrt(1 + lean * lean)  # distance to the outline, to first order
        hole = (labels == SHAPES.index("ring"))[:, None, None]
        depth = torch.where(hole, torch.minimum(depth, distance - 0.45), depth)
        return (0.5 + depth * extent * size / 2 / softness).clamp(0, 1), u, v

    def colour():  # hue, saturation and value -> (N, 3, 1, 1)
        hue, saturation, value = vary(0, 1), vary(0.35, 1), vary(0.3, 1)
        wheel = (hue + torch.tensor([0, 2 / 3, 1 / 3]).view(3, 1, 1, 1)) * 6 % 6  # of red, green and blue
        rgb = value * (1 - saturation * (1 - ((wheel - 3).abs() - 1).clamp(0, 1)))  # (3, N, 1, 1)
        return rgb.transpose(0, 1)

    def waves(a, b):  # soft stripes of any direction, in [-1, 1]
        direction, phase = vary(0, math.pi), vary(0, 2 * math.pi)
        frequency = vary(2, 9)
        return torch.sin((a * direction.cos() + b * direction.sin()) * frequency + phase)

    body, u, v = inside(0, 0, 1.0)
    shadow, _, _ = inside(0.07, 0.1, 0.16 * size)
    back, front = colour(), colour()
    # Keep object and background apart in brightness, so that there is something to see.
    weights = torch.tensor([0.3, 0.59, 0.11]).view(1, 3, 1, 1)
    contrast = ((front - back) * weights).sum(dim=1, keepdim=True)
    push = (0.3 - contrast.abs()).clamp_min(0) * torch.where(contrast < 0, -1.0, 1.0)
    front, back = front + push / 2, back - push / 2
    back = back * (1 + vary(0, 0.18) * waves(x, y))[:, None] + (vary(-0.15, 0.15) * x + vary(-0.15, 0.15) * y)[:, None]
    front = front * (1 + vary(0, 0.22) * waves(2 * u, 2 * v) - 0.16 * (u + v))[:, None]  # lit from the upper left
    image = back * (1 - 0.45 * shadow)[:, None]
    image = image + (front - image) * body[:, None]
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), body > 0.5


def save_pictures(rows: Tensor, path, side: int = 128):
    """Write rows of pictures (R, K, 3, H, W), values in [0, 1], as one PNG, small ones enlarged in whole steps."""
    zoom = max(1, side // rows.shape[-1])
    tiles = F.interpolate(rows.flatten(0, 1).float().cpu(), scale_factor=zoom, mode="nearest")
    tiles = F.pad(tiles, (2, 2, 2, 2), value=1.0).unflatten(0, rows.shape[:2])  # thin white frames
    sheet = rearrange(tiles, "r k c h w -> (r h) (k w) c")
    picture = Image.fromarray((sheet * 255).round().to(torch.uint8).numpy())
    write_atomically(Path(path), lambda file: picture.save(file, format="PNG"))


# ---------------------------------------------------------------------------------------------------------------------
# 8. Probes
# ---------------------------------------------------------------------------------------------------------------------


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 10, chunk: int = 0):
    """Share of queries (M, D) whose k nearest rows of the bank (N, D) vote for their label, in percent.

    Euclidean distance, one vote each, the lowest class wins a tie (MAGMA, section 5: k = 10).
    """
    centre = bank.mean(dim=0)  # the Gram form of a distance loses its digits where the mean is large
    bank, queries = bank - centre, queries - centre
    norms, right = bank.square().sum(dim=1), 0
    chunk = chunk or max(1, 2**24 // len(bank))  # at most 64 MB of distances at a time
    for part, truth in zip(queries.split(chunk), labels.split(chunk), strict=True):
        distance = torch.addmm(norms, part, bank.T, alpha=-2)  # (chunk, N), up to a constant a row
        nearest = bank_labels[distance.topk(min(k, len(bank)), largest=False).indices]  # (chunk, k)
        votes = F.one_hot(nearest, int(bank_labels.max()) + 1).sum(dim=1)
        right += int((votes.argmax(dim=1) == truth).sum())
    return 100 * right / len(labels)


def ridge_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int):
    """Accuracy in percent of ridge regression on one-hot labels: a linear probe without a training loop.

    Features (N, D) are standardised. Of seven ridge strengths, 1e-5 to 10 times N, the one with the best exact
    leave-one-out accuracy on the training part is taken.
    """
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0).clamp_min(1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    if len(train) < train.shape[1]:
        # The weights lie in the span of the images, so a basis of it will do. Fits are nearly exact there: what they
        # leave needs more digits.
        basis = torch.linalg.qr(train.T).Q.double()  # (D, N)
        train, test = train.double() @ basis, test.double() @ basis
    onehot = F.one_hot(train_labels, classes).to(train.dtype)
    offset = onehot.mean(dim=0)
    values, vectors = torch.linalg.eigh(train.T @ train)  # (D,), (D, D)
    rotated = train @ vectors  # (N, D)
    target, squares = rotated.T @ (onehot - offset), rotated.square()  # (D, classes), (N, D)
    best, best_weight = -1.0, None
    for strength in len(train) * 10.0 ** torch.arange(-5, 2):
        shrink = 1 / (values.clamp_min(0) + strength)  # (D,)
        fitted = rotated @ (shrink[:, None] * target) + offset
        leverage = (squares @ shrink + 1 / len(train)).clamp_max(1 - 1e3 * torch.finfo(train.dtype).eps)[:, None]
        left_out = onehot - (onehot - fitted) / (1 - leverage)
        accuracy = float((left_out.argmax(dim=1) == train_labels).float().mean())
        if accuracy > best:
            best, best_weight = accuracy, vectors @ (shrink[:, None] * target)
    return 100 * float(((test @ best_weight + offset).argmax(dim=1) == test_labels).float().mean())


def pooled_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """One vector an image (B, D): what the encoder returns, or the mean over positions where that is a map."""
    out = encoder(images)
    return out.mean(dim=(2, 3)) if out.ndim == 4 else out


@torch.no_grad()
def features_of(encode, data, indices, size: int, **loading) -> tuple[Tensor, Tensor]:
    """encode(images) -> (B, D) over whole images of a data set: float32 features (N, D) and labels (N,)."""
    parts = [(encode(images).float(), labels) for images, labels in data.plain_batches(indices, size, **loading)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def raw_pixels(images: Tensor) -> Tensor:
    """The baseline of every probe: (B, 3, H, W) -> (B, D), at no more than 32 x 32, or photographs would be huge."""
    return resize(images, min(images.shape[-1], 32)).flatten(1)


def labelled(data, limit: int = 0) -> Tensor:
    """Indices of the images that have a label; at most `limit`, drawn once by a fixed seed, 0 takes all."""
    chosen = torch.nonzero(data.labels >= 0)[:, 0].cpu()
    if limit and limit < len(chosen):
        chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:limit]]
    return chosen


def probe(encode, train, test, size: int, limit: int = 0, **loading) -> dict:
    """kNN and linear accuracy in percent of frozen features: {"knn": ..., "linear": ...}.

    At most `limit` images of each split; 0 takes all. Unlabelled ones do not count.
    """
    parts = []
    for data in (train, test):
        parts += features_of(encode, data, labelled(data, limit), size, **loading)
    return {"knn": knn_accuracy(*parts), "linear": ridge_accuracy(*parts, len(train.classes))}


# ---------------------------------------------------------------------------------------------------------------------
# 9. Configuration
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class TrainConfig:
    """The settings of the loop. Each method's Config adds its own; a field's comment is the help text of its flag."""

    data: str = "shapes"  # name of a data set, or a folder with train/<class>/* and val/<class>/*
    recipe: str = ""  # data set whose recipe is taken, by default that of --data: shapes has laptop sizes
    root: str = "data"  # folder that holds the files of a named data set
    download: bool = False  # fetch the files of a named data set where they are missing
    skip_bad_images: bool = False  # leave out images that cannot be read instead of stopping
    image_size: int = 224  # side of the crops, in pixels
    crop_min: float = 0.08  # smallest share of the image that a random resized crop keeps
    flip: float = 0.5  # probability of a mirror image
    epochs: int = 100  # passes over the training images
    batch_size: int = 256  # images a step, over all processes and accumulated parts
    accumulate: int = 1  # parts a step is cut into, to save memory
    base_lr: float = 1.5e-4  # learning rate for a batch of 256; the real one is base_lr * batch_size / 256
    warmup_epochs: int = 10  # epochs in which the learning rate rises linearly
    warmup_lr: float = 0.0  # learning rate that the warm-up starts from
    milestones: tuple[int, ...] = ()  # epochs at which the learning rate falls tenfold, instead of a cosine
    weight_decay: float = 0.05  # of AdamW; none on biases, norms and tokens
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    clip: float = 0.0  # largest norm of the gradient, 0 for no limit
    amp: str = "auto"  # auto, bf16, fp16 or off; auto is bf16 where the processor has it, else fp16 on a GPU
    compile: bool = False  # compile the model with torch.compile
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    workers: int = 8  # processes that decode image files, for each training process; at most the cores
    seed: int = 0  # of weights, order, crops and masks
    probe_every: int = 10  # epochs between two probes and pictures; the last epoch always has them, with 0 none has
    probe_images: int = 20000  # most images of each split to probe, 0 for all
    save_every: int = 1  # epochs between two checkpoints; the last epoch is always saved
    out: str = ""  # run folder; the default is runs/<method>-<data>
    resume: bool = False  # go on with the run in the run folder


FREE_FIELDS = {"recipe", "root", "download", "skip_bad_images", "device", "workers", "amp"}
FREE_FIELDS |= {"probe_every", "probe_images", "save_every", "out", "resume"}
"""Fields that may differ between a run and its continuation; of `amp`, the precision that it stands for must not."""


@functools.cache
def field_comments(config_class) -> dict:
    """The comment behind each field of a dataclass, base classes included: {field: comment}."""
    comments = {}
    for cls in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(cls):
            found = re.findall(r"^ {4}(\w+): [^#\n]*(?:# (.*))?$", inspect.getsource(cls), flags=re.MULTILINE)
            comments |= {name: text for name, text in found if text or name not in comments}
    return comments


def check_choices(config, **choices):
    """Raise UserError where a setting is not one of its choices: check_choices(config, model=VIT_SIZES)."""
    for field, names in choices.items():
        if getattr(config, field) not in names:
            raise UserError(unknown("--" + field.replace("_", "-"), getattr(config, field), names))


def check_least(config, **least):
    """Raise UserError where a setting is below its least value, infinite or nan: check_least(config, steps=0)."""
    for field, bound in least.items():
        if not bound <= (value := getattr(config, field)) < math.inf:  # false for nan too
            raise UserError(f"--{field.replace('_', '-')} {value} makes no sense; give {bound} or more")


def check_positive(config, *fields):
    """Raise UserError where a setting is not more than 0, infinite or nan."""
    for field in fields:
        if not 0 < (value := getattr(config, field)) < math.inf:
            raise UserError(f"--{field.replace('_', '-')} {value} makes no sense; give more than 0")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line: UserError."""

    def error(self, message):
        raise UserError(message)


def flag_parser(config, usage: str, description: str) -> Parser:
    """A parser with one flag a field of a dataclass: --any-field value, --no-x for booleans, no abbreviations.

    `config` is the class, or a config whose values are the defaults that --help shows.
    """
    parser = Parser(usage=usage, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    config_class = config if isinstance(config, type) else type(config)
    hints, comments = typing.get_type_hints(config_class), field_comments(config_class)
    for field in dataclasses.fields(config_class):
        kind, shown = hints[field.name], getattr(config, field.name)
        options = {"type": kind}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)
            options = {"type": inner[0], "nargs": "+" if inner[-1] is ... else len(inner)}
            shown = " ".join(map(str, shown))
        text = f"{comments[field.name]} (default: {shown})".replace("%", "%%").strip()
        parser.add_argument("--" + field.name.replace("_", "-"), help=text, **options)
    return parser


def given_flags(config_class, argv: list, usage: str = "", description: str = "") -> dict:
    """Command line -> {field: value} of the flags that are there. Raises UserError for one that does not exist."""
    parser = flag_parser(config_class, usage, description)
    given, rest = parser.parse_known_args(argv)
    if rest:
        if not rest[0].startswith("-"):
            raise UserError(f"{rest[0]!r} stands alone; a value needs its flag: --any-field value")
        known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
        flag = rest[0].split("=")[0].lower()
        close = [option for option in known if flag.strip("-") in option.split("-")]  # --lr: --base-lr
        close = close or difflib.get_close_matches(flag, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown flag {rest[0]!r}; {hint}--help lists the flags")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()}


def read_flags(config_class, recipes: dict, argv: list, usage: str = "", description: str = ""):
    """Command line -> config: the defaults, then every recipe that fits, then the flags themselves.

    A recipe's key is what one would type: "cifar100" fits --data cifar100, "cifar100 --ssl simclr" needs that flag too.
    --help prints the flags with the defaults that hold beside those given, and ends the program.
    Raises UserError for a flag or a value that does not exist.
    """
    asked = [word for word in argv if word not in ("-h", "--help")]
    given, values = given_flags(config_class, asked, usage, description), {}
    source, names = given.get("recipe") or given.get("data", config_class.data), {key.split()[0] for key in recipes}
    if given.get("recipe") and source not in names:
        raise UserError(unknown("--recipe", source, sorted(names)))
    for key, recipe in recipes.items():
        name, *flags = key.split()
        if name == source and given_flags(config_class, flags).items() <= given.items():
            values |= recipe
    if len(asked) < len(argv):
        note = f"{description}\nDefaults are those for {' '.join(asked) or '--data ' + config_class.data}."
        flag_parser(config_class(**values), usage, note).print_help()
        raise SystemExit(0)
    return config_class(**values | given)


def check_config(config: TrainConfig):
    """Raise UserError where a setting of the loop makes no sense, whatever the data."""
    check_least(config, image_size=1, epochs=1, batch_size=1, accumulate=1, save_every=1)
    check_least(config, warmup_epochs=0, probe_every=0, probe_images=0, workers=0, seed=0)
    check_least(config, base_lr=0, warmup_lr=0, weight_decay=0, clip=0)
    check_choices(config, amp=("auto", "bf16", "fp16", "off"))
    if not 0 < config.crop_min <= 1:
        raise UserError(f"--crop-min {config.crop_min} is not a share of the image; give more than 0, at most 1")
    if not 0 <= config.flip <= 1:
        raise UserError(f"--flip {config.flip} is not a probability; give 0 to 1")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise UserError(f"--betas {config.betas} must both be at least 0 and less than 1")


def check_batch(config: TrainConfig):
    """Raise UserError where a batch does not divide by the processes and the accumulated parts."""
    parts = world_size() * config.accumulate
    if config.batch_size % parts:
        raise UserError(
            f"a batch of {config.batch_size} does not divide by {world_size()} processes x {config.accumulate} parts; "
            f"change --batch-size or --accumulate"
        )


# ---------------------------------------------------------------------------------------------------------------------
# 10. The loop
# ---------------------------------------------------------------------------------------------------------------------


def pick_precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None for plain float32.

    float32 products keep full precision (no TF32): under autocast the heavy ones are in bf16 or fp16 already, and what
    is left in float32, such as a loss on nearly equal features, is there because it needs every digit.
    """
    if amp != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has_bf16 = device.type == "cpu" and any(
        capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "amx_tile", "bf16")
    )
    return torch.bfloat16 if has_bf16 else None  # emulated bf16 is slower than float32


def learning_rate(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """Linear warm-up from `warmup_lr`, then a cosine to zero, step by step; or steps down at `milestones`."""
    peak = config.base_lr * config.batch_size / 256
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.warmup_lr + (peak - config.warmup_lr) * step / warmup
    if config.milestones:
        return peak * 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in config.milestones)
    return peak / 2 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def autocast(amp: str, device: torch.device):
    """The context in which --amp computes on a device."""
    dtype = pick_precision(amp, device)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def gradient_if(wanted):
    """A context that keeps gradients where they are wanted: a term of weight 0 is measured, but not differentiated."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and bool(wanted))


def decays(name: str, parameter: Tensor) -> bool:
    """Whether AdamW's weight decay acts on a parameter: not on biases, norms and tokens."""
    return parameter.ndim >= 2 and not name.endswith(("token", "tokens", "bias"))


class Stepper:
    """Autocast, loss scaling, clipping and the optimiser, in the one order that is right for fp16."""

    def __init__(self, optimizer, config: TrainConfig, device: torch.device):
        self.optimizer, self.clip, self.device = optimizer, config.clip, device
        self.dtype = pick_precision(config.amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: Tensor):
        self.scaler.scale(loss).backward()

    def step(self):
        if self.clip:
            self.scaler.unscale_(self.optimizer)  # clip the true gradient, not the scaled one
            nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


class Method(nn.Module):
    """The whole contract between a paper and the loop. Made as `Method(config, data)`; `data` knows mean, std, classes.

    `encoder` is what a run is for: it is saved in encoder.pt and probed. `views` is how many crops of each image
    `forward` is given: (B, 3, H, W) for one, (B, views, 3, H, W) for more. Only process 0 calls `encoder`, `probe` and
    `pictures`, so these must not wait for the others.
    """

    name: str
    encoder: nn.Module
    views = 1
    captions = ()  # what the columns of `pictures` show
    origin = ""  # a digest of the weights that it starts from, where the settings do not determine them

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict:
        """{"loss": scalar to minimise, other scalars to log}, all 0-d tensors; images are in [0, 1]."""
        raise TypeError(f"{type(self).__name__} has no forward")

    def steps_per_epoch(self, images: int, config: TrainConfig) -> int:
        """How many steps make an epoch of so many images."""
        return images // config.batch_size

    def plan(self, images: int, config: TrainConfig, first_step: int):
        """What this process loads from `first_step` on: (seed, indices) a step; see `batch_plan`."""
        return batch_plan(images, config, first_step)

    def start_epoch(self, epoch: int):
        """Called before each epoch, counted from 0, for schedules in epochs."""

    def optimizer(self, config: TrainConfig) -> torch.optim.Optimizer:
        """AdamW without decay on biases, norms and tokens."""
        decay, plain = [], []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                (decay if decays(name, parameter) else plain).append(parameter)
        groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=config.base_lr, betas=tuple(config.betas), fused=True)

    def update(self, model: nn.Module, batches: list, stepper: Stepper) -> dict:
        """One optimisation step over the parts of a batch -> scalars to log. `model` is self, as DDP wraps it."""
        logged = []
        for i, (images, labels) in enumerate(batches):
            # Only the last part's backward averages over the processes; DDP decides that in the forward pass.
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last or model is self or world_size() == 1 else model.no_sync():
                with stepper.autocast():
                    out = model(images, labels)
                stepper.backward(out["loss"] / len(batches))
            logged.append({name: value.detach().float() for name, value in out.items()})
        stepper.step()
        return {name: sum(part[name] for part in logged) / len(logged) for name in logged[0]}

    def probe(self, encode, train, test, config: TrainConfig, **loading) -> dict:
        """What an epoch is judged by: accuracies to log. `encode` is the encoder under autocast."""
        return probe(encode, train, test, config.image_size, config.probe_images, **loading)

    def pictures(self, images: Tensor) -> Tensor:
        """Rows of pictures worth looking at: images (B, 3, H, W) -> (B, K, 3, H, W), values in [0, 1]."""
        return images[:, None]


class NonFiniteLoss(RuntimeError):
    """The loss is infinite or not a number: the run stops, its last checkpoint stays."""


def what_is_left(checkpoint: Path) -> str:
    kept = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "no checkpoint was written"
    return f"{kept}; start anew with a lower --base-lr or --amp off"


class Stopped(RuntimeError):
    """A signal ended the run after its current step, and it was saved; `number` is the signal's."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
"""Ctrl-C, a polite kill, and what Slurm can be told to send before a job's time is over."""


@contextlib.contextmanager
def noted_signals():
    """Signals that stop a run only add their number to the list that this gives; a second Ctrl-C stops at once."""
    noted, first = [], 0.0

    def note(number, frame):
        nonlocal first
        # torchrun passes Ctrl-C on to processes that have it already: that one is no second one.
        if number == signal.SIGINT and signal.SIGINT in noted and time.monotonic() - first > 1:
            raise KeyboardInterrupt
        first = first or time.monotonic()
        noted.append(number)

    if threading.current_thread() is not threading.main_thread():  # Python lets no other one do this
        yield noted
        return
    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Meter:
    """Means of logged scalars over an epoch, read from the device every few steps: each read waits for it."""

    def __init__(self, sums: dict | None = None, count: int = 0):
        self.sums, self.count, self.waiting = dict(sums or {}), count, []

    def add(self, step: int, values: dict):
        self.waiting.append((step, values))

    def flush(self, checkpoint: Path):
        """Fold in what waits, averaged over the processes; raise NonFiniteLoss where the loss is not finite."""
        if not self.waiting:
            return
        names = list(self.waiting[0][1])
        table = torch.stack([torch.stack([values[name] for name in names]) for _, values in self.waiting])
        if world_size() > 1:  # one bad rank stops all, at the same step
            dist.all_reduce(table)
            table /= world_size()
        for (step, _), row in zip(self.waiting, table.tolist(), strict=True):
            if not math.isfinite(row[names.index("loss")]):
                terms = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, row, strict=True))
                raise NonFiniteLoss(f"step {step}: {terms}; {what_is_left(checkpoint)}")
            for name, value in zip(names, row, strict=True):
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.count += 1
        self.waiting = []

    def means(self) -> dict:
        return {name: total / max(1, self.count) for name, total in self.sums.items()}


def write_atomically(path: Path, write):
    """write(open binary file), then move it over `path`: a kill at any moment leaves the old file or the new one.

    Raises OSError where the disk is full or the folder cannot be written; the old file is still there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError of its own
        cause = error
        while cause.__context__ and not isinstance(cause, OSError):
            cause = cause.__context__
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        kept = "the file of before is intact" if path.exists() else "nothing was written"
        raise OSError(f"cannot write {path} ({getattr(cause, 'strerror', None) or cause}); {kept}") from error


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint without running any code that a file may hold. Raises UserError where it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception as error:  # noqa: BLE001 (a damaged file fails in any of a dozen ways)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} is not a checkpoint ({reason})") from None


def identity_of(method: Method, train, config: TrainConfig, stepper: Stepper) -> dict:
    """All that must be the same where a run goes on: else it would not end where an uninterrupted one does."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_FIELDS}
    return {
        "method": method.name,
        "origin": method.origin,
        "images": len(train),
        "processes": world_size(),
        "precision": str(stepper.dtype),
    } | fields


def lock_run(out: Path, resume: bool):
    """Make a run folder, or with --resume take the one that is there; lock it until the returned file closes.

    The lock is the operating system's: it ends with the process, however that ends. Raises UserError where the run
    exists, or another process is writing it.
    """
    try:
        if not resume and out.exists():
            raise FileExistsError
        out.mkdir(parents=True, exist_ok=resume)
        file = open(out / ".lock", "a")  # noqa: SIM115 (stays open for as long as the run)
    except FileExistsError:
        raise UserError(f"{out} exists; add --resume to go on with it, or choose another folder by --out") from None
    except OSError as error:
        raise UserError(f"cannot write the run folder {out} ({error.strerror}); choose another by --out") from None
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # either one means that somebody has it
        file.close()
        raise UserError(f"another process is writing {out}; wait for it, or choose another folder by --out") from None
    except OSError:
        pass  # some network file systems have no locks
    return file


def open_run(out: Path, identity: dict, config: TrainConfig) -> int:
    """Begin the run in a locked folder, or with --resume find its checkpoint; returns the step to go on from.

    Raises UserError rather than overwrite a run, or go on with one that is not the same.
    """
    if config.resume and (out / "last.pt").exists():
        state = load_checkpoint(out / "last.pt")
        old = state.get("identity") if isinstance(state, dict) and "step" in state else None
        if old is None:
            raise UserError(f"{out / 'last.pt'} is not a checkpoint of a run; choose another folder by --out")
        differing = sorted(name for name in identity.keys() | old.keys() if old.get(name) != identity.get(name))
        if differing:
            changes = ", ".join(f"{name} {old.get(name)} -> {identity.get(name)}" for name in differing)
            raise UserError(f"{out} was trained otherwise ({changes}); go on with what it was trained with")
        return state["step"]
    if (out / "encoder.pt").exists():
        raise UserError(f"{out} holds an encoder but no last.pt to go on from; choose another folder by --out")
    if config.resume:
        print(f"note: no checkpoint in {out} yet, starting from the beginning", flush=True)
    settings = json.dumps({"method": identity["method"], **dataclasses.asdict(config)}, indent=2)
    write_atomically(out / "config.json", lambda file: file.write(f"{settings}\n".encode()))
    write_atomically(out / "log.jsonl", lambda file: file.write(log_header(identity, config).encode()))
    return 0


def log_header(identity: dict, config: TrainConfig) -> str:
    """The first line of a log: how to make the run again."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    header = {"command": " ".join(sys.argv), "method": identity["method"], "config": dataclasses.asdict(config)}
    return json.dumps(header | {"precision": identity["precision"], "versions": versions}) + "\n"


def rewind_log(path: Path, last_epoch: int, header: str) -> list:
    """Drop the lines of a log after `last_epoch`, whose steps will be done again, and return the lines that stay."""
    kept = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a line that a kill cut short
            line = json.loads(text)
            if isinstance(line, dict) and "command" in line:
                header = text + "\n"
            elif isinstance(line, dict) and line.get("epoch", math.inf) <= last_epoch:
                kept.append(line)
    lines = header + "".join(json.dumps(line) + "\n" for line in kept)
    write_atomically(path, lambda file: file.write(lines.encode()))
    return kept


def save_encoder(encoder: nn.Module, file):
    """Write an encoder, to a path or an open file, so that `load_encoder` can rebuild it from the file alone."""
    fields = getattr(encoder, "fields", {})  # a module of a user's own may have none
    torch.save({"kind": type(encoder).__name__, "fields": fields, "weights": encoder.state_dict()}, file)


ENCODERS = {"ViT": ViT, "MobileFormer": MobileFormer}
"""What `load_encoder` can rebuild, by the name of the class. A file with encoders of its own adds them on import."""


def load_encoder(path, image_size: int = 0) -> nn.Module:
    """The encoder of an encoder.pt file, in eval mode; a transformer for another size of images where one is given.

    Raises UserError where the file is not one.
    """
    state = load_checkpoint(Path(path))
    if not isinstance(state, dict) or "kind" not in state:
        raise UserError(f"{path} is not an encoder file; expected the encoder.pt of a run")
    if state["kind"] not in ENCODERS:
        raise UserError(f"{path} holds a {state['kind']}, not known here; import the file that has this class first")
    try:
        changes = {"image_size": image_size} if image_size and "image_size" in state["fields"] else {}
        encoder = ENCODERS[state["kind"]](**state["fields"] | changes)
        encoder.load_state_dict(state["weights"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} does not fit this version ({str(error).splitlines()[0]})") from None
    return encoder.eval()


def batch_plan(images: int, config: TrainConfig, first_step: int):
    """What this process loads from `first_step` on: (seed, indices) a step.

    Which images make up a global batch depends on (seed, step) alone, not on the number of processes.
    """
    steps, share = images // config.batch_size, config.batch_size // world_size()
    for epoch in range(first_step // steps, config.epochs):
        generator = torch.Generator().manual_seed(mix_seed(config.seed, epoch, 0))
        order = torch.randperm(images, generator=generator)
        for step in range(max(first_step, epoch * steps), (epoch + 1) * steps):
            start = step % steps * config.batch_size + rank() * share
            yield mix_seed(config.seed, step, rank(), 1), order[start : start + share]


def fit(method: Method, train, test, config: TrainConfig) -> dict:
    """Train a method and return the probes' accuracies: {"trained": {...}, "untrained": {...}, "pixels": {...}}.

    Runs in one process or in each of several (torchrun). Writes the run folder `config.out`: config.json, log.jsonl,
    last.pt, encoder.pt, pictures.png. Everything random in step t comes from generators seeded by (seed, t, rank), so a
    run that was killed and resumed equals one that was not.
    Raises UserError for a configuration that cannot run, NonFiniteLoss, and Stopped after a signal.
    """
    check_config(config)
    check_batch(config)
    if config.batch_size > len(train):
        raise UserError(
            f"a batch of {config.batch_size} is larger than the data set of {len(train)}; lower --batch-size"
        )
    out = Path(config.out or f"runs/{method.name}-{Path(config.data).name}")
    lock = []  # of process 0
    on_rank_zero(lambda: lock.append(lock_run(out, config.resume)))
    with contextlib.closing(lock[0]) if lock else contextlib.nullcontext(), noted_signals() as noted:
        return run_epochs(method, train, test, config, out, noted)


def restore_run(method: Method, stepper: Stepper, out: Path, first_step: int) -> "Meter":
    """Put back weights, optimiser and loss scaler of a checkpoint; returns the sums of its unfinished epoch."""
    state = load_checkpoint(out / "last.pt")
    if state["step"] != first_step:
        raise UserError(f"{out / 'last.pt'} is at step {state['step']} here, at step {first_step} on process 0")
    try:
        method.load_state_dict(state["weights"])
        stepper.optimizer.load_state_dict(state["optimizer"])
        stepper.scaler.load_state_dict(state["scaler"])
        return Meter(state["sums"], state["count"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{out / 'last.pt'} does not fit this version ({reason}); choose another folder by --out"
        ) from None


def run_epochs(method: Method, train, test, config: TrainConfig, out: Path, noted: list) -> dict:
    """The body of `fit`, in a run folder that is locked; stops after the step in which a signal was noted."""
    device, steps = next(method.parameters()).device, method.steps_per_epoch(len(train), config)
    if world_size() > 1 and device.type == "cuda":
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    stepper = Stepper(method.optimizer(config), config, device)
    identity = identity_of(method, train, config, stepper)
    first_step, meter, log = on_rank_zero(lambda: open_run(out, identity, config)), Meter(), []
    if first_step:
        meter = restore_run(method, stepper, out, first_step)
        header = log_header(identity, config)
        log = on_rank_zero(lambda: rewind_log(out / "log.jsonl", first_step // steps, header))

    model = method
    if world_size() > 1:
        devices = [device.index] if device.type == "cuda" else None
        model = nn.parallel.DistributedDataParallel(method, device_ids=devices, gradient_as_bucket_view=True)
    model = torch.compile(model) if config.compile else model
    loading = {"workers": config.workers, "device": device}
    if rank() == 0:
        print_start(method, train, config, stepper, out, first_step // steps, steps)

    def save_weights():
        write_atomically(out / "encoder.pt", lambda file: save_encoder(method.encoder, file))

    def save(step: int):
        state = {"identity": identity, "step": step, "sums": meter.sums, "count": meter.count}
        state |= {"weights": method.state_dict(), "optimizer": stepper.optimizer.state_dict()}
        state |= {"scaler": stepper.scaler.state_dict()}
        write_atomically(out / "last.pt", lambda file: torch.save(state, file))
        save_weights()

    def check_weights(step: int):
        if not all(bool(p.isfinite().all()) for p in method.parameters()):  # a finite loss may have such a gradient
            raise NonFiniteLoss(f"step {step}: the weights are not finite; {what_is_left(out / 'last.pt')}")

    def stop(done: int, number: int):
        """What a signal asks for: a checkpoint, and one line on how to go on."""
        meter.flush(out / "last.pt")
        check_weights(done - 1)
        on_rank_zero(lambda: save(done))
        bar.close()
        name = signal.Signals(number).name
        raise Stopped(f"stopped by {name} after {done} steps; go on with the same command and --resume", number)

    def encode(images: Tensor) -> Tensor:
        with stepper.autocast():
            return pooled_features(method.encoder, images)

    def finish_epoch(epoch: int, **extra):
        """Probe, draw and log an epoch that is over; epoch 0 is the untrained encoder."""
        line = {"epoch": epoch, **meter.means()}
        line |= ({"lr": learning_rate(epoch * steps - 1, steps, config)} if epoch else {}) | extra
        if config.probe_every and (epoch == config.epochs or epoch % config.probe_every == 0):
            method.eval()
            line |= method.probe(encode, train, test, config, **loading)
            if epoch == 0 and "knn" in line:
                line["pixels"] = probe(raw_pixels, train, test, config.image_size, config.probe_images, **loading)
            some, _ = next(iter(test.plain_batches(range(min(8, len(test))), config.image_size, **loading)))
            torch.manual_seed(config.seed)
            with torch.no_grad(), stepper.autocast():
                save_pictures(method.pictures(some), out / "pictures.png")
            method.train()
        log.append(line)
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        shown = {name: line[name] for name in ("loss", "knn", "linear", "accuracy") if name in line}
        if len(shown) > 1 or (shown and bar.disable):
            shown = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            tqdm.write(f"epoch {epoch}/{config.epochs}  {shown}")

    bar = tqdm(
        total=config.epochs * steps * config.batch_size,
        initial=first_step * config.batch_size,
        unit="img",
        unit_scale=True,
        disable=None if rank() == 0 else True,  # None: only where a person is watching
    )
    if rank() == 0:
        if first_step:
            save_weights()  # a kill may have come just before
        if first_step == config.epochs * steps:
            print("the run is finished: nothing is left to do")
        if not log or log[-1]["epoch"] < first_step // steps:
            finish_epoch(first_step // steps)  # the untrained encoder, or a kill came between a checkpoint and its line
    if first_step % steps == 0:
        meter = Meter()
    method.train()
    plan = method.plan(len(train), config, first_step)
    scale = (config.crop_min, 1.0)
    batches = train.train_batches(plan, config.image_size, scale, config.flip, method.views, **loading)
    often = 1 if device.type == "cpu" else 10  # steps between two readings of the device, each of which waits for it
    for epoch in range(first_step // steps, config.epochs):
        method.start_epoch(epoch)
        started, done = time.perf_counter(), 0
        for step in range(max(first_step, epoch * steps), (epoch + 1) * steps):
            images, labels = next(batches)
            rate = learning_rate(step, steps, config)
            for group in stepper.optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            torch.manual_seed(mix_seed(config.seed, step, rank(), 2))
            parts = list(zip(images.chunk(config.accumulate), labels.chunk(config.accumulate), strict=True))
            meter.add(step, method.update(model, parts, stepper))
            done += config.batch_size
            if step % often == 0:
                meter.flush(out / "last.pt")
            if (step % often == 0 or world_size() == 1) and (number := agree(noted[0] if noted else 0, device)):
                stop(step + 1, number)
            if step % 10 == 0:
                bar.set_postfix(epoch=epoch + 1, loss=f"{meter.means()['loss']:.4f}", lr=f"{rate:.1e}", refresh=False)
            bar.update(config.batch_size)
        meter.flush(out / "last.pt")
        check_weights(step)
        if rank() == 0:
            seconds = time.perf_counter() - started
            if (epoch + 1) % config.save_every == 0 or epoch + 1 == config.epochs:
                save((epoch + 1) * steps)  # before the probe, which may fail
            finish_epoch(epoch + 1, images_per_second=round(done / seconds))
        meter = Meter()
    bar.close()
    log = on_rank_zero(lambda: log)
    first = next((line for line in log if line["epoch"] == 0), {})
    results = {"trained": log[-1], "untrained": first, "pixels": first.get("pixels", {})}
    return {row: {name: line[name] for name in ("knn", "linear")} for row, line in results.items() if "knn" in line}


def print_start(method: Method, train, config: TrainConfig, stepper: Stepper, out: Path, epoch: int, steps: int):
    """What is about to run, so that a wrong setting is seen in the first second."""
    millions = [sum(p.numel() for p in module.parameters()) / 1e6 for module in (method, method.encoder)]
    device, precision = stepper.device, str(stepper.dtype or torch.float32).removeprefix("torch.")
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} thread(s)"
    peak = config.base_lr * config.batch_size / 256
    print(f"method      {method.name}: {millions[0]:.2f} M parameters, encoder {millions[1]:.2f} M")
    print(f"data        {config.data}: {len(train)} images, {len(train.classes)} classes, size {config.image_size}")
    print(f"device      {device} ({place}), {precision}, {world_size()} process(es)")
    print(f"batch       {config.batch_size} images, {config.accumulate} part(s); learning rate {peak:.3g}")
    print(f"epochs      {epoch} of {config.epochs} done, {steps} steps each; writes {out}")
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    shown = "  ".join(f"{name}={value}" for name, value in own.items() if name not in TrainConfig.__dataclass_fields__)
    print(f"settings    {shown}", flush=True)


def format_results(results: dict) -> str:
    """The table that a run ends with: what the encoder learned, beside what it knew and what pixels say."""
    titles = {"trained": "trained encoder", "untrained": "untrained encoder", "pixels": "raw pixels"}
    rows = [f"{titles[row]:<20}{line['knn']:>8.1f}{line['linear']:>10.1f}" for row, line in results.items()]
    return "\n".join([f"{'accuracy (%)':<20}{'kNN':>8}{'linear':>10}", *rows])


def run_command(command, argv: list) -> int:
    """command(argv), with one clear line instead of a traceback; returns the exit code.

    0, 1 for a run that had to stop, 2 for a user's mistake, 128 + its number for a signal (130 for Ctrl-C).
    """
    try:
        command(argv)
    except KeyboardInterrupt:
        message, code = "\nstopped at once; go on from the last checkpoint with the same command and --resume", 130
    except Stopped as stopped:
        message, code = str(stopped) if rank() == 0 else "", 128 + stopped.number
    except Exception as error:
        known = (UserError, NonFiniteLoss, OtherProcessFailed, OSError, MemoryError)
        if not isinstance(error, known) and not (found := foreign_failure(error)):
            raise
        number = os.environ.get("RANK", "0")
        text = str(error) if isinstance(error, known) else found
        message = f"error{f' of process {number}' if number != '0' else ''}: {text or 'not enough memory'}"
        code = 2 if isinstance(error, UserError) else 1
    else:
        if dist.is_initialized():
            gc.collect()  # what still holds the group, before the group goes
            dist.destroy_process_group()
        return 0
    print(message, file=sys.stderr, flush=True, end="\n" if message else "")
    if dist.is_initialized():
        os._exit(code)  # leaving in order would wait for processes that may be waiting for this one
    return code


def foreign_failure(error: Exception) -> str:
    """What to say of an error of torch's that is no bug: too little memory, or a process that is gone; else nothing."""
    text = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return f"not enough memory ({text}); lower --batch-size, or raise --accumulate"
    if text.startswith("DataLoader worker"):  # torch raises this at whatever place the parent is
        return f"a process that decodes images died ({text.strip()}); try fewer --workers"
    if isinstance(error, RuntimeError) and world_size() > 1 and ("gloo" in text or isinstance(error, dist.DistError)):
        return f"another process is gone ({text})"
    return ""
