"""MixedAE: an autoencoder that sees several images mixed into one and must tell their patches apart.

Chen, Liu, Hong, Xu, Li and Yeung, "Mixed Autoencoder for Self-supervised Visual Representation Learning" (CVPR 2023,
arXiv 2303.17152).

The idea: MAE hides most of an image and wastes what it hides. Fill the holes with patches of other images instead,
encode the mixture, take the images apart again and reconstruct each of them. By the paper mixing alone makes the task
easier: patches of other images may tell something about the hidden ones (Eq. 5; nothing, if images are independent).
So each patch must recognise its relatives: it attends only to the patches that it finds most similar, and a contrastive
loss pulls patches of the same image together.

Equation                                                      function
Eq. 1, A1, A4   mixing                                        mixing_assignment, mix
Eq. A2          MAE's input, the special case                 mix, with images of zeros
Eq. 5, A3       mixing never lowers mutual information        tests: test_mixing_never_lowers_mutual_information
unmixing        reconstruction of each image                  unmix, MixedAE.reconstruct
TopK            homologous attention                          topk_attention, of topk_weights and top_keys
App. C          masked self-attention, a control              MixedAE.attention (--attention oracle)
Fig. 6          TopK sampling accuracy                        homologous_accuracy
Eq. 7           homologous contrastive loss                   homologous_contrastive
Eq. 8           total loss (its number from memory)           MixedAE.forward
App. B          segment embeddings                            segment_code

Train it:  python train.py mixedae                                      on built-in pictures, on a laptop
           python train.py mixedae --mode mae --contrast 0 --segment off             the MAE baseline
           python train.py mixedae --attention global --segment off --contrast 0     naive mixing
           python train.py mixedae --data imagenet --root DIR           the paper's experiment; --model vit_large

Choices that change a number (docs/mixedae.md has all). No code was released; only supplement and abstract were at hand:
* As we believe the main paper to have it: TopK keeps round(N / K) keys (`--topk`); Eq. 7 is a mean over positives,
  outside the logarithm, its temperature 0.25, its weight 0.1; the loss counts the patches that came from others.
* Ours: TopK acts in every block (`--attention-blocks`); a patch keeps the CLS token besides, which keeps everything.
  Eq. 7 takes the encoder's patch tokens after the final norm, without projector.
* Ours: segment codes are added in the encoder alone, to patches, not to the CLS token, as they are (`--segment-scale`).
  The laptop recipes centre them (`--segment-centred`), and keep homologous attention to the last block.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

import common
from common import VIT_SIZES, MaskedAutoencoder, Method, ViT, ViTSize, attend, gradient_if, reconstruction_loss
from plumbing.errors import UserError
from plumbing.images import BatchPlan
from plumbing.processes import world_size
from plumbing.settings import TrainConfig, check_least, check_positive
from plumbing.start import start_from

# ---------------------------------------------------------------------------------------------------------------------
# The paper's mathematics, pure functions of tensors. G groups of K images (K = 1 / r, r the paper's mixing ratio), N
# patches of P numbers, D width. M, the mask of Eq. 1, is `assignment`. TopK's K is another: `topk`, keys of a query.
# ---------------------------------------------------------------------------------------------------------------------


def mixing_assignment(
    groups: int, patches: int, images_per_group: int, generator=None, cell: int = 1, grid=None, device="cpu"
) -> Tensor:
    """M of Eq. 1: which image each position of a mixture comes from -> long (G, N), values 0 to K - 1.

    Drawn on cells of cell x cell patches; the counts of a group's images differ by at most one cell, and which image
    gets one more is random. `grid` is (rows, columns) of patches, a square by default.
    Raises ValueError where the cells do not fit the grid.
    """
    rows, columns = grid or (math.isqrt(patches), math.isqrt(patches))
    if cell > 1 and (rows * columns != patches or rows % cell or columns % cell):
        raise ValueError(f"{patches} patches in {rows} x {columns} cannot be cut into cells of {cell} x {cell}")
    cells = patches // cell**2
    # A permutation of the cells, and who gets those that are left over.
    rank = torch.rand(groups, cells, generator=generator, device=device).argsort(dim=1).argsort(dim=1)  # (G, cells)
    shift = torch.randint(images_per_group, (groups, 1), generator=generator, device=device)
    assignment = (rank + shift) % images_per_group
    if cell == 1:
        return assignment
    return repeat(assignment, "g (h w) -> g (h p w q)", w=columns // cell, p=cell, q=cell)


def mix(tokens: Tensor, assignment: Tensor) -> Tensor:
    """Eq. 1 (A1, A4), sum_i 1(M = i) X_i: the images of each group (G, K, N, D), M (G, N) -> mixtures (G, N, D)."""
    index = assignment[:, None, :, None].expand(-1, 1, -1, tokens.shape[-1])  # (G, 1, N, D)
    return tokens.gather(1, index)[:, 0]


def own_patches(assignment: Tensor, images_per_group: int) -> Tensor:
    """1(M = i) for every image i: M (G, N) -> bool (G, K, N), True where the position shows the image itself."""
    return assignment[:, None] == torch.arange(images_per_group, device=assignment.device)[:, None]


def unmix(mixed: Tensor, assignment: Tensor, fill, images_per_group: int) -> Tensor:
    """Take mixtures apart: each image keeps its own patches and gets `fill`, (D,) or a number, elsewhere.

    Mixtures (G, N, D), M (G, N) -> (G, K, N, D).
    """
    own = own_patches(assignment, images_per_group)[..., None]  # (G, K, N, 1)
    return torch.where(own, mixed[:, None], torch.as_tensor(fill, dtype=mixed.dtype, device=mixed.device))


def top_keys(scores: Tensor, topk: int) -> Tensor:
    """Which keys have the `topk` largest scores of each query, no more where some are equal.

    (..., N, N) -> long (..., N, topk).
    """
    return scores.topk(min(topk, scores.shape[-1]), dim=-1).indices


def attention_scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T / sqrt(d) on (B, heads, N, d) -> (B, heads, N, N); what overflows fp16 becomes its largest number."""
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    return scores.clamp(-65504, 65504) if scores.dtype == torch.float16 else scores


