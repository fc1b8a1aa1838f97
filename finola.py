"""FINOLA: an image is one vector, unrolled over a grid by a first-order norm + linear autoregression.

Chen, Dai, Chen, Liu, Yuan, Liu and Lin, "Image is First-order Norm+Linear Autoregressive" (arXiv 2305.16319, 2023).

The idea: compress an image to a vector q, put it into the middle of an empty grid, and fill the grid by steps
z(x + 1) = z(x) + A norm(z(x)): one matrix a direction, the same for all positions and images. An upsampler turns the
grid into pixels. In Masked FINOLA the encoder sees a quarter of the image and the rest is predicted, which teaches it
what things are: -E unrolls the vector of the visible block, -B predicts three masked cells from each visible one.

Equation                                   function
Eq. 1, 3   norm + linear, phi and psi      channel_norm, norm_linear
Fig. 3     parallel form, both orders      Finola.forward
Fig. 4     block-wise; element-wise        Finola.blockwise, block_sources; FinolaAutoencoder.unroll
Eq. 2, 4   differential equations (6, 8)   pde_residuals, laplacian_residual
Eq. 5, 7   what Eq. 4 takes for granted    orders_residual
Eq. 9      Gaussian curvature (Fig. 5)     gaussian_curvature, peak_curvature
App. E     embedding space                 mirror, interpolate, gaussian_samples, principal_reconstructions
App. B     pooling, upsamplers (Table 10)  AttentionPool, ConvUpsampler, PatchUpsampler
Sec. 4     moving averages of the norm     AveragedFinola
Table 11   decoder for DETR                MFDecoder

Train it:   python train.py finola                                on built-in pictures; --variant masked_b, masked_e
            python train.py finola --width micro4                 the same with the paper's map of 16 x 16 cells
            python train.py finola --data imagenet --root DIR     the paper's experiment (Table 12)
Look at it: python evaluate.py runs/finola-shapes --protocol finola

No code was released. Choices of ours that change a number; docs/finola.md has them all:
* The norm adds 1e-5 to the variance. q is at index 8 of 16, counted from 0. Both orders are averaged once, at the end.
* In -B one step leads to each predicted cell. The mirror of q is 2 mean - q, where the paper prints 2q - mean.
* One query pools, with 8 heads, without projections. The upsampler's blocks are VQGAN's. AdamW's betas are (0.9, 0.95).
* The loss is that of normalised pixels. PSNR is that of each image, clamped to [0, 1], then the mean.
* Crops keep 0.08 to 1 of the image and are not mirrored.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import common
from common import Block, Method, MobileFormer, MobileFormerWidth, conv, initialize, sincos_positions, unpatchify
from plumbing.errors import UserError
from plumbing.probes import features_of, labelled
from plumbing.processes import autocast
from plumbing.recompute import recomputed
from plumbing.settings import TrainConfig, check_least
from plumbing.start import start_from

# ---------------------------------------------------------------------------------------------------------------------
# The paper's mathematics. Maps are (B, C, H, W), x counts columns, y counts rows. Any float dtype and device. Letters
# beside those of common.py: L lines, N cells or embeddings, S cells a side of the map, Q object queries.
# ---------------------------------------------------------------------------------------------------------------------

DIRECTIONS = ("right", "left", "down", "up")  # A, A-, B, B-; the paper's B- leads down: its y grows upwards


def channel_norm(z: Tensor, dim: int = -1, eps: float = 1e-5) -> Tensor:
    """z_n of Eq. 1: (z - mean) / sqrt(variance + eps) over the channels of each position, in float32 or better."""
    z = (z if z.dtype == torch.float64 else z.float()).movedim(dim, -1)
    return F.layer_norm(z, z.shape[-1:], eps=eps).movedim(-1, dim)


def norm_linear(z: Tensor, matrix: Tensor) -> Tensor:
    """phi or psi of Eq. 3, one step in the direction of `matrix` (C, C): z (..., C) -> z + matrix z_n (..., C)."""
    return z + F.linear(channel_norm(z), matrix)


def block_sources(corner: Tensor, block: int) -> Tensor:
    """Along one axis of 2 * block cells, where each comes from if `block` cells are visible, the first at `corner`.

    Corners (B,) -> (B, 2 * block): for a visible cell its number in the block, for another the number of the visible
    cell that predicts it, plus `block`. The axis is cut at 2 * corner; each part has its inner half visible (Fig. 4).
    """
    cell, corner = torch.arange(2 * block, device=corner.device), corner[:, None]
    visible = (cell >= corner) & (cell < corner + block)
    return torch.where(visible, cell - corner, block + cell % block)  # outer halves repeat the numbers of inner ones


class Finola(nn.Module):
    """The four matrices (C, C), and the maps that they unroll."""

    walks_differ = False  # whether a step from q differs from the same step beside others (`AveragedFinola`)

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        for name in DIRECTIONS:
            setattr(self, name, nn.Parameter(torch.empty(dim, dim).uniform_(-(dim**-0.5), dim**-0.5)))

    def step(self, z: Tensor, direction: str) -> Tensor:
        return norm_linear(z, getattr(self, direction))

    def walk(self, z: Tensor, direction: str, steps: int) -> Tensor:
        """Lines z (L, B, C), side by side, and what each of `steps` steps makes of them -> (1 + steps, L, B, C)."""
        states = [z]
        for _ in range(steps):
            states.append(self.step(states[-1], direction))
        return torch.stack(states)

    def fill(self, z: Tensor, directions: tuple[str, str], place: int, length: int) -> Tensor:
        """Walk from lines z (L, B, C) at `place` to both ends of an axis of `length` cells -> (length, L, B, C)."""
        first, last = self.walk(z, directions[0], place), self.walk(z, directions[1], length - 1 - place)
        return torch.cat([first.flip(0)[:-1], last])  # both begin with z

    def forward(self, q: Tensor, size: int | tuple[int, int], origin: tuple[int, int] | None = None) -> Tensor:
        """Vectors q (B, C) at `origin` (row, column), or the centre (H // 2, W // 2) -> maps (B, C, H, W) (Fig. 3).

        The cell u to the right of q and v below it is (phi^u psi^v + psi^v phi^u)(q) / 2, as below Eq. 3. Lines side by
        side take their steps at once: H + 2 W products of matrices follow one another, not 2 H W.
        Raises ValueError where the origin is not on the map.
        """
        height, width = (size, size) if isinstance(size, int) else size
        row, column = (height // 2, width // 2) if origin is None else origin
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"origin {(row, column)} is not on a map of {height} x {width}; it counts from 0")
        q = q.to(self.right.dtype)[None]  # (1, B, C); not half precision, or sums of many steps would lose their digits
        middle_row = self.fill(q, ("left", "right"), column, width)[:, 0]  # (W, B, C)
        across_first = self.fill(middle_row, ("up", "down"), row, height)  # (H, W, B, C): psi^v phi^u q
        middle_column = across_first[:, column]  # (H, B, C): psi^v q, where the other order starts
        if self.walks_differ:
            middle_column = self.fill(q, ("up", "down"), row, height)[:, 0]
        along_first = self.fill(middle_column, ("left", "right"), column, width)  # (W, H, B, C): phi^u psi^v q
        return rearrange((across_first + along_first.transpose(0, 1)) / 2, "h w b c -> b c h w")

    def blockwise(self, z: Tensor, size: int, row: int | Tensor, col: int | Tensor) -> Tensor:
        """Masked-FINOLA-B: a visible block z (B, C, h, w) at (row, col) of a map -> the whole map (B, C, size, size).

        The block has half the side of the map and may lie anywhere, elsewhere in each image if row and col are (B,).
        The map is cut at 2 * row and 2 * col into four partitions, each with a visible quarter (Fig. 4). Here a block
        of 3 x 3 cells, in capitals, lies at (1, 1), and each partition has its letter:

            f f | g g g g
            f F | G G g g    F stays. One step left makes the quarter beside it, one step up the one above it, and the
            ----+--------    mean of both orders of the two steps the last one. In G the steps go right and up, in J
            j J | K K k k    left and down, in K right and down.
            j J | K K k k
            j j | k k k k
            j j | k k k k

        Raises ValueError where the block does not fit (where it lies is checked on CPUs alone).
        """
        batch, _, height, width = z.shape
        corner = torch.stack([torch.as_tensor(x, device=z.device).expand(batch) for x in (row, col)])  # (2, B)
        if (2 * height, 2 * width) != (size, size):
            raise ValueError(f"a block of {height} x {width} is not a quarter of a map of {size} x {size}")
        if not corner.is_cuda and (corner.min() < 0 or corner.max() > size // 2):  # on a GPU it would wait
            raise ValueError(f"a block of {height} x {width} at {(row, col)} leaves the map of {size} x {size}")
        z, cell = rearrange(z.to(self.right.dtype), "b c h w -> b h w c"), torch.arange(height, device=z.device)
        above, left = (cell < x[:, None] for x in corner)  # (B, h): rows of the block in F and G, columns in F and J

        def phi(z):
            return torch.where(left[:, None, :, None], self.step(z, "left"), self.step(z, "right"))

        def psi(z):
            return torch.where(above[:, :, None, None], self.step(z, "up"), self.step(z, "down"))

        phi_z, psi_z = phi(z), psi(z)
        both = (psi(phi_z) + phi(psi_z)) / 2
        grid = rearrange([z, phi_z, psi_z, both], "(i j) b h w c -> b (i h) (j w) c", i=2)  # (B, 2h, 2w, C)
        image = torch.arange(batch, device=z.device)[:, None, None]
        rows, columns = (block_sources(x, height) for x in corner)  # where in the grid each cell is found: (B, size)
        return rearrange(grid[image, rows[:, :, None], columns[:, None]], "b h w c -> b c h w")


def pde_residuals(z: Tensor, model: Finola, origin: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """How far a map is from Eq. 2: |dz - A z_n| / |dz| over all steps away from the origin, along x and along y.

    Maps (B, C, H, W) -> two (B,). Zero where both orders of steps agree, for maps unrolled with the channel norm.
    """
    row, column = (z.shape[2] // 2, z.shape[3] // 2) if origin is None else origin
    results = []
    for place, before, after, axis in ((column, model.left, model.right, 3), (row, model.up, model.down, 2)):
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
    return apart(z_xx, z_yy)


def orders_residual(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """How far a map is from the step * of Eq. 5, z_xy = z_yx: |A d_y z_n - B d_x z_n| over the sum of both lengths.

    In [0, 1], in float64. Where both orders of steps agree, it goes to 0 with their length. Maps (B, C, H, W) that A
    and B (C, C) unroll to the right and downwards, two or more cells a side -> (B,).
    """
    z_n = channel_norm(z.double(), dim=1).movedim(1, -1)  # (B, H, W, C)
    n_y, n_x = z_n[:, :, :-1].diff(dim=1), z_n[:, :-1].diff(dim=2)  # (B, H - 1, W - 1, C), one step down, one right
    return apart(F.linear(n_y, a.double()), F.linear(n_x, b.double()))


def apart(one: Tensor, other: Tensor) -> Tensor:
    """|x - y| / (|x| + |y|) of two (B, ...), in [0, 1]: 0.71 for unrelated ones of one length -> (B,)."""
    length = [x.flatten(1).norm(dim=1) for x in (one - other, one, other)]
    return length[0] / (length[1] + length[2]).clamp_min(1e-300)


def gaussian_curvature(z: Tensor) -> Tensor:
    """Eq. 9: curvature of the surfaces (x, y, z(x, y)), each channel one: (..., H, W) -> (..., H, W).

    Central differences with a cell as unit; at the border, those of the parabola through the last three cells.
    Raises ValueError for fewer than three cells a side.
    """
    if min(z.shape[-2:]) < 3:
        raise ValueError(f"curvature needs three cells a side, a map of {z.shape[-2]} x {z.shape[-1]} has fewer")
    for dim in (-1, -2):  # one more cell at both ends of an axis
        ends = (z.narrow(dim, 0, 3), z.narrow(dim, -3, 3).flip(dim))
        before, after = (3 * x - 3 * y + w for x, y, w in (end.split(1, dim) for end in ends))
        z = torch.cat([before, z, after], dim=dim)  # (..., H + 2, W + 2) in the end
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
    """PSNR in dB of `others`, cut to [0, 1], at most 100: two (B, 3, H, W), over a mask (B, 1, H, W) -> (B,)."""
    dtype = torch.promote_types(images.dtype, torch.float32)  # half precision has too few digits
    error = (images.to(dtype) - others.to(dtype).clamp(0, 1)).square().mean(dim=1, keepdim=True)
    mask = torch.ones_like(error) if mask is None else mask
    return -10 * ((error * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))).clamp_min(1e-10).log10()


def mirror(q: Tensor, mean: Tensor) -> Tensor:
    """The embeddings on the other side of the mean (Fig. 13, printed as 2q - mean)."""
    return 2 * mean - q


def interpolate(first: Tensor, second: Tensor, count: int) -> Tensor:
    """`count` embeddings, 2 or more, from `first` to `second`, ends included (Fig. 14): two (N, C) -> (count, N, C)."""
    return torch.stack([torch.lerp(first, second, i / (count - 1)) for i in range(count)])


def gaussian_samples(q: Tensor, count: int, generator=None) -> Tensor:
    """Draws from the Gaussian with the mean and covariance of the embeddings (Fig. 12): (N, C) -> (count, C)."""
    # A random sum of the N centred embeddings has their covariance: no root of a matrix (C, C), singular for N <= C.
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
            raise UserError(f"{dim} channels do not divide into {heads} heads of the pooling; change --pool-heads")
        self.heads, self.query_token = heads, nn.Parameter(torch.empty(dim).normal_(std=0.02))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C)
        x = rearrange(x, "b (n c) h w -> b n (h w) c", n=self.heads)  # (B, heads, N, C / heads)
        query = rearrange(self.query_token, "(n c) -> n c 1", n=self.heads) * x.shape[-1] ** -0.5
        weights = (x @ query).softmax(dim=2)  # (B, heads, N, 1)
        return (weights * x).sum(dim=2).flatten(1)


def normed(channels: int) -> nn.Sequential:
    """Group norm and SiLU: 32 groups, fewer for narrow maps, where a group of one channel would forget the colour."""
    return nn.Sequential(nn.GroupNorm(math.gcd(32, channels // 4, channels), channels, eps=1e-6), nn.SiLU())


class ResConv(nn.Module):
    """ "res-conv" of Table 10: two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        first, second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.layers = nn.Sequential(*normed(inputs), first, *normed(outputs), second)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.layers(x)


class ConvUpsampler(nn.Module):
    """FINOLA's upsampler (Table 10): maps (B, C, H, W) -> pictures (B, 3, 16 H, 16 W). `width` is the table's 512.

    Each row doubles the size: for cells of 8, 4 or 2 pixels the first one, two or three are left out.
    """

    def __init__(self, dim: int, width: int = 512, cell: int = 16):
        super().__init__()
        half, quarter = width // 2, width // 4
        rows = [(width, width, half), (half, half, half), (half, half, quarter), (quarter, quarter, quarter)]
        rows = rows[-int(math.log2(cell)) :]
        layers = [ResConv(dim, rows[0][0])]
        for inputs, up, out in rows:  # each at twice the size: up-conv (upsample and 3 x 3 convolution), res-conv
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(inputs, up, 3, padding=1), ResConv(up, out)]
        self.layers = nn.Sequential(*layers, *normed(quarter), nn.Conv2d(quarter, 3, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class PatchUpsampler(nn.Module):
    """Masked FINOLA's upsampler (Table 10): transformer blocks without positions, none in -E, and a linear layer."""

    def __init__(self, dim: int, blocks: int = 0, heads: int = 8, cell: int = 16):
        super().__init__()
        self.cell = cell  # pixels
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(blocks)])
        self.norm = nn.LayerNorm(dim, eps=1e-6) if blocks else nn.Identity()
        self.linear = nn.Linear(dim, 3 * cell**2)
        self.apply(initialize)

    def forward(self, z: Tensor) -> Tensor:  # (B, C, H, W) -> (B, 3, 16 H, 16 W), for cells of 16 pixels
        patches = self.linear(self.norm(self.blocks(rearrange(z, "b c h w -> b (h w) c"))))
        return unpatchify(patches, self.cell, self.cell * z.shape[2], self.cell * z.shape[3])


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------

