"""Energy-inspired pretraining: restore a corrupted image by descending a learned energy.

Wang, Wang, Liu and Qiu, "Energy-Inspired Self-Supervised Pretraining for Vision Models" (ICLR 2023; equations and
tables are numbered as in the text of the ICML workshop 2022). No code was released.

Put a linear head with one output on any vision model and call the output an energy. Corrupt an image: mask it, make it
coarse, add noise, take its colour. Follow the gradient of the energy *with respect to the pixels* downhill for a step
or two, and ask that the original comes out. The forward pass is the encoder and the backward pass is the decoder, so
nothing has to be added to the model, and nothing thrown away after training but the head.

The loss (Eq. 4) reads the gradient of the energy alone, never its value. That whole images end up lower than corrupted
ones is what the paper expects of it; docs/ebm_pretrain.md ("Is it an energy?") measures it.

Equation                                                        function
App. A.3         masks                                          gridded_mask, random_patches
App. A.2         super-resolution, denoising                    super_resolution, noise
Sec. 3.1, 3.2    colorization; one of four for each image       grayscale, mixed
Eq. 3, 4, Alg. 1 gradient steps, stop-gradient between them     descent, restore
Eq. 4            error of every step                            restoration_loss
App. A.1         learned step size                              EnergyPretraining.step_size, its start first_step_size
Listing 1        a step of the training                         EnergyPretraining.forward, EnergyPretraining.update
Eq. 2            corrupted images as negatives (N = 0, Fig. A)  contrast_loss
Eq. 1 to 3       samples from noise, Fig. 1, left               likelihood_loss, langevin (--objective sampling)
Fig. 1, right    chains from corrupted images                   sample
Sec. 2.2         energy of an image                             Energy
Table B          other backbones                                ConvNeXt, Swin

Train it:  python train.py ebm_pretrain                              on built-in pictures, on a laptop
           python train.py ebm_pretrain --model swin_micro           any backbone
           python train.py ebm_pretrain --objective sampling         samples from noise, which the paper does without
           python train.py ebm_pretrain --data imagenet --root DIR   the paper's experiment (Table A)
Look at it: python evaluate.py runs/ebm_pretrain-shapes --protocol energy

Choices that change a number (docs/ebm_pretrain.md has all of them):
* The energy acts on images of zero mean and unit variance a channel, and so do masks (blank is 0) and noise.
* log alpha is learned, and starts such that the first step on the first batch moves pixels by 0.3 standard
  deviations, root mean square.
* The loss is SmoothL1 as in Listing 1, averaged over the steps and all pixels; `--criterion mse` is that of Eq. 4.
* N = 0 has no loss in the paper. Ours is softplus(E(x) - E(corrupted)).
* Sizes of random patches are shares of the area, U(0.03, 0.075) for large ones: those printed would blank every image.
"""

import contextlib
import copy
import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
from common import VIT_SIZES, Block, Method, MobileFormer, ViT, ViTSize, attend_plainly
from plumbing.encoders import Encoder
from plumbing.errors import UserError
from plumbing.probes import features_of, labelled, pooled_features, probe
from plumbing.processes import autocast, average
from plumbing.settings import TrainConfig, check_least, check_positive
from plumbing.start import start_from

# ---------------------------------------------------------------------------------------------------------------------
# Corruptions: images (B, C, H, W) -> corrupted images. Draws, by `generator` if given, are for each image on its own.
# ---------------------------------------------------------------------------------------------------------------------


def gridded_mask(images: Tensor, patch: int, ratio: float, generator=None) -> Tensor:
    """Blank round(ratio * cells) of the squares of a grid, `patch` pixels a side, in each image (App. A.3).

    Squares at the right and lower border are cut off where `patch` does not divide the image.
    """
    height, width = images.shape[-2:]
    rows, columns = -(-height // patch), -(-width // patch)
    cells = rows * columns
    draw = torch.rand(len(images), cells, generator=generator, device=images.device)
    rank = draw.argsort(dim=1).argsort(dim=1)  # (B, cells), 0 for the smallest draw of an image
    blank = rank >= cells - round(ratio * cells)  # as many in each row
    blank = blank.unflatten(1, (1, rows, columns))
    blank = blank.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)[..., :height, :width]  # (B, 1, H, W)
    return images.masked_fill(blank, 0)  # the mean colour


