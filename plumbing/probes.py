"""What frozen features are worth: nearest neighbours and ridge regression, both exact."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing.crops import resize
from plumbing.processes import note


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 10, chunk: int = 0, weigh: bool = False
):
    """Share of queries (M, D) whose k nearest rows of the bank (N, D) vote for their label, in percent.

    Euclidean distance, the lowest class wins a tie (MAGMA, section 5: k = 10). One vote each; with `weigh` 1 / distance
    votes, as in MAGMA's code. nan where there is nothing to judge (`unfit`).
    """
    if unfit(training=bank, test=queries):
        return math.nan
    bank, queries = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (bank, queries))
    scale = moderate(torch.maximum(bank.abs().max(), queries.abs().max()))
    bank, queries = bank / scale, queries / scale
    centre = bank.mean(dim=0)  # the Gram form of a distance loses its digits where the mean is large
    bank, queries = bank - centre, queries - centre
    k, right, classes = min(k, len(bank)), 0, int(bank_labels.max()) + 1
    norms, columns = bank.square().sum(dim=1), bank.T
    # At most 64 MB of distances at a time, of votes and of differences.
    chunk = chunk or max(1, 2**24 // max(len(bank), classes, k * bank.shape[1] * weigh))
    for part, truth in zip(queries.split(chunk), labels.split(chunk), strict=True):
        found = smallest(torch.addmm(norms, part, columns, alpha=-2), k)  # (chunk, k); distances up to a constant a row
        votes = bank.new_ones(found.shape)  # (chunk, k)
        if weigh:  # the distances anew, as differences: those above have lost their digits where they are small
            votes /= scale * (part[:, None] - bank[found]).norm(dim=2) + 1e-5
        votes = bank.new_zeros(len(part), classes).scatter_add_(1, bank_labels[found], votes)  # (chunk, classes)
        right += int((votes.argmax(dim=1) == truth).sum())
    return 100 * right / len(labels)


def smallest(x: Tensor, k: int, block: int = 64) -> Tensor:
    """Where the k smallest of each row are: (M, N) -> (M, k), the smallest first.

    They lie in the k blocks of columns whose own smallest are the smallest, so one pass over all and a choice among
    k * block does for what `topk` takes three to five times as long for.
    """
    whole = x.shape[1] // block * block  # the columns after it are a block of their own, that is always looked at
    if whole < 2 * k * block:
        return x.topk(k, largest=False).indices
    blocks = x[:, :whole].unflatten(1, (-1, block)).amin(dim=2).topk(k, largest=False).indices  # (M, k)
    columns = (blocks[..., None] * block + torch.arange(block, device=x.device)).flatten(1)  # (M, k * block)
    columns = torch.cat([columns, torch.arange(whole, x.shape[1], device=x.device).expand(len(x), -1)], dim=1)
    return columns.gather(1, x.gather(1, columns).topk(k, largest=False).indices)


def ridge_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int):
    """Accuracy in percent of ridge regression on one-hot labels: a linear probe without a training loop.

    Features (N, D) are standardised. Of seven ridge strengths, 1e-5 to 10 times N, the one with the best exact
    leave-one-out accuracy on the training part is taken. nan where there is nothing to judge (`unfit`), or where no
    solution is found.
    """
    if unfit(training=train, test=test):
        return math.nan
    train, test = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (train, test))
    scale = moderate(train.abs().amax(dim=0)).clamp_min(1)  # (D,); tiny ones are as good as constant
    train, test = train / scale, test / scale
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0).clamp_min(1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    if len(train) < train.shape[1]:
        # The weights lie in the span of the images, so a basis of it will do. Fits are nearly exact there: what they
        # leave needs more digits.
        basis = torch.linalg.qr(train.T).Q.double()  # (D, N)
        train, test = train.double() @ basis, test.double() @ basis
    onehot = F.one_hot(train_labels, classes).to(train.dtype)
    offset = onehot.mean(dim=0)
    try:
        values, vectors = torch.linalg.eigh(train.T @ train)  # (D,), (D, D)
    except torch.linalg.LinAlgError:  # it does not converge
        return math.nan
    rotated = train @ vectors  # (N, D)
    target, squares = rotated.T @ (onehot - offset), rotated.square()  # (D, classes), (N, D)
    best, best_weight = -1.0, None
    for strength in len(train) * 10.0 ** torch.arange(-5, 2):
        shrink = 1 / (values.clamp_min(0) + strength)  # (D,)
        fitted = rotated @ (shrink[:, None] * target) + offset
        leverage = (squares @ shrink + 1 / len(train)).clamp_max(1 - 1e3 * torch.finfo(train.dtype).eps)[:, None]
        left_out = onehot - (onehot - fitted) / (1 - leverage)
        accuracy = float((left_out.argmax(dim=1) == train_labels).float().mean())
        if accuracy > best:
            best, best_weight = accuracy, vectors @ (shrink[:, None] * target)
    scores = test @ best_weight + offset
    return 100 * float((scores.argmax(dim=1) == test_labels).float().mean()) if scores.isfinite().all() else math.nan


def unfit(**splits) -> str:
    """Why frozen features say nothing: "features are not finite (3 of 500 images)"; "" if they do.

    Of each split the features, unfit(training=(N, D), test=(M, D)).
    """
    for split, features in splits.items():
        if not len(features):
            return f"no {split} image has a label"
    finite = torch.cat([features.isfinite().all(dim=1) for features in splits.values()])
    return "" if finite.all() else f"features are not finite ({int((~finite).sum())} of {len(finite)} images)"


def moderate(largest: Tensor) -> Tensor:
    """What to divide features by whose largest magnitudes are these, so that their squares stay in float32's range.

    It is 1 but for huge and tiny ones, so that others keep every digit.
    """
    return largest.where((largest > 1e15) | ((0 < largest) & (largest < 1e-15)), 1.0)


def pooled_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """One vector an image (B, D): what the encoder returns, or the mean over positions where that is a map."""
    out = encoder(images)
    return out.mean(dim=(2, 3)) if out.ndim == 4 else out


@torch.no_grad()
def features_of(encode, data, indices, size: int) -> tuple[Tensor, Tensor]:
    """encode(images) -> (B, D) over whole images of a data set: float32 features (N, D) and labels (N,).

    Without any image, both are empty and D is 0.
    """
    if not len(indices):
        return torch.empty(0, 0, device=data.labels.device), data.labels[:0]
    parts = [(encode(images).float(), labels) for images, labels in data.plain_batches(indices, size)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def raw_pixels(images: Tensor) -> Tensor:
    """The baseline of every probe: (B, 3, H, W) -> (B, D), at no more than 32 x 32, or photographs would be huge."""
    return resize(images, min(images.shape[-1], 32)).flatten(1)


def effective_rank(features: Tensor) -> float:
    """RankMe: how many directions the features (N, D) use, 1 to min(N, D), by the entropy of their singular values.

    exp(-sum p_k log p_k), p_k = s_k / sum(s) + 1e-7, of features that are not centred (Garrido et al. 2023, Eq. 1, 2);
    nan where they are not finite.
    """
    if not bool(features.isfinite().all()) or not len(features):
        return math.nan
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + 1e-7
    return float((-shares * shares.log()).sum().exp())


def rank_of(features: Tensor) -> dict:
    """The effective rank as a result: None where there is none."""
    rank = effective_rank(features)
    return {"effective_rank": None if math.isnan(rank) else rank}


def labelled(data, limit: int = 0) -> Tensor:
    """Indices of the images that have a label, of all where the data set has no classes.

    At most `limit`, drawn once by a fixed seed; 0 takes all.
    """
    chosen = torch.nonzero(data.labels >= 0)[:, 0].cpu() if len(data.classes) else torch.arange(len(data))
    if limit and limit < len(chosen):
        chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:limit]]
    return chosen


def probe(encode, train, test, size: int, limit: int = 0) -> dict:
    """What frozen features are worth: {"knn": percent, "linear": percent, "effective_rank": of the training images}.

    At most `limit` images of each split; 0 takes all. Unlabelled ones do not count; a data set without classes has the
    rank alone. None, and a note that says why, for what cannot be told.
    """
    if not len(train.classes):
        return rank_of(features_of(encode, train, labelled(train, limit), size)[0])
    parts = []
    for data in (train, test):
        parts += features_of(encode, data, labelled(data, limit), size)
    if reason := unfit(training=parts[0], test=parts[2]):
        note(f"{reason}: no kNN, no linear")
        return {"knn": None, "linear": None} | rank_of(parts[0])
    linear = ridge_accuracy(*parts, len(train.classes))
    if math.isnan(linear):
        note("ridge regression finds no solution for these features: no linear")
    found = {"knn": knn_accuracy(*parts), "linear": None if math.isnan(linear) else linear}
    return found if encode is raw_pixels else found | rank_of(parts[0])  # thousands of pixels would take long
