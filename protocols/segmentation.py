"""Segmentation: a class for every pixel, by a head on an encoder's maps, and mean IoU.

A linear head shows what lies in the features of one place; the pyramid is UPerNet's idea (Xiao et al. 2018). Both take
any encoder: see `maps_of`.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import MobileFormer, ViT, gradient_if
from ebm_pretrain import Swin
from plumbing.encoders import Encoder
from plumbing.errors import UserError
from plumbing.pictures import save_pictures
from plumbing.probes import unfit
from plumbing.processes import autocast, note, on_rank_zero
from protocols.frozen import without_value
from protocols.heads import note_diverged
from protocols.rows import Subject
from protocols.settings import Config, changed
from protocols.training import OnEncoder, digest, fit_in_folder, folder_of

IGNORED = 255
RESULTS = ("miou", "pixel_accuracy")


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def confusion(prediction: Tensor, truth: Tensor, classes: int) -> Tensor:
    """How often each class (row) was taken for each class (column): integers of one shape -> int64 (K, K).

    Pixels whose truth is IGNORED are left out. Matrices of parts of the data add up.
    Raises ValueError for another value outside 0 to K - 1.
    """
    prediction, truth = prediction.flatten().long(), truth.flatten().long()
    counted = truth != IGNORED
    prediction, truth = prediction[counted], truth[counted]
    if len(truth) and not (0 <= min(truth.min(), prediction.min()) and max(truth.max(), prediction.max()) < classes):
        raise ValueError(f"a label lies outside 0 to {classes - 1}")
    return torch.bincount(truth * classes + prediction, minlength=classes**2).view(classes, classes)


def class_ious(confusion: Tensor) -> Tensor:
    """Intersection over union of each class: (K, K) -> float64 (K,), nan for one in neither truth nor prediction."""
    counts = confusion.double()
    right = counts.diagonal()
    union = counts.sum(dim=0) + counts.sum(dim=1) - right
    return torch.where(union > 0, right / union, math.nan)


def mean_iou(confusion: Tensor) -> float:
    """Mean IoU in [0, 1] of the classes that occur in truth or prediction; nan without any. (K, K): see `confusion`."""
    return float(class_ious(confusion).nanmean())


def pixel_accuracy(confusion: Tensor) -> float:
    """Share of the pixels that count whose class was found; nan without any."""
    counts = confusion.double()
    return float(counts.diagonal().sum() / counts.sum())


# ---------------------------------------------------------------------------------------------------------------------
# Maps and heads
# ---------------------------------------------------------------------------------------------------------------------


def maps_of(encoder: nn.Module, images: Tensor) -> list:
    """Maps of several depths, the encoder's own output last: images (B, 3, H, W) in [0, 1] -> list of (B, D, h, w).

    Of a ViT four maps of one size, after a third, half, two thirds and all of its blocks, as MMSegmentation takes them
    of MAE's; of Mobile-Former, ConvNeXt and Swin the last map of each size, the finest first; of any other encoder its
    one map. Raises UserError for an encoder without a map.
    """
    if isinstance(encoder, ViT):
        encoded, hidden = encoder.encode(encoder.embed(images), hidden=True)
        depth = len(hidden)
        chosen = [hidden[max(1, round(depth * part / 12)) - 1] for part in (4, 6, 8)]
        return [x[:, 1:].movedim(1, 2).unflatten(2, encoder.grid) for x in [*chosen, encoded]]
    if isinstance(encoder, MobileFormer):
        out, maps = encoder(images, hidden=True)
        return [*last_of_each_size(maps)[:-1], out]
    if hasattr(encoder, "stem") and isinstance(encoder.blocks, nn.Sequential):  # ConvNeXt, Swin
        channels_last, x, maps = isinstance(encoder, Swin), encoder.stem(encoder.normalize(images)), []
        x = x.movedim(1, -1) if channels_last else x
        for block in encoder.blocks:
            x = block(x)
            maps.append(x.movedim(-1, 1) if channels_last else x)
        x = encoder.norm(x)
        return [*last_of_each_size(maps)[:-1], x.movedim(-1, 1) if channels_last else x]
    out = encoder(images)
    if out.ndim != 4:
        raise UserError(f"this encoder, a {type(encoder).__name__}, gives one vector an image and no map to segment by")
    return [out]


def last_of_each_size(maps: list) -> list:
    """The last of some maps (B, D, h, w) of each size, in their order."""
    return list({tuple(x.shape[-2:]): x for x in maps}.values())


class RawPatches(Encoder):
    """The pixels of every patch as its features, what an encoder is compared with: -> (B, 3 * stride^2, h, w)."""

    def __init__(self, stride: int = 4, mean=(0.0,) * 3, std=(1.0,) * 3):
        super().__init__(mean, std, stride=stride)
        self.stride = self.smallest_side = stride
        self.whole_cells, self.dim = True, 3 * stride**2

    def forward(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(self.normalize(images), self.stride)


class LinearMapHead(nn.Module):
    """A linear classifier at every place of the last map: maps -> logits (B, classes, h, w)."""

    def __init__(self, shapes: list, classes: int, batchnorm: bool = False):
        super().__init__()
        dim = shapes[-1][0]
        self.norm = nn.BatchNorm2d(dim, affine=False, eps=1e-6) if batchnorm else nn.Identity()
        self.classify = nn.Conv2d(dim, classes, 1)
        nn.init.trunc_normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)

    def forward(self, maps: list) -> Tensor:
        return self.classify(self.norm(maps[-1]))


def layer(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """A convolution, a norm over the whole map, in which no picture depends on others, and ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(1, outputs), nn.ReLU())