def random_patches(images: Tensor, count: int, low: float, high: float, generator=None, aspect=(0.5, 2.0)) -> Tensor:
    """Blank `count` rectangles anywhere in each image, each with a share U(low, high) of its area (App. A.3).

    Height over width is log-uniform in `aspect`; no side is longer than the image. A pixel is blank if its centre is.
    """
    draw = torch.rand(4, len(images), count, generator=generator, device=images.device)  # each (B, count)
    area, aspects = low + (high - low) * draw[0], aspect[0] * (aspect[1] / aspect[0]) ** draw[1]  # (B, count)

    def covered(share, place, side):  # which pixels of an axis each rectangle covers: (B, count, side)
        share = share.clamp_max(1)
        start = place * (1 - share) * side
        centre = torch.arange(side, device=images.device) + 0.5
        return (centre >= start[..., None]) & (centre < (start + share * side)[..., None])

    # A product of two thin matrices counts the rectangles over each pixel, without a map for each rectangle.
    tall = images.shape[-2] / images.shape[-1]  # of the image: areas and aspects are in pixels, shares are of a side
    rows = covered((area * aspects / tall).sqrt(), draw[2], images.shape[-2]).float()  # (B, count, H)
    columns = covered((area / aspects * tall).sqrt(), draw[3], images.shape[-1]).float()  # (B, count, W)
    blank = torch.einsum("bkh,bkw->bhw", rows, columns) > 0.5  # (B, H, W)
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
    """RGB images (B, 3, H, W) in [0, 1] without their colour: three equal channels (section 3.1, colorization).

    Grey is luma by the weights of ITU-R BT.601.
    """
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=images.dtype).view(3, 1, 1)
    weights = weights.to(images.device, non_blocking=True)  # a copy that the CPU does not wait for
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

    `energy` maps images to (B,) or (B, 1), each image by itself: so the gradient of the sum holds that of each image.
    Raises RuntimeError, here or in the backward pass, where a kernel inside `energy` has no second derivative.
    """
    recording = torch.is_grad_enabled()  # in training: then this step is recorded, too, for loss.backward()
    x = x.detach().requires_grad_()
    # torch's fused attention has no second derivative: where `energy` asks for attention, it gets the plain one.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        # alpha E is differentiated rather than E: the same number, but what travels back is of the size of a step. In
        # fp16 the gradient of E itself, 1e-4 and less, would lose its digits, or be zero.
        total = step_size * energy(x).sum()
    # Gradients keep the types of the forward pass. Autocast would cast those of the float32 head, which alpha makes
    # large, to fp16, where they can overflow.
    with torch.autocast(x.device.type, enabled=False):
        return torch.autograd.grad(total, x, create_graph=recording)[0]


def restore(energy, images: Tensor, steps: int, step_size: Tensor | float) -> list:
    """x^n = x^(n-1) - alpha dE/dx(x^(n-1)) from x^0 = `images` (Eq. 3, 4): the list of x^1 to x^N, each (B, C, H, W).

    Each step starts from detached pixels, as in Algorithm 1 and Listing 1 (Eq. 4 as printed detaches within dE/dx
    alone), so the error of step n teaches step n alone. Gradients reach `step_size`, and as a second derivative the
    weights of `energy`.
    """
    x, chain = images, []
    for _ in range(steps):
        x = x.detach() - descent(energy, x, step_size)
        chain.append(x)
    return chain


def restoration_loss(restored: list, images: Tensor, criterion="smooth_l1", weight: Tensor | None = None) -> Tensor:
    """Mean error of all steps, pixels and images (Eq. 4): N times (B, C, H, W) against (B, C, H, W) -> scalar.

    `criterion` is smooth_l1 (beta 1, Listing 1, which adds the steps up) or mse (Eq. 4, whose j = 0 is constant).
    `weight` (B, C, H, W) or (B, 1, H, W), of ours, says which pixels count: then it is the mean over images of the mean
    over these.
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