def sparse_softmax(scores: Tensor, keys: Tensor) -> Tensor:
    """Softmax over the scores of the given keys, zero elsewhere: (..., Q, N) -> the same; keys (..., Q, kept).

    Gradients reach these scores alone.
    """
    weights = scores.gather(-1, keys).softmax(dim=-1)
    return torch.zeros_like(scores, dtype=weights.dtype).scatter_(-1, keys, weights)


def topk_weights(scores: Tensor, topk: int, exempt: int = 0, select=top_keys) -> tuple[Tensor, Tensor]:
    """Attention weights (B, heads, N, N) that are zero but for each query's `topk` largest scores, and these keys.

    The first `exempt` of N tokens, such as a CLS token, are kept by every query besides, and keep every key themselves.
    The keys are counted without them.
    """
    keys = select(scores[..., exempt:, exempt:], topk)  # (B, heads, N - exempt, topk)
    always = torch.arange(exempt, device=keys.device).expand(*keys.shape[:-1], exempt)  # (B, heads, N - exempt, exempt)
    weights = sparse_softmax(scores[..., exempt:, :], torch.cat([always, keys + exempt], dim=-1))
    return torch.cat([scores[..., :exempt, :].softmax(dim=-1), weights], dim=-2), keys


def topk_attention(q: Tensor, k: Tensor, v: Tensor, topk: int, exempt: int = 0, select=top_keys) -> Tensor:
    """Homologous attention: each query attends to the `topk` keys that it finds most similar; (B, heads, N, d).

    With topk = N it is plain attention. `exempt` as in `topk_weights`; `select(scores, topk)` finds the keys.
    """
    return topk_weights(attention_scores(q, k), topk, exempt, select)[0] @ v


def same_image(assignment: Tensor) -> Tensor:
    """Which patches are homologous, of the same image: M (G, N) -> bool (G, N, N)."""
    return assignment[:, :, None] == assignment[:, None]


