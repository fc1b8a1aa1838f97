"""MAGMA: manifold regularisation between the layers of a vision transformer.

Dondera, Singh and Jamali-Rad, "MAGMA: Manifold Regularization for MAEs" (arXiv 2412.02871; thesis, TU Delft 2024).

The idea: two images that are close in one layer should be close in the next. Build a graph over the images of a batch
from the features of a reference layer (the last but one), and penalise features of the regularised layer (the last)
that differ across its edges. The term is added to a self-supervised loss for a while early in training and removed
again; the paper finds that its effect lasts.

Equation                                                      function
Eq. 1      total loss                                         Magma.forward
Sec. 5.3   its schedule, e_st and e_dur                       Magma.start_epoch
Eq. 2, 6   regulariser as a trace                             manifold_loss
Eq. 3, 5   inverse form                                       inverse_manifold_loss, inverse_affinity
Eq. 4      Gaussian affinity between images                   affinity
Eq. 7      normalised Laplacian                               laplacian (and printed_laplacian, as printed)
Sec. 3.1   image = average of its patches                     image_features
Fig. 3     the term between all blocks, only measured         Magma.along_the_blocks (--log-layers)
U-MAE      uniformity (Zhang et al. 2022)                     uniformity_loss
Sec. 5     SimCLR, VICReg (Chen et al. 2020, Bardes 2021)     contrastive_loss, vicreg_loss, jitter

Train it:  python train.py magma                                  M-MAE on built-in pictures, on a laptop
           python train.py magma --lam 0                          the MAE baseline
           python train.py magma --uniformity 0.01                MU-MAE; with --lam 0, U-MAE
           python train.py magma --ssl simclr                     M-SimCLR; --ssl vicreg likewise
           python train.py magma --data imagenet100 --root DIR    the paper's experiment

Choices that change a number (docs/readings.md has all, docs/magma.md why; "code" is the authors' release):
* Eq. 7 prints D^-1/2 W D^-1/2. Minimising that trace would push similar images apart; the code has the identity minus
  it, and so have we. `--laplacian printed` is the text, `unnormalized` is D - W, half the double sum of Eq. 2.
* Eq. 4 prints exp(-d / 2 std); code and we have exp(-d / std) for i != j. `--kernel-factor 0.5 --diagonal` is the text.
* Eq. 2 sums over all pairs of layers in K; code and we average over the references of the last (`--layer-pairs all`).
  Gradients flow into both layers (`--detach-reference`), and the batch is that of one process (`--gather`).
* The average of patches is a mean over visible ones (printed: a sum). Biases, norms, tokens do not decay (code: all).
"""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import VIT_SIZES, MaskedAutoencoder, Method, ViT, ViTSize, gradient_if, reconstruction_loss
from plumbing.errors import UserError
from plumbing.processes import gather
from plumbing.settings import TrainConfig, check_least, check_positive
from plumbing.start import start_from

# ---------------------------------------------------------------------------------------------------------------------
# The paper's mathematics. B images, D width of a feature, M visible patches. Pure, of any float dtype and device.
# ---------------------------------------------------------------------------------------------------------------------