def likelihood_loss(clean: Tensor, sampled: Tensor) -> Tensor:
    """Mean E(x+) - mean E(x-), whose gradient by the weights is Eq. 2: energies (B,), (B',) -> scalar.

    This is also the gradient of the negative log-likelihood (Eq. 1), if x- are samples of exp(-E) / Z. The loss itself
    has no lower bound.
    """
    return clean.mean() - sampled.mean()


@torch.no_grad()
def langevin(energy, x: Tensor, steps: int, step_size: Tensor | float, temperature: float = 0.0, generator=None):
    """Eq. 3, `steps` times x - alpha dE/dx, without gradients: (B, C, H, W) -> the same.

    As printed it has no noise: small steps go towards a minimum, if there is one. Langevin's adds sqrt(2 alpha
    temperature) eps: after many small steps the law is exp(-E / temperature) / Z.
    """
    for _ in range(steps):
        x = x - descent(energy, x, step_size)
        if temperature:
            eps = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            x = x + (2 * step_size * temperature) ** 0.5 * eps
    return x


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
# Modules: the energy
# ---------------------------------------------------------------------------------------------------------------------


class Energy(nn.Module):
    """E(x) = h(psi(x)) (section 2.2): psi is a backbone's mean feature, a choice, h linear, without bias (Listing 1).

    x (B, 3, H, W) has zero mean and unit variance a channel, by `mean` and `std`; -> (B,), in the type of the head
    under autocast, too. `encoder` is any module that maps images in [0, 1] to features (B, D) or a map (B, D, H, W);
    `images`, a trial batch, tell how wide they are.
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
            kind, shape = type(encoder).__name__, " x ".join(map(str, features.shape))
            raise UserError(f"{kind} returns {shape}; an energy needs features (B, D) or (B, D, H, W): wrap it")
        self.encoder, self.head = encoder, nn.Linear(features.shape[1], 1, bias=False)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, D)."""
        if type(self.encoder) is ViT:  # by hand: torch's plain attention computes in float32 what is in bf16
            return self.encoder.pooled(self.encoder.encode(self.encoder.embed(images), attend_plainly))
        return pooled_features(self.encoder, images)

    def forward(self, x: Tensor) -> Tensor:
        # Back to [0, 1]: an encoder normalises by itself, after --start by what its weights are used to.
        features = self.features(x * self.std + self.mean)  # (B, D)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(features.to(self.head.weight.dtype)).squeeze(1)  # (B,)


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------

MIXTURE = ("gridded", "super_resolution", "noise", "grayscale")  # the tasks of `mixed`
TASKS = ("gridded", "random_small", "random_large", "super_resolution", "noise", "grayscale", "mixed")
OtherBackbones = Literal["convnext_micro", "convnext_tiny", "swin_micro", "swin_tiny"]
MobileFormers = Literal["mobile_former_micro", "mobile_former_720", "mobile_former_1440", "mobile_former_2880"]