def homologous_accuracy(keys: Tensor, assignment: Tensor) -> Tensor:
    """Fig. 6, TopK sampling accuracy: the share of kept keys (G, heads, N, topk) that are homologous; M (G, N).

    Averaged over queries and heads; a query that keeps itself is right. Chance is about 1 / K, the share of an image in
    its mixture; the most is 1, or less where more keys are kept than an image has patches.
    """
    of_key = assignment[:, None, None].expand(*keys.shape[:3], -1).gather(-1, keys)  # (G, heads, N, topk)
    return (of_key == assignment[:, None, :, None]).float().mean()


def homologous_contrastive(z: Tensor, assignment: Tensor, temperature: float = 0.25) -> Tensor:
    """Eq. 7, pick the patches of the same image out of a mixture by their cosine: (G, N, D), M (G, N) -> scalar.

    -log(exp(s_lp / t) / sum over l' != l of exp(s_ll' / t)), s_ll' the cosine of patches l and l', t the temperature;
    averaged over the positives p of each patch l, its relatives, then over patches. A patch without any does not count.
    The supplement has the number alone, the form is from memory. At least in float32.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)
        similarity = z @ z.transpose(1, 2) / temperature  # (G, N, N)
    itself = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    log_share = similarity - similarity.masked_fill(itself, -math.inf).logsumexp(dim=-1, keepdim=True)
    positive = same_image(assignment) & ~itself
    count = positive.sum(dim=-1)  # (G, N)
    of_anchor = -torch.where(positive, log_share, 0).sum(dim=-1) / count.clamp_min(1)
    return (of_anchor * (count > 0)).sum() / (count > 0).sum().clamp_min(1)


def segment_code(slots: int, dim: int, centred: bool = False) -> Tensor:
    """Sine-cosine code of the slot of an image in its group -> (K, D); D is even.

    With a few slots most channels hardly differ between them: what all slots share is 0.97 of the length at
    K = 4, D = 96. `centred` takes that mean out and gives each code unit length, so that it says nothing but the slot.
    """
    frequency = 1.0 / 10000 ** (torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = torch.arange(slots)[:, None] * frequency
    code = torch.cat([angle.sin(), angle.cos()], dim=1)
    return (F.normalize(code - code.mean(dim=0), dim=1) if centred else code).float()


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Config(TrainConfig):
    """The paper's experiment on ImageNet with ViT-B (Table A1)."""

    epochs: int = 1600  # passes over the pictures; the supplement tells them of ViT-L alone (Table A3)
    batch_size: int = 4096  # images before they are mixed, over all processes
    base_lr: float = 7.5e-5  # learning rate for a batch of 256
    warmup_epochs: int = 40
    crop_min: float = 0.2  # smallest share of the image that a random resized crop keeps
    model: ViTSize = "vit_base"  # size of the encoder
    patch: int = 16  # side of a patch, in pixels
    pool: Literal["mean", "cls"] = "mean"  # what is probed: the mean of the patch tokens, or the CLS token
    decoder_dim: int = 512  # width of the decoder
    decoder_depth: int = 8  # blocks of the decoder
    decoder_heads: int = 16  # attention heads of the decoder
    norm_pixels: bool = True  # normalise the pixels to predict patch by patch
    mode: Literal["compose", "full", "mae"] = "compose"  # one mixture a group; K mixtures; no mixing, global attention
    images_per_group: int = 4  # K = 1 / r
    cell: int = 2  # side of the cells that are mixed, in patches
    segment: Literal["every", "first", "off"] = "every"  # blocks of the encoder whose input gets the segment code
    segment_scale: float = 1.0  # factor of the segment code
    segment_centred: bool = False  # take out of the codes what all slots share, and give each unit length
    attention: Literal["topk", "global", "oracle"] = "topk"  # homologous, plain, or within the same image
    attention_blocks: tuple[int, ...] = ()  # blocks with that attention, negative ones from the end; none given: all
    topk: int = 0  # keys that a query keeps, 0 for round(patches / K)
    reconstruction: float = 1.0  # weight of the reconstruction loss
    contrast: float = 0.1  # weight of the homologous contrastive loss
    temperature: float = 0.25  # of the homologous contrastive loss
    start: str = ""  # weights to start from: an encoder.pt or last.pt, MAE's or timm's

    def check(self):
        super().check()
        check_least(self, reconstruction=0, contrast=0, topk=0)
        check_positive(self, "temperature")
        if not self.reconstruction and not self.contrast:
            raise UserError("--reconstruction 0 --contrast 0 leave nothing to learn; give one of them more than 0")
        k, depth = self.images_per_group, VIT_SIZES[self.model]["depth"]
        if k < 2:
            raise UserError(f"--images-per-group {k}: a mixture needs two images or more")
        if not all(-depth <= block < depth for block in self.attention_blocks):
            raise UserError(f"--attention-blocks {self.attention_blocks}: give blocks from {-depth} to {depth - 1}")
        if self.patch < 1 or self.image_size % self.patch:
            return  # the transformer says so better
        side = self.image_size // self.patch
        if self.cell < 1 or side % self.cell:
            raise UserError(f"--cell {self.cell} does not divide the {side} x {side} patches of an image; try 1")
        if (side // self.cell) ** 2 < k:
            raise UserError(f"--cell {self.cell} leaves fewer cells than the {k} images that share them; try 1")
        if self.topk > side**2:
            raise UserError(f"--topk {self.topk} keeps more than the {side**2} patches of an image; 0 chooses")


LAPTOP = {"model": "vit_micro", "patch": 4, "image_size": 32, "decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 4}
LAPTOP |= {"warmup_epochs": 2, "segment_centred": True, "segment_scale": 2.0, "attention_blocks": (-1,)}
PHOTOS = {"image_size": 64, "patch": 8, "epochs": 20, "epoch_steps": 100, "batch_size": 32, "base_lr": 8e-3}

RECIPES = {
    "imagenet": {},  # Table A1, the defaults of Config
    "imagenet --model vit_large": {"batch_size": 2048},
    # Laptop recipes of ours. That for photos takes 64,000 crops of a folder, small or large.
    "photos": LAPTOP | PHOTOS,
    "shapes": LAPTOP | {"epochs": 24, "batch_size": 32, "base_lr": 12e-3, "crop_min": 0.8, "probe_every": 12},
    "cifar10": LAPTOP | {"epochs": 30, "batch_size": 64, "base_lr": 8e-3},
}


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What becomes of a batch; L patches take part in a contrastive loss.

    In full mode B and G count each group K times.
    """

    prediction: Tensor  # (B, N, P) pixels of every patch, in the units of `target`
    target: Tensor  # (B, N, P)
    mask: Tensor  # (B, N) bool, True for the patches to be predicted
    tokens: Tensor  # (G, L, D) encoded patches
    owners: Tensor  # (G, L) the image of its group that each one comes from
    found: list  # of (accuracy, weights), of each block with the attention of mixtures


class MixedAE(Method):
    """Mix, encode with homologous attention, unmix, reconstruct; plus the homologous contrastive loss (Eq. 8)."""

    name = "mixedae"

    def __init__(self, config: Config, data):
        super().__init__()
        size, k = VIT_SIZES[config.model], config.images_per_group
        vit = ViT(config.image_size, config.patch, **size, pool=config.pool, mean=data.mean, std=data.std)
        decoder = (config.decoder_dim, config.decoder_depth, config.decoder_heads)
        self.autoencoder = MaskedAutoencoder(vit, *decoder, 1 - 1 / k, config.norm_pixels)
        segments = config.segment_scale * segment_code(k, vit.dim, config.segment_centred)
        self.register_buffer("segments", segments, persistent=False)
        self.group, self.config, self.topk = k, config, config.topk or round(len(vit.positions) / k)
        blocks = () if config.mode == "mae" else config.attention_blocks or range(size["depth"])
        self.special_blocks = {block % size["depth"] for block in blocks}
        self.origin = start_from(self, config, VIT_SIZES)

    @property
    def encoder(self) -> ViT:
        return self.autoencoder.encoder

    def plan(self, images: int, config: Config) -> BatchPlan:
        """As every method's; UserError where the images of a process and part do not make whole groups."""
        share = config.batch_size // (world_size() * config.accumulate)
        if share % config.images_per_group:
            given = f"--batch-size {config.batch_size} gives each process and part {share} images"
            raise UserError(f"{given}, not a multiple of --images-per-group {config.images_per_group}; change one")
        return super().plan(images, config)

    def draw_assignment(self, groups: int) -> Tensor:
        """M for some groups: (G, N); in full mode (G * K, N), the K mixtures of a group one after the other."""
        k, grid, device = self.config.images_per_group, self.encoder.grid, self.segments.device
        assignment = mixing_assignment(groups, grid[0] * grid[1], k, cell=self.config.cell, grid=grid, device=device)
        if self.config.mode == "full":  # image i + s where the first mixture has image i: each patch is seen once
            shifts = torch.arange(k, device=device)[:, None]
            assignment = ((assignment[:, None] + shifts) % k).flatten(0, 1)
        return assignment

    def attention(self, q: Tensor, k: Tensor, v: Tensor, assignment: Tensor, look: bool = False) -> tuple:
        """The attention of mixtures with M (G, N): q, k, v and the output are (G, heads, 1 + N, d).

        With it come the accuracy of top-k keys (Fig. 6), and with `look` the weights (G, heads, 1 + N, 1 + N).
        """
        if self.config.attention == "global" and not look:
            return attend(q, k, v), None, None
        # As topk_attention, with keys and weights to look at.
        scores, accuracy = attention_scores(q, k), None  # (G, heads, 1 + N, 1 + N)
        if self.config.attention == "topk":
            weights, keys = topk_weights(scores, self.topk, exempt=1, select=top_keys_fast)
            accuracy = homologous_accuracy(keys, assignment)
        else:
            if self.config.attention == "oracle":  # App. C: the CLS token sees everything, and is seen by itself alone
                keep = F.pad(same_image(assignment), (1, 0, 0, 0), value=False)
                keep = F.pad(keep, (0, 0, 1, 0), value=True)[:, None]  # (G, 1, 1 + N, 1 + N)
                scores = scores.masked_fill(~keep, -math.inf)
            weights = scores.softmax(dim=-1)
        return weights @ v, accuracy, weights if look else None

    def encode(self, tokens: Tensor, slots: Tensor, look: bool = False, codes=None) -> tuple[Tensor, list]:
        """Run the encoder on tokens (B, L, D) of images in the slots (B, L) of their groups -> (B, 1 + L, D).

        Also gives what `attention` found in each of `special_blocks`; the other blocks have plain attention. `codes`
        (B, L) are slots whose segment codes the tokens get, in place of those of their own.
        """
        config, vit, found = self.config, self.encoder, []

        def special(q, k, v):
            out, *what = self.attention(q, k, v, slots, look)
            found.append(what)
            return out

        segment = self.segments[slots if codes is None else codes].to(tokens.dtype)  # (B, L, D)
        segment = F.pad(segment, (0, 0, 1, 0))  # (B, 1 + L, D), 0 for the CLS token
        x = torch.cat([vit.cls_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
        for i, block in enumerate(vit.blocks):
            if config.segment == "every" or (config.segment == "first" and i == 0):
                x = x + segment
            x = block(x, special if i in self.special_blocks else attend)  # (B, 1 + L, D)
        return vit.norm(x), found

    def reconstruct(self, encoded: Tensor, assignment: Tensor) -> Tensor:
        """Unmix in the decoder: encoded mixtures (G, 1 + N, D), M (G, N) -> predicted patches (G * K, N, P)."""
        k, autoencoder = self.config.images_per_group, self.autoencoder
        x = autoencoder.decoder_embed(encoded)  # (G, 1 + N, d)
        full = unmix(x[:, 1:], assignment, autoencoder.mask_token[0, 0], k)  # (G, K, N, d)
        return autoencoder.predict(x[:, :1].repeat_interleave(k, dim=0), full.flatten(0, 1))

    def mixed(self, images: Tensor, assignment: Tensor, look: bool = False) -> Seen:
        """Images (B, 3, H, W), mixed by M (G, N), encoded and unmixed.

        With M (G * T, N) each group T times: G and B of all that follows are then T times as large.
        """
        k = self.config.images_per_group
        groups = [x.unflatten(0, (-1, k)) for x in (self.encoder.embed(images), self.autoencoder.target(images))]
        times = len(assignment) // len(groups[0])
        embedded, target = (x.repeat_interleave(times, dim=0) for x in groups)  # (G, K, N, D), (G, K, N, P)
        encoded, found = self.encode(mix(embedded, assignment), assignment, look)  # (G, 1 + N, D)
        prediction = self.reconstruct(encoded, assignment)  # (G * K, N, P)
        mask = ~own_patches(assignment, k)  # what came from others is to be predicted
        return Seen(prediction, target.flatten(0, 1), mask.flatten(0, 1), encoded[:, 1:], assignment, found)

    def unmixed(self, images: Tensor) -> Seen:
        """MAE on each of the images (B, 3, H, W) alone; the visible patches of a group meet in the contrastive loss."""
        k, autoencoder, vit = self.config.images_per_group, self.autoencoder, self.encoder
        batch, patches = len(images), len(vit.positions)
        mask = common.random_mask(batch, patches, autoencoder.mask_ratio, device=images.device)
        visible = common.visible_patches(mask, patches - round(autoencoder.mask_ratio * patches))
        slots = torch.arange(batch, device=images.device)[:, None].expand_as(visible) % k  # (B, L)
        encoded, _ = self.encode(common.take(vit.embed(images), visible), slots)  # (B, 1 + L, D)
        tokens, owners = (rearrange(x, "(g k) m ... -> g (k m) ...", k=k) for x in (encoded[:, 1:], slots))
        return Seen(autoencoder.decode(encoded, visible), autoencoder.target(images), mask, tokens, owners, [])

    def forward(self, images: Tensor, labels: Tensor | None = None, assignment: Tensor | None = None) -> dict:
        """Eq. 8 and its terms, for images (B, 3, H, W), B a multiple of K.

        M is drawn, or given as `draw_assignment` makes it. `homologous`, of Fig. 6, is no loss.
        """
        config, k = self.config, self.config.images_per_group
        if len(images) % k:
            raise ValueError(f"{len(images)} images do not make groups of {k}; give a multiple")
        if config.mode == "mae":
            seen = self.unmixed(images)
        else:
            groups, times = len(images) // k, k if config.mode == "full" else 1  # mixtures of a group
            assignment = self.draw_assignment(groups) if assignment is None else assignment
            if len(assignment) != groups * times:
                raise ValueError(f"{len(assignment)} assignments for {groups} groups, mixed {times} times each")
            seen = self.mixed(images, assignment)
        loss = reconstruction_loss(seen.prediction, seen.target, seen.mask)
        with gradient_if(config.contrast):
            contrast = homologous_contrastive(seen.tokens, seen.owners, config.temperature)
        terms = {"reconstruction": loss, "contrast": contrast}
        if accuracies := [accuracy for accuracy, _ in seen.found if accuracy is not None]:
            terms["homologous"] = torch.stack(accuracies).float().mean()
        return {"loss": config.reconstruction * loss + config.contrast * contrast} | terms

    @property
    def captions(self) -> tuple:
        if self.config.mode == "mae":
            return self.autoencoder.captions
        numbers = range(1, self.config.images_per_group + 1)
        return (*[f"image {i}" for i in numbers], "mixture", *[f"reconstruction {i}" for i in numbers], "attention")

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Tensor:
        """A row a group: the K images, the mixture, the K reconstructions, and the attention of one query.

        (B, 3, H, W) -> (B // K, 2 K + 2, 3, H', W'), in [0, 1]; fewer than K images are repeated to make a group. The
        attention is that of the last block that `attention` acts in. With --mode mae, MAE's pictures.
        """
        config, k, patch = self.config, self.config.images_per_group, self.encoder.patch
        images = images[torch.arange(max(k, len(images) // k * k)) % len(images)]  # whole groups
        if config.mode == "mae":
            seen = self.unmixed(images)
            return self.autoencoder.pictures_of(images, seen.prediction, seen.mask)
        assignment = self.draw_assignment(len(images) // k)[:: k if config.mode == "full" else 1]  # each group's first
        seen = self.mixed(images, assignment, look=True)
        restored = self.autoencoder.pictures_of(images, seen.prediction.float(), seen.mask)[:, 2]
        mixture = mix(common.patchify(images, patch).unflatten(0, (-1, k)), assignment)  # (G, N, P)
        mixture = common.unpatchify(mixture, patch, *images.shape[-2:])[:, None]  # (G, 1, 3, H, W)
        images, restored = (x.unflatten(0, (-1, k)) for x in (images, restored))  # (G, K, 3, H, W)
        sheet = torch.cat([images, mixture, restored], dim=1)
        zoom = max(1, 128 // images.shape[-2])  # room for frames
        sheet = sheet.repeat_interleave(zoom, dim=-1).repeat_interleave(zoom, dim=-2)
        _, weights = seen.found[-1]
        lit = attention_picture(sheet[:, k], weights, assignment, self.encoder.grid)
        return torch.cat([sheet, lit[:, None]], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Appendix: a faster selection on CPUs, and a picture of attention
# ---------------------------------------------------------------------------------------------------------------------


def top_keys_fast(scores: Tensor, topk: int) -> Tensor:
    """`top_keys` in any order, by NumPy on CPUs, which selects several times as fast as torch there.

    Its partition gives values, not places. So each score becomes an integer of the same order, with its place in
    the bits below.
    """
    size, places = 8 * scores.element_size(), scores.shape[-1]
    if scores.device.type != "cpu" or size == 64:
        return top_keys(scores, topk)
    bits = scores.detach().view({16: torch.int16, 32: torch.int32}[size])
    # As integers positive floats keep their order. Negative ones reverse it; flipping all bits but the sign mends that.
    ordered = bits ^ (bits >> (size - 1) & torch.iinfo(bits.dtype).max)
    placed = ordered.to({16: torch.int32, 32: torch.int64}[size]) << size | torch.arange(places, dtype=torch.int32)
    first = places - min(topk, places)
    chosen = np.partition(placed.numpy(), first, axis=-1)[..., first:]
    return (torch.from_numpy(chosen) & (2**size - 1)).long()


def attention_picture(mixture: Tensor, weights: Tensor, assignment: Tensor, grid: tuple) -> Tensor:
    """Mixtures (G, 3, H, W) lit by the attention of the central patch, framed in red, its relatives in white.

    `weights` (G, heads, 1 + N, 1 + N) are those of one block, `grid` is (rows, columns) of patches.
    """
    rows, columns = grid
    query, side = rows // 2 * columns + columns // 2, mixture.shape[-2] // rows
    light = weights[:, :, 1 + query, 1:].float().mean(dim=1)  # (G, N)
    light = light / light.amax(dim=1, keepdim=True).clamp_min(1e-12)

    def enlarge(x):  # one value a patch (G, N) -> one a pixel (G, 1, H, W)
        return repeat(x, "g (h w) -> g 1 (h p) (w q)", h=rows, p=side, q=side)

    edge = max(1, side // 8)
    frame = torch.ones(side, side, dtype=torch.bool, device=mixture.device)
    frame[edge:-edge, edge:-edge] = False
    frame, out = frame.repeat(rows, columns), mixture * (0.15 + 0.85 * enlarge(light))
    itself = (torch.arange(rows * columns, device=mixture.device) == query).expand_as(assignment)
    for framed, colour in ((same_image(assignment)[:, query], (1.0, 1.0, 1.0)), (itself, (1.0, 0.1, 0.1))):
        out = torch.where(enlarge(framed) & frame, torch.tensor(colour, device=out.device)[:, None, None], out)
    return out