def rescale(dim: int, power: int) -> nn.Module:
    """A map 2^power times as large: learned where it grows, by maxima where it shrinks."""
    if power < 0:
        return nn.MaxPool2d(2**-power, ceil_mode=True)
    steps = [nn.ConvTranspose2d(dim, dim, 2, 2) for _ in range(power)]
    return nn.Sequential(*[part for step in steps for part in (step, nn.GroupNorm(1, dim), nn.GELU())][:-2])


class PyramidHead(nn.Module):
    """UPerNet's head (Xiao et al. 2018): maps -> logits (B, classes, h, w) at the size of the first.

    The last map is joined by its means over 1, 4, 9 and 36 parts. Each map is brought to one width (a lateral), those
    of coarser maps are added to it, and all, convolved, are put together. Four maps of one size, as a ViT's, are first
    made 4, 2, 1 and 1/2 times as large (BEiT's way), but no finer than cells of 4 pixels. `auxiliary` is a second head,
    on the third map or the last of fewer, that only helps to train.
    """

    def __init__(self, shapes: list, classes: int, width: int, side: int, dropout: float = 0.1):
        super().__init__()
        dims, cells = [dim for dim, *_ in shapes], [(h, w) for _, h, w in shapes]
        plain = len(shapes) == 4 and len(set(cells)) == 1
        most = int(math.log2(max(1, side // (4 * max(cells[0])))))
        powers = [min(2, most), min(1, most), 0, -1] if plain else [0] * len(shapes)
        self.rescales = nn.ModuleList(rescale(dim, power) for dim, power in zip(dims, powers, strict=True))
        self.laterals = nn.ModuleList(layer(dim, width, 1) for dim in dims[:-1])
        self.parts = (1, 2, 3, 6)
        self.pools = nn.ModuleList(layer(dims[-1], width, 1) for _ in self.parts)
        self.pooled = layer(dims[-1] + 4 * width, width, 3)
        self.smooth = nn.ModuleList(layer(width, width, 3) for _ in dims[:-1])
        self.join = layer(width * len(dims), width, 3)
        self.dropout, self.classify = nn.Dropout2d(dropout), nn.Conv2d(width, classes, 1)
        self.at = min(2, len(dims) - 1)
        narrow = max(8, width // 3)
        parts = layer(dims[self.at], narrow, 3), nn.Dropout2d(dropout), nn.Conv2d(narrow, classes, 1)
        self.auxiliary = nn.Sequential(*parts)
        for conv in (self.classify, self.auxiliary[-1]):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: list) -> Tensor:
        maps = [scale(x) for scale, x in zip(self.rescales, maps, strict=True)]
        last = maps[-1]
        means = [pool(F.adaptive_avg_pool2d(last, n)) for pool, n in zip(self.pools, self.parts, strict=True)]
        means = [enlarge(mean, last) for mean in means]
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=False)]
        levels.append(self.pooled(torch.cat([last, *means], dim=1)))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + enlarge(levels[i], levels[i - 1])
        levels = [*(smooth(x) for smooth, x in zip(self.smooth, levels, strict=False)), levels[-1]]
        x = self.join(torch.cat([enlarge(level, levels[0]) for level in levels], dim=1))
        return self.classify(self.dropout(x))

    def auxiliary_logits(self, maps: list) -> Tensor:
        """Those of the second head, which helps to train."""
        return self.auxiliary(self.rescales[self.at](maps[self.at]))


def enlarge(x: Tensor, like) -> Tensor:
    """Bilinear to the size of another map, or to (height, width)."""
    size = tuple(like.shape[-2:]) if isinstance(like, Tensor) else tuple(like)
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def starts(length: int, size: int) -> list:
    """Where windows of `size` begin that cover a length: two thirds of one apart, the last one at the end.

    MMSegmentation's setting for MAE: 341 pixels of 512.
    """
    step = max(1, size * 2 // 3)
    return [min(i, length - size) for i in range(0, length - size + step, step)]


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (B, K, h, w), enlarged, with labels (B, H, W); a mean over all pixels, ignored ones as 0.

    So MMSegmentation has it. Parts of a batch, over processes too, then count alike, and a picture in which all is
    ignored has the loss 0.
    """
    logits = enlarge(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
    return F.cross_entropy(logits, labels.long(), ignore_index=IGNORED, reduction="none").mean()


class Segmenter(OnEncoder):
    """An encoder and a head on its maps, trained on labels of pixels."""

    name = "segment"
    captions = ("image", "truth", "prediction")

    def __init__(self, encoder: nn.Module, classes: list, config: Config):
        super().__init__(encoder, frozen=not config.finetune, config=config)
        self.classes, self.origin = classes, digest(encoder)
        self.truth = None  # labels of the pictures that are drawn
        size, mode = config.image_size, encoder.training
        with torch.no_grad():
            maps = maps_of(encoder.eval(), torch.zeros(1, 3, size, size, device=encoder.mean.device))
        encoder.train(mode)
        shapes = [tuple(x.shape[1:]) for x in maps]
        if config.head == "pyramid":
            width = min(768, getattr(encoder, "dim", shapes[-1][0]))
            self.head = PyramidHead(shapes, len(classes), width, size, config.dropout)
        else:
            self.head = LinearMapHead(shapes, len(classes), config.batchnorm)

    def maps(self, images: Tensor) -> list:
        with gradient_if(not self.frozen):
            return maps_of(self.encoder, images)

    def forward(self, images: Tensor, labels: Tensor) -> dict:
        maps = self.maps(images)
        loss = pixel_loss(self.head(maps), labels)
        if isinstance(self.head, PyramidHead):
            loss = loss + self.config.aux_weight * pixel_loss(self.head.auxiliary_logits(maps), labels)
        return {"loss": loss}

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Images of any size (B, 3, H, W) -> logits (B, K, H, W), by windows of the size of training, averaged."""
        size, (height, width) = self.config.image_size, images.shape[-2:]
        total, times = 0.0, torch.zeros(height, width, device=images.device)
        for top in starts(height, size):
            for left in starts(width, size):
                with autocast(self.config.amp, images.device):
                    part = self.head(self.maps(images[..., top : top + size, left : left + size]))
                part = enlarge(part.float(), (size, size))
                total = total + F.pad(part, (left, width - left - size, top, height - top - size))
                times[top : top + size, left : left + size] += 1
        return total / times

    def probe(self, encode, train, test, config) -> dict:
        """Mean IoU, accuracy and the IoU of each class that occurs, in percent, of all test pictures; a note on nan."""
        found, count = 0, len(self.classes)
        for images, labels in test.whole_batches(range(len(test)), config.image_size):
            scores = self.scores(images)
            if unfit(test=scores.flatten(1)):
                return note_diverged(dict.fromkeys(RESULTS, math.nan))
            found = found + confusion(enlarge(scores, labels).argmax(dim=1), labels, count)
        if not found.any():
            note("no pixel of the test pictures has a label, so there is no mean IoU and no pixel accuracy")
        values = {"miou": mean_iou(found), "pixel_accuracy": pixel_accuracy(found)}
        ious = zip(self.classes, class_ious(found).tolist(), strict=True)
        values |= {f"iou_{name}": iou for name, iou in ious if not math.isnan(iou)}
        return {name: 100 * value for name, value in values.items()}

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Tensor:
        """Rows of an image, its true classes and those that are found: (B, 3, H, W) -> (B, 3, 3, H, W)."""
        found = self.scores(images).argmax(dim=1)
        truth = torch.full_like(found, IGNORED) if self.truth is None else self.truth[: len(images)].to(found.device)
        colours = class_colours(len(self.classes)).to(images.device)
        drawn = [colours[x.clamp_max(len(self.classes))].movedim(-1, 1) for x in (truth, found)]  # (B, 3, H, W)
        return torch.stack([images, *drawn], dim=1)


def class_colours(count: int) -> Tensor:
    """A colour in [0, 1] for each class, dark grey for the first, and white for what is ignored: (count + 1, 3)."""
    hue = torch.arange(count) * 0.618034 % 1
    value = 1 - 0.35 * (torch.arange(count) % 3 == 2)
    wheel = (hue[:, None] + torch.tensor([0, 2 / 3, 1 / 3])) * 6 % 6
    colours = value[:, None] * (1 - 0.8 * (1 - ((wheel - 3).abs() - 1).clamp(0, 1)))
    colours[0] = 0.2
    return torch.cat([colours, torch.ones(1, 3)])


def check_classes(subject: Subject):
    """Raise UserError where the data to test on have other classes than those to train on."""
    train, test = subject.train.classes, subject.test.classes
    if test != train:
        first = min(set(train) ^ set(test), default="their order")
        raise UserError(f"{len(train)} classes train, {len(test)} are tested on; mend what differs, first: {first}")


def run_segment(subject: Subject, config: Config) -> dict:
    """A head on a subject's encoder, trained in a folder of its own -> {"miou": percent, "pixel_accuracy": ..., ...}.

    Raw pixels have a linear head on patches of 4 x 4, or smaller ones where these do not divide the image.
    """
    if config.crop_pad:
        raise UserError(f"--crop-pad {config.crop_pad} is for images without labels of pixels; give --crop-pad 0")
    check_classes(subject)
    encoder, size = subject.encoder, config.image_size
    if encoder is None:
        encoder = RawPatches(math.gcd(size, 4), subject.train.mean, subject.train.std)
        config = changed(config, head="linear", finetune=False)
    elif not all(parameter.isfinite().all() for parameter in encoder.parameters()):
        return without_value(subject, RESULTS, "its weights are not finite")
    if subject.name == "untrained":
        config = changed(config, layer_decay=1.0)  # it would all but freeze random lower layers
    torch.manual_seed(config.seed)
    method = Segmenter(copy.deepcopy(encoder), subject.train.classes, config).to(subject.device)
    shown = range(min(8, len(subject.test)))
    method.truth = next(iter(subject.test.plain_batches(shown, size)))[1]
    run = fit_in_folder("segment", method, subject, config)

    def judge():
        out = folder_of("segment", subject, config) / "predictions.png"
        images = next(iter(subject.test.plain_batches(shown, size)))[0]
        save_pictures(method.pictures(images), out, method.captions)
        note(f"predictions are drawn in {out}")
        return method.probe(None, subject.train, subject.test, run)

    return on_rank_zero(judge)