ORIGINS = {"center": None, "top_left": (0, 0), "top_right": (0, -1), "bottom_left": (-1, 0), "bottom_right": (-1, -1)}


@dataclass
class Config(TrainConfig):
    """The paper's image reconstruction on ImageNet (Table 12, left). Its base rate and 100 epochs are TrainConfig's."""

    image_size: int = 256
    batch_size: int = 128
    weight_decay: float = 0.1  # of AdamW; none on biases, norms and tokens
    flip: float = 0.0  # probability of a mirror image
    variant: Literal["finola", "masked_e", "masked_b"] = "finola"  # whole images; masked, element-wise or block-wise
    width: MobileFormerWidth = "2880"  # of Mobile-Former (Table 2b)
    channels: int = 3072  # C: of q and of the map that is unrolled (Table 2a)
    origin: Literal[tuple(ORIGINS)] = "center"  # where q is put (Fig. 11)
    norm: Literal["channel", "running", "batch", "none"] = "channel"  # running, batch: section 4; none: ours
    pool_heads: int = 8  # heads of the attentional pooling
    upsampler_width: int = 512  # channels of the convolutional upsampler's first block (Table 10)
    upsampler_blocks: int = 6  # transformer blocks of the upsampler of masked_b (Table 16)
    recompute: bool = True  # activation checkpointing: memory for time (docs/speed.md); --compile keeps all
    start: str = ""  # weights to start from: an encoder.pt or last.pt with such a Mobile-Former
    freeze_encoder: bool = False  # keep the encoder of --start as it is (Fig. 8)

    def check(self):
        super().check()
        unit = common.STRIDES[self.width] * (1 if self.variant == "finola" else 2)
        if self.image_size % unit:
            raise UserError(f"--image-size {self.image_size} is not a multiple of {unit}, which {self.variant} needs")
        check_least(self, channels=4, upsampler_width=4, upsampler_blocks=0)
        if self.variant != "finola" and self.origin != "center":
            raise UserError("--origin belongs to --variant finola: masked variants start from the visible block")
        if self.norm in ("running", "batch") and self.variant == "masked_b":
            raise UserError(f"--norm {self.norm} is an ablation of unrolling; give --variant finola or masked_e")
        if self.freeze_encoder and not self.start:
            raise UserError("--freeze-encoder keeps an encoder that was trained; give its run's last.pt by --start")


