"""Features as they are: neighbours, a linear probe, and figures of merit without any training."""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common import learning_rate
from plumbing.errors import NonFiniteLoss, UserError
from plumbing.images import BatchPlan
from plumbing.probes import knn_accuracy, moderate, ridge_accuracy, unfit
from plumbing.processes import note, on_rank_zero
from plumbing.tables import ROWS, column_of
from protocols.heads import (
    LinearHeads,
    accuracies,
    head_groups,
    make_head,
    make_optimizer,
    note_diverged,
    one_hot,
    soft_loss,
)
from protocols.rows import Subject
from protocols.settings import Config, result_names


def without_value(subject: Subject, names, reason: str) -> dict:
    """Results that cannot be told, {name: nan}, and a note that says why."""
    note(f"{ROWS[subject.name]}: {reason}, so no {', '.join(column_of(name)[0] for name in names)}")
    return dict.fromkeys(names, math.nan)


def run_knn(subject: Subject, config: Config) -> dict:
    """Votes of the nearest training images: {"knn": percent of the test images}, nan where features are not finite."""
    (bank, bank_labels), (queries, labels) = subject.features("train", config), subject.features("test", config)
    if reason := unfit(training=bank, test=queries):
        return without_value(subject, ["knn"], reason)
    if config.k > len(bank):
        raise UserError(f"--k {config.k} is more than the {len(bank)} training images that could be neighbours")
    if config.metric == "cosine":  # on the unit sphere, the nearest is the one with the largest cosine
        bank, queries = (F.normalize(x / moderate(x.abs().amax(dim=1, keepdim=True)), dim=1) for x in (bank, queries))
    return {"knn": knn_accuracy(bank, bank_labels, queries, labels, config.k, weigh=config.vote == "distance")}


# ---------------------------------------------------------------------------------------------------------------------
# A linear probe on features that are computed once
# ---------------------------------------------------------------------------------------------------------------------


def run_linear(subject: Subject, config: Config) -> dict:
    """A linear layer by gradient descent, of raw pixels by ridge regression: {"linear": percent}, or one each rate.

    nan for a head that diverged, and for all where features are not finite.
    """
    classes, names = len(subject.train.classes), result_names("linear", config)

    def probe():
        (features, labels), (queries, truth) = subject.features("train", config), subject.features("test", config)
        if reason := unfit(training=features, test=queries):
            return without_value(subject, names, reason)
        if subject.encoder is None:
            return dict.fromkeys(names, ridge_accuracy(features, labels, queries, truth, classes))
        torch.manual_seed(config.seed)
        head = make_head("linear", features.shape[1], classes, config).to(subject.device)
        few = dataclasses.replace(config, batch_size=min(config.batch_size, len(labels)))
        if config.batchnorm and few.batch_size < 2:
            raise UserError("--batchnorm takes statistics of a batch: it needs two training images in one, or more")
        fit_on_features(head, features, labels, classes, few)
        with torch.no_grad():
            return note_diverged(dict(zip(names, accuracies(head.eval()(queries), truth), strict=True)))

    return on_rank_zero(probe)


def fit_on_features(head: LinearHeads, features: Tensor, labels: Tensor, classes: int, config: Config):
    """Train linear heads on features that are computed once (N, D): no image is encoded twice.

    Batches, learning rates and loss are those of `Classifier` in `common.fit`. Raises NonFiniteLoss if no head is left.
    """
    optimizer, plan = make_optimizer(head_groups(head, config), config), BatchPlan(len(labels), config)
    head.train()
    steps = len(plan)
    for epoch in range(config.epochs):
        for step, (index,) in enumerate(plan.draw(epoch)):
            index = index.to(features.device)
            rate = learning_rate(epoch * steps + step, steps, config)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            logits = head(features[index])
            optimizer.zero_grad(set_to_none=True)
            soft_loss(logits, one_hot(labels[index], classes, config.smoothing)).backward()
            optimizer.step()
        if not logits.isfinite().flatten(1).all(dim=1).any():
            raise NonFiniteLoss(f"linear, epoch {epoch + 1}: the loss is not finite; lower --base-lr")


# ---------------------------------------------------------------------------------------------------------------------
# Do classes form clusters?
# ---------------------------------------------------------------------------------------------------------------------


def run_clusters(subject: Subject, config: Config) -> dict:
    """Davies-Bouldin index, mean cosines within and between classes, their ratio, and their gap without the mean.

    nan for all where features are not finite, and for the index where classes have the same centre.
    """
    features, labels = subject.features("test", config)
    names = ("davies_bouldin", "same_class_cosine", "other_class_cosine", "cosine_ratio", "cosine_gap")
    if reason := unfit(test=features):
        return without_value(subject, names, reason)
    if len(labels.unique()) < 2 or len(labels) == len(labels.unique()):
        raise UserError(f"clusters needs two classes or more, and one with two test images, not {len(labels)} images")
    features = features.double()
    same, different = class_cosines(features, labels)
    centred = class_cosines(features - features.mean(dim=0), labels)
    index, ratio = davies_bouldin(features, labels), same / different if different else math.nan
    found = dict(zip(names, (index, same, different, ratio, centred[0] - centred[1]), strict=True))
    if not math.isfinite(index):
        found |= without_value(subject, names[:1], "classes have the same centre")
    if math.isnan(ratio):
        without_value(subject, ["cosine_ratio"], "the mean cosine of two classes is 0")
    return found


def davies_bouldin(features: Tensor, labels: Tensor) -> float:
    """How much classes overlap, >= 0, lower is better (Davies and Bouldin 1979; MAGMA, Fig. 4): (N, D), (N,).

    The mean over classes of the worst (s_i + s_j) / |c_i - c_j|, where s is the mean distance to the class centre c.
    """
    labels = labels.unique(return_inverse=True)[1]
    features, count = features.double(), torch.bincount(labels).double()
    sums = torch.zeros(len(count), features.shape[1], dtype=torch.float64, device=features.device)
    centres = sums.index_add(0, labels, features) / count[:, None]  # (classes, D)
    distance = (features - centres[labels]).norm(dim=1)  # (N,)
    spread = torch.zeros_like(count).index_add(0, labels, distance) / count  # (classes,)
    apart = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
    ratio = (spread[:, None] + spread[None]) / apart
    return float(ratio.fill_diagonal_(-math.inf).max(dim=1).values.mean())


def class_cosines(features: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cosine over all pairs of one class, and of two classes (MLO-MAE, Table 13, is their ratio): (N, D), (N,).

    From class sums: the squared length of a sum of unit vectors is the sum of all cosines among them.
    """
    labels = labels.unique(return_inverse=True)[1]
    unit, count = F.normalize(features.double(), dim=1), torch.bincount(labels).double()
    sums = torch.zeros(len(count), unit.shape[1], dtype=torch.float64, device=unit.device).index_add(0, labels, unit)
    within, everything = sums.square().sum(), sums.sum(dim=0).square().sum()
    alone = unit.square().sum()  # of each image and itself: 1, or 0 where all its features are
    same = (within - alone) / (count * (count - 1)).sum()
    different = (everything - within) / (len(unit) ** 2 - count.square().sum())
    return float(same), float(different)
