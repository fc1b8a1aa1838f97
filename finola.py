"""FINOLA: an image is one vector, unrolled over a grid by a first-order norm + linear autoregression.

Chen, Dai, Chen, Liu, Yuan, Liu and Lin, "Image is First-order Norm+Linear Autoregressive" (arXiv 2305.16319, 2023).

The idea: compress an image to a vector q, put it into the middle of an empty grid, and fill the grid by steps
z(x + 1) = z(x) + A norm(z(x)): one matrix a direction, the same for all positions and all images. An upsampler turns
the grid into pixels. Where the encoder sees a quarter of the image only and the rest is predicted (Masked FINOLA), it
learns features that recognise things: -E unrolls the vector of the visible block, -B predicts three masked cells from
each visible one.

Equation                                                      function
Eq. 1, 3   norm + linear step, phi and psi                    channel_norm, step
Sec. 2     four matrices A, A-, B, B-                         Finola: right, left, down, up
Fig. 3     parallel form, both orders averaged                Finola.forward
Fig. 4     block-wise prediction                              Finola.blockwise, block_sources
Eq. 2      the two differential equations                     pde_residuals
Eq. 4, 8   anisotropic Laplacian                              laplacian_residual
Eq. 9      Gaussian curvature and its peaks (Fig. 5)          gaussian_curvature, peak_curvature
App. B     attentional pooling                                AttentionPool
Table 10   upsamplers                                         ConvUpsampler, PatchUpsampler
Table 11   Mobile-Former decoders for detection               MFDecoder
App. E     embedding space                                    mirror, gaussian_samples, principal_reconstructions

Train it:  python train.py finola                                    on built-in pictures, on a laptop
           python train.py finola --variant masked_b                 Masked-FINOLA-B; masked_e likewise
           python train.py finola --data imagenet --root DIR         the paper's experiment (Table 12)
Look at it: python evaluate.py runs/finola-shapes --protocol finola

No code was released. What the text leaves open, and our choice:
* z_n divides by the population deviation; 1e-5 is added to the variance. A and B start as nn.Linear does, without bias;
  weight decay acts on them.
* "z(16/2, 16/2)" is index 8 counted from 0: eight steps left and up, seven right and down. Right and lower cells use A
  and B, left and upper ones A- and B-. With q in a corner, the two matrices without use are frozen.
* The two orders of Fig. 3 are averaged once, at the end.
* Pooling: one learnable query; the output of the encoder's last 1 x 1 convolution, C channels wide and without
  activation, is keys and values without projections; 8 heads. With it, encoders have 5.2, 12.2, 25.2, 43.7 and 67.8 M
  parameters at C = 3072, where Table 2b has 5.0, 12.0, 25.0, 43.5 and 67.6 M.
* Upsampler: residual blocks as in VQGAN (group norm, SiLU, convolution, twice; 1 x 1 shortcut where the width changes),
  nearest-neighbour upsampling. The transformer blocks are pre-norm, with 8 heads, ratio 4 and a last norm.
* The upsampler predicts normalised pixels, and the loss is the mean squared error of those. PSNR is that of [0, 1],
  clamped, of each image, then the mean; in masked variants over masked pixels alone.
* Masked: the block starts at a multiple of 16 pixels, drawn for each image. In -E, q is put at the centre of the block,
  and the map is a window of a larger one. In -B, a 1 x 1 convolution takes the encoder's map to 512 channels before
  FINOLA; one step leads from a visible cell to each of the cells that it predicts ("block offsets" u = v = 1); visible
  cells go to the transformer blocks as they are.
* Section 4 tries "pre-computed moving averages" in the norm at inference, in one sentence with two readings. `--norm
  running` trains with the norm of each position and averages its mean and variance; `--norm batch` is batch norm, by
  channel. Both keep averages for each step of each walk. `--norm none` has no norm.
* AdamW's betas are (0.9, 0.95). The crop is torchvision's (0.08 to 1) and not mirrored, as Table 12 lists crops alone.
* The paper prints 2q - mean for the mirror embedding. The mirror of q, on the other side of the mean, is 2 mean - q;
  2q - mean lies on q's own side, twice as far. We take it for a misprint: the figure goes from q through the mean.
* Curvature has a cell as unit. How Eq. 2 and 4 are measured is ours.
Not here: detection on COCO but for its decoder, and Fig. 8 (new upsamplers on frozen encoders).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common import (
    Block,
    FormerToMobile,
    LiteBottleneck,
    Method,
    MobileFormer,
    MobileFormerWidth,
    MobileToFormer,
    conv,
    initialize,
    sincos_positions,
    unpatchify,
)
from plumbing.errors import UserError
from plumbing.probes import features_of, labelled, probe
from plumbing.processes import autocast
from plumbing.settings import TrainConfig, check_least

STRIDE = 16  # pixels of a cell of the grid

# ---------------------------------------------------------------------------------------------------------------------
# The paper's mathematics. Maps are (B, C, H, W), x counts columns, y counts rows. Any float dtype and device.
# ---------------------------------------------------------------------------------------------------------------------


def channel_norm(z: Tensor, dim: int = -1, eps: float = 1e-5) -> Tensor:
    """z_n of Eq. 1: (z - mean) / deviation over the channels of each position, in float32 or better."""
    z = z.movedim(dim, -1)
    z = z if z.dtype == torch.float64 else z.float()
    return F.layer_norm(z, z.shape[-1:], eps=eps).movedim(-1, dim)


def step(z: Tensor, matrix: Tensor, norm=channel_norm) -> Tensor:
    """phi or psi of Eq. 3, one step in the direction of `matrix` (C, C): z (..., C) -> z + matrix norm(z) (..., C)."""
    return z + F.linear(norm(z), matrix)


def block_sources(corner: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Along one axis of 2 * block cells, where each cell comes from if cells corner to corner + block - 1 are visible.

    Corners (B,) -> source (B, 2 * block), the cell of the block counted from its first one, and visible (B, 2 * block).
    The axis is cut in two parts whose inner halves are visible (Fig. 4), each half predicts the other.
    """
    cell, corner = torch.arange(2 * block, device=corner.device), corner[:, None]
    source = cell - block * (cell >= corner + block)  # cells behind the block; those before it keep their number
    visible = (cell >= corner) & (cell < corner + block)
    return torch.where(visible, cell - corner, source), visible


