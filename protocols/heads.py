"""What is put on an encoder to judge it, how its parameters are grouped, and what fine-tuning adds to it."""

import functools
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common import Block, ViT, decays, initialize
from ebm_pretrain import ConvNeXtBlock, SwinBlock
from plumbing.errors import UserError
from plumbing.processes import note
from protocols.settings import Config, decoder_width, result_names

# ---------------------------------------------------------------------------------------------------------------------
# Heads
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
        self.apply(initialize)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)  # (B, N, width)
        for block in self.blocks:
            x = block(x)
        return self.classify(self.dropout(self.norm(x).mean(dim=1)))[None]


def make_head(kind: str, dim: int, classes: int, config: Config, std: float = 0.01, width: int = 0) -> nn.Module:
    """The head of a protocol, "linear", "tran1" or "tran4", on features of width `dim`; `width` as in `width_of`."""
    if kind == "linear":
        return LinearHeads(dim, classes, len(result_names("linear", config)), config.batchnorm, std)
    return TransformerHead(dim, decoder_width(width or dim), int(kind[-1]), classes, config.dropout)


def token_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """All positions (B, N, D), row by row: a transformer's patch tokens, without the CLS token, or a map's cells.

    Raises UserError for an encoder that gives one vector an image.
    """
    if isinstance(encoder, ViT):
        return encoder.encode(encoder.embed(images))[:, 1:]
    out = encoder(images)
    if out.ndim != 4:
        kind = type(encoder).__name__
        raise UserError(
            f"this encoder, a {kind}, gives one vector an image and no tokens: leave out --tokens, tran1 and tran4"
        )
    return rearrange(out, "b d h w -> b (h w) d")


def mean_before_norm(encoder: ViT, images: Tensor) -> Tensor:
    """The mean over patches (B, D) of what a transformer's last block gives, without its final norm (MAE's code)."""
    _, outputs = encoder.encode(encoder.embed(images), hidden=True)
    return outputs[-1][:, 1:].mean(dim=1)


def width_of(encoder: nn.Module) -> int:
    """The width that FINOLA's tables go by: that in a Mobile-Former's name, or of an encoder's features."""
    name = str(encoder.fields.get("width", ""))
    return int(name) if name.isdigit() else encoder.dim


# ---------------------------------------------------------------------------------------------------------------------
# Labels and losses
# ---------------------------------------------------------------------------------------------------------------------


def one_hot(labels: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """Labels (B,) -> (B, classes) with `smoothing` of the mass spread evenly over all classes (Szegedy et al. 2016)."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def soft_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits (heads, B, classes) with soft targets (B, classes), summed over heads -> scalar."""
    return sum(F.cross_entropy(one.float(), targets) for one in logits)


def accuracies(logits, labels: Tensor) -> list:
    """Accuracy in percent of each head: logits, a sequence of (N, classes); nan for a head that diverged."""
    right = [100 * float((one.argmax(dim=1) == labels).float().mean()) for one in logits]
    return [value if one.isfinite().all() else float("nan") for value, one in zip(right, logits, strict=True)]


def note_diverged(results: dict) -> dict:
    """The accuracies {name: percent}, with a note for each that is nan."""
    for name, value in results.items():
        if math.isnan(value):
            note(f"{name}: the head diverged, so it has no accuracy; lower its learning rate")
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Optimisers and their groups of parameters
# ---------------------------------------------------------------------------------------------------------------------


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
            group | {"lr_scale": rate / config.base_lr}
            for layer, rate in zip(head.layers, rates, strict=True)
            for group in layer_groups(None, layer, 1.0, config.weight_decay, config.decay_on)
        ]
    return layer_groups(None, head, 1.0, config.weight_decay, config.decay_on)


def layer_groups(
    encoder: nn.Module | None, head: nn.Module, decay: float, weight_decay: float, on: str = "matrices"
) -> list:
    """Parameter groups with layer-wise learning rates: `decay` to the power of the layers that lie above.

    What an encoder registers before its `blocks` (patches and tokens) is the lowest layer; what comes after them, and
    the head, is the highest. Weight decay acts `on` what `common.decays` says. Without an encoder, the head alone.
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
    for over, name, parameter in layers:
        groups.setdefault((over, decays(name, parameter, on)), []).append(parameter)
    return [
        {"params": group, "lr_scale": decay**over, "weight_decay": weight_decay if decayed else 0.0}
        for (over, decayed), group in groups.items()
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Stochastic depth
# ---------------------------------------------------------------------------------------------------------------------


def drop_path(x: Tensor, rate: float) -> Tensor:
    """Zero the whole of x for a random `rate` of the batch, and enlarge the rest so that the mean stays."""
    keep = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= rate
    return x * keep / (1 - rate)


BRANCHES = {Block: ("attn.proj", "mlp.fc2"), ConvNeXtBlock: ("fc2",)}  # layers whose outputs a block adds to its input


def add_drop_path(encoder: nn.Module, rate: float):
    """Stochastic depth (Huang et al. 2016) while training: rates rise linearly from 0 in the first block to `rate`.

    It acts on what the blocks of a ViT, a Swin or a ConvNeXt add to their input. What lies between the stages of the
    latter two is no block. Raises UserError for an encoder without such blocks.
    """
    blocks = [module for module in encoder.modules() if type(module) in BRANCHES]
    if not blocks:
        raise UserError("--drop-path needs a ViT, a Swin or a ConvNeXt; this encoder is none, give --drop-path 0")

    def count_images(module, inputs):  # the block within sees windows, those of an image one after the other
        module.block.images = len(inputs[0])

    def drop(block, share, module, inputs, output):
        if not module.training:
            return output
        images = getattr(block, "images", len(output))
        return drop_path(output.unflatten(0, (images, -1)), share).flatten(0, 1)  # all windows of an image, or none

    for i, block in enumerate(blocks):
        for name in BRANCHES[type(block)]:
            hook = functools.partial(drop, block, rate * i / max(1, len(blocks) - 1))
            block.get_submodule(name).register_forward_hook(hook)
    for module in encoder.modules():
        if isinstance(module, SwinBlock):
            module.register_forward_pre_hook(count_images)
