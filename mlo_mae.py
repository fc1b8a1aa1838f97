"""MLO-MAE: a masking network learned from what the encoder is worth downstream, by three-level optimisation.

Guo, Hosseini, Zhang, Somayajula, Chowdhury, Gupta and Xie, "Downstream Task Guided Masking Learning in Masked
Autoencoders Using Multi-Level Optimization" (arXiv 2402.18128, 2024).

The idea: MAE masks patches at random. Here a network T gives each patch a probability, and the most probable ones
are masked. A mask is judged two levels later: level I trains an autoencoder (E and D) on the masked images, level II a
linear head C on the features of E, level III looks at the head's loss on images that neither has seen, and improves T.
The gradient of that loss by T runs backwards through the training steps of the two levels below: a hypergradient.

Equation                                                      function
Eq. 1      weighted reconstruction                            weighted_reconstruction_loss
Sec. 3.2   the patches of the highest probability             top_mask
Sec. 3.3   masking network T                                  MaskingNetwork
Eq. 2, 3   head and validation                                MultiLevelMAE.classification_loss
Eq. 4      the three levels, one after the other              MultiLevelMAE.update
Eq. 5      two levels instead of three (--objective blo)      MultiLevelMAE.train_autoencoder
Eq. 6, 7   a step of level I, and of level II                 MultiLevelMAE.train_autoencoder, MultiLevelMAE.train_head
Eq. 8      a step of T                                        MultiLevelMAE.learn_masks
Eq. 9      gradient of T through both                         hypergradient
Eq. 10, 11 second derivatives, times a vector                 mixed_product
Eq. 10, 11 where the steps are AdamW's, not plain ones        adamw_derivative (--hypergradient adamw)
Eq. 12     the same by a difference, of both ends (App. A.2)  central_difference
Eq. 13     fine-tuning in level II                            proximal_hypergradient (--objective full)
App. A.4   gradients through the selection                    soft_selection

Train it:  python train.py mlo_mae                                    on built-in pictures, on a laptop
           python train.py mlo_mae --objective blo                    two levels; mae and fixed learn no masks
           python train.py mlo_mae --data cifar10 --root DIR          the paper's experiment (Table 12)

Choices that change a number (docs/mlo_mae.md has all of them, and what the authors' code does):
* Level I's loss is a mean over masked patches, as in the code, not a sum as in Eq. 1 (`--normalization sum`).
* The hypergradient is that of the last step of each level alone, exact if that is a plain gradient step (for AdamW's:
  `--hypergradient adamw`). It has the learning rates of Eq. 10 and 11 (`--no-lr-factors`), is taken where the step
  started, in the code where it ended, and reaches T through the weights of Eq. 1 alone (`--mask-gradient`).
* Level I sees the 80 % of the training images that level II sees, in the code on CIFAR all (`--level1-data all`).
* Learning rates and unrolling steps are those of Tables 11 and 12; section 3.3 and the code have others.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import common
from common import VIT_SIZES, MaskedAutoencoder, Method, ViT, ViTSize, decays, take, visible_patches
from plumbing.crops import mix_seed
from plumbing.errors import UserError
from plumbing.images import BatchPlan, shuffled
from plumbing.probes import features_of, labelled, probe
from plumbing.processes import autocast, average, world_size
from plumbing.settings import TrainConfig, check_least, check_positive
from plumbing.start import start_from

# ---------------------------------------------------------------------------------------------------------------------
# The paper's mathematics
# ---------------------------------------------------------------------------------------------------------------------


def widen(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class MaskingNetwork(nn.Module):
    """T (section 3.3): the tokens of an image (B, N, D) -> how probable each patch is masked (B, N), in (0, 1).

    Two layers, but all tokens at once: 77 million weights on ImageNet, 101 on CIFAR; ViT-B has 86.
    """

    def __init__(self, patches: int, dim: int, hidden: int = 512):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(patches * dim, hidden), nn.Linear(hidden, patches)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(tokens.flatten(1)))).sigmoid()  # (B, N)


def top_mask(probability: Tensor, ratio: float) -> Tensor:
    """True for the round(ratio * N) most probable patches, of equals the first ones: (B, N) -> bool (B, N)."""
    count = round(ratio * probability.shape[1])
    order = probability.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(probability, dtype=torch.bool).scatter(1, order[:, :count], True)


def weighted_reconstruction_loss(
    prediction: Tensor, target: Tensor, mask: Tensor, probability: Tensor, normalization: str = "mean"
) -> Tensor:
    """Eq. 1: squared error of each masked patch times its probability; (B, N, P) twice, (B, N) twice -> scalar.

    mean: over masked patches, as the code. sum: that of Eq. 1, divided by the number of images. A patch's error is the
    mean over its pixels.
    """
    error = (widen(prediction) - widen(target)).square().mean(dim=-1)  # (B, N)
    total = (mask * probability * error).sum()
    return total / (len(error) if normalization == "sum" else mask.detach().sum())


def soft_selection(probability: Tensor, ratio: float, kind: str, temperature: float = 0.1) -> Tensor:
    """`top_mask` as numbers 0 and 1 (B, N), through which a gradient passes to `probability` (App. A.4).

    straight_through: as if the selection were the identity. softsort: that of SoftSort (Prillo and Eisenschlos 2020),
    where rank i takes patch j with a share of softmax_j(-|sorted_i - p_j| / temperature), and a patch is masked by the
    sum of its shares in the first ranks. weight: no gradient passes.
    """
    hard, soft = top_mask(probability, ratio).to(probability.dtype), probability
    if kind == "weight":
        return hard
    if kind == "softsort":
        count = round(ratio * probability.shape[1])
        first = probability.sort(dim=1, descending=True).values[:, :count]  # (B, ranks)
        shares = (-(first[:, :, None] - probability[:, None]).abs() / temperature).softmax(dim=2)  # (B, ranks, N)
        soft = shares.sum(dim=1)
    return hard + (soft - soft.detach())  # the brackets make it exactly 0 or 1


# The hypergradient (appendix A). Parameters are dicts {name: tensor}; losses are functions of two of them.


def moved(at: dict, direction: dict, share: float) -> dict:
    """at + share * direction, name by name."""
    return {name: value + share * direction[name] for name, value in at.items()}


def gradients_and_value(loss, *points: dict) -> tuple[list, Tensor]:
    """The gradients of loss(*points) by each point, a dict each, and that loss; in less time than by torch.func.

    Tensors that require gradients are used themselves, not copies: `loss` may go on from what was computed with them.
    """
    points = [{name: x if x.requires_grad else x.detach().requires_grad_() for name, x in p.items()} for p in points]
    with torch.enable_grad():
        value = loss(*points)
    found = iter(torch.autograd.grad(value, [x for p in points for x in p.values()], materialize_grads=True))
    return [{name: next(found) for name in p} for p in points], value.detach()


def forward_over_reverse(loss, at: dict, direction: dict, wanted: dict) -> dict:
    """The forward-mode derivative of the gradient by `wanted`: cheap if little lies between `wanted` and the loss."""
    gradient = torch.func.grad(loss, argnums=1)
    return torch.func.jvp(lambda at: gradient(at, wanted), (at,), (direction,))[1]


def reverse_over_reverse(loss, at: dict, direction: dict, wanted: dict) -> dict:
    """The gradient by `wanted` of the slope along `direction`: cheap where little lies between `at` and the loss."""
    at = {name: value.detach().requires_grad_() for name, value in at.items()}

    def slope(wanted):
        slopes = torch.autograd.grad(loss(at, wanted), list(at.values()), create_graph=True)
        return sum((x * direction[name]).sum() for name, x in zip(at, slopes, strict=True))

    (gradient,), _ = gradients_and_value(slope, wanted)
    return gradient


def central_difference(loss, at: dict, direction: dict, wanted: dict, radius: float = 0.01) -> dict:
    """Eq. 12 with both ends (App. A.2): gradients by `wanted` 2 `radius` apart; both see the same random numbers."""
    gradient = torch.func.grad(loss, argnums=1)
    eps = radius / (float(sum(v.square().sum() for v in direction.values())) ** 0.5 + 1e-15)
    device = next(iter(at.values())).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        ahead = gradient(moved(at, direction, eps), wanted)
    behind = gradient(moved(at, direction, -eps), wanted)
    return {name: (ahead[name] - behind[name]) / (2 * eps) for name in wanted}


def mixed_product(loss, at: dict, direction: dict, wanted: dict, method: str = "forward", radius: float = 0.01) -> dict:
    """How the gradient of loss(at, wanted) by `wanted` changes when `at` moves along `direction` -> {name: tensor}.

    A matrix times a vector; the matrix is the mixed second derivative of Eq. 10 or 11. `method` is forward or reverse,
    which are exact, or finite_difference, with its `radius`. (adamw is no method, but a rate: `adamw_derivative`.)
    """
    if method == "finite_difference":
        return central_difference(loss, at, direction, wanted, radius)
    exact = {"forward": forward_over_reverse, "reverse": reverse_over_reverse}
    # Fused attention has no forward-mode derivative, and no second one. (This is for losses of your own: level I here
    # has `PlainAttention`, and level II goes back through attention but once.)
    with sdpa_kernel(SDPBackend.MATH):
        return exact[method](loss, at, direction, wanted)


def adamw_derivative(gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, lr, betas, eps) -> Tensor:
    """How far AdamW's step takes a weight down for each unit of its gradient: what stands in for eta in Eq. 10 and 11.

    The step is w' = (1 - lr decay) w - lr m / (sqrt(v) + eps), where the averages m and v, without their bias, hold a
    share of the gradient g and of its square. This is -dw'/dg, a number a weight. `exp_avg`, `exp_avg_sq` and `step`
    (0-d) are what torch's AdamW keeps, after the step. Where v is 0, all gradients so far were 0, and sqrt(v) has no
    slope: m's part counts alone.
    """
    first, second = (1 - beta ** step.double() for beta in betas)  # they take the bias off
    m, root = exp_avg / first, (exp_avg_sq / second).sqrt()
    by_root = torch.where(root > 0, (1 - betas[1]) / second * gradient / root, 0.0)  # d sqrt(v) / dg
    return lr * ((1 - betas[0]) / first - m * by_root / (root + eps)) / (root + eps)


def weighed(direction: dict, rate) -> tuple:
    """A direction and its factor; where that is one for each weight, a dict, they go into the direction and leave 1."""
    if isinstance(rate, dict):
        return {name: value * rate[name] for name, value in direction.items()}, 1.0
    return direction, rate


def hypergradient(
    level_1,
    level_2,
    level_3,
    encoder: tuple[dict, dict],
    head: tuple[dict, dict],
    masking: dict,
    lr_encoder: float | dict = 1.0,
    lr_head: float | dict = 1.0,
    method: str = "exact",
    radius: float = 0.01,
    paths: tuple = ("head", "encoder"),
    mean=lambda gradient: gradient,
) -> tuple[dict, Tensor]:
    """The gradient of level III's loss by T through a step of each level (Eq. 8 to 11) -> {name: tensor}, that loss.

    level_1(encoder, masking), level_2(encoder, head) and level_3(encoder, head) are losses of parameters; `encoder` and
    `head` are pairs, before and after their step:
        E' = E - lr_encoder dL1/dE(E, T),   C' = C - lr_head dL2/dC(E', C).
    (Eq. 11 is printed without the second minus.) A step of another kind has a rate for each weight, {name: tensor}: how
    far it goes down for each unit of the gradient (`adamw_derivative`). The first term of Eq. 9 is 0, as level III does
    not see T. `paths` are those that count: encoder is val -> E' -> T, head is val -> C' -> E' -> T. With both learning
    rates at 1 they weigh as in the authors' code. `method` is exact or finite_difference, with its `radius`. `mean`
    averages over the processes: each sees a part of the batches, and a product of derivatives is not the mean of its
    parts.
    """
    (encoder_before, encoder_after), (head_before, head_after) = encoder, head
    # Little lies between the head and level II's loss (reverse), and between T's weights and level I's (forward).
    through_head, through_encoder = ("reverse", "forward") if method == "exact" else (method, method)
    gradients, loss = gradients_and_value(level_3, encoder_after, head_after)
    by_encoder, by_head = (mean(g) for g in gradients)
    towards = {name: value if "encoder" in paths else torch.zeros_like(value) for name, value in by_encoder.items()}
    if "head" in paths:
        by_head, lr_head = weighed(by_head, lr_head)
        product = mixed_product(lambda c, e: level_2(e, c), head_before, by_head, encoder_after, through_head, radius)
        towards = moved(towards, mean(product), -lr_head)  # dL3/dE', through both paths
    towards, lr_encoder = weighed(towards, lr_encoder)
    product = mean(mixed_product(level_1, encoder_before, towards, masking, through_encoder, radius))
    return {name: -lr_encoder * value for name, value in product.items()}, loss


def proximal_hypergradient(
    level_1, level_3, encoder: dict, tuned: dict, masking: dict, lr_encoder, lr_tuned, proximal, method, radius, mean
) -> tuple[dict, Tensor]:
    """As `hypergradient`, where level II fine-tunes an encoder F (Eq. 13): level_3(tuned) is a loss of F after a step,
        F' = F - lr_tuned d/dF (L2(F, C) + proximal |F - E'|^2),
    so the one path is val -> F' -> E' -> T, with dF'/dE' = 2 lr_tuned proximal: C' sees F before its step, which knows
    no E'. `encoder` is E before its step; the names of `tuned` are those of `encoder`.
    """
    (by_tuned,), loss = gradients_and_value(level_3, tuned)
    by_tuned, lr_tuned = weighed(mean(by_tuned), lr_tuned)
    towards = {name: 2 * lr_tuned * proximal * value for name, value in by_tuned.items()}
    towards, lr_encoder = weighed(towards, lr_encoder)
    kind = "forward" if method == "exact" else method
    product = mean(mixed_product(level_1, encoder, towards, masking, kind, radius))
    return {name: -lr_encoder * value for name, value in product.items()}, loss


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


Derivative = Literal["exact", "finite_difference", "adamw"]


@dataclass
class Config(TrainConfig):
    """The paper's experiment on ImageNet (Table 11)."""

    epochs: int = 50  # passes of level II over its images
    batch_size: int = 256  # images of one step of one level, over all processes
    base_lr: float = 1e-4  # learning rate of the autoencoder for a batch of 256
    head_lr: float = 4e-5  # learning rate of the head, for a batch of 256
    mask_lr: float = 4e-5  # learning rate of the masking network, for a batch of 256
    warmup_epochs: int = 0  # epochs in which the learning rate rises linearly
    crop_min: float = 0.2  # smallest share of the image that a random resized crop keeps
    model: ViTSize = "vit_base"  # size of the encoder
    patch: int = 16  # side of a patch, in pixels
    decoder_dim: int = 512  # width of the decoder
    decoder_depth: int = 8  # blocks of the decoder
    decoder_heads: int = 16  # attention heads of the decoder
    mask_ratio: float = 0.75  # r: share of the patches that are masked
    mask_ratio_end: float = 0.0  # r in the last epoch, reached linearly; 0 for no change (Table 17: 0.5 to 0.9)
    hidden: int = 512  # hidden width of the masking network
    objective: Literal["mlo", "blo", "full", "mae", "fixed"] = "mlo"  # full: Eq. 13; mae: random masks; fixed: one
    unrolling: int = 1  # steps of level I in a cycle (Table 7)
    head_steps: int = 1  # steps of level II in a cycle (section 3.2 has several); the last is differentiated
    fresh_head: bool = False  # start the head anew in each cycle (Algorithm 1, line 13)
    update_every: int = 1  # cycles between two steps of the masking network (Table 16)
    hypergradient: Derivative = "exact"  # of plain steps, exact or by the paper's difference; or of AdamW's, exact
    radius: float = 0.01  # finite_difference: how far the parameters move
    lr_factors: bool = True  # with the learning rates of Eq. 10 and 11; without them is the code
    mask_gradient: Literal["weight", "straight_through", "softsort"] = "weight"  # how the gradient reaches T (App. A.4)
    temperature: float = 0.1  # of softsort
    normalization: Literal["mean", "sum"] = "mean"  # of the loss of level I: that of the code, or Eq. 1
    detach_tokens: bool = False  # keep the encoder from learning through the masking network's input
    level1_data: Literal["train", "all"] = "train"  # images of level I: without the validation part, or all (the code)
    validation: float = 0.2  # share of the labelled training images kept for level III
    head: Literal["linear", "code"] = "linear"  # that of the code has a norm and dropout 0.1 before it
    gamma: float = 1.0  # blo: weight of the reconstruction (Eq. 5)
    proximal: float = 0.01  # full: lambda, which holds the fine-tuned encoder near the pretrained one (Eq. 13)
    start: str = ""  # weights to go on from (section 3.6): an encoder.pt or last.pt, MAE's or timm's

    @property
    def learns_masks(self) -> bool:
        return self.objective in ("mlo", "blo", "full")

    def check(self):
        super().check()
        check_least(self, unrolling=1, head_steps=1, update_every=1, hidden=1, gamma=0, proximal=0)
        check_positive(self, "base_lr", "head_lr", "mask_lr", "temperature", "radius")
        if not 0 < self.validation < 1:
            raise UserError(f"--validation {self.validation} is no share of the images; give more than 0, less than 1")
        if self.objective == "blo" and (self.head_steps > 1 or self.fresh_head):
            raise UserError("--objective blo has no level II: leave out --head-steps and --fresh-head")
        if self.hypergradient == "adamw" and self.clip:
            raise UserError("--hypergradient adamw does not differentiate --clip; leave out one of the two")
        if self.hypergradient == "adamw" and not self.lr_factors:
            raise UserError("--hypergradient adamw has the learning rates within; leave out --no-lr-factors")
        last, patches = self.mask_ratio_end, (self.image_size // max(1, self.patch)) ** 2
        if last and not (0 < last < 1 and 0 < round(last * patches) < patches):
            none = f"--mask-ratio-end {last} leaves no patch masked or none visible out of {patches}"
            raise UserError(f"{none}; give more than 0, less than 1, or 0 for no change")
        if self.accumulate > 1:
            raise UserError("--accumulate does not work here: a step has a batch for each level; leave it out")
        if self.compile:
            raise UserError(
                "--compile does not work here: torch.compile fails at the forward-mode derivative of a layer norm "
                "(docs/speed.md); leave it out"
            )

    def notes(self) -> list:
        never = f"--mask-ratio-end {self.mask_ratio_end} is never reached in a single epoch"
        return super().notes() + ([never] if self.mask_ratio_end and self.epochs == 1 else [])


CIFAR = {"image_size": 32, "patch": 2, "epochs": 200, "batch_size": 128, "unrolling": 2}  # Table 12
CIFAR |= {"crop_pad": 4}  # "conventional RandomCrop" (App. B.4); the 4 is the code's
CIFAR |= {"base_lr": 1e-3, "head_lr": 2e-3, "mask_lr": 2e-3}  # the latter two are 1e-3 at its batch of 128
LAPTOP = {"image_size": 32, "patch": 4, "model": "vit_micro", "batch_size": 32, "hidden": 128}
LAPTOP |= {"unrolling": 5, "update_every": 5, "head_lr": 2e-1, "mask_lr": 4e-3, "warmup_epochs": 1}
LAPTOP |= {"decoder_dim": 96, "decoder_depth": 2, "decoder_heads": 3}

RECIPES = {"imagenet": {}, "cifar10": CIFAR, "cifar100": CIFAR}  # Table 11 (the defaults of Config), Table 12
RECIPES |= {"shapes": LAPTOP | {"epochs": 6, "base_lr": 12e-3, "crop_min": 0.8, "probe_every": 6}}  # from here on ours
RECIPES |= {"photos": LAPTOP | {"image_size": 64, "patch": 8, "epochs": 6, "epoch_steps": 100, "base_lr": 8e-3}}
OURS = {"epochs": 5, "base_lr": 8e-3, "crop_min": 0.5, "crop_pad": 0, "probe_every": 5}
RECIPES |= {"cifar10 --model vit_micro": LAPTOP | OURS}


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------


class MultiLevelMAE(Method):
    """The three levels. A step of the loop is a cycle: `unrolling` steps of level I, `head_steps` of level II, and in
    every `update_every`th cycle one of level III.
    """

    name = "mlo_mae"
    captions = ("image", "probability", "masked image", "reconstruction")

    def __init__(self, config: Config, data):
        super().__init__()
        self.held_out, self.trained_on = split_labelled(data, config)  # images of level III and of level II
        size, look = VIT_SIZES[config.model], {"mean": data.mean, "std": data.std}
        encoder = ViT(config.image_size, config.patch, **size, pool="cls", **look)  # E, with D in the autoencoder
        decoder = (config.decoder_dim, config.decoder_depth, config.decoder_heads)
        self.autoencoder = MaskedAutoencoder(encoder, *decoder, config.mask_ratio)
        self.head = nn.Linear(encoder.dim, len(data.classes))  # C
        if config.head == "code":
            self.head = nn.Sequential(nn.LayerNorm(encoder.dim, eps=1e-6), nn.Dropout(0.1), self.head)
        if config.fresh_head:
            self.first_head = copy.deepcopy(self.head).requires_grad_(False)
        patches = math.prod(encoder.grid)
        self.masking = MaskingNetwork(patches, encoder.dim, config.hidden) if config.learns_masks else None  # T
        self.origin = start_from(self, config, VIT_SIZES)
        self.tuned = copy.deepcopy(encoder) if config.objective == "full" else None  # F of Eq. 13
        self.register_buffer("fixed_noise", torch.rand(1, patches))  # of the one mask of --objective fixed
        self.register_buffer("validation_loss", torch.tensor(0.0))  # of the last step of level III
        self.config, self.ratio = config, config.mask_ratio
        self.last_gradients = {}  # each network's {parameter: tensor} of its last step, for --hypergradient adamw

    @property
    def encoder(self) -> ViT:
        return self.autoencoder.encoder

    def plan(self, images: int, config: Config) -> BatchPlan:
        return LevelPlan(images, config, self.trained_on, self.held_out)

    def start_epoch(self, epoch: int):
        """The curriculum of the mask ratio (Table 17)."""
        first, last = self.config.mask_ratio, self.config.mask_ratio_end or self.config.mask_ratio
        self.ratio = first + (last - first) * epoch / max(1, self.config.epochs - 1)

    def optimizer(self, config: Config) -> torch.optim.Optimizer:
        """AdamW for all levels, each in groups of its own: a step moves those that have a gradient, and no others."""
        networks = (self.autoencoder, self.head, self.masking, self.tuned)
        rates, groups = (config.base_lr, config.head_lr, config.mask_lr, config.base_lr), []
        for network, rate in zip(networks, rates, strict=True):
            # T's gradients are tiny, as they carry a learning rate; 1e-8 would drown them.
            options = {"lr_scale": rate / config.base_lr, "eps": 1e-15 if network is self.masking else 1e-8}
            for plain in (False, True) if network is not None else ():
                chosen = [p for name, p in network.named_parameters() if decays(name, p, config.decay_on) != plain]
                groups.append({"params": chosen, "weight_decay": 0.0 if plain else config.weight_decay} | options)
        return torch.optim.AdamW(groups, lr=config.base_lr, betas=tuple(config.betas), fused=True)

    # The losses of the levels.

    def choose(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D) -> what is masked, numbers 0 and 1, and the probability of each patch; both (B, N)."""
        config = self.config
        if config.learns_masks:
            seen = widen(tokens.detach() if config.detach_tokens else tokens)
            with torch.autocast(tokens.device.type, enabled=False):  # in bf16 many probabilities would be equal
                probability = self.masking(seen)
            return soft_selection(probability, self.ratio, config.mask_gradient, config.temperature), probability
        noise = torch.rand(tokens.shape[:2], device=tokens.device)
        noise = self.fixed_noise.expand_as(noise) if config.objective == "fixed" else noise
        return top_mask(noise, self.ratio).float(), torch.ones_like(noise)

    def reconstruct(self, images: Tensor) -> tuple:
        """Images (B, 3, H, W) -> prediction (B, N, P), target (B, N, P), mask (B, N), probability (B, N)."""
        tokens = self.encoder.embed(images)  # (B, N, D)
        mask, probability = self.choose(tokens)
        visible = visible_patches(mask.detach(), mask.shape[1] - round(self.ratio * mask.shape[1]))  # (B, M)
        if self.config.mask_gradient != "weight" and self.config.learns_masks:
            tokens = tokens * (1 - mask)[..., None]  # of visible ones times 1, with the gradient of the selection
        encoded = self.encoder.encode(take(tokens, visible))  # (B, 1 + M, D)
        return self.autoencoder.decode(encoded, visible), self.autoencoder.target(images), mask, probability

    def pretraining_loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Level I, Eq. 1, and the probabilities (B, N)."""
        prediction, target, mask, probability = self.reconstruct(images)
        normalization = self.config.normalization
        return weighted_reconstruction_loss(prediction, target, mask, probability, normalization), probability

    def features(self, images: Tensor) -> Tensor:
        """What the head sees: the CLS token (B, D) of whole images, by E, or in Eq. 13 by F (levels II and III)."""
        return cls_token(self.tuned or self.encoder, images)

    def classification_loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Levels II and III, Eq. 2 and 3: cross-entropy of the head on features (B, D)."""
        return F.cross_entropy(widen(self.head(features)), labels)

    def forward(self, images: Tensor, labels: Tensor | None = None, level: int = 1, features=None) -> Tensor:
        """The loss of a level as a scalar, for `torch.func.functional_call`: the loop calls `update`, never this.

        `features` (B, D) are those of the images, where they are known.
        """
        if level == 1:
            with PlainAttention():
                return self.pretraining_loss(images)[0]
        return self.classification_loss(self.features(images) if features is None else features, labels)

    # A cycle.

    def update(self, model: nn.Module, batches: list, stepper) -> dict:
        """A cycle: Eq. 6 and 7 some times each, and Eq. 8 where images for it came along (`LevelPlan`)."""
        ((images, labels),) = batches
        config, size = self.config, self.config.batch_size // world_size()
        parts = list(zip(images.split(size), labels.split(size), strict=True))
        # As `LevelPlan.draw` lays them out: batches of level I, then of level II, and in some cycles one of level III.
        first, second = config.unrolling, config.unrolling + config.head_steps
        unlabelled, trainings, validation = parts[:first], parts[first:second], parts[second:]
        total, training = 0.0, trainings[-1]
        for batch, _ in unlabelled:
            before = self.weights("autoencoder.", copy=bool(validation))  # those before the last step remain
            loss, head_loss, probability = self.train_autoencoder(batch, training, stepper)
            total = total + loss.detach() / config.unrolling
        if config.fresh_head:
            self.head.load_state_dict(self.first_head.state_dict())
            for parameter in self.head.parameters():
                stepper.optimizer.state.pop(parameter, None)
        features = None
        for batch in trainings:
            head_before = self.weights("head.", copy=True)
            if config.objective != "blo":
                head_loss, features = self.train_head(*batch, stepper, keep=bool(validation))
        if validation:
            learned_from = (unlabelled[-1][0], None), training, validation[0]
            self.learn_masks(*learned_from, before, head_before, stepper, features)
        logged = {"loss": total, "loss_head": head_loss.detach()}
        if config.learns_masks:
            p = probability.detach().clamp(1e-6, 1 - 1e-6)
            logged |= {"loss_validation": self.validation_loss.clone(), "probability": p.mean(), "entropy": entropy(p)}
        return logged

    def train_autoencoder(self, images: Tensor, training: tuple, stepper) -> tuple:
        """Level I (Eq. 6), or with the head in one step (Eq. 5) -> loss, head's loss or None, probabilities (B, N)."""
        with stepper.autocast():
            loss, probability = self.pretraining_loss(images)
            objective, head_loss, learning = loss, None, [self.autoencoder]
            if self.config.objective == "blo":
                head_loss = self.classification_loss(self.features(training[0]), training[1])
                objective, learning = self.config.gamma * loss + head_loss, [self.autoencoder, self.head]
        self.descend(objective, learning, stepper)
        return loss, head_loss, probability

    def train_head(self, images: Tensor, labels: Tensor, stepper, keep: bool = False) -> tuple:
        """Level II: the head on fixed features (Eq. 7), or with the encoder F of Eq. 13, held near E by lambda.

        -> its loss, and with `keep` the features (B, D) with their graph for `masking_gradient`, where it can use them.
        """
        # None for `masking_gradient` where it computes in another precision or, with an F, does not look at level II.
        keep = keep and self.tuned is None and stepper.dtype != torch.float16
        keep = keep and self.config.hypergradient != "finite_difference"
        with stepper.autocast():
            with torch.set_grad_enabled(keep or self.tuned is not None):
                features = self.features(images)
            fixed = features if self.tuned is not None else features.detach()
            loss, learning = self.classification_loss(fixed, labels), [self.head]
            if self.tuned is not None:
                pairs = zip(self.tuned.parameters(), self.encoder.parameters(), strict=True)
                apart = sum((f - e.detach()).square().sum() for f, e in pairs)
                loss, learning = loss + self.config.proximal * apart, [self.tuned, self.head]
        self.descend(loss, learning, stepper)
        return loss, features if keep else None

    def learn_masks(self, unlabelled, training, validation, before, head_before, stepper, features=None):
        """Level III: one step of T (Eq. 8). Arguments as for `masking_gradient`."""
        batches, weights = (unlabelled, training, validation), (before, head_before)
        gradient, loss = self.masking_gradient(*batches, *weights, stepper, features)
        self.validation_loss.copy_(average(loss))
        for name, parameter in self.masking.named_parameters():
            parameter.grad = gradient["masking." + name].to(parameter)
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.masking.parameters(), self.config.clip)
        stepper.optimizer.step()  # these gradients were never scaled
        stepper.optimizer.zero_grad(set_to_none=True)

    def masking_gradient(self, unlabelled, training, validation, before, head_before, stepper, features=None) -> tuple:
        """The hypergradient {name of T's parameter: tensor}, and the loss of level III.

        The batches are (images, labels) of the last step of each level; `before` are the weights of the autoencoder and
        `head_before` those of the head, before these steps. `features` are those of level II, if their graph is there:
        the product through the head goes back through it, without another forward pass.
        """
        config, rates = self.config, [group["lr"] for group in stepper.optimizer.param_groups]  # two groups a network
        lr_encoder, lr_head = (rates[0], rates[2]) if config.lr_factors else (1.0, 1.0)
        lr_tuned, prefix = lr_encoder, "autoencoder.encoder."
        if config.objective == "blo":  # of its loss, gamma L1 + L2, only gamma L1 depends on T
            lr_encoder = config.gamma * lr_encoder
        lr_encoder, lr_head = self.rate_of(prefix, lr_encoder, stepper), self.rate_of("head.", lr_head, stepper)

        def loss_of(level, batch, others, features=None):
            """A level's loss as a function of the weights of the encoder and of one more network."""
            return lambda encoder, network: functional_call(self, others | encoder | network, (*batch, level, features))

        level_1 = loss_of(1, unlabelled, before)  # with the decoder as it was, too
        level_2, level_3 = loss_of(2, training, {}, features), loss_of(3, validation, {})
        encoder_before = {name: value for name, value in before.items() if name.startswith(prefix)}
        of_features = {name: p for name, p in self.named_parameters() if name.startswith(prefix)}
        encoder_after = self.weights(prefix) if features is None else of_features
        encoder, head = (encoder_before, encoder_after), (head_before, self.weights("head."))
        masking = self.weights("masking.")
        method = "finite_difference" if config.hypergradient == "finite_difference" else "exact"
        options = {"method": method, "radius": config.radius, "mean": mean_over_processes}
        # A difference needs every digit; a derivative does not, but fp16 is too narrow. torch.func ignores `no_grad`.
        narrow = stepper.dtype == torch.bfloat16 and method == "exact"
        self.eval()  # no dropout
        with torch.no_grad(), torch.autocast(unlabelled[0].device.type, torch.bfloat16, enabled=narrow):
            if config.objective == "full":
                of_tuned = lambda weights: level_3({x.replace(prefix, "tuned."): p for x, p in weights.items()}, {})
                tuned = {x.replace("tuned.", prefix): p for x, p in self.weights("tuned.").items()}
                steps = (lr_encoder, self.rate_of("tuned.", lr_tuned, stepper, prefix), config.proximal)
                found = proximal_hypergradient(level_1, of_tuned, encoder_before, tuned, masking, *steps, **options)
            else:
                if config.objective == "blo":  # E and C step at once, from the same point: C' depends on no E'
                    options["paths"] = ("encoder",)
                steps = (lr_encoder, lr_head)
                found = hypergradient(level_1, level_2, level_3, encoder, head, masking, *steps, **options)
        self.train()
        return found

    def rate_of(self, prefix: str, lr: float, stepper, renamed: str = ""):
        """How far a network's last step took it down for each unit of its gradient, as `hypergradient` wants it: `lr`
        for what is taken as a plain step, or, for AdamW's, {name: tensor} of the parameters whose name starts with
        `prefix`, which becomes `renamed`.
        """
        if self.config.hypergradient != "adamw":
            return lr
        gradients = self.last_gradients[self.get_submodule(prefix.split(".")[0])]
        options = stepper.optimizer.param_groups[0]
        taken, found = torch.stack([g.isfinite().all() for g in gradients.values()]).all(), {}  # fp16 leaves some out
        for name, parameter in self.named_parameters():
            if name.startswith(prefix):
                state, rest = stepper.optimizer.state[parameter], (lr, options["betas"], options["eps"])
                moments = (state["exp_avg"], state["exp_avg_sq"], state["step"])
                rate = adamw_derivative(gradients[parameter], *moments, *rest)
                found[name.replace(prefix, renamed or prefix)] = torch.where(taken, rate, 0.0)
        return found

    def descend(self, loss: Tensor, modules: list, stepper):
        """One step of the optimiser for these modules alone, by the gradient over all processes."""
        # `loss.backward()` would fill the gradients of other levels too, and DDP, not being called, not average them.
        parameters = [p for module in modules for p in module.parameters()]
        gradients = torch.autograd.grad(stepper.scaler.scale(loss), parameters)
        for parameter, gradient in mean_over_processes(dict(zip(parameters, gradients, strict=True))).items():
            parameter.grad = gradient
        if self.config.hypergradient == "adamw":
            kept = {parameter: parameter.grad for parameter in parameters}  # the step takes fp16's scale off, in place
            self.last_gradients |= {module: kept for module in modules}
        stepper.step()

    def weights(self, prefix: str, copy: bool = False) -> dict:
        """The parameters whose name starts with `prefix`, without gradients: {name: tensor}; cloned with `copy`."""
        found = {name: p.detach() for name, p in self.named_parameters() if name.startswith(prefix)}
        return {name: p.clone() for name, p in found.items()} if copy else found

    def probe(self, encode, train, test, config: Config) -> dict:
        """kNN, linear, `accuracy` of level II's head; on shapes `object`, its share of masked pixels over that of all
        pixels.
        """
        torch.manual_seed(config.seed)  # the same masks each time
        found = probe(encode, train, test, config.image_size, config.probe_images)
        chosen = labelled(test, config.probe_images)

        def look(images):
            with autocast(config.amp, images.device):
                mask, _ = self.choose(self.encoder.embed(images))
                return torch.cat([self.head(self.features(images)).float(), mask], dim=1)

        rows, labels = features_of(look, test, chosen, config.image_size)
        scores, masked = rows.tensor_split([len(test.classes)], dim=1)
        found["accuracy"] = 100 * float((scores.argmax(dim=1) == labels).float().mean())
        if getattr(test, "masks", None) is not None:
            objects = test.masks[chosen.to(test.masks.device)][:, None].float()  # (B, 1, H, W)
            share = F.avg_pool2d(objects, self.encoder.patch).flatten(1)  # (B, N)
            found["object"] = float((share * masked).sum() / masked.sum() / share.mean())
        return found

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Tensor:
        """Rows of (image, probability, masked image, reconstruction): (B, 4, 3, H, W) in [0, 1].

        Each image's lowest probability is blue, its highest yellow, however near these are.
        """
        prediction, _, mask, probability = self.reconstruct(images)
        low, high = probability.amin(dim=1, keepdim=True), probability.amax(dim=1, keepdim=True)
        heat = ((probability - low) / (high - low).clamp_min(1e-6)).unflatten(1, self.encoder.grid)[:, None]
        heat = F.interpolate(heat, scale_factor=self.encoder.patch)  # (B, 1, H, W)
        heat = torch.cat([heat, heat, 1 - heat], dim=1)
        rows = self.autoencoder.pictures_of(images, prediction, mask.bool())
        return torch.cat([rows[:, :1], heat[:, None], rows[:, 1:]], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Appendix: what each level loads, small helpers
# ---------------------------------------------------------------------------------------------------------------------


class LevelPlan(BatchPlan):
    """Which images a cycle loads: a batch for each step of level I and of level II, and one for level III where T
    learns in it. An epoch is one pass of level II over its images, `trained_on`, or --epoch-steps cycles; level III has
    those `held_out`.

    An example: ten images, 8 and 9 held out, batch_size 2, unrolling 2, update_every 2. An epoch has four cycles. For
    the first `draw` gives (4, 2) indices: two batches for level I and one for level II, out of 0 to 7, and one for
    level III, out of 8 and 9. For the second it gives (3, 2): there T does not learn.
    """

    def __init__(self, images: int, config: Config, trained_on: Tensor, held_out: Tensor):
        super().__init__(images, config)
        if min(len(trained_on) // config.head_steps, len(held_out)) < config.batch_size:
            raise UserError(
                f"a batch of {config.batch_size} is larger than the {len(held_out)} images of level III, or "
                f"--head-steps {config.head_steps} such batches than the {len(trained_on)} of level II; lower "
                f"--batch-size or --head-steps, or change --validation {config.validation}"
            )
        allowed = torch.ones(images, dtype=torch.bool)  # in level I
        if config.level1_data == "train":
            allowed[held_out] = False
        self.pools = ((allowed.nonzero()[:, 0], config.unrolling), (trained_on, config.head_steps), (held_out, 1))

    def __len__(self):
        images, steps = self.pools[1]
        return self.config.epoch_steps or len(images) // (steps * self.config.batch_size)

    def draw(self, epoch: int) -> list:
        config, levels = self.config, []
        for level, (pool, times) in enumerate(self.pools):
            order = shuffled(len(pool), len(self) * times * config.batch_size, mix_seed(config.seed, epoch, level))
            levels.append(pool[order].view(len(self), times, config.batch_size))
        learns = [config.learns_masks and step % config.update_every == 0 for step in self.steps_of(epoch)]
        return [torch.cat([level[i] for level in levels[: 2 + learns[i]]]) for i in range(len(self))]


class PlainAttention(TorchFunctionMode):
    """While this is on, torch's attention takes plain steps, which have a forward-mode derivative in bf16 on a GPU too.

    torch's own plain form (`SDPBackend.MATH`) mixes up types under autocast in torch 2.11, which was tried on a GPU.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        plain = function is F.scaled_dot_product_attention
        return (common.attend_plainly if plain else function)(*args, **kwargs or {})


def cls_token(encoder: ViT, images: Tensor) -> Tensor:
    """The CLS token of `encoder.encode(encoder.embed(images))`, (B, 3, H, W) -> (B, D).

    The last block computes it alone: from all keys and values, but for one query.
    """
    tokens, dim, block = encoder.embed(images), encoder.dim, encoder.blocks[-1]
    x = torch.cat([encoder.cls_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)  # (B, 1 + N, D)
    for earlier in encoder.blocks[:-1]:
        x = earlier(x)
    normed, weight, bias = block.norm1(x), block.attn["qkv"].weight, block.attn["qkv"].bias
    q, kv = F.linear(normed[:, :1], weight[:dim], bias[:dim]), F.linear(normed, weight[dim:], bias[dim:])
    q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=block.heads) for y in (q, *kv.chunk(2, dim=-1)))
    x = x[:, :1] + block.attn["proj"](rearrange(common.attend(q, k, v), "b h n d -> b n (h d)"))  # (B, 1, D)
    x = x + block.mlp["fc2"](F.gelu(block.mlp["fc1"](block.norm2(x))))
    return encoder.norm(x)[:, 0]


def split_labelled(data, config: Config) -> tuple[Tensor, Tensor]:
    """The labelled images, split by the seed: indices of level III's share, and of the rest, for level II."""
    if len(data.classes) < 2:
        wanted = "give pictures in the folders of two classes or more"
        raise UserError(f"mlo_mae learns from labels: {wanted}; these have {len(data.classes)}")
    chosen = labelled(data)
    order = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(mix_seed(config.seed, 5)))]
    return order.tensor_split([round(config.validation * len(order))])


def entropy(probability: Tensor) -> Tensor:
    """Mean entropy in bits of yes or no with these probabilities, each in (0, 1)."""
    other = 1 - probability
    return -(probability * probability.log() + other * other.log()).mean() / math.log(2)


def mean_over_processes(tensors: dict) -> dict:
    """Each tensor's mean over the processes, in one exchange."""
    if world_size() == 1:
        return tensors
    flat = average(torch.cat([x.flatten() for x in tensors.values()]))
    parts = flat.split([x.numel() for x in tensors.values()])
    return {name: part.view_as(x) for (name, x), part in zip(tensors.items(), parts, strict=True)}
