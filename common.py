"""What every method shares: patches, `ViT`, `MobileFormer`, `MaskedAutoencoder`, and the loop, `fit`.

Axis letters of shape comments; a file with letters of its own names them:
    B batch   V views   C channels   H W height, width   N patches   M visible ones   D width of a token
    P values of a patch (p p C)   T Mobile-Former's tokens   d width of these, of a head, or of a decoder

Images are float tensors in [0, 1] everywhere. The encoder normalises them itself, with the mean and standard deviation
that it carries, so that nobody who lifts it out can forget to. What a run needs besides, data, flags, run folders and
processes, is in `plumbing/`.
"""

import contextlib
import math
import typing

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from plumbing.crops import mix_seed
from plumbing.datasets import load_data  # noqa: F401 (`from common import load_data`)
from plumbing.encoders import Encoder, height_and_width
from plumbing.errors import UserError, unknown
from plumbing.images import BatchPlan
from plumbing.probes import probe
from plumbing.processes import distribute, pick_precision, rank, synchronize_norms, world_size
from plumbing.recompute import recomputed
from plumbing.runs import Run
from plumbing.settings import TrainConfig, check_batch

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
    rows, columns = height // patch, width // patch
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, w=columns, p=patch, q=patch)


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
    order = noise.argsort(dim=1).argsort(dim=1)  # (B, N) 0 for the smallest
    return order >= noise.shape[1] - round(ratio * noise.shape[1])


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
ViTSize = typing.Literal[tuple(VIT_SIZES)]  # the choices of a setting


def attend_plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: (B, heads, M, d), keys and values (B, heads, N, d); it has a second derivative.

    No fused kernel has one: neither that of CPUs nor those of GPUs. torch's own plain form has, but computes in float32
    what is in bf16, so this is the attention of energies on every device.
    """
    scores = q.contiguous() * q.shape[-1] ** -0.5 @ k.contiguous().transpose(-2, -1)  # (B, heads, M, N)
    short = scores.dtype == torch.bfloat16 and scores.shape[-1] < 32  # CPUs are slow at the softmax of short bf16 rows
    return scores.softmax(dim=-1, dtype=torch.float32 if short else None).to(v.dtype) @ v


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v on (B, heads, N, d): fused, but on CPUs in float32 alone, for in bf16 it is slow."""
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
        q, k, v = rearrange(qkv, "b n (three h d) -> b h n three d", three=3, h=self.heads).unbind(3)  # (B, h, N, d)
        x = x + self.attn["proj"](rearrange(attention(q, k, v), "b h n d -> b n (h d)"))  # (B, N, D)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))  # (B, N, D)