@dataclass
class Config(TrainConfig):
    """The paper's self comparisons on ImageNet: ViT-S, 100 epochs, gridded masks (section 3.1, Table A)."""

    crop_min: float = 0.2  # smallest share of the image that a random resized crop keeps
    base_lr: float = 1e-4  # learning rate for a batch of 256
    model: Literal[ViTSize, OtherBackbones, MobileFormers] = "vit_small"  # the backbone
    patch: int = 16  # side of a patch of a vit, in pixels
    objective: Literal["energy", "sampling", "autoencoder", "mae"] = "energy"  # in turn: Eq. 4, Eq. 2, Table 2, Table 1
    task: Literal[TASKS] = "gridded"  # how images are corrupted
    grid: int = 16  # gridded, mixed: side of the squares, in pixels; 16, 24 and 32 in Table 1
    mask_ratio: float = 0.7  # gridded, mixed, mae: share of the squares or patches that are blank (Table 1)
    scale: int = 16  # super_resolution, mixed: how many times the image shrinks; 14, 16, 24, 32 in Table 2
    steps: int = 2  # N: gradient steps on each image; 0 takes corrupted images as negatives (Fig. A)
    temperature: float = 0.0  # sampling: of the chain's noise, sqrt(2 alpha temperature) a step; 0: Eq. 3
    criterion: Literal["smooth_l1", "mse"] = "smooth_l1"  # error of the restored pixels: Listing 1, or Eq. 4
    scored: Literal["all", "changed"] = "all"  # pixels that count in the loss: all, or those that were corrupted
    first_step: float = 0.3  # the very first step, in standard deviations of a pixel (root mean square)
    alpha_lr: float = 1.0  # learning rate of log alpha, relative to that of the weights
    decoder_dim: int = 512  # autoencoder, mae: width of the decoder
    decoder_depth: int = 8  # autoencoder, mae: blocks of the decoder
    decoder_heads: int = 16  # autoencoder, mae: attention heads of the decoder
    start: str = ""  # weights to start from: an encoder.pt or last.pt; for a vit also MAE's or timm's

    @property
    def is_energy(self) -> bool:
        return self.objective in ("energy", "sampling")

    @property
    def descends(self) -> bool:
        """Whether it trains by the steps of Eq. 4; with N = 0 it learns by contrast."""
        return self.objective == "energy" and self.steps > 0

    def check(self):
        super().check()
        check_least(self, grid=1, scale=1, steps=int(self.objective == "sampling"), alpha_lr=0, temperature=0)
        check_positive(self, "first_step")
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"--mask-ratio {self.mask_ratio} blanks nothing or all; give more than 0, less than 1")
        if self.compile and self.is_energy:
            raise UserError(
                "--compile does not work here: torch.compile does not differentiate compiled code twice "
                "(docs/speed.md); leave it out"
            )
        squares = math.ceil(self.image_size / self.grid) ** 2
        if self.task in ("gridded", "mixed") and not 0 < round(self.mask_ratio * squares) < squares:
            given = f"--grid {self.grid} makes {squares} square(s)"
            raise UserError(f"{given}, of which --mask-ratio {self.mask_ratio} blanks none or all; change one")


LAPTOP = {"model": "vit_micro", "image_size": 32, "patch": 4, "grid": 4, "scale": 4, "batch_size": 64}
LAPTOP |= {"decoder_dim": 96, "decoder_depth": 2, "decoder_heads": 3, "warmup_epochs": 1}
LAPTOP |= {"base_lr": 16e-3, "crop_min": 0.5, "task": "super_resolution"}  # more than `mixed` teaches
LONG = {"epochs": 200, "task": "mixed"}
SAMPLING = {"image_size": 16, "batch_size": 32, "epochs": 5, "epoch_steps": 60, "base_lr": 4e-3}
SAMPLING |= {"steps": 20, "first_step": 0.1}

RECIPES = {  # all whose key fits the command count, later ones over earlier ones
    "imagenet": {},  # Tables 1 and 2, the defaults of Config
    "imagenet --objective mae": {"epochs": 400, "base_lr": 1.5e-4, "warmup_epochs": 40},  # Table 1; rate as in MAE
    "imagenet --model vit_base": LONG,  # Table 3; the longer row is --epochs 800
    "imagenet --model convnext_tiny": LONG,  # Table B, whose task is not told: that of Table 3
    "imagenet --model swin_tiny": LONG,
    # Laptop recipes of ours.
    "photos": LAPTOP | {"image_size": 64, "patch": 8, "grid": 8, "epochs": 10, "epoch_steps": 40},
    "shapes": LAPTOP | {"epochs": 5, "probe_every": 5},
    "shapes --objective sampling": SAMPLING,
    "cifar10": LAPTOP | {"epochs": 10},
}


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------


