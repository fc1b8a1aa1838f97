"""Detection: DETR (Carion et al. 2020) on an encoder's maps, with FINOLA's Mobile-Former decoders or a plain one.

A decoder gives every picture the same number of boxes and classes, one of which is "no object". For the loss each truth
is matched with one of them. What is found is judged by average precision (detection.py).
"""

import contextlib
import copy
import dataclasses
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import MobileFormer, gradient_if, sincos_positions
from finola import MFDecoder
from plumbing.boxes import BoxFolder, BoxImages, Targets, targets_of
from plumbing.errors import UserError
from plumbing.pictures import save_pictures
from plumbing.processes import autocast, average, broadcast_buffers, note, on_every_rank, on_rank_zero, rank, world_size
from protocols.detection import average_precision, generalized_iou, match, to_corners
from protocols.frozen import without_value
from protocols.heads import note_diverged
from protocols.rows import Subject
from protocols.segmentation import check_classes, class_colours, maps_of
from protocols.settings import Config, changed
from protocols.training import OnEncoder, digest, fit_in_folder, folder_of, start_from_probe

CLASS, DISTANCE, OVERLAP = 1.0, 5.0, 2.0  # weights of the parts of the loss, and of the cost of a pair (DETR)
NO_OBJECT = 0.1  # weight of this class
DEPTHS = {"mf522": (5, 2, 2), "mf211": (2, 1, 1)}  # FINOLA, Table 11
RESULTS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