def initialize(module: nn.Module):
    """Xavier-uniform linear layers with zero bias, for `module.apply` (the init of MAE)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class ViT(Encoder):
    """Vision transformer: linear patches, fixed 2-D sine-cosine positions, CLS token, pre-norm blocks, a final norm.

    Images are (B, 3, H, W) in [0, 1]; `mean` and `std` normalise them. `image_size` is a side or (height, width).
    `pool` says what `forward` returns: the mean of the patch tokens ("mean") or the CLS token ("cls"), after the norm.
    Parameters have timm's names (`plumbing.encoders.to_timm`). `learned_positions`, of patches alone, start as timm's.
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
        learned_positions: bool = False,
    ):
        fields = {"image_size": image_size, "patch": patch, "dim": dim, "depth": depth, "heads": heads}
        super().__init__(mean, std, **fields, mlp_ratio=mlp_ratio, pool=pool)
        height, width = self.image_sides = height_and_width(self.fields["image_size"], patch)
        if min(patch, dim, depth, heads) < 1:
            size = f"width {dim}, {depth} blocks, {heads} heads and patch {patch}"
            raise UserError(f"a transformer of {size} cannot be built")
        if height % patch or width % patch:
            raise UserError(f"image size {height} x {width} is not a multiple of the patch size {patch}")
        if pool not in ("mean", "cls"):
            raise UserError(f"unknown pool {pool!r}; choose 'mean' or 'cls'")
        self.patch, self.dim, self.pool, self.grid = patch, dim, pool, (height // patch, width // patch)
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(3 * patch * patch, dim)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.register_buffer("positions", sincos_positions(*self.grid, dim), persistent=False)
        self.apply(initialize)
        nn.init.normal_(self.cls_token, std=0.02)
        if learned_positions:
            self.fields["learned_positions"] = True  # files of fixed ones stay as they always were
            self.positions = nn.Parameter(nn.init.trunc_normal_(self.positions, std=0.02))  # (N, D)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> patch tokens with positions (B, N, D), without the CLS token."""
        return self.patch_embed["proj"](patchify(self.normalize(images), self.patch)) + self.positions

    def encode(self, tokens: Tensor, attention=attend, hidden: bool = False):
        """Put the CLS token before (B, M, D) patch tokens, run the blocks and the final norm -> (B, 1 + M, D).

        `attention(q, k, v)` on (B, heads, 1 + M, d) may be any function. With `hidden`, also return the list of every
        block's output before the final norm, each (B, 1 + M, D).
        """
        x, outputs = torch.cat([self.cls_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1), []
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


def table_9(factor: float, middle: tuple = (("down", 1152, 352), ("same", 1408, 352), ("same", 1408, 352))) -> list:
    """Rows (block, #exp, #out) of MF-W2880 (FINOLA, Table 9), times `factor`; `middle` are the first three at 1/16."""
    rows = [("stem", 0, 64), ("lite", 128, 64), ("down", 384, 112), ("same", 336, 112)]
    rows += [("down", 672, 192), ("same", 576, 192), ("same", 576, 192), *middle]
    rows += [("same", 2112, 480), ("same", 2880, 480), ("same", 2880, 480)]
    return [(kind, int(expanded * factor), int(out * factor)) for kind, expanded, out in rows]


# Mobile-Former by width. W1440's first row of stage 4 is printed as 288, 96: that network misses what is published by
# far (11.4 of 11.7 M parameters, 19.3 of 20.4 G multiply-adds). Half of W2880's row meets both, so we have 576, 176.
MICRO = [("stem", 0, 16), ("lite", 32, 16), ("down", 64, 32), ("down", 128, 48), ("same", 144, 48)]
MICRO += [("down", 192, 64), ("same", 192, 64)]
OF_720 = (("down", 4 * 240, 4 * 80), ("same", 4 * 320, 4 * 88), ("same", 4 * 480, 4 * 88))  # printed 240, 80, ...
MOBILE_FORMERS = {
    "micro": {"token_dim": 64, "head": 256, "rows": MICRO},  # for laptops, not in the paper; micro4 has a finer map
    "micro4": {"token_dim": 64, "head": 256, "rows": [*MICRO[:3], *(("same", *row[1:]) for row in MICRO[3:])]},
    "720": {"token_dim": 192, "head": 720, "rows": table_9(1 / 4, OF_720)},
    "1440": {"token_dim": 256, "head": 1440, "rows": table_9(1 / 2)},
    "2880": {"token_dim": 256, "head": 2880, "rows": table_9(1)},
    "4320": {"token_dim": 256, "head": 2880, "rows": table_9(3 / 2)},  # wider heads would miss the published counts
    "5760": {"token_dim": 256, "head": 2880, "rows": table_9(2)},
}
MobileFormerWidth = typing.Literal[tuple(MOBILE_FORMERS)]
STRIDES = {x: 2 ** sum(row[0] in ("stem", "down") for row in MOBILE_FORMERS[x]["rows"]) for x in MOBILE_FORMERS}


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
        a, b = hard_sigmoid(self.slopes(F.relu(self.hidden(token))))[..., None, None].chunk(2, dim=1)  # (B, C, 1, 1)
        a, b = 2 * a, 2 * b - 1
        return torch.minimum(a, b) * x + (a - b).abs() * F.relu(x)  # a maximum of maps has a slow backward pass


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
            self.widen, self.narrow = conv(inputs, expanded, 3, stride=2, groups=inputs), conv(expanded, outputs)
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
    """Mobile to Former, Former, Mobile, Former to Mobile: (B, C, H, W), tokens (B, T, d) -> the next map and tokens."""

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


class MobileFormer(Encoder):
    """Mobile-Former (Chen et al. 2022), a MobileNet with six tokens beside it, as FINOLA uses it (Table 9).

    `width` is one of MOBILE_FORMERS. Images (B, 3, H, W) in [0, 1] -> (B, head, H / 16, W / 16), rounded
    up, of "micro4" a quarter (`stride`); `head` is the width of the last 1 x 1 convolution, 0 for that of the table.
    `norm` is "batch", or "group" where no image may depend on others (`replace_batch_norms`).
    The block is that of the released Mobile-Former. No activation follows the last convolution; that is a choice.
    Parameters lie within 1.2 % of FINOLA's 4.9, 11.7, 25.0 (Table 4), 43.5 and 67.6 M (Table 2b).
    """

    def __init__(self, width: int | str = 2880, head: int = 0, mean=(0.0,) * 3, std=(1.0,) * 3, norm: str = "batch"):
        super().__init__(mean, std, width=width, head=head, norm=norm)
        for name, value, known in (("Mobile-Former", str(width), MOBILE_FORMERS), ("norm", norm, ("batch", "group"))):
            if value not in known:
                raise UserError(unknown(name, value, known))
        self.recompute = False  # True: the backward pass computes each block again, to keep less in memory
        size = MOBILE_FORMERS[str(width)]
        token_dim, (stem, lite, *rows) = size["token_dim"], size["rows"]
        self.dim, channels, self.stride = head or size["head"], stem[2], STRIDES[str(width)]  # pixels of a cell
        self.tokens = nn.Parameter(torch.empty(6, token_dim))
        self.stem, self.lite = conv(3, channels, 3, stride=2), LiteBottleneck(channels, *lite[1:])
        channels, self.blocks = lite[2], nn.ModuleList()
        for kind, expanded, out in rows:
            self.blocks.append(MobileFormerBlock(kind, channels, expanded, out, token_dim))
            channels = out
        self.head = conv(channels, self.dim)
        nn.init.normal_(self.tokens)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=(2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        if norm == "group":
            replace_batch_norms(self)

    def forward(self, images: Tensor, hidden: bool = False):
        """Images (B, 3, H, W) -> (B, head, H/stride, W/stride); with `hidden`, also the list of every block's map."""
        x = recomputed(self.lite, F.relu6(self.stem(self.normalize(images))), again=self.recompute)  # (B, C, H/2, W/2)
        tokens, maps = self.tokens.expand(len(x), -1, -1), []  # (B, T, d)
        for block in self.blocks:
            x, tokens = recomputed(block, x, tokens, again=self.recompute)
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
    centred = patches - (mean := patches.mean(dim=-1, keepdim=True))
    std = (centred.square().sum(dim=-1, keepdim=True) / (patches.shape[-1] - 1) + 1e-6).sqrt()  # `var` is slow
    return centred / std, mean, std


def reconstruction_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the masked patches only (He et al. 2022); (B, N, P), (B, N, P), bool (B, N) -> scalar."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)  # half precision has too few digits
    error = (prediction.to(dtype) - target.to(dtype)).square().mean(dim=-1)  # (B, N)
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
            size = f"width {decoder_dim}, {decoder_depth} blocks, {decoder_heads} heads"
            raise UserError(f"a decoder of {size} cannot be built")
        self.encoder, self.mask_ratio, self.norm_pixels = encoder, mask_ratio, norm_pixels
        self.decoder_embed = nn.Linear(encoder.dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_head = nn.Linear(decoder_dim, 3 * encoder.patch**2)
        self.register_buffer("decoder_positions", sincos_positions(*encoder.grid, decoder_dim), persistent=False)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_head):
            module.apply(initialize)
        nn.init.normal_(self.mask_token, std=0.02)

    def target(self, images: Tensor) -> Tensor:
        """The pixels to predict: images (B, 3, H, W) in [0, 1] -> (B, N, P)."""
        return self.target_of(patchify(self.encoder.normalize(images), self.encoder.patch))

    def target_of(self, patches: Tensor) -> Tensor:
        return normalize_patches(patches)[0] if self.norm_pixels else patches  # (B, N, P)

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
        encoder, patches = self.encoder, patchify(self.encoder.normalize(images), self.encoder.patch)  # (B, N, P)
        batch, count = patches.shape[:2]
        masked = round(self.mask_ratio * count) if mask is None else int(mask[0].sum())
        if mask is None:
            mask = random_mask(batch, count, self.mask_ratio, device=images.device)
        elif not (mask.sum(dim=1) == masked).all():
            raise ValueError("the rows of a mask must hide the same number of patches, these differ")
        visible = visible_patches(mask, count - masked)  # (B, M): only these are embedded, not all as by `embed`
        tokens = encoder.patch_embed["proj"](take(patches, visible)) + encoder.positions[visible]  # (B, M, D)
        encoded, hidden = encoder.encode(tokens, hidden=True)
        return Reconstruction(self.decode(encoded, visible), self.target_of(patches), mask, encoded, hidden)

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Tensor:
        """Rows of (image, masked image, reconstruction): (B, 3, H, W) -> (B, 3, 3, H, W), values in [0, 1]."""
        prediction, _, mask, _, _ = self(images)
        return self.pictures_of(images, prediction, mask)

    def pictures_of(self, images: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
        """`pictures` for predicted patches (B, N, P) and a mask (B, N)."""
        encoder = self.encoder
        patches = patchify(encoder.normalize(images), encoder.patch)  # (B, N, P)
        if self.norm_pixels:  # give each predicted patch the brightness and contrast of the true one
            _, mean, std = normalize_patches(patches)
            prediction = prediction.float() * std + mean
        fillings = (patches, torch.zeros_like(patches), prediction)  # of the masked patches; 0 is the mean colour
        rows = [torch.where(mask[..., None], x, patches) for x in fillings]
        rows = [unpatchify(x, encoder.patch, *images.shape[-2:]) * encoder.std + encoder.mean for x in rows]
        return torch.stack(rows, dim=1).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# 5. The loop
# ---------------------------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """Linear warm-up from `warmup_lr`, then a cosine to zero, step by step; or steps down at `milestones`."""
    peak = config.base_lr * config.batch_size / 256
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.warmup_lr + (peak - config.warmup_lr) * step / warmup
    if config.milestones:
        return peak * 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in config.milestones)
    return peak / 2 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def gradient_if(wanted):
    """A context that keeps gradients where they are wanted: a term of weight 0 is measured, but not differentiated."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and bool(wanted))


def decays(name: str, parameter: Tensor, on: str = "matrices") -> bool:
    """Whether weight decay acts on a parameter: `on` is "matrices"; "tokens", with positions and tokens; or "all"."""
    spared = ("bias",) if on == "tokens" else ("token", "tokens", "positions", "bias")
    return on == "all" or (parameter.ndim >= 2 and not name.endswith(spared))


class Stepper:
    """Learning rate, autocast, loss scaling, clipping and the optimiser, in the one order that is right for fp16."""

    def __init__(self, optimizer, config: TrainConfig, device: torch.device, steps_per_epoch: int = 1):
        self.optimizer, self.config, self.device, self.steps = optimizer, config, device, steps_per_epoch
        self.dtype = pick_precision(config.amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def rate(self, step: int) -> float:
        return learning_rate(step, self.steps, self.config)

    def set_rate(self, step: int):
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step) * group.get("lr_scale", 1.0)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: Tensor):
        self.scaler.scale(loss).backward()

    def step(self):
        if self.config.clip:
            self.scaler.unscale_(self.optimizer)  # clip the true gradient, not the scaled one
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


class Method(nn.Module):
    """The contract between a paper and the loop. Made as `Method(config, data)`; data has mean, std, classes, labels.

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

    def plan(self, images: int, config: TrainConfig) -> BatchPlan:
        """Which of so many images each step loads; its length is the number of steps of an epoch."""
        return BatchPlan(images, config)

    def start_epoch(self, epoch: int):
        """Called before each epoch, counted from 0, for schedules in epochs."""

    def optimizer(self, config: TrainConfig) -> torch.optim.Optimizer:
        """AdamW, its decay on what `decays` tells. A group's `lr_scale` multiplies its rate (1 without one)."""
        learned = [(decays(name, p, config.decay_on), p) for name, p in self.named_parameters() if p.requires_grad]
        decay, plain = ([p for decayed, p in learned if decayed == wanted] for wanted in (True, False))
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

    def probe(self, encode, train, test, config: TrainConfig) -> dict:
        """What an epoch is judged by: figures to log. `encode` is the encoder under autocast."""
        return probe(encode, train, test, config.image_size, config.probe_images)

    def pictures(self, images: Tensor) -> Tensor:
        """Rows of pictures worth looking at: images (B, 3, H, W) -> (B, K, 3, H, W), values in [0, 1]."""
        return images[:, None]


METHODS = {"ebm_pretrain": "EnergyPretraining", "finola": "FinolaAutoencoder", "magma": "Magma", "mixedae": "MixedAE"}
METHODS |= {"mlo_mae": "MultiLevelMAE"}  # file: class


def fit(method: Method, train, test, config: TrainConfig) -> dict:
    """Train a method and return what was measured: {"trained": {...}, "untrained": {...}, "pixels": {...}}.

    Runs in one process or in each of several (torchrun). Writes the run folder `config.out` (docs/runs.md lists its
    files). Everything random in step t comes from generators seeded by (seed, t, rank), so a run that was killed and
    resumed equals one that was not. Raises UserError for what cannot run, NonFiniteLoss, and Stopped after a signal.
    """
    config.check()  # it may have been changed since it was made
    check_batch(config, len(train))
    device, plan = next(method.parameters()).device, method.plan(len(train), config)
    config.limit(len(plan))  # to --max-steps; the plan shrinks with it
    method = synchronize_norms(method, device)
    stepper = Stepper(method.optimizer(config), config, device, len(plan))
    with Run(method, stepper, train, test, config) as run:
        model = distribute(method, device)
        model = torch.compile(model) if config.compile else model
        view = config.image_size, config.crop, config.flip, method.views
        batches = train.train_batches(plan.after(run.first_step), *view)
        method.train()
        for epoch in range(run.first_step // len(plan), config.epochs):
            method.start_epoch(epoch)
            for step in range(max(run.first_step, epoch * len(plan)), (epoch + 1) * len(plan)):
                images, labels = next(batches)
                stepper.set_rate(step)
                torch.manual_seed(mix_seed(config.seed, step, rank(), 2))  # of masks and dropout; crops have 1
                parts = list(zip(images.chunk(config.accumulate), labels.chunk(config.accumulate), strict=True))
                run.note(step, method.update(model, parts, stepper))
            run.end_epoch(epoch + 1)
        return run.results()