def widen(x: Tensor) -> Tensor:
    """Half precision to float32, since differences of similar features need every digit; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, which autocast would compute in half precision."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def image_features(tokens: Tensor) -> Tensor:
    """One vector an image, Sec. 3.1: the mean (printed: the sum) of its patch tokens: (B, 1 + M, D) -> (B, D).

    Without the CLS token. In `Magma` tokens are what a block returns, before the final norm.
    """
    return tokens[:, 1:].mean(dim=1)


def off_diagonal(like: Tensor) -> Tensor:
    """1 where i != j and 0 where i = j, as a matrix like the given one (B, B)."""
    return 1 - torch.eye(len(like), dtype=like.dtype, device=like.device)


def squared_distances(z: Tensor) -> Tensor:
    """All |z_i - z_j|^2: (B, D) -> (B, B), from a Gram matrix, so memory is O(B^2 + B D).

    The features are centred first. Without that (and in `torch.cdist`) a batch that has nearly collapsed around a large
    mean loses all digits of its differences, and of the gradient.
    """
    z = widen(z)
    z = z - z.mean(dim=0, keepdim=True)
    gram = product(z, z.T)  # (B, B), not always symmetric to the last bit, as gram + gram.T is
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - (gram + gram.T)).clamp_min(0)  # (B, B), exactly zero on the diagonal


def bandwidth(distances: Tensor, diagonal: bool = False) -> Tensor:
    """sigma of Eq. 4, the standard deviation of the squared distances: (B, B) -> scalar > 0.

    Over pairs i != j, or all pairs with `diagonal`. Where it vanishes, the mean distance stands in, or 1 for zero.
    """
    counted = torch.ones_like(distances) if diagonal else off_diagonal(distances)
    pairs = counted.sum()
    mean = (distances * counted).sum() / pairs.clamp_min(1)
    variance = ((distances - mean).square() * counted).sum() / (pairs - 1).clamp_min(1)
    spread_out = variance > (1e-6 * mean) ** 2
    # The inner `where` keeps the infinite slope of the square root at zero out of the gradient.
    deviation = torch.where(spread_out, variance, 1.0).sqrt()
    return torch.where(spread_out, deviation, torch.where(mean > 0, mean, 1.0))


def affinity(z: Tensor, kernel_factor: float = 1.0, diagonal: bool = False) -> Tensor:
    """How near the images are, Eq. 4: features (B, D) -> W (B, B), symmetric, in [0, 1].

    W_ij = exp(-kernel_factor d_ij / std(d)); the factor is 1 in the code, 1/2 in the text. W_ii = 0, 1 if `diagonal`.
    """
    distances = squared_distances(z)
    w = torch.exp(-kernel_factor * distances / bandwidth(distances, diagonal))
    return w if diagonal else w * off_diagonal(w)  # (B, B)


def printed_laplacian(w: Tensor, eps: float = 1e-4) -> Tensor:
    """S = D^-1/2 W D^-1/2, Eq. 7 as printed: (B, B) -> (B, B). `eps` is added to the degrees, as in the code."""
    scale = (w.sum(dim=1) + eps).rsqrt()  # (B,)
    return w * (scale[:, None] * scale[None, :])


def laplacian(w: Tensor, normalized: bool = True) -> Tensor:
    """Laplacian of the graph: I - D^-1/2 W D^-1/2 (Eq. 7 as the code has it), or D - W: (B, B) -> (B, B).

    Symmetric and positive semi-definite; eigenvalues of the normalised one lie in [0, 2]. With d the degrees,

        trace Y^T (D - W) Y = 1/2 sum_ij W_ij |y_i - y_j|^2, half of Eq. 2 but for its 1 / B^2
        trace Y^T (I - S) Y = 1/2 sum_ij W_ij |y_i / sqrt(d_i) - y_j / sqrt(d_j)|^2, up to eps: not Eq. 2

    So the normalised one does not vanish where all y are equal, and a common shift of them changes it.
    """
    if normalized:
        return torch.eye(len(w), dtype=w.dtype, device=w.device) - printed_laplacian(w)
    return torch.diag(w.sum(dim=1)) - w


LAPLACIANS = {"normalized": laplacian, "unnormalized": lambda w: laplacian(w, False), "printed": printed_laplacian}


def manifold_loss(
    regularized: Tensor,
    reference: Tensor,
    kernel_factor: float = 1.0,
    detach_reference: bool = False,
    diagonal: bool = False,
    form: str = "normalized",
) -> Tensor:
    """The regulariser, Eq. 6: trace(Y^T L Y) / B^2 with L the Laplacian of the reference: (B, D), (B, D') -> scalar.

    `form` is a key of LAPLACIANS. With "unnormalized" it is half of Eq. 2; "printed" alone can be negative (not with
    `diagonal`). Gradients flow into both layers, unless `detach_reference`. Finite for any batch: one image, two,
    identical ones.
    """
    regularized = widen(regularized)
    w = affinity(reference.detach() if detach_reference else reference, kernel_factor, diagonal)  # (B, B)
    if form == "unnormalized":  # a common shift changes nothing there, and in float32 a large one drowns the gradient
        regularized = regularized - regularized.mean(dim=0, keepdim=True)
    return (regularized * product(LAPLACIANS[form](w), regularized)).sum() / len(regularized) ** 2


def inverse_affinity(z: Tensor, kernel_factor: float = 0.5) -> Tensor:
    """w* of Eq. 5, large for images far apart: exp(+ kernel_factor d_ij / std(d)), i != j: (B, D) -> (B, B) >= 0.

    The factor is that of the text, since the code has no inverse form. The exponent's limit of 30 is ours.
    """
    distances = squared_distances(z)
    exponent = (kernel_factor * distances / bandwidth(distances)).clamp_max(30)
    return exponent.exp() * off_diagonal(distances)


def inverse_manifold_loss(
    regularized: Tensor, reference: Tensor, kernel_factor: float = 0.5, detach_reference: bool = False
) -> Tensor:
    """Reg* of Eq. 3: images far apart in the reference must not be close: (B, D), (B, D') -> scalar >= 0.

    In float64, since one over a small distance makes its rounding errors large; 1e-6, our choice, keeps it finite.
    """
    w = inverse_affinity((reference.detach() if detach_reference else reference).double(), kernel_factor)
    return (w / (squared_distances(regularized.double()) + 1e-6)).sum() / len(regularized) ** 2


def uniformity_loss(z: Tensor) -> Tensor:
    """U-MAE's uniformity: the mean over all pairs, i = j too, of the squared cosine: (B, D) -> scalar in [1/B, 1]."""
    z = F.normalize(widen(z), dim=1)
    return product(z, z.T).square().mean()


def contrastive_loss(a: Tensor, b: Tensor, temperature: float = 0.2) -> Tensor:
    """SimCLR's NT-Xent over two views (B, D), (B, D): pick the other view among all 2B - 1 others -> scalar."""
    z = F.normalize(widen(torch.cat([a, b])), dim=1)  # (2B, D)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (product(z, z.T) / temperature).masked_fill(itself, -math.inf)  # (2B, 2B)
    other_view = torch.arange(len(z), device=z.device).roll(len(a))
    return F.cross_entropy(logits, other_view)


def vicreg_loss(a: Tensor, b: Tensor, weights: tuple = (25.0, 25.0, 1.0)) -> Tensor:
    """VICReg over two views (B, D), (B, D): invariance, variance and covariance, weighted -> scalar >= 0.

    As in solo-learn: the views' variance terms are added (VICReg's Eq. 6; its code takes their mean), and the
    invariance is a mean over channels too (its code; its Eq. 5 sums over them).
    """
    a, b = widen(a), widen(b)
    invariance, variance, covariance = F.mse_loss(a, b), 0.0, 0.0
    for z in (a, b):
        z = z - z.mean(dim=0)
        deviation = (z.square().sum(dim=0) / max(1, len(z) - 1) + 1e-4).sqrt()  # (D,)
        variance = variance + F.relu(1 - deviation).mean()  # a hinge: channels want a deviation of 1 or more
        square = (product(z.T, z) / max(1, len(z) - 1)).square()  # (D, D)
        covariance = covariance + (square.sum() - square.diagonal().sum()) / z.shape[1]
    return weights[0] * invariance + weights[1] * variance + weights[2] * covariance


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Config(TrainConfig):
    """The paper's experiment on ImageNet-100 (Appendix A, Table 4); RECIPES has its other data sets."""

    epochs: int = 400
    model: ViTSize = "vit_base"  # size of the encoder
    heads: int = 0  # attention heads of the encoder, 0 for those of its size (the code's MAE has 12 in vit_tiny)
    patch: int = 16  # side of a patch, in pixels
    positions: Literal["fixed", "learned"] = "fixed"  # of the encoder; the code's SimCLR and VICReg learn them
    pool: Literal["cls", "mean"] = "cls"  # what is probed: the CLS token (the code), or the mean of the patch tokens
    decoder_dim: int = 512  # width of the decoder
    decoder_depth: int = 8  # blocks of the decoder
    decoder_heads: int = 16  # attention heads of the decoder
    mask_ratio: float = 0.75  # share of the patches that are masked
    norm_pixels: bool = True  # normalise the pixels to predict patch by patch
    ssl: Literal["mae", "simclr", "vicreg"] = "mae"  # L_SSL of Eq. 1
    lam: float = 1.0  # lambda of Eq. 1, the weight of the regulariser; 0 is the baseline
    e_st: int = 10  # epoch in which the regulariser starts, counted from 0
    e_dur: int = 100  # epochs that it lasts
    uniformity: float = 0.0  # weight of U-MAE's uniformity; 0.01 is U-MAE, or with the regulariser MU-MAE
    inverse: float = 0.0  # weight of Eq. 3, in the epochs of the regulariser
    layers: tuple[int, ...] = (-2, -1)  # K: reference layers, then the regularised one; blocks, counted as in Python
    layer_pairs: Literal["last", "all"] = "last"  # each reference to the last of K, averaged; or all k != l, summed
    laplacian: Literal["normalized", "unnormalized", "printed"] = "normalized"  # that of the code, half of Eq. 2, Eq. 7
    kernel_factor: float = 1.0  # of Eq. 4: 1 is the code's, 0.5 the text's; Eq. 5 (--inverse) has 0.5
    diagonal: bool = False  # count i = j in Eq. 4 (text) or not (code)
    log_layers: bool = False  # log the term between each block and the next, too (Fig. 3); the training is the same
    detach_reference: bool = False  # stop the gradient through the weights w
    shuffle_graph: bool = False  # a control: each image has the neighbours of one drawn at random, for each term
    gather: bool = False  # one graph, one uniformity and one SSL loss over the images of all processes
    gather_graph: bool = True  # with --gather; without, each process has a graph of its own, as in the code
    temperature: float = 0.2  # of SimCLR
    vicreg: tuple[float, float, float] = (25.0, 25.0, 1.0)  # weights of invariance, variance and covariance
    projector_dim: int = 2048  # hidden width of the projector of SimCLR and VICReg
    colour: float = 1.0  # strength of the colour jitter of SimCLR and VICReg
    blur: float = 0.5  # probability of blurring a view of SimCLR and VICReg
    start: str = ""  # weights to start from: an encoder.pt or last.pt, MAE's or timm's

    in_epochs = (*TrainConfig.in_epochs, ("e_st", 0), ("e_dur", 1))

    def check(self):
        super().check()
        if not self.gather and not self.gather_graph:
            raise UserError("--no-gather-graph says what --gather leaves out; give both or neither")
        if self.shuffle_graph and (self.gather or self.layer_pairs == "all"):  # each pair would want its own order
            raise UserError("--shuffle-graph does not go with --gather or --layer-pairs all; leave out one")
        check_least(self, lam=0, uniformity=0, inverse=0, e_st=0, e_dur=0, colour=0, projector_dim=1)
        check_positive(self, "kernel_factor", "temperature")
        if not 0 <= self.blur <= 1:
            raise UserError(f"--blur {self.blur} is not a probability; give 0 to 1")
        if not all(0 <= weight < math.inf for weight in self.vicreg):  # false of nan, too
            given = " ".join(map(str, self.vicreg))
            raise UserError(f"--vicreg {given} makes no sense; give three weights of 0 or more")
        depth = VIT_SIZES[self.model]["depth"]
        exist = all(-depth <= layer < depth for layer in self.layers)
        different = len({layer % depth for layer in self.layers}) == len(self.layers)
        if not exist or not different or len(self.layers) < 2:
            given, limits = " ".join(map(str, self.layers)), f"from {-depth} to {depth - 1}"
            raise UserError(f"--layers {given}: give two or more different blocks {limits}, those of {self.model}")

    def notes(self) -> list:
        late = self.e_st >= self.epochs and f"--e-st {self.e_st} is not before the end of --epochs {self.epochs}"
        never = late or not self.e_dur and "--e-dur 0"
        if not (self.lam or self.inverse):  # a baseline
            never = self.shuffle_graph and "--shuffle-graph with --lam 0"
        return super().notes() + [f"{never}: the regulariser never acts"] * bool(never)


# Heads, betas and e_dur are the code's: the tables have none.
# 3e-5 is the text's start of the warm-up, and solo-learn's; the released configurations, of ImageNet, have 0.
TABLE_4 = {"model": "vit_tiny", "heads": 12, "warmup_lr": 3e-5}
TABLE_5 = TABLE_4 | {"heads": 3}
TABLE_5 |= {"epochs": 1000, "batch_size": 256, "base_lr": 1e-3, "betas": (0.9, 0.999), "e_st": 10}
LAPTOP = {"model": "vit_micro", "patch": 4, "image_size": 32, "decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 4}
LAPTOP |= {"pool": "mean", "warmup_epochs": 2, "e_st": 5}
PHOTOS = {"image_size": 64, "patch": 8, "epochs": 20, "epoch_steps": 100, "batch_size": 32, "base_lr": 8e-3}
VIEWS = {"batch_size": 128, "base_lr": 1e-3, "betas": (0.9, 0.999)}  # on a laptop
SIMCLR_32, VICREG_32 = {"blur": 0.0, "colour": 0.5}, {"blur": 0.0}  # for pictures of 32 x 32

RECIPES = {
    # Table 4: MAE, M-MAE, U-MAE and MU-MAE. Batches of 512 double the printed learning rate, as solo-learn does.
    "cifar100": TABLE_4 | {"patch": 4, "image_size": 32, "epochs": 2000, "e_st": 60},
    "tinyimagenet": TABLE_4 | {"patch": 8, "image_size": 64, "epochs": 800, "batch_size": 512, "base_lr": 1e-3},
    "stl10": TABLE_4 | {"patch": 12, "image_size": 96, "epochs": 800, "batch_size": 512, "base_lr": 3e-4},
    "imagenet100": {},  # the defaults of Config
    "imagenet": {"e_st": 3},  # the released configuration
    # Table 5: SimCLR and VICReg, with and without the regulariser.
    "cifar100 --ssl simclr": TABLE_5 | SIMCLR_32,
    "cifar100 --ssl vicreg": TABLE_5 | VICREG_32,
    **{f"{data} --ssl {ssl}": TABLE_5 for data in ("tinyimagenet", "stl10") for ssl in ("simclr", "vicreg")},
    "imagenet100 --ssl simclr": TABLE_5 | {"epochs": 200},
    "imagenet100 --ssl vicreg": TABLE_5 | {"epochs": 200},
    # Laptop recipes of ours: many small steps. That for photos takes 64,000 crops of a folder, small or large.
    "photos": LAPTOP | PHOTOS,
    "photos --ssl simclr": VIEWS,
    "photos --ssl vicreg": VIEWS,
    "shapes": LAPTOP | {"epochs": 24, "batch_size": 32, "base_lr": 12e-3, "crop_min": 0.8, "probe_every": 12},
    "shapes --ssl simclr": VIEWS | SIMCLR_32,
    "shapes --ssl vicreg": VIEWS | VICREG_32,
    "cifar10": LAPTOP | {"epochs": 30, "batch_size": 64, "base_lr": 8e-3, "crop_min": 0.2, "e_dur": 20},
    "cifar10 --ssl simclr": VIEWS | SIMCLR_32,
    "cifar10 --ssl vicreg": VIEWS | VICREG_32,
}


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------


class Magma(Method):
    """Eq. 1: a self-supervised loss plus lambda times the manifold regulariser, which acts in some epochs (Sec. 5.3).

    The loop calls `start_epoch` to switch the regulariser on and off; whoever lifts this out must call it too.
    """

    name, captions = "magma", MaskedAutoencoder.captions

    def __init__(self, config: Config, data):
        super().__init__()
        size = VIT_SIZES[config.model] | ({"heads": config.heads} if config.heads else {})
        size |= {"pool": config.pool, "learned_positions": config.positions == "learned"}
        vit = ViT(config.image_size, config.patch, **size, mean=data.mean, std=data.std)
        if config.ssl == "mae":
            decoder = (config.decoder_dim, config.decoder_depth, config.decoder_heads)
            self.autoencoder = MaskedAutoencoder(vit, *decoder, config.mask_ratio, config.norm_pixels)
        else:
            self.backbone, self.views, self.captions = vit, 2, ("image", "view", "view")
            self.projector = projector(config.ssl, vit.dim, config.projector_dim)
        self.config = config
        self.origin = start_from(self, config, VIT_SIZES)
        self.start_epoch(0)

    @property
    def encoder(self) -> ViT:
        return self.autoencoder.encoder if self.config.ssl == "mae" else self.backbone

    def start_epoch(self, epoch: int):
        """The regulariser acts in epochs e_st to e_st + e_dur - 1, counted from 0 (Sec. 5.3)."""
        self.active = self.config.e_st <= epoch < self.config.e_st + self.config.e_dur

    def gathered(self, features: Tensor) -> Tensor:
        return gather(features) if self.config.gather else features

    def graph_features(self, layers: list) -> list:
        """Outputs of blocks, each (B, 1 + M, D) -> a vector for each image of the graph, each (B, D)."""
        found = [image_features(layer) for layer in layers]
        return [self.gathered(x) for x in found] if self.config.gather_graph else found

    def over_layers(self, function, hidden: list, *settings) -> Tensor:
        """Eq. 2 over the layers of K; `hidden` is the output of every block.

        The mean of function(regularized, reference) over the references of the last layer, as in the code; or the sum
        over all pairs k != l, as in the text: at k = l a layer would regularise itself.
        """
        chosen = self.graph_features([hidden[layer] for layer in self.config.layers])
        if self.config.shuffle_graph:
            order = torch.randperm(len(chosen[0]), device=chosen[0].device)
            chosen = [x[order] for x in chosen[:-1]] + chosen[-1:]
        if self.config.layer_pairs == "all":
            pairs = itertools.permutations(chosen, 2)
            return sum(function(regularized, reference, *settings) for reference, regularized in pairs)
        *references, last = chosen
        return sum(function(last, reference, *settings) for reference in references) / len(references)

    @torch.no_grad()
    def along_the_blocks(self, hidden: list, *settings) -> dict:
        """The term between each block and the one before it (Fig. 3), counted from 1: {"manifold_1_2": scalar, ...}."""
        pairs = enumerate(itertools.pairwise(self.graph_features(hidden)), 1)
        return {f"manifold_{i}_{i + 1}": manifold_loss(later, earlier, *settings) for i, (earlier, later) in pairs}

    def view(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] as SimCLR or VICReg sees them, each by its own draw -> the same."""
        strength = JITTER[self.config.ssl] | {"blur": self.config.blur}
        for name in ("brightness", "contrast", "saturation", "hue"):
            strength[name] *= self.config.colour
        with torch.autocast(images.device.type, enabled=False):
            return jitter(images, strength)

    def compare_views(self, views: Tensor) -> tuple[Tensor, Tensor, list]:
        """SimCLR or VICReg: views (B, 2, 3, H, W) -> loss, and the first view's tokens and every block's output."""
        images = self.view(views.transpose(0, 1).flatten(0, 1))  # (2B, 3, H, W), all first views first
        encoded, hidden = self.backbone.encode(self.backbone.embed(images), hidden=True)
        # The projector sees one view at a time: the statistics of its batch norm are those of a view.
        a, b = (self.gathered(self.projector(x)) for x in self.backbone.pooled(encoded).chunk(2))  # (B, D) each
        if self.config.ssl == "simclr":
            loss = contrastive_loss(a, b, self.config.temperature)
        else:
            loss = vicreg_loss(a, b, self.config.vicreg)
        return loss, encoded.chunk(2)[0], [layer.chunk(2)[0] for layer in hidden]

    def forward(self, images: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> dict:
        """Eq. 1 for images (B, 3, H, W), with a mask (B, N) or a random one, or for two views (B, 2, 3, H, W).

        With U-MAE's term, and Eq. 3, where they have a weight.
        """
        config = self.config
        if config.ssl == "mae":
            # prediction, target (B, N, P); mask (B, N); encoded (B, 1 + M, D), after the final norm; hidden, before it
            prediction, target, mask, encoded, hidden = self.autoencoder(images, mask)
            loss = reconstruction_loss(prediction, target, mask)
        else:
            loss, encoded, hidden = self.compare_views(images)
        pull, push = self.active * config.lam, self.active * config.inverse
        kernel = (config.kernel_factor, config.detach_reference)
        # A term that is off is measured all the same, as in the paper's Fig. 2a, but takes no part in the gradient.
        with gradient_if(pull):
            manifold = self.over_layers(manifold_loss, hidden, *kernel, config.diagonal, config.laplacian)
        with gradient_if(config.uniformity):
            uniformity = uniformity_loss(self.gathered(encoded[:, 0]))  # of the CLS tokens (B, D)
        terms = {config.ssl: loss, "manifold": manifold, "uniformity": uniformity}
        if config.log_layers:
            terms |= self.along_the_blocks(hidden, *kernel, config.diagonal, config.laplacian)
        loss = loss + pull * manifold + config.uniformity * uniformity
        if config.inverse:
            with gradient_if(push):
                terms["inverse"] = self.over_layers(inverse_manifold_loss, hidden, 0.5, config.detach_reference)
            loss = loss + push * terms["inverse"]
        return {"loss": loss, **terms}

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Tensor:
        """Rows of (image, masked image, reconstruction) or (image, two jitters of it): (B, 3, 3, H, W) in [0, 1]."""
        if self.config.ssl == "mae":
            return self.autoencoder.pictures(images)
        return torch.stack([images, self.view(images), self.view(images)], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Appendix: what SimCLR and VICReg need besides, the projector and the views
# ---------------------------------------------------------------------------------------------------------------------


def projector(ssl: str, dim: int, width: int) -> nn.Sequential:
    """The layers through which the views are compared: (B, D) -> (B, 256) for SimCLR, (B, width) for VICReg."""
    if ssl == "simclr":
        return nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, 256))
    layers = [nn.Linear(dim, width), nn.BatchNorm1d(width), nn.ReLU()]
    layers += [nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(*layers)


# Strengths of the colour changes, and probabilities of these, of grey, of a blur and of solarisation, by the papers of
# SimCLR (its appendix A) and VICReg (its C.1).
BOTH = {"apply": 0.8, "grey": 0.2, "blur": 0.5}
JITTER = {
    "simclr": BOTH | {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "solarize": 0.0},
    "vicreg": BOTH | {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "solarize": 0.1},
}


def jitter(images: Tensor, strength: dict, generator=None) -> Tensor:
    """Colour jitter, grey, blur and solarisation, each image with its own draw: (B, 3, H, W) -> the same, in [0, 1].

    `strength` is an entry of JITTER. Brightness, contrast, saturation, hue and grey are one affine map of the colours
    an image, in this order, clipped once. torchvision shuffles the order, clips after each, and turns the hue in HSV
    rather than about the grey axis. Autocast would take digits from it.
    """
    batch, like = len(images), {"dtype": images.dtype, "device": images.device}

    def draw(low=0.0, high=1.0):
        return low + (high - low) * torch.rand(batch, 1, 1, generator=generator, **like)  # (B, 1, 1)

    def factor(name):
        return draw(max(0.0, 1 - strength[name]), 1 + strength[name])

    # Copies that the CPU does not wait for.
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=images.dtype).to(**like, non_blocking=True).expand(3, 3)
    identity = torch.eye(3, **like)
    brightness, contrast, saturation = factor("brightness"), factor("contrast"), factor("saturation")
    angle = 2 * math.pi * draw(-strength["hue"], strength["hue"])
    third = torch.full((3, 3), 1 / 3, **like)
    axis = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]).to(**like, non_blocking=True) / math.sqrt(3)
    hue = angle.cos() * identity + (1 - angle.cos()) * third + angle.sin() * axis  # rotation about the grey axis
    colour = hue @ (saturation * identity + (1 - saturation) * luma) * contrast * brightness  # (B, 3, 3)
    mean_luma = (luma[0] @ images.mean(dim=(2, 3)).T)[:, None, None]
    # Contrast turns about the mean grey, and a grey shift stays itself under saturation and hue.
    shift = (brightness * (1 - contrast) * mean_luma).expand(-1, 3, 1)
    applied = draw() < strength["apply"]
    colour, shift = torch.where(applied, colour, identity), torch.where(applied, shift, 0.0)
    grey = draw() < strength["grey"]
    colour, shift = torch.where(grey, luma @ colour, colour), torch.where(grey, luma @ shift, shift)
    images = (colour @ images.flatten(2) + shift).clamp(0, 1).view_as(images)

    sigma = torch.where(draw() < strength["blur"], draw(0.1, 2.0), 1e-3)  # (B, 1, 1) in pixels; 1e-3 changes nothing
    matrices = []  # of a kernel as wide as a tenth of the side, as SimCLR has it
    for side in images.shape[-2:]:
        at = torch.arange(side, **like)
        apart = (at[:, None] - at[None, :]).abs()
        weight = torch.exp(-0.5 * (apart / sigma) ** 2) * (apart <= max(1, side // 20))  # (B, side, side)
        matrices.append(weight / weight.sum(dim=2, keepdim=True))
    images = torch.einsum("bchw,bvw,buh->bcuv", images, matrices[1], matrices[0])
    solarized = torch.where(images >= 0.5, 1 - images, images)
    return torch.where((draw() < strength["solarize"])[..., None], solarized, images)