MASKED = {"epochs": 1600, "batch_size": 1024, "channels": 512}  # Table 12; C of -E by Table 15, of -B by Table 10
LAPTOP = {"width": "micro", "image_size": 64, "channels": 256, "upsampler_width": 64, "upsampler_blocks": 2}
LAPTOP |= {"warmup_epochs": 1, "batch_size": 32, "recompute": False}  # sizes of ours
RECIPES = {  # all whose key fits the command count, later ones over earlier ones
    "imagenet": {},  # Table 12, the defaults of Config
    "imagenet --variant masked_e": MASKED,
    "imagenet --variant masked_b": MASKED,
    "photos": LAPTOP | {"epochs": 20, "epoch_steps": 50, "base_lr": 16e-3, "crop_min": 0.3},
    "shapes": LAPTOP | {"epochs": 9, "base_lr": 24e-3, "crop_min": 0.8, "probe_every": 9},
    "shapes --width micro4": {"channels": 128, "epochs": 3, "probe_every": 3},
    "cifar10": LAPTOP | {"epochs": 10, "base_lr": 16e-3, "crop_min": 0.3},
}


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------


def cut(maps: Tensor, corner: Tensor, side: int) -> Tensor:
    """The windows of maps (B, C, H, W) whose first cell is `corner` (B, 2), row and column -> (B, C, side, side)."""
    rows, columns = (corner[:, i, None] + torch.arange(side, device=maps.device) for i in (0, 1))  # (B, side) each
    image = torch.arange(len(maps), device=maps.device)[:, None, None]
    return maps[image, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


class FinolaAutoencoder(Method):
    """Encoder, FINOLA, upsampler: the whole image from its vector, or what is masked from a visible block."""

    name = "finola"

    def __init__(self, config: Config, data):
        super().__init__()
        self.config, self.masked = config, config.variant != "finola"
        self.cell = common.STRIDES[config.width]  # pixels of a cell of the grid
        self.size = config.image_size // self.cell  # cells a side
        dim, norm, pooled = config.channels, config.norm, config.variant != "masked_b"
        self.encoder = MobileFormer(config.width, dim if pooled else 0, data.mean, data.std)  # 0: a width of its own
        kinds = {"channel": Finola, "none": UnnormedFinola}
        self.finola = kinds[norm](dim) if norm in kinds else AveragedFinola(dim, norm)
        if pooled:
            self.pool = AttentionPool(dim, config.pool_heads)
        else:
            self.project = nn.Conv2d(self.encoder.dim, dim, 1)
        self.captions = ("image", "masked image", "reconstruction") if self.masked else ("image", "reconstruction")
        if self.masked:
            self.upsampler = PatchUpsampler(dim, 0 if pooled else config.upsampler_blocks, cell=self.cell)
        else:
            self.upsampler = ConvUpsampler(dim, config.upsampler_width, self.cell)
            (row, column), last = self.place, self.size - 1
            idle = {"right": column == last, "left": column == 0, "down": row == last, "up": row == 0}
            for name, unused in idle.items():  # DDP takes none without a gradient: its next step fails
                getattr(self.finola, name).requires_grad_(not unused)
        self.origin = start_from(self, config)  # digest of the weights it began with, if any; not --origin
        self.encoder.requires_grad_(not config.freeze_encoder)
        self.recompute = self.encoder.recompute = config.recompute and not config.compile

    def train(self, mode: bool = True):
        super().train(mode)
        if self.config.freeze_encoder:
            self.encoder.eval()  # its norms keep their statistics
        return self

    @property
    def place(self) -> tuple[int, int]:
        """Row and column of q in the map; if masked, of the centre of a visible block in the middle (`middle`)."""
        if self.masked:
            return (self.size // 4 + self.size // 2 // 2,) * 2
        found = ORIGINS[self.config.origin]
        return (self.size // 2, self.size // 2) if found is None else tuple(x % self.size for x in found)

    def draw_corners(self, batch: int, device) -> Tensor:
        """Where the visible block of each image starts, in cells: (B, 2), row and column, uniform."""
        return torch.randint(0, self.size // 2 + 1, (batch, 2), device=device)

    def middle(self, images: Tensor) -> Tensor | None:
        """The corners (B, 2) of blocks in the middle, to look at; None where the whole image is seen."""
        return torch.full((len(images), 2), self.size // 4, device=images.device) if self.masked else None

    def block(self, images: Tensor, corner: Tensor) -> Tensor:
        """The visible blocks of images, half as high and wide, whose first cells are `corner` (B, 2)."""
        return cut(images, self.cell * corner, self.config.image_size // 2)

    def embed(self, images: Tensor, corner: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) -> vectors q (B, C), of visible blocks alone if `corner` (B, 2) says where these are.

        Not in masked_b, which has no q.
        """
        if corner is not None:
            images = self.block(images, corner)  # before the encoder, which sees no more
        return self.pool(self.encoder(images))

    def unroll(self, q: Tensor, corner: Tensor | None = None) -> Tensor:
        """Vectors (B, C) -> maps (B, C, S, S); in masked_e, q is put at the centre of each image's visible block."""
        if corner is None:
            return self.finola(q, self.size, self.place)
        half = self.size // 2
        # One map, of which each image cuts its own window.
        canvas = self.finola(q, self.size + half, (half + half // 2,) * 2)
        return cut(canvas, half - corner, self.size)

    def feature_map(self, images: Tensor, corner: Tensor | None = None) -> Tensor:
        """The map z (B, C, S, S) that the upsampler is given; masked_b needs `corner`."""
        if self.config.variant != "masked_b":
            return self.unroll(self.embed(images, corner), corner)
        seen = self.project(self.encoder(self.block(images, corner)))  # (B, C, S / 2, S / 2)
        return self.finola.blockwise(seen, self.size, corner[:, 0], corner[:, 1])

    def upsample(self, z: Tensor) -> Tensor:
        """Maps (B, C, S, S) -> normalised images (B, 3, H, W); with --recompute, a sixteenth of the batch at a time."""
        if not self.recompute:
            return self.upsampler(z)
        images = []
        for part in z.chunk(16):  # no image depends on others here, so that only one part is in memory at a time
            torch.clear_autocast_cache()  # parts that shared one bf16 copy of the weights would sum gradients in bf16
            images.append(recomputed(self.upsampler, part))
        return torch.cat(images)

    def decode(self, z: Tensor) -> Tensor:
        """Maps (B, C, S, S) -> images (B, 3, H, W), not clamped to [0, 1]."""
        return self.upsampler(z).float() * self.encoder.std + self.encoder.mean

    def scored(self, images: Tensor, corner: Tensor | None) -> Tensor:
        """1 where pixels count in the loss: everywhere, or outside the visible block; (B, 1, H, W)."""
        if corner is None:
            return torch.ones_like(images[:, :1])
        rows, columns = (block_sources(x, self.size // 2) >= self.size // 2 for x in corner.T)  # predicted, each (B, S)
        hidden = rows[:, :, None] | columns[:, None]  # (B, S, S)
        return hidden.repeat_interleave(self.cell, dim=1).repeat_interleave(self.cell, dim=2)[:, None].to(images.dtype)

    def forward(self, images: Tensor, labels: Tensor | None = None, corner: Tensor | None = None) -> dict:
        """Loss and PSNR of images (B, 3, H, W); masked variants take the corners of the blocks (B, 2) or draw them."""
        if self.masked and corner is None:
            corner = self.draw_corners(len(images), images.device)
        prediction = self.upsample(self.feature_map(images, corner)).float()  # (B, 3, H, W)
        mask = self.scored(images, corner)  # (B, 1, H, W)
        error = (prediction - self.encoder.normalize(images)).square().mean(dim=1, keepdim=True)  # (B, 1, H, W)
        restored = prediction.detach() * self.encoder.std + self.encoder.mean
        return {"loss": (error * mask).sum() / mask.sum(), "psnr": psnr(images, restored, mask).mean()}

    def probe(self, encode, train, test, config: Config) -> dict:
        """kNN and linear accuracy, and the mean PSNR in dB on test images."""
        torch.manual_seed(config.seed)  # the same blocks each time

        def measure(images):  # (B, 3, H, W) -> (B, 1)
            with autocast(config.amp, images.device):
                return self(images)["psnr"].expand(len(images), 1)

        quality, _ = features_of(measure, test, labelled(test, config.probe_images), config.image_size)
        return super().probe(encode, train, test, config) | {"psnr": float(quality.mean())}

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Tensor:
        """Rows of (image, reconstruction) or (image, visible block, with its prediction): (B, K, 3, H, W) in [0, 1]."""
        if not self.masked:
            return torch.stack([images, self.decode(self.feature_map(images)).clamp(0, 1)], dim=1)
        corner = self.draw_corners(len(images), images.device)
        mask, prediction = self.scored(images, corner), self.decode(self.feature_map(images, corner)).clamp(0, 1)
        seen = torch.where(mask > 0, self.encoder.mean, images)
        return torch.stack([images, seen, torch.where(mask > 0, prediction, images)], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Appendix: norms of section 4, decoders of Table 11
# ---------------------------------------------------------------------------------------------------------------------


class UnnormedFinola(Finola):
    """Without a norm: the map is a linear function of q. Ours: the paper changes the norm at inference alone."""

    def step(self, z: Tensor, direction: str) -> Tensor:
        return z + F.linear(z, getattr(self, direction))


class AveragedFinola(Finola):
    """Section 4's "pre-computed moving averages to normalize the input during inference": used in eval mode.

    Two readings: "running" trains with the norm of each position (Eq. 1) and averages its mean and variance, "batch"
    trains with batch norm, by channel. Each step of each walk has its averages, a tenth of them new with each batch.
    """

    walks_differ = True

    def __init__(self, dim: int, norm: str):
        super().__init__(dim)
        self.norm = norm
        # Four directions from q, and four from whole lines; steps.
        shape = (8, 64, dim if norm == "batch" else 1)
        self.register_buffer("statistics", torch.stack([torch.zeros(shape), torch.ones(shape)]))  # mean, variance

    def normalize(self, z: Tensor, statistics: Tensor) -> Tensor:
        """z_n of lines z (L, B, C), by the statistics (2, 1 or C) of this step, or in training into them."""
        if not self.training:
            mean, variance = statistics
        elif self.norm == "running":
            mean, variance = z.mean().view(1), z.var(dim=-1, correction=0).mean().view(1)
        else:
            mean, variance = z.mean(dim=(0, 1)), z.var(dim=(0, 1), correction=0)
        if self.training:
            statistics.lerp_(torch.stack([mean, variance]).detach(), 0.1)
        if self.training and self.norm == "running":
            return channel_norm(z)
        return (z - mean) / (variance + 1e-5).sqrt()

    def walk(self, z: Tensor, direction: str, steps: int) -> Tensor:
        if steps > self.statistics.shape[2]:
            raise ValueError(f"moving averages are kept for {self.statistics.shape[2]} steps of a walk, not {steps}")
        states, number = [z], 4 * (len(z) > 1) + DIRECTIONS.index(direction)
        for count in range(steps):
            z_n = self.normalize(states[-1], self.statistics[:, number, count])
            states.append(states[-1] + F.linear(z_n, getattr(self, direction)))
        return torch.stack(states)

    def blockwise(self, *_):
        raise ValueError(f"a norm of {self.norm!r} is for maps that are unrolled from one vector, not for blocks")


class DecoderBlock(nn.Module):
    """ "M-F+" or "M-F-" of Table 11: a Mobile-Former block whose Mobile part is a transformer block, or bneck-lite.

    Choices: the map comes before the queries; the Former part is a pre-norm `Block`, without dropout (the paper: 0.1).
    """

    def __init__(self, kind: str, dim: int, last: bool = False, heads: int = 8):
        super().__init__()
        self.mobile = Block(dim, heads, mlp_ratio=8) if kind == "+" else common.LiteBottleneck(dim, 2 * dim, dim)
        self.to_former, self.former = common.MobileToFormer(dim, dim), Block(dim, heads)
        self.to_mobile = None if last else common.FormerToMobile(dim, dim)  # nothing reads the map after the last block

    def forward(self, x: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:  # (B, C, H, W), (B, Q, C)
        if isinstance(self.mobile, Block):
            tokens = self.mobile(rearrange(x, "b c h w -> b (h w) c"))
            x = rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2])
        else:
            x = self.mobile(x)
        queries = self.former(self.to_former(queries, x))
        return self.to_mobile(x, queries) if self.to_mobile else x, queries


class MFDecoder(nn.Module):
    """MF-Dec-522 or -211 (Table 11), object queries for DETR, on an encoder `coarse` wide at 1/16 and `fine` at 1/8."""

    def __init__(self, depths=(5, 2, 2), coarse: int = 2880, fine: int = 192, classes: int = 91, queries: int = 100):
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
        hidden = [nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU()]
        self.locate = nn.Sequential(*hidden, nn.Linear(dim, 4), nn.Sigmoid())
        nn.init.normal_(self.queries)

    def forward(self, coarse: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, C, H, W) at 1/16 and 1/8 -> logits, "no object" last, and boxes: centre x, y, width, height."""
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
        outputs = self.norm(torch.stack(outputs))  # (L, B, Q, 256), of all L blocks
        return self.classify(outputs), self.locate(outputs)  # (L, B, Q, classes + 1), (L, B, Q, 4)