DIRECTIONS = ("right", "left", "down", "up")  # the paper's A, A-, B, B-
NORMS = ("channel", "running", "batch", "none")
LONGEST = 64  # steps that moving averages are kept for


class Finola(nn.Module):
    """The four matrices (C, C) and the maps that they unroll.

    `norm` is "channel" (Eq. 1), "none", or one of section 4 that has moving averages in eval mode: "running", which
    trains with the channel norm, and "batch", which trains with batch norm.
    """

    def __init__(self, dim: int, norm: str = "channel"):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"unknown norm {norm!r}; choose from {', '.join(NORMS)}")
        self.dim, self.norm = dim, norm
        for name in DIRECTIONS:
            setattr(self, name, nn.Parameter(torch.empty(dim, dim).uniform_(-(dim**-0.5), dim**-0.5)))
        if norm in ("running", "batch"):  # mean and variance of each step of the walks
            shape = (8, LONGEST, dim if norm == "batch" else 1)
            self.register_buffer("averages", torch.stack([torch.zeros(shape), torch.ones(shape)]))

    def normalize(self, z: Tensor, number: int, count: int) -> Tensor:
        """z_n of z (L, B, C), L lines side by side, which is `count` steps along the walk of that number."""
        if self.norm == "none":
            return z
        if self.norm == "channel":
            return channel_norm(z)
        if self.training:
            if self.norm == "running":
                mean, variance = z.mean().view(1), z.var(dim=-1, correction=0).mean().view(1)
            else:
                mean, variance = z.mean(dim=(0, 1)), z.var(dim=(0, 1), correction=0)
            self.averages[:, number, count].lerp_(torch.stack([mean, variance]).detach(), 0.1)
            if self.norm == "running":
                return channel_norm(z)
        else:
            mean, variance = self.averages[:, number, count]
        return (z - mean) / (variance + 1e-5).sqrt()

    def walk(self, z: Tensor, direction: str, steps: int, stage: int) -> Tensor:
        """z (L, B, C) and what `steps` steps in a direction make of it -> (1 + steps, L, B, C)."""
        matrix, number, states = getattr(self, direction), 4 * stage + DIRECTIONS.index(direction), [z]
        for count in range(steps):
            states.append(step(states[-1], matrix, lambda z, count=count: self.normalize(z, number, count)))
        return torch.stack(states)

    def line(self, z: Tensor, before: str, after: str, place: int, length: int, stage: int) -> Tensor:
        """Fill an axis of `length` cells from z (L, B, C) at `place`, both ways -> (length, L, B, C)."""
        first, last = self.walk(z, before, place, stage), self.walk(z, after, length - 1 - place, stage)
        return torch.cat([first.flip(0)[:-1], last])

    def forward(self, q: Tensor, size: int | tuple[int, int], origin: tuple[int, int] | None = None) -> Tensor:
        """Vectors q (B, C) at `origin` (row, column), or the centre (H // 2, W // 2) -> maps (B, C, H, W) (Fig. 3).

        A whole row is unrolled along columns at once, and a whole column along rows: H + 2 W products of matrices
        follow one another, not 2 H W.
        Raises ValueError where the origin is not on the map.
        """
        height, width = (size, size) if isinstance(size, int) else size
        row, column = (height // 2, width // 2) if origin is None else origin
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"origin {(row, column)} is not on a map of {height} x {width}")
        if self.norm in ("running", "batch") and max(height, width) > LONGEST:
            raise ValueError(f"moving averages are kept for {LONGEST} cells a side, not {max(height, width)}")
        q = q.to(self.right.dtype)[None]  # (1, B, C); not half precision, or sums of many steps would lose their digits
        across, along = ("left", "right", column, width), ("up", "down", row, height)
        middle_row = self.line(q, *across, stage=0)[:, 0]  # (W, B, C)
        across_first = self.line(middle_row, *along, stage=1)  # (H, W, B, C): psi^v phi^u q
        middle_column = across_first[:, column]  # (H, B, C): psi^v q, where the other order starts
        along_first = self.line(middle_column, *across, stage=1)  # (W, H, B, C): phi^u psi^v q
        return rearrange((across_first + along_first.transpose(0, 1)) / 2, "h w b c -> b c h w")

    def blockwise(self, z: Tensor, size: int, row: int | Tensor, col: int | Tensor) -> Tensor:
        """Masked-FINOLA-B: a visible block z (B, C, h, w) at (row, col) of a map -> the whole map (B, C, size, size).

        The block has half the side of the map and may lie anywhere, elsewhere in each image if row and col are (B,). It
        stays as it is; each other cell is one step right or left, one step down or up, or the mean of both orders of
        two steps, from the cell of the block that predicts it (Fig. 4).
        Raises ValueError where the block does not fit (where it lies is checked on CPUs alone), and for norms that have
        moving averages.
        """
        if self.norm in ("running", "batch"):
            raise ValueError(f"a norm of {self.norm!r} is for maps that are unrolled from one vector")
        batch, _, height, width = z.shape
        corner = torch.stack([torch.as_tensor(x, device=z.device).expand(batch) for x in (row, col)])  # (2, B)
        if (2 * height, 2 * width) != (size, size):
            raise ValueError(f"a block of {height} x {width} is not a quarter of a map of {size} x {size}")
        if not corner.is_cuda and (corner.min() < 0 or corner.max() > size // 2):  # on a GPU it would wait
            raise ValueError(f"a block of {height} x {width} at {(row, col)} leaves the map of {size} x {size}")
        z, cell = rearrange(z.to(self.right.dtype), "b c h w -> b h w c"), torch.arange(height, device=z.device)
        above, left = (cell < x[:, None] for x in corner)  # (B, h): cells of the block that predict what is before it
        above, left = above[:, :, None, None], left[:, None, :, None]

        def phi(z):
            return torch.where(left, self.one_step(z, "left"), self.one_step(z, "right"))

        def psi(z):
            return torch.where(above, self.one_step(z, "up"), self.one_step(z, "down"))

        beside, below = phi(z), psi(z)
        parts = torch.stack([z, beside, below, (psi(beside) + phi(below)) / 2], dim=1)  # (B, 4, h, w, C)
        (rows, seen_rows), (columns, seen_columns) = (block_sources(x, size // 2) for x in corner)  # each (B, size)
        part = 2 * ~seen_rows[:, :, None] + ~seen_columns[:, None]  # (B, size, size)
        image = torch.arange(batch, device=z.device)[:, None, None]
        return parts[image, part, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)

    def one_step(self, z: Tensor, direction: str) -> Tensor:
        return step(z, getattr(self, direction), lambda z: self.normalize(z, 0, 0))


def pde_residuals(z: Tensor, finola: Finola, origin: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """How far a map is from Eq. 2: |dz - A z_n| / |dz| over all steps away from the origin, along x and along y.

    Maps (B, C, H, W) -> two (B,). Zero where both orders of steps agree, for maps unrolled with the channel norm.
    """
    row, column = (z.shape[2] // 2, z.shape[3] // 2) if origin is None else origin
    results = []
    for place, before, after, axis in ((column, finola.left, finola.right, 3), (row, finola.up, finola.down, 2)):
        line = z.movedim(axis, 1).movedim(2, -1)  # (B, length, other, C): the axis first, the channels last
        wrong, moved = 0, 0
        for part, matrix in ((line[:, place:], after), (line[:, : place + 1].flip(1), before)):
            difference = part.diff(dim=1)
            error = difference - F.linear(channel_norm(part[:, :-1]), matrix)
            wrong, moved = wrong + error.square().sum(dim=(1, 2, 3)), moved + difference.square().sum(dim=(1, 2, 3))
        results.append((wrong / moved.clamp_min(1e-30)).sqrt())
    return tuple(results)


def laplacian_residual(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """How far a map is from Eq. 4: |z_xx - (A B^-1)^2 z_yy| / (|z_xx| + |(A B^-1)^2 z_yy|), in [0, 1], in float64.

    Maps (B, C, H, W) that A and B (C, C) unroll to the right and downwards, three or more cells a side -> (B,).
    """
    z = z.double()
    ratio = torch.linalg.solve(b.double(), a.double(), left=False)  # A B^-1
    z_xx = z[:, :, 1:-1].diff(n=2, dim=3).movedim(1, -1)  # (B, H - 2, W - 2, C)
    z_yy = F.linear(z[:, :, :, 1:-1].diff(n=2, dim=2).movedim(1, -1), ratio @ ratio)
    length = [x.flatten(1).norm(dim=1) for x in (z_xx - z_yy, z_xx, z_yy)]
    return length[0] / (length[1] + length[2]).clamp_min(1e-300)


def extend(z: Tensor, dim: int) -> Tensor:
    """One more value at both ends of an axis, on the parabola through the last three."""
    first, last = z.narrow(dim, 0, 3).unbind(dim), z.narrow(dim, z.shape[dim] - 3, 3).flip(dim).unbind(dim)
    before, after = (3 * x[0] - 3 * x[1] + x[2] for x in (first, last))
    return torch.cat([before.unsqueeze(dim), z, after.unsqueeze(dim)], dim=dim)


def gaussian_curvature(z: Tensor) -> Tensor:
    """Eq. 9: curvature of the surfaces (x, y, z(x, y)), each channel one: (..., H, W) -> (..., H, W).

    Central differences with a cell as unit; at the border, those of the parabola through the last three cells.
    Raises ValueError for fewer than three cells a side.
    """
    if min(z.shape[-2:]) < 3:
        raise ValueError(f"curvature needs three cells a side, a map of {z.shape[-2]} x {z.shape[-1]} has fewer")
    z = extend(extend(z, -1), -2)  # (..., H + 2, W + 2)
    middle, rows, columns = z[..., 1:-1, 1:-1], z[..., :, 1:-1], z[..., 1:-1, :]
    z_x, z_y = (columns[..., 2:] - columns[..., :-2]) / 2, (rows[..., 2:, :] - rows[..., :-2, :]) / 2
    z_xx = columns[..., 2:] - 2 * middle + columns[..., :-2]
    z_yy = rows[..., 2:, :] - 2 * middle + rows[..., :-2, :]
    z_xy = (z[..., 2:, 2:] - z[..., 2:, :-2] - z[..., :-2, 2:] + z[..., :-2, :-2]) / 4
    return (z_xx * z_yy - z_xy.square()) / (1 + z_x.square() + z_y.square()).square()


def peak_curvature(z: Tensor) -> Tensor:
    """What Fig. 5 ranks channels by: root mean square of the positive and the negative peak, (..., H, W) -> (...)."""
    curvature = gaussian_curvature(z).flatten(-2)
    high, low = curvature.amax(dim=-1).clamp_min(0), curvature.amin(dim=-1).clamp_max(0)
    return ((high.square() + low.square()) / 2).sqrt()


def psnr(images: Tensor, others: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB: images (B, 3, H, W) in [0, 1], over pixels of a mask (B, 1, H, W) -> (B,)."""
    error = (images.float() - others.float().clamp(0, 1)).square().mean(dim=1, keepdim=True)
    mask = torch.ones_like(error) if mask is None else mask
    return -10 * ((error * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))).clamp_min(1e-10).log10()


# Appendix E: the space of the vectors q. All take and give rows (N, C).


def mirror(q: Tensor, mean: Tensor) -> Tensor:
    """The embeddings on the other side of the mean (Fig. 13, printed as 2q - mean)."""
    return 2 * mean - q


def interpolate(first: Tensor, second: Tensor, count: int) -> Tensor:
    """`count` embeddings, 2 or more, from `first` to `second`, ends included (Fig. 14): two (N, C) -> (count, N, C)."""
    return torch.stack([torch.lerp(first, second, i / (count - 1)) for i in range(count)])


def gaussian_samples(q: Tensor, count: int, generator=None) -> Tensor:
    """Draws from the Gaussian with the mean and covariance of the embeddings (Fig. 12): (N, C) -> (count, C)."""
    noise = torch.randn(count, len(q), generator=generator, dtype=q.dtype).to(q.device)
    return q.mean(dim=0) + noise @ (q - q.mean(dim=0)) / max(1, len(q) - 1) ** 0.5


def principal_reconstructions(q: Tensor, mean: Tensor, covariance: Tensor, counts) -> Tensor:
    """Embeddings with the top-K principal components alone (Fig. 15), for each K of `counts`: (N, C) -> (len, N, C)."""
    vectors = torch.linalg.eigh(covariance.double()).eigenvectors.flip(1).to(q.dtype)  # (C, C), the largest first
    return torch.stack([mean + (q - mean) @ vectors[:, :k] @ vectors[:, :k].T for k in counts])


# ---------------------------------------------------------------------------------------------------------------------
# Modules
# ---------------------------------------------------------------------------------------------------------------------


class AttentionPool(nn.Module):
    """Attentional pooling (appendix B): a learnable query attends to all cells; keys and values are the map itself."""

    def __init__(self, dim: int, heads: int = 8):
        super().__init__()
        if heads < 1 or dim % heads:
            raise UserError(f"{dim} channels do not divide into {heads} heads of the pooling")
        self.heads, self.query_token = heads, nn.Parameter(torch.empty(dim))
        nn.init.normal_(self.query_token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C)
        x = rearrange(x, "b (n c) h w -> b n (h w) c", n=self.heads)  # (B, heads, N, C / heads)
        query = rearrange(self.query_token, "(n c) -> n c 1", n=self.heads) * x.shape[-1] ** -0.5
        weights = (x @ query).softmax(dim=2)  # (B, heads, N, 1)
        return (weights * x).sum(dim=2).flatten(1)


def normed(channels: int) -> nn.Sequential:
    """Group norm and SiLU: 32 groups, fewer for narrow maps, where a group of one channel would forget the colour."""
    groups = math.gcd(32, channels // 4, channels)
    return nn.Sequential(nn.GroupNorm(groups, channels, eps=1e-6), nn.SiLU())


class ResConv(nn.Module):
    """ "res-conv" of Table 10: two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.layers = nn.Sequential(
            *normed(inputs),
            nn.Conv2d(inputs, outputs, 3, padding=1),
            *normed(outputs),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.layers(x)


class ConvUpsampler(nn.Module):
    """FINOLA's upsampler (Table 10): maps (B, C, H, W) -> pictures (B, 3, 16 H, 16 W). `width` is the table's 512."""

    def __init__(self, dim: int, width: int = 512):
        super().__init__()
        half, quarter = width // 2, width // 4
        layers = [ResConv(dim, width)]
        # at twice the size each: up-conv (upsample and 3 x 3 convolution), res-conv
        for inputs, up, out in [(width, width, half), (half, half, half), (half, half, quarter), (*[quarter] * 3,)]:
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(inputs, up, 3, padding=1), ResConv(up, out)]
        self.layers = nn.Sequential(*layers, *normed(quarter), nn.Conv2d(quarter, 3, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class PatchUpsampler(nn.Module):
    """Masked FINOLA's upsampler (Table 10): transformer blocks without positions, none in -E, and a linear layer."""

    def __init__(self, dim: int, blocks: int = 0, heads: int = 8):
        super().__init__()
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(blocks)])
        self.norm = nn.LayerNorm(dim, eps=1e-6) if blocks else nn.Identity()
        self.linear = nn.Linear(dim, 3 * STRIDE**2)
        self.apply(initialize)

    def forward(self, z: Tensor) -> Tensor:  # (B, C, H, W) -> (B, 3, 16 H, 16 W)
        height, width = z.shape[2:]
        patches = self.linear(self.norm(self.blocks(rearrange(z, "b c h w -> b (h w) c"))))
        return unpatchify(patches, STRIDE, STRIDE * height, STRIDE * width)


# ---------------------------------------------------------------------------------------------------------------------
# Decoders for detection (Table 11)
# ---------------------------------------------------------------------------------------------------------------------


class DecoderBlock(nn.Module):
    """ "M-F+" or "M-F-" of Table 11: a Mobile-Former block whose Mobile part is a transformer block, or bneck-lite.

    These parts have no dynamic ReLU and need no token, so they run before the queries' part, a choice. After the last
    block nothing reads the map, so nothing is added to it.
    """

    def __init__(self, kind: str, dim: int, last: bool = False, heads: int = 8):
        super().__init__()
        self.mobile = Block(dim, heads, mlp_ratio=8) if kind == "+" else LiteBottleneck(dim, 2 * dim, dim)
        self.to_former, self.former = MobileToFormer(dim, dim), Block(dim, heads)
        self.to_mobile = None if last else FormerToMobile(dim, dim)

    def forward(self, x: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:  # (B, C, H, W), (B, Q, C)
        if isinstance(self.mobile, Block):
            tokens = self.mobile(rearrange(x, "b c h w -> b (h w) c"))
            x = rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2])
        else:
            x = self.mobile(x)
        queries = self.former(self.to_former(queries, x))
        return self.to_mobile(x, queries) if self.to_mobile else x, queries


class MFDecoder(nn.Module):
    """MF-Dec-522 or MF-Dec-211 (Table 11): object queries for DETR, refined at 1/32, 1/16 and 1/8 of the image.

    `depths` are (5, 2, 2) or (2, 1, 1) blocks; `coarse` and `fine` the widths of the encoder's output at 1/16 and of
    its map at 1/8, 2880 and 192 for MF-W2880.
    The text does not say how the encoder's maps come in, nor how wide the blocks are. Published multiply-adds grow with
    the encoder's width as if each scale added a 1 x 1 convolution of its map; so it is here. With DETR's 2048 hidden
    units for the map, and a transformer block of ratio 4 for the queries, parameters lie within 2.5 % of the published
    ones. Multiply-adds do not: at 800 x 1333 MF-Dec-522 has 8 G less than published, whatever the encoder. Choices,
    too: a lite bottleneck twice as wide within, 8 heads, batch norm, no dropout, sine-cosine positions added to the map
    at each scale, DETR's prediction heads after each block.
    """

    def __init__(
        self, depths: tuple = (5, 2, 2), coarse: int = 2880, fine: int = 192, classes: int = 91, queries: int = 100
    ):
        super().__init__()
        dim = 256
        self.queries = nn.Parameter(torch.empty(queries, dim))
        self.down = nn.Sequential(conv(coarse, coarse, 3, stride=2, groups=coarse), conv(coarse, dim))  # "down-conv"
        self.lateral = nn.ModuleList([conv(coarse, dim), conv(fine, dim)])
        self.up = nn.ModuleList(nn.Sequential(conv(dim, dim, 3, groups=dim), conv(dim, dim)) for _ in range(2))
        self.stages = nn.ModuleList(
            nn.ModuleList(DecoderBlock(kind, dim, i == 2 and j == depth - 1) for j in range(depth))
            for i, (kind, depth) in enumerate(zip("+--", depths, strict=True))
        )
        self.norm, self.classify = nn.LayerNorm(dim), nn.Linear(dim, classes + 1)
        self.locate = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4), nn.Sigmoid()
        )
        nn.init.normal_(self.queries)

    def forward(self, coarse: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, coarse, H/16, W/16) and (B, fine, H/8, W/8) -> for L blocks, logits (L, B, Q, classes + 1), the last
        of which is "no object", and boxes (L, B, Q, 4): centre x, y, width, height in shares of the image.
        """
        queries, outputs = self.queries.expand(len(coarse), -1, -1), []
        x = self.down(coarse)  # (B, 256, H/32, W/32)
        for scale, blocks in enumerate(self.stages):
            if scale:
                encoded = self.lateral[scale - 1]((coarse, fine)[scale - 1])
                x = self.up[scale - 1](F.interpolate(x, encoded.shape[2:], mode="bilinear")) + encoded
            positions = sincos_positions(*x.shape[2:], x.shape[1]).to(x)
            x = x + rearrange(positions, "(h w) c -> c h w", h=x.shape[2])
            for block in blocks:
                x, queries = block(x, queries)
                outputs.append(queries)
        outputs = self.norm(torch.stack(outputs))  # (L, B, Q, 256)
        return self.classify(outputs), self.locate(outputs)


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


ORIGINS = {"center": None, "top_left": (0, 0), "top_right": (0, -1), "bottom_left": (-1, 0), "bottom_right": (-1, -1)}


@dataclass
class Config(TrainConfig):
    """The paper's image reconstruction on ImageNet (Table 12, left), with MF-W2880 and 3072 channels."""

    image_size: int = 256
    epochs: int = 100
    batch_size: int = 128
    base_lr: float = 1.5e-4  # learning rate for a batch of 256
    weight_decay: float = 0.1  # of AdamW; none on biases, norms and tokens
    flip: float = 0.0  # probability of a mirror image
    variant: Literal["finola", "masked_e", "masked_b"] = "finola"  # whole images; masked, element-wise or block-wise
    width: MobileFormerWidth = "2880"  # of Mobile-Former (Table 2b)
    channels: int = 3072  # C: of q and of the map that is unrolled (Table 2a)
    origin: Literal[tuple(ORIGINS)] = "center"  # where q is put (Fig. 11)
    norm: Literal[NORMS] = "channel"  # running and batch: moving averages at inference (section 4)
    pool_heads: int = 8  # heads of the attentional pooling
    upsampler_width: int = 512  # channels of the convolutional upsampler's first block (Table 10)
    upsampler_blocks: int = 6  # transformer blocks of the upsampler of masked_b (Table 16)

    def check(self):
        super().check()
        masked = self.variant != "finola"
        unit = 2 * STRIDE if masked else STRIDE
        if self.image_size % unit:
            raise UserError(f"--image-size {self.image_size} is not a multiple of {unit}, which {self.variant} needs")
        check_least(self, channels=4, upsampler_width=4, upsampler_blocks=0)
        if masked and self.origin != "center":
            raise UserError("--origin belongs to --variant finola: masked variants start from the visible block")
        if self.norm in ("running", "batch") and self.variant == "masked_b":
            raise UserError(f"--norm {self.norm} is an ablation of unrolling; give --variant finola or masked_e")


MASKED = {"epochs": 1600, "batch_size": 1024, "channels": 512}  # Tables 12 and 15
LAPTOP = {"width": "micro", "image_size": 64, "channels": 256, "upsampler_width": 64, "upsampler_blocks": 2}
LAPTOP |= {"warmup_epochs": 1, "batch_size": 32}

RECIPES = {
    "imagenet": {},  # Table 12, the defaults of Config
    "imagenet --variant masked_e": MASKED,
    "imagenet --variant masked_b": MASKED,
    # Laptop recipes of ours.
    "shapes": LAPTOP | {"epochs": 9, "base_lr": 24e-3, "crop_min": 0.8, "probe_every": 9},
    "cifar10": LAPTOP | {"epochs": 10, "base_lr": 16e-3, "crop_min": 0.3},
}


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------


def cut(maps: Tensor, corner: Tensor, side: int) -> Tensor:
    """The windows of maps (B, C, H, W) whose first cell is `corner` (B, 2), row and column -> (B, C, side, side)."""
    rows, columns = (corner[:, i, None] + torch.arange(side, device=maps.device) for i in (0, 1))  # (B, s)
    image = torch.arange(len(maps), device=maps.device)[:, None, None]
    return maps[image, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


class FinolaAutoencoder(Method):
    """Encoder, FINOLA, upsampler: the whole image from its vector, or what is masked from a visible block."""

    name = "finola"

    def __init__(self, config: Config, data):
        super().__init__()
        self.config, self.masked = config, config.variant != "finola"
        self.size = config.image_size // STRIDE  # cells a side
        pooled = config.variant != "masked_b"
        head = config.channels if pooled else 0  # the last 1 x 1 convolution makes the channels of q
        self.encoder = MobileFormer(config.width, head, data.mean, data.std)
        self.finola = Finola(config.channels, config.norm)
        if pooled:
            self.pool = AttentionPool(config.channels, config.pool_heads)
        else:
            self.project = nn.Conv2d(self.encoder.dim, config.channels, 1)
        blocks = config.upsampler_blocks if config.variant == "masked_b" else 0
        if self.masked:
            self.upsampler = PatchUpsampler(config.channels, blocks)
        else:
            self.upsampler = ConvUpsampler(config.channels, config.upsampler_width)
            row, column = self.start
            unused = {"right": column == self.size - 1, "left": column == 0}
            unused |= {"down": row == self.size - 1, "up": row == 0}
            for name, idle in unused.items():  # DDP would wait for the gradient of an idle one for ever
                getattr(self.finola, name).requires_grad_(not idle)

    @property
    def start(self) -> tuple[int, int]:
        """Row and column of q in the map; in masked_e, of the centre of a visible block in the middle (`middle`)."""
        if self.masked:
            return (self.size // 4 + self.size // 2 // 2,) * 2
        place = ORIGINS[self.config.origin]
        return (self.size // 2, self.size // 2) if place is None else tuple(x % self.size for x in place)

    def draw_corners(self, batch: int, device) -> Tensor:
        """Where the visible block of each image starts, in cells: (B, 2), row and column, uniform."""
        return torch.randint(0, self.size // 2 + 1, (batch, 2), device=device)

    def middle(self, images: Tensor) -> Tensor | None:
        """The corners (B, 2) of blocks in the middle, to look at; None where the whole image is seen."""
        if not self.masked:
            return None
        return torch.full((len(images), 2), self.size // 4, device=images.device)

    def embed(self, images: Tensor, corner: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) -> vectors q (B, C), of visible blocks alone if `corner` (B, 2) says where these are."""
        if corner is not None:
            images = cut(images, STRIDE * corner, STRIDE * self.size // 2)  # before the encoder, which sees no more
        return self.pool(self.encoder(images))

    def unroll(self, q: Tensor, corner: Tensor | None = None) -> Tensor:
        """Vectors (B, C) -> maps (B, C, S, S); in masked_e, q is put at the centre of each image's visible block."""
        if corner is None:
            return self.finola(q, self.size, self.start)
        half = self.size // 2
        canvas = self.finola(q, self.size + half, (half + half // 2,) * 2)  # holds all places that the block can have
        return cut(canvas, half - corner, self.size)

    def feature_map(self, images: Tensor, corner: Tensor | None = None) -> Tensor:
        """The map z (B, C, S, S) that the upsampler is given."""
        if self.config.variant != "masked_b":
            return self.unroll(self.embed(images, corner), corner)
        block = cut(images, STRIDE * corner, STRIDE * self.size // 2)
        return self.finola.blockwise(self.project(self.encoder(block)), self.size, corner[:, 0], corner[:, 1])

    def decode(self, z: Tensor) -> Tensor:
        """Maps (B, C, S, S) -> images (B, 3, H, W), not clamped to [0, 1]."""
        return self.upsampler(z).float() * self.encoder.std + self.encoder.mean

    def scored(self, images: Tensor, corner: Tensor | None) -> Tensor:
        """1 where pixels count in the loss: everywhere, or outside the visible block; (B, 1, H, W)."""
        if corner is None:
            return torch.ones_like(images[:, :1])
        visible = [block_sources(corner[:, i], self.size // 2)[1] for i in (0, 1)]  # rows and columns, each (B, S)
        hidden = ~(visible[0][:, :, None] & visible[1][:, None])  # (B, S, S)
        hidden = hidden.repeat_interleave(STRIDE, dim=1).repeat_interleave(STRIDE, dim=2)
        return hidden[:, None].to(images.dtype)

    def forward(self, images: Tensor, labels: Tensor | None = None, corner: Tensor | None = None) -> dict:
        """Loss and PSNR of images (B, 3, H, W); masked variants take the corners of the blocks (B, 2) or draw them."""
        if self.masked and corner is None:
            corner = self.draw_corners(len(images), images.device)
        prediction = self.upsampler(self.feature_map(images, corner)).float()
        mask = self.scored(images, corner)
        error = (prediction - self.encoder.normalize(images)).square().mean(dim=1, keepdim=True)  # (B, 1, H, W)
        with torch.no_grad():
            quality = psnr(images, prediction * self.encoder.std + self.encoder.mean, mask).mean()
        return {"loss": (error * mask).sum() / mask.sum(), "psnr": quality}

    def probe(self, encode, train, test, config: Config) -> dict:
        """kNN and linear accuracy, and the mean PSNR in dB on test images."""
        torch.manual_seed(config.seed)  # the same blocks each time
        chosen = labelled(test, config.probe_images)

        def measure(images):
            with autocast(config.amp, images.device):
                return self(images)["psnr"].expand(len(images), 1)

        quality = features_of(measure, test, chosen, config.image_size)[0].mean()
        return probe(encode, train, test, config.image_size, config.probe_images) | {"psnr": float(quality)}

    @property
    def captions(self) -> tuple:
        return ("image", "masked image", "reconstruction") if self.masked else ("image", "reconstruction")

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Tensor:
        """Rows of (image, reconstruction) or (image, visible block, what is predicted): (B, K, 3, H, W) in [0, 1]."""
        if not self.masked:
            return torch.stack([images, self.decode(self.feature_map(images)).clamp(0, 1)], dim=1)
        corner = self.draw_corners(len(images), images.device)
        mask, prediction = self.scored(images, corner), self.decode(self.feature_map(images, corner)).clamp(0, 1)
        seen = torch.where(mask > 0, self.encoder.mean, images)
        return torch.stack([images, seen, torch.where(mask > 0, prediction, images)], dim=1)