def pair_costs(logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
    """DETR's cost of taking each query for each truth: (L, B, Q, K + 1), (L, B, Q, 4) -> (L, B, Q, M).

    Less the probability of the class, plus 5 times the L1 distance, less twice the generalised IoU.
    """
    shape = (*logits.shape[:3], targets.labels.shape[1])
    index = targets.labels.clamp_min(0)[None, :, None].expand(shape)
    likely = logits.softmax(dim=-1).gather(3, index)
    truth = targets.boxes[None, :, None]  # (1, B, 1, M, 4)
    distance = (boxes[..., None, :] - truth).abs().sum(dim=-1)
    overlap = generalized_iou(to_corners(boxes)[..., None, :], to_corners(truth))
    return DISTANCE * distance - CLASS * likely - OVERLAP * overlap


def pairs_of(logits: Tensor, boxes: Tensor, targets: Targets) -> tuple | None:
    """Who is matched with whom: places (layer, image, query, truth), each (P,); None where a cost is not finite."""
    costs = pair_costs(logits.detach(), boxes.detach(), targets).cpu()
    labels, places = targets.labels.cpu(), []
    if not costs.isfinite().all():
        return None
    for image, row in enumerate(labels):
        there = torch.nonzero(row >= 0)[:, 0]
        for layer in range(len(costs)):
            queries, columns = match(costs[layer, image][:, there])
            where = torch.tensor([[layer], [image]]).expand(2, len(queries))
            places.append(torch.stack([*where, queries, there[columns]]))
    return tuple(torch.cat(places, dim=1).to(logits.device))


def detection_loss(logits: Tensor, boxes: Tensor, targets: Targets) -> dict:
    """DETR's loss of all L layers: logits (L, B, Q, K + 1), "no object" last, and boxes (L, B, Q, 4) -> scalars.

    Cross-entropy, in which "no object" weighs 0.1, plus 5 times the L1 distance and twice 1 - generalised IoU of the
    matched boxes, these divided by the number of truths. Layers add up; the parts that are told are of the last one.
    Weights and truths are counted over all processes, so that the loss does not depend on how many share a batch.
    """
    logits, boxes = logits.float(), boxes.float()
    layers, classes = len(logits), logits.shape[-1] - 1
    pairs = pairs_of(logits, boxes, targets)
    if pairs is None:
        average(logits.new_zeros(layers + 1))  # other processes wait for it
        nothing = (logits.sum() + boxes.sum()) * math.nan  # of both, as DDP takes no parameter without a gradient
        return {"loss": nothing, **dict.fromkeys(("class_loss", "distance", "overlap"), nothing.detach())}
    layer, image, query, truth = pairs
    wanted = torch.full(logits.shape[:3], classes, device=logits.device)
    wanted[layer, image, query] = targets.labels[image, truth]
    weight = torch.where(wanted == classes, NO_OBJECT, 1.0)  # (L, B, Q)
    entropy = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none").view_as(weight)
    counts = torch.cat([weight.sum(dim=(1, 2)), (targets.labels >= 0).sum()[None].float()])
    *weights, truths = average(counts)
    found, true = boxes[layer, image, query], targets.boxes[image, truth]  # (P, 4)
    distance = (found - true).abs().sum(dim=1)
    overlap = 1 - generalized_iou(to_corners(found), to_corners(true))
    parts = []
    for number in range(layers):
        mine = (layer == number) / truths
        each = (entropy * weight)[number].sum() / weights[number], (distance * mine).sum(), (overlap * mine).sum()
        parts.append(torch.stack(each))
    table = torch.stack(parts)  # (L, 3)
    told = dict(zip(("class_loss", "distance", "overlap"), table[-1].detach(), strict=True))
    return {"loss": (table * table.new_tensor([CLASS, DISTANCE, OVERLAP])).sum(), **told}


# ---------------------------------------------------------------------------------------------------------------------
# Decoders
# ---------------------------------------------------------------------------------------------------------------------


class PlainDecoder(nn.Module):
    """DETR's decoder on the last map of any encoder (B, dim, h, w): queries look at each other and at the map."""

    reads = 1  # maps, from the last

    def __init__(
        self, dim: int, classes: int, queries: int = 100, depth: int = 6, width: int = 256, dropout: float = 0
    ):
        super().__init__()
        self.project = nn.Conv2d(dim, width, 1)
        self.queries = nn.Parameter(torch.randn(queries, width))
        options = {"dim_feedforward": 4 * width, "dropout": dropout, "batch_first": True}
        self.blocks = nn.ModuleList(nn.TransformerDecoderLayer(width, 8, **options) for _ in range(depth))
        self.norm, self.classify = nn.LayerNorm(width), nn.Linear(width, classes + 1)
        hidden = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.locate = nn.Sequential(*hidden, nn.Linear(width, 4), nn.Sigmoid())

    def forward(self, maps: list, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Maps, of which the last is read where `mask` (B, H, W) -> logits (L, B, Q, K + 1), boxes (L, B, Q, 4)."""
        x = self.project(maps[-1])
        positions = sincos_positions(*x.shape[2:], x.shape[1]).to(x)
        memory = rearrange(x, "b c h w -> b (h w) c") + positions
        hidden = ~mask_like(mask, x).flatten(1)
        queries, outputs = self.queries.expand(len(x), -1, -1), []
        with contextlib.nullcontext() if x.is_cuda else sdpa_kernel(SDPBackend.MATH):  # see `common.attend`
            for block in self.blocks:
                queries = block(queries, memory, memory_key_padding_mask=hidden)
                outputs.append(queries)
        outputs = self.norm(torch.stack(outputs))
        return self.classify(outputs), self.locate(outputs)


class MobileFormerDecoder(MFDecoder):
    """FINOLA's decoder on the last two maps of a Mobile-Former. It knows no mask: maps are 0 outside of the picture."""

    reads = 2

    def forward(self, maps: list, mask: Tensor) -> tuple[Tensor, Tensor]:
        fine, coarse = (x * mask_like(mask, x)[:, None] for x in maps[-2:])
        return super().forward(coarse, fine)


def mask_like(mask: Tensor, x: Tensor) -> Tensor:
    """The mask (B, H, W) at the cells of a map (B, D, h, w): bool (B, h, w)."""
    return F.interpolate(mask[:, None].float(), x.shape[2:], mode="nearest-exact")[:, 0] > 0.5


def fitting(encoder: nn.Module, config: Config) -> Config:
    """The settings with a --head that fits an encoder: FINOLA's decoders are for Mobile-Former, by its maps."""
    if config.head not in DEPTHS or isinstance(encoder, MobileFormer):
        return config
    note(f"--head {config.head} reads two maps of a Mobile-Former, which this encoder does not have: plain it is")
    return changed(config, head="plain")


def make_decoder(shapes: list, classes: int, config: Config) -> nn.Module:
    """The decoder that --head names; maps have `shapes` (D, h, w)."""
    if config.head == "plain":
        dim, *_ = shapes[-1]
        depth, width = (6, 256) if dim >= 384 else (3, 128)  # DETR's, but for encoders of laptops
        return PlainDecoder(dim, classes, config.queries, depth, width, config.dropout)
    return MobileFormerDecoder(DEPTHS[config.head], shapes[-1][0], shapes[-2][0], classes, config.queries)


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------


class Detector(OnEncoder):
    """An encoder, frozen or not, and a decoder of boxes, trained by the loop of all methods.

    The encoder's norms keep their statistics: too few pictures are in a batch to have new ones (DETR).
    """

    name = "detect"
    captions = ("truth", "found")

    def __init__(self, encoder: nn.Module, classes: list, config: Config):
        config = fitting(encoder, config)
        super().__init__(encoder, frozen=not config.finetune, config=config)
        self.classes = classes
        self.shown = None  # Targets of the pictures that are drawn
        self.kept = []  # maps, see `keep`
        size = config.image_size
        size -= 0 if encoder.image_sides else size % 32
        with torch.no_grad():
            maps = maps_of(encoder.eval(), torch.zeros(1, 3, size or 32, size or 32, device=encoder.mean.device))
        self.head = make_decoder([tuple(x.shape[1:]) for x in maps], len(classes), config)

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.encoder.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    @torch.no_grad()
    def keep(self, data: BoxImages):
        """Compute the maps of all whole pictures, and of their mirror images, once; `answers` looks them up."""
        parts, device = [], data.images.device.type
        for images, _ in data.plain_batches(range(len(data)), self.config.image_size):
            with autocast(self.config.amp, images.device):
                kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else images.dtype
                both = (maps_of(self.encoder, x)[-self.head.reads :] for x in (images, images.flip(-1)))
                parts.append([torch.stack(pair).to(kind) for pair in zip(*both, strict=True)])
        self.kept = [torch.cat(part, dim=1).flatten(0, 1) for part in zip(*parts, strict=True)]

    def answers(self, images: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """Padded images (B, 3, H, W) -> logits (L, B, Q, K + 1) and boxes (L, B, Q, 4), in shares of the picture.

        Or numbers of pictures (B,) whose maps are kept.
        """
        if images.ndim == 1:
            maps = [x[images] for x in self.kept]
            return self.head(maps, targets.mask(*maps[0].shape[2:]))
        mask = targets.mask(*images.shape[2:])
        images = torch.where(mask[:, None], images, self.encoder.mean)
        with gradient_if(not self.frozen):
            maps = maps_of(self.encoder, images)
        return self.head(maps, mask)

    def forward(self, images: Tensor, targets: Targets) -> dict:
        logits, boxes = self.answers(images, targets)
        with torch.autocast(images.device.type, enabled=False):
            return detection_loss(logits, boxes, targets)

    @torch.no_grad()
    def find(self, images: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (B, Q), labels (B, Q), and corners (B, Q, 4) in shares of the picture: each query's best class."""
        with autocast(self.config.amp, images.device):
            logits, boxes = self.answers(images, targets)
        scores, labels = logits[-1].float().softmax(dim=-1)[..., :-1].max(dim=-1)
        return scores, labels, to_corners(boxes[-1].float())

    def probe(self, encode, train, test, config, shared: bool = False) -> dict:
        """Average precision on all test pictures, in percent; nan where there is no truth of a size.

        `shared`: all processes call it, and each finds boxes in its part of the pictures.
        """
        number, parts = (rank(), world_size()) if shared else (0, 1)

        def find_mine() -> list | None:  # None where something is not finite
            found, mine = [], range(number, len(test), parts)
            for images, targets in test.plain_batches(mine, config.image_size) if mine else ():
                scores, labels, corners = (x.double().cpu() for x in self.find(images, targets))
                if not (scores.isfinite().all() and corners.isfinite().all()):
                    return None
                for row in zip(scores, labels, corners, strict=True):
                    height, width = test.size(mine[len(found)])
                    own = row[2].clamp(0, 1) * torch.tensor([width, height] * 2)
                    boxes = torch.cat([own[:, :2], own[:, 2:] - own[:, :2]], dim=1)
                    found.append({"boxes": boxes.numpy(), "labels": row[1].numpy(), "scores": row[0].numpy()})
            return found

        if shared:
            broadcast_buffers(self)
        found = on_every_rank(find_mine) if shared else [find_mine()]
        if None in found:
            return dict.fromkeys(RESULTS, math.nan)
        found = [found[i % parts][i // parts] for i in range(len(test))]
        values = average_precision([test.truth(i) for i in range(len(test))], found)
        return {name: math.nan if value < 0 else 100 * value for name, value in values.items()}

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Tensor:
        """Rows of pictures with the true boxes, and with those found whose score is 0.5 or more: (B, 2, 3, H, W)."""
        shown, colours = self.shown, class_colours(len(self.classes) + 1)[1:]
        scores, labels, corners = (x.cpu() for x in self.find(images, shown))
        true = [(row >= 0, row, to_corners(boxes)) for row, boxes in zip(shown.labels, shown.boxes, strict=True)]
        own = [(score >= 0.5, row, boxes) for score, row, boxes in zip(scores, labels, corners, strict=True)]
        rows = []
        for image, filled, *both in zip(images, shown.filled.tolist(), true, own, strict=True):
            sides = [image.shape[2] * filled[1], image.shape[1] * filled[0]] * 2
            pair = [
                draw_boxes(image, boxes[there].cpu() * torch.tensor(sides), colours[row[there].cpu()])
                for there, row, boxes in both
            ]
            rows.append(torch.stack(pair))
        return torch.stack(rows)


@dataclasses.dataclass
class KeptPictures(BoxImages):
    """Pictures whose maps a detector keeps: a batch is their numbers (B,), N more where one is mirrored."""

    detector: Detector | None = None

    def train_batches(self, plan, size, crop=(1.0, 1.0), flip=0.5, views=1):
        generator, (height, width) = torch.Generator(self.images.device), self.images.shape[2:]
        for seed, indices in plan:
            if not self.detector.kept:  # a run that is at its end needs none
                self.detector.keep(self)
            indices = torch.as_tensor(indices).to(self.images.device)
            draw = torch.rand(len(indices), device=indices.device, generator=generator.manual_seed(seed))
            flipped = draw < flip
            x0, y0, x1, y1 = self.corners[indices].div(self.corners.new_tensor([width, height] * 2)).unbind(dim=-1)
            x0, x1 = (torch.where(flipped[:, None], *pair) for pair in ((1 - x1, x0), (1 - x0, x1)))
            corners = torch.stack([x0, y0, x1, y1], dim=-1)
            filled = torch.ones(len(indices), 2, device=indices.device)
            yield indices + len(self) * flipped, targets_of(self.objects[indices], corners, filled)


def draw_boxes(image: Tensor, corners: Tensor, colours: Tensor) -> Tensor:
    """A copy of a picture (3, H, W) with the rims of boxes, corners (n, 4) in pixels, in their colours (n, 3)."""
    image, (height, width) = image.clone(), image.shape[1:]
    thick = max(1, min(height, width) // 200)
    for (x0, y0, x1, y1), colour in zip(corners.round().long().tolist(), colours.to(image), strict=True):
        left, right = max(0, min(x0, width - 1)), min(width, max(x1, x0 + 1))
        top, bottom = max(0, min(y0, height - 1)), min(height, max(y1, y0 + 1))
        sides = ((top, top + thick, left, right), (bottom - thick, bottom, left, right))
        for a, b, c, d in (*sides, (top, bottom, left, left + thick), (top, bottom, right - thick, right)):
            image[:, max(0, a) : b, max(0, c) : d] = colour[:, None, None]
    return image


def run_detect(subject: Subject, config: Config) -> dict:
    """A decoder on a subject's encoder, trained in a folder of its own -> {"AP": percent, "AP50": ..., ...}.

    With --finetune the encoder is trained too, and the decoder starts from where a finished run on the frozen encoder
    ended (FINOLA, appendix C).
    """
    if config.crop_pad:
        raise UserError(f"--crop-pad {config.crop_pad} is for images without boxes; give --crop-pad 0")
    check_classes(subject)
    train, test = subject.train, subject.test
    if not all(parameter.isfinite().all() for parameter in subject.encoder.parameters()):
        return without_value(subject, RESULTS, "its weights are not finite")
    if subject.encoder.image_sides and isinstance(train, BoxFolder):
        side = config.image_size
        note(f"this encoder takes pictures of one size: all are fitted into {side} x {side}; --image-size says another")
        train, test = (dataclasses.replace(data, square=True) for data in (train, test))
        subject = dataclasses.replace(subject, train=train, test=test)
    if subject.name == "untrained":
        config = changed(config, layer_decay=1.0)  # it would all but freeze random lower layers
    torch.manual_seed(config.seed)
    method = Detector(copy.deepcopy(subject.encoder), train.classes, config)
    if config.finetune:
        start_from_probe(method.head, "detect", subject, dataclasses.replace(config, finetune=False))
    method.origin = digest(subject.encoder) + (digest(method.head) if config.finetune else "")
    method = method.to(subject.device)
    if method.frozen and isinstance(train, BoxImages) and config.crop_min >= 1:
        subject = dataclasses.replace(subject, train=KeptPictures(**vars(train), detector=method))
    some = range(min(8, len(test)))
    method.shown = next(iter(test.plain_batches(some, config.image_size)))[1]
    run = fit_in_folder("detect", method, subject, config)

    def draw():
        out = folder_of("detect", subject, config) / "found.png"
        images, method.shown = next(iter(test.plain_batches(some, config.image_size, len(some))))
        save_pictures(method.pictures(images), out, method.captions)
        note(f"boxes are drawn in {out}")

    on_rank_zero(draw)
    found = method.probe(None, train, test, run, shared=True)
    note_missing(found, test)
    return found


def note_missing(found: dict, test):
    """Say why there is no AP; APs, APm and APl are nan where no truth is of their size."""
    if all(bool(torch.as_tensor(test.truth(i)["crowd"]).all()) for i in range(len(test))):
        note("AP: the test pictures hold no object but crowds, so it has no value")
    else:
        note_diverged({"AP": found["AP"]})