class EnergyPretraining(Method):
    """An energy that restores images, or the autoencoders that the paper compares with.

    `encoder` is any module of yours that maps images in [0, 1] to features (B, D) or a map (B, D, H, W); by default,
    the one that `config.model` names. With N of 1 or more it must be twice differentiable, which is checked.
    Smooth activations are best: the pixel gradient of a network of ReLUs is constant in pieces.
    """

    name = "ebm_pretrain"

    def __init__(self, config: Config, data, encoder: nn.Module | None = None):
        super().__init__()
        own, size, generator = encoder is not None, config.image_size, torch.Generator().manual_seed(0)
        encoder = encoder if own else build_encoder(config, data)
        images = torch.rand(2, 3, size, size, generator=generator).to(next(encoder.parameters()).device)  # for a trial
        if config.is_energy:
            self.energy = Energy(encoder, images, data.mean, data.std)
            self.log_alpha = nn.Parameter(torch.tensor(0.0))
            self.started = False  # whether the first batch has set log alpha
        elif type(encoder) is ViT:
            decoder = (config.decoder_dim, config.decoder_depth, config.decoder_heads, config.mask_ratio)
            self.autoencoder = common.MaskedAutoencoder(encoder, *decoder, norm_pixels=config.objective == "mae")
        else:
            kind = type(encoder).__name__
            raise UserError(f"--objective {config.objective} needs a vit, not {kind}; try --model vit_small")
        self.register_buffer("mean", torch.tensor(data.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(data.std).view(3, 1, 1), persistent=False)
        self.config, self.tasks = config, MIXTURE if config.task == "mixed" else (config.task,)
        self.to(images.device)
        self.origin = start_from(self, config, VIT_SIZES)
        freeze_idle(self, images)
        if own and config.descends:  # otherwise the first derivative is enough
            check_second_derivative(self.energy, images)

    @property
    def encoder(self) -> nn.Module:
        return (self.energy if self.config.is_energy else self.autoencoder).encoder

    def optimizer(self, config: Config) -> torch.optim.Optimizer:
        """AdamW; log alpha in a group of its own, without decay."""
        optimizer = super().optimizer(config)
        if config.descends:
            for group in optimizer.param_groups:  # with --decay-on all among the decaying ones
                group["params"] = [p for p in group["params"] if p is not self.log_alpha]
            optimizer.add_param_group({"params": [self.log_alpha], "weight_decay": 0.0, "lr_scale": config.alpha_lr})
        return optimizer

    def corrupt(self, images: Tensor, task: str = "") -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> normalised ones, whole and corrupted; by default by `config.task`."""
        config, clean = self.config, (images - self.mean) / self.std
        match task or config.task:
            case "gridded":
                return clean, gridded_mask(clean, config.grid, config.mask_ratio)
            case "random_small":
                return clean, random_patches(clean, 75, 0.01, 0.025)
            case "random_large":  # U(0.5, 2.0), as printed, would blank every image
                return clean, random_patches(clean, 25, 0.03, 0.075)
            case "super_resolution":
                return clean, super_resolution(clean, config.scale)
            case "noise":
                return clean, noise(clean)
            case "grayscale":
                return clean, (grayscale(images) - self.mean) / self.std
            case "mixed":
                return clean, mixed([self.corrupt(images, part)[1] for part in MIXTURE])

    def set_alpha(self, corrupted: Tensor):
        """Set log alpha such that a step from the first batch has the root mean square `first_step`."""
        alpha = first_step_size(self.energy, corrupted, self.config.first_step)
        with torch.no_grad():
            self.log_alpha.copy_(average(alpha**-2).log() / -2)  # by the mean square of the gradients of all processes
        self.started = True

    def step_size(self, corrupted: Tensor) -> Tensor:
        """alpha. Before `set_alpha`, when log alpha is 0, it is what `corrupted` (B, 3, H, W) would set it to, times a
        factor of 1, so that log alpha has a gradient and `freeze_idle` does not freeze it.
        """
        alpha = self.log_alpha.exp()
        return alpha if self.started else alpha * first_step_size(self.energy, corrupted, self.config.first_step)

    def restored(self, corrupted: Tensor, reached: Tensor | None = None) -> list:
        """Corrupted images, normalised (B, 3, H, W) -> a list: what each step makes of them; an autoencoder has one.

        Where earlier steps have `reached` these images, the list has the next step alone. With N = 0, of which the
        training takes none, it has one, to look at.
        """
        if self.config.objective == "energy":
            steps, x = (self.config.steps or 1, corrupted) if reached is None else (1, reached)
            return restore(self.energy, x, steps, self.step_size(corrupted))
        encoded = self.encoder.encode(self.encoder.embed(corrupted * self.std + self.mean))  # (B, 1 + N, D)
        tokens = self.autoencoder.decoder_embed(encoded)  # (B, 1 + N, d)
        patches = self.autoencoder.predict(tokens[:, :1], tokens[:, 1:]).float()  # (B, N, P)
        return [common.unpatchify(patches, self.encoder.patch, *corrupted.shape[-2:])]

    def from_noise(self, images: Tensor) -> Tensor:
        """Uniform noise in [0, 1], normalised, in the shape of images (B, 3, H, W): where chains of Eq. 3 start."""
        return (torch.rand_like(images) - self.mean) / self.std

    def sampling(self, images: Tensor) -> dict:
        """Eq. 2 for images (B, 3, H, W) and as many samples. The first batch sets alpha, which stays as it is."""
        config, noisy = self.config, self.from_noise(images)
        if self.training and not self.started:
            self.set_alpha(noisy)
        sampled = langevin(self.energy, noisy, config.steps, self.step_size(noisy), config.temperature)
        clean, sampled = self.energy((images - self.mean) / self.std), self.energy(sampled)
        means = {"energy": clean.detach().mean(), "energy_sampled": sampled.detach().mean()}
        return {"loss": likelihood_loss(clean, sampled)} | means

    def prepare(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`corrupt`; the first batch sets alpha."""
        clean, corrupted = self.corrupt(images)
        if self.config.descends and self.training and not self.started:
            self.set_alpha(corrupted)
        return clean, corrupted

    def forward(self, images: Tensor, labels: Tensor | None = None, chain: tuple = ()) -> dict:
        """Loss of images (B, 3, H, W), the share of squared error left at the end (1 = no change), and alpha.

        With `chain`, which is (clean, corrupted, reached), images are not read: the same for one more step, and what
        that one reaches. With N = 0 the loss, and the share of images lower than their corrupted ones; of `mae` the
        loss alone.
        """
        config = self.config
        if config.objective == "sampling":
            return self.sampling(images)
        if config.objective == "mae":
            out = self.autoencoder(images)
            return {"loss": common.reconstruction_loss(out.prediction, out.target, out.mask)}
        clean, corrupted, *reached = chain or self.prepare(images)
        if config.objective == "energy" and not config.steps:
            energies = self.energy(clean), self.energy(corrupted)
            return {"loss": contrast_loss(*energies), "told_apart": (energies[0] < energies[1]).float().mean()}
        restored = self.restored(corrupted, *reached)
        changed = (corrupted != clean).any(dim=1, keepdim=True).float() if config.scored == "changed" else None
        logged = {"loss": restoration_loss(restored, clean, config.criterion, changed)}
        with torch.no_grad():
            logged["left"] = F.mse_loss(restored[-1], clean) / F.mse_loss(corrupted, clean).clamp_min(1e-12)
            if config.objective == "energy":
                logged["alpha"] = self.log_alpha.exp()
        return logged | ({"reached": restored[-1].detach()} if chain else {})

    def update(self, model: nn.Module, batches: list, stepper: common.Stepper) -> dict:
        """As `Method.update`, but each step of Eq. 4 is differentiated before the next one is taken.

        A step needs only the pixels that the one before has reached. So the graph of one is kept at a time, not of N.
        """
        config, logged = self.config, []
        if config.objective != "energy" or not config.steps:
            return super().update(model, batches, stepper)
        count = pending = len(batches) * config.steps  # backward passes, of which the last averages over the processes
        for images, _ in batches:
            with stepper.autocast():
                clean, corrupted = self.prepare(images)
            loss, reached = 0.0, corrupted
            for _ in range(config.steps):
                pending -= 1
                waits = pending and model is not self  # of several processes: the last pass averages their gradients
                with model.no_sync() if waits else contextlib.nullcontext():
                    with stepper.autocast():
                        out = model(images, chain=(clean, corrupted, reached))
                    stepper.backward(out["loss"] / count)
                loss, reached = loss + out["loss"].detach() / config.steps, out.pop("reached")
            logged.append(out | {"loss": loss})
        stepper.step()
        return {name: sum(part[name] for part in logged).float() / len(logged) for name in logged[0]}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """With `started`, which is no buffer: each step would have to wait for a GPU to read it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.config.is_energy:
            destination[prefix + "started"] = torch.tensor(self.started)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if self.config.is_energy:
            name, self.started = prefix + "started", bool(state_dict.get(prefix + "started"))
            missing += [name] * (name not in state_dict)
            unexpected[:] = [other for other in unexpected if other != name]

    def probe(self, encode, train, test, config: Config) -> dict:
        """kNN and linear accuracy, and what is left of the squared error, task by task, of a tenth as many images."""
        found = probe(encode, train, test, config.image_size, config.probe_images)
        if config.objective in ("mae", "sampling") or (config.objective == "energy" and not config.steps):
            return found
        chosen = labelled(test, max(1, (config.probe_images or 20_000) // 10))

        def measure(images):
            rows = []
            for task in self.tasks:
                clean, corrupted = self.corrupt(images, task)
                with autocast(config.amp, images.device):
                    last = self.restored(corrupted)[-1]
                rows += [(x - clean).square().mean(dim=(1, 2, 3)) for x in (corrupted, last)]
            return torch.stack(rows, dim=1)  # (B, 2 * tasks)

        torch.manual_seed(config.seed)  # the same corruptions each time
        errors, _ = features_of(measure, test, chosen, config.image_size)
        corrupted, last = errors.mean(dim=0).unflatten(0, (-1, 2)).T  # each (tasks,)
        left = last / corrupted.clamp_min(1e-12)
        return found | {f"left_{task}": float(share) for task, share in zip(self.tasks, left, strict=True)}

    @property
    def stages(self) -> list:
        """After which steps of `sampling` there is a picture: every quarter."""
        return sorted({math.ceil(self.config.steps * i / 4) for i in range(1, 5)})

    @property
    def captions(self) -> tuple:
        if self.config.objective == "mae":
            return self.autoencoder.captions
        if self.config.objective == "sampling":
            return ("image", "noise", *[f"step {count}" for count in self.stages])
        count = self.config.steps or 1
        steps = ["output"] if self.config.objective != "energy" else [f"step {i + 1}" for i in range(count)]
        return ("image", *[caption for task in self.tasks for caption in (task.replace("_", " "), *steps)])

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Tensor:
        """Rows of (image, then for each task the corrupted image and every step): (B, K, 3, H, W) in [0, 1]."""
        if self.config.objective == "mae":
            return self.autoencoder.pictures(images)
        columns = [(images - self.mean) / self.std]
        if self.config.objective == "sampling":
            columns.append(self.from_noise(images))
            alpha = self.step_size(columns[-1])
            for before, after in itertools.pairwise([0, *self.stages]):
                columns.append(langevin(self.energy, columns[-1], after - before, alpha, self.config.temperature))
            return (torch.stack(columns, dim=1) * self.std + self.mean).clamp(0, 1)
        for task in self.tasks:
            _, corrupted = self.corrupt(images, task)
            columns += [corrupted, *self.restored(corrupted)]
        return (torch.stack(columns, dim=1) * self.std + self.mean).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Appendix: other people's backbones (Table B), and guards against networks that cannot be trained so
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

    def __init__(self, dims=(96, 192, 384, 768), depths=(3, 3, 9, 3), stem=4, mean=(0.0,) * 3, std=(1.0,) * 3):
        super().__init__(mean, std, dims=tuple(dims), depths=tuple(depths), stem=stem)
        self.dim, self.stride = dims[-1], stem * 2 ** (len(dims) - 1)
        self.smallest_side = self.stride
        self.stem = nn.Sequential(nn.Conv2d(3, dims[0], stem, stem), ChannelNorm(dims[0], eps=1e-6))
        blocks = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            if i:
                blocks.append(nn.Sequential(ChannelNorm(dims[i - 1], eps=1e-6), nn.Conv2d(dims[i - 1], dim, 2, 2)))
            blocks += [ConvNeXtBlock(dim) for _ in range(depth)]
        self.blocks, self.norm = nn.Sequential(*blocks), ChannelNorm(self.dim, eps=1e-6)
        self.apply(start_small)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.blocks(self.stem(self.normalize(images))))


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
                f"a map of {height} x {width} cells cannot be cut into windows of {side} x {side}; "
                "give an --image-size whose maps are no wider than a window, or a multiple of it"
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
        x = rearrange(x, "b (h p) (w q) d -> b h w (q p d)", p=2, q=2)  # column by column, as in Swin's release
        return self.reduction(self.norm(x))


class Swin(Encoder):
    """Swin transformer (Liu et al. 2021): images (B, 3, H, W) in [0, 1] -> (B, D, h, w).

    A cell is stem * 2^(stages - 1) pixels wide. The defaults are Swin-T. 28.3 M parameters with 1000 classes.
    """

    whole_cells = True

    def __init__(
        self, dim=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), window=7, stem=4, mean=(0.0,) * 3, std=(1.0,) * 3
    ):
        super().__init__(mean, std, dim=dim, depths=tuple(depths), heads=tuple(heads), window=window, stem=stem)
        self.stride = self.smallest_side = stem * 2 ** (len(depths) - 1)
        self.stem = nn.Sequential(nn.Conv2d(3, dim, stem, stem), ChannelNorm(dim))
        blocks = []
        for i, (depth, count) in enumerate(zip(depths, heads, strict=True)):
            if i:
                blocks.append(PatchMerging(dim))
                dim *= 2
            blocks += [SwinBlock(dim, count, window, shifted=j % 2 == 1) for j in range(depth)]
        self.dim, self.blocks, self.norm = dim, nn.Sequential(*blocks), nn.LayerNorm(dim)
        self.apply(start_small)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(self.normalize(images)).movedim(1, -1)  # (B, H, W, D)
        return self.norm(self.blocks(x)).movedim(-1, 1)


BACKBONES = {  # name: class, fields
    "convnext_micro": (ConvNeXt, {"dims": (48, 96, 192), "depths": (2, 2, 2), "stem": 2}),  # for laptops
    "convnext_tiny": (ConvNeXt, {}),
    "swin_micro": (Swin, {"dim": 48, "depths": (2, 2, 2), "heads": (2, 4, 8), "window": 4, "stem": 2}),  # for laptops
    "swin_tiny": (Swin, {}),
}
BACKBONES |= {
    f"mobile_former_{width}": (MobileFormer, {"width": width, "norm": "group"})
    for width in ("micro", "720", "1440", "2880")
}


def build_encoder(config: Config, data) -> nn.Module:
    """The backbone that --model names."""
    size, look = config.image_size, {"mean": data.mean, "std": data.std}
    if config.model in VIT_SIZES:
        return ViT(size, config.patch, **VIT_SIZES[config.model], **look)
    kind, fields = BACKBONES[config.model]
    encoder = kind(**fields, **look)
    if size % encoder.stride:
        smaller = size // encoder.stride * encoder.stride or encoder.stride
        needs = f"is not a multiple of {encoder.stride}, which {config.model} needs"
        raise UserError(f"--image-size {size} {needs}; give {smaller} or another")
    return encoder


def freeze_idle(method: Method, images: Tensor):
    """Freeze the weights that the loss of a method does not depend on: with them DDP would stop at its second step.

    They are found by a trial step. Raises UserError where it fails, as for want of a kernel's second derivative.
    """
    trial = copy.deepcopy(method).eval()
    weights = {name: p for name, p in trial.named_parameters() if p.requires_grad}
    try:
        gradients = torch.autograd.grad(trial(images)["loss"], list(weights.values()), allow_unused=True)
    except RuntimeError as error:
        raise UserError(
            f"a trial step with {type(method.encoder).__name__} failed ({str(error).splitlines()[0]}); if that is for "
            f"want of a second derivative, write the fused or own kernel in plain operations"
        ) from None
    for name, gradient in zip(weights, gradients, strict=True):
        method.get_parameter(name).requires_grad_(gradient is not None)


def check_second_derivative(energy: Energy, images: Tensor):
    """Raise UserError where the derivative of a step by the weights is wrong.

    A kernel whose backward pass is no operation of torch's may raise no error: its part of the derivative is just
    missing. So the derivative along one random direction is compared with a difference quotient, in float64.
    """
    energy, images = copy.deepcopy(energy).double().eval(), images.double()
    weights, generator = [p for p in energy.parameters() if p.requires_grad], torch.Generator().manual_seed(0)
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
    if abs(measured - sum(slopes)) > 0.02 * sum(map(abs, slopes)) + 1e-6 * ends[0]:  # for kinks, and for rounding
        raise UserError(
            f"{type(energy.encoder).__name__} has a wrong second derivative ({sum(slopes):.3g} along one direction, "
            f"{measured:.3g} measured); write its fused or own kernels in plain operations"
        )
