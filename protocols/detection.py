"""Detection: pairs of least cost, overlaps of boxes, and average precision as COCO's evaluation counts it.

Boxes are corners x0 y0 x1 y1, or x y width height where "xywh" is said; any unit. No function needs a run.
"""

import numpy as np
import torch
from torch import Tensor

# --- pairs -----------------------------------------------------------------------------------------------------------


def match(cost) -> tuple[Tensor, Tensor]:
    """The min(M, N) pairs of rows and columns of least total cost: (M, N) -> rows, in order, and columns, on the CPU.

    Shortest augmenting paths (Jonker and Volgenant 1987) in float64: each row in turn takes a column, and rows that had
    theirs before may move to others. Which of equally good answers is given is left open. Raises ValueError for a cost
    that is not finite, or no matrix.
    """
    cost = np.asarray(torch.as_tensor(cost).detach().to("cpu", torch.float64))
    if cost.ndim != 2:
        raise ValueError(f"costs of {cost.ndim} dimensions are no matrix")
    if not np.isfinite(cost).all():
        raise ValueError(f"{int((~np.isfinite(cost)).sum())} of {cost.size} costs are not finite")
    if cost.shape[0] > cost.shape[1]:
        columns, rows = match(cost.T)
        order = rows.argsort()
        return rows[order], columns[order]
    count, width = cost.shape
    cost = cost * 2.0**-64 if np.abs(cost).max(initial=0) > 2.0**960 else cost  # so that sums of them are finite
    of_row, of_column = np.zeros(count), np.zeros(width)  # prices: cost - of_row - of_column is never below 0
    owner = np.full(width, -1)  # the row that has each column
    for start in range(count):
        length, before = np.full(width, np.inf), np.full(width, -1)  # of the shortest path to each column, and by which
        seen, row, column, reached = np.zeros(width, dtype=bool), start, -1, 0.0
        while True:  # Dijkstra: until a column that is free
            through = reached + cost[row] - of_row[row] - of_column
            shorter = ~seen & (through < length)
            length[shorter], before[shorter] = through[shorter], column
            column = int(np.where(seen, np.inf, length).argmin())
            reached = length[column]
            if owner[column] < 0:
                break
            seen[column], row = True, owner[column]
        of_row[start] += reached
        of_row[owner[seen]] += reached - length[seen]
        of_column[seen] -= reached - length[seen]
        while column >= 0:  # back along the path, each column goes to the row that the path came from
            previous = before[column]
            owner[column] = start if previous < 0 else owner[previous]
            column = previous
    columns = torch.from_numpy(np.flatnonzero(owner >= 0))
    rows = torch.from_numpy(owner[owner >= 0])
    order = rows.argsort()
    return rows[order], columns[order]


# --- boxes -----------------------------------------------------------------------------------------------------------


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU - (hull - union) / hull of boxes (..., 4), corners x0 y0 x1 y1, that broadcast -> (...) in [-1, 1].

    Rezatofighi et al. 2019. Denominators are at least 1e-7, so that two boxes without area have 0, and not nan.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)  # areas leave half precision
    a, b = a.to(dtype), b.to(dtype)
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0).prod(dim=-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(dim=-1)
    union = (a[..., 2:] - a[..., :2]).prod(dim=-1) + (b[..., 2:] - b[..., :2]).prod(dim=-1) - shared
    return shared / union.clamp_min(1e-7) - (hull - union) / hull.clamp_min(1e-7)


def to_corners(boxes: Tensor) -> Tensor:
    """Centre x, y, width, height (..., 4) -> x0 y0 x1 y1."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


# --- average precision -----------------------------------------------------------------------------------------------

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU; in float32 some would lose exact ties
RECALLS = np.linspace(0, 1, 101)
MOST = 100  # findings of a class in an image that count
SIZES = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}  # areas in pixels, both ends included


def overlaps(found: np.ndarray, truth: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """IoU of boxes xywh: (D, 4), (G, 4) -> (D, G); with a crowd, how much of the finding lies in it."""
    low = np.maximum(found[:, None, :2], truth[None, :, :2])
    high = np.minimum(found[:, None, :2] + found[:, None, 2:], truth[None, :, :2] + truth[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    own, other = found[:, 2:].prod(axis=1)[:, None], truth[:, 2:].prod(axis=1)[None]
    union = np.where(crowd[None], own, own + other - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


def assign(iou: np.ndarray, aside: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Findings, the best first, take truths at each of T thresholds: IoU (D, G) -> which found one, and which of these
    found one that is set `aside` (G,), both bool (T, D).

    A finding takes what overlaps it most, the later one of equals, and what is aside only where nothing else is left.
    What is taken is gone, but a crowd has room for all.
    """
    least = np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]
    step = np.arange(len(THRESHOLDS))
    hit, ignored = np.zeros((2, len(THRESHOLDS), len(iou)), dtype=bool)
    taken = np.zeros((len(THRESHOLDS), len(aside)), dtype=bool)
    for d, row in enumerate(iou):
        fits = (row >= least) & ~(taken & ~crowd)  # (T, G)
        counts = fits & ~aside
        choice = np.where(counts.any(axis=1, keepdims=True), counts, fits)
        best = len(aside) - 1 - np.where(choice, row, -1)[:, ::-1].argmax(axis=1)  # from the end: the last of equals
        hit[:, d] = fits[step, best]
        ignored[:, d] = hit[:, d] & aside[best]
        taken[step[hit[:, d]], best[hit[:, d]]] = True
    return hit, ignored


def precisions(scores, hit, ignored, truths: int) -> np.ndarray:
    """Precision at the 101 recalls: scores (D,), bools (T, D) of all images, and how many truths there are -> (T, 101).

    Raised to the best at any higher recall; 0 at a recall that is not reached.
    """
    order = np.argsort(-scores, kind="stable")  # equal ones stay in the order of the images
    right, wrong = ((x & ~ignored)[:, order].cumsum(axis=1) for x in (hit, ~hit))
    precision = right / np.maximum(right + wrong, 1)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    table = np.zeros((len(THRESHOLDS), len(RECALLS)))
    for t, recall in enumerate(right / truths):
        place = np.searchsorted(recall, RECALLS)  # the first that is at least as high
        reached = place < len(recall)
        table[t, reached] = precision[t, place[reached]]
    return table


def average_precision(truth: list, found: list) -> dict:
    """COCO's evaluation of boxes: {AP, AP50, AP75, APs, APm, APl}, each in [0, 1], or -1 where no truth counts.

    One dict an image, images in the order of their ids, of tensors, arrays or lists: truth {boxes (n, 4) xywh, labels
    (n,), area (n,), crowd (n,)}, found {boxes, labels, scores}; without "crowd" there is none, without "area" it is
    that of the box. AP is the mean over classes and over IoU 0.50 to 0.95, AP50 and AP75 at one. APs, APm and APl are
    of sizes (SIZES): truths go by their area, findings without a truth by that of their box.
    It is pycocotools' COCOeval, but for a truth whose id is 0, which that counts as never found, and where nothing is
    found at all: 0 here. Raises ValueError for lists of different length and for what is not finite.
    """
    if len(truth) != len(found):
        raise ValueError(f"{len(truth)} images of truth, {len(found)} of findings")
    images = []
    for t, f in zip(truth, found, strict=True):
        boxes, own = (_array(x["boxes"]).reshape(-1, 4) for x in (t, f))
        scores, area = _array(f["scores"]), _array(t["area"]) if "area" in t else boxes[:, 2:].prod(axis=1)
        crowd = _array(t["crowd"]).astype(bool) if "crowd" in t else np.zeros(len(boxes), dtype=bool)
        if not all(np.isfinite(x).all() for x in (boxes, own, scores, area)):
            raise ValueError("boxes, areas and scores must be finite")
        images.append((_array(t["labels"]), boxes, area, crowd, _array(f["labels"]), own, scores))
    tables = {size: [] for size in SIZES}
    for label in np.unique(np.concatenate([np.zeros(0), *(image[0] for image in images)])):
        parts = [part for image in images if (part := _of_class(image, label))]
        for size, limits in SIZES.items():
            results = [_judge(part, limits) for part in parts]
            if count := sum(result[3] for result in results):
                scores = np.concatenate([result[0] for result in results])
                hit, ignored = (np.concatenate([result[i] for result in results], axis=1) for i in (1, 2))
                tables[size].append(precisions(scores, hit, ignored, count))
    means = {f"AP{size}": np.stack(rows).mean(axis=(0, 2)) if rows else None for size, rows in tables.items()}
    result = {name: -1.0 if row is None else float(row.mean()) for name, row in means.items()}
    at = {"AP50": 0, "AP75": 5}  # places of these thresholds
    single = {name: -1.0 if means["AP"] is None else float(means["AP"][i]) for name, i in at.items()}
    return {"AP": result.pop("AP")} | single | result


def _array(x) -> np.ndarray:
    return np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, dtype=np.float64)


def _of_class(image: tuple, label: float) -> tuple | None:
    """What of an image is of one class: areas, crowds, IoU, boxes' areas and scores, the best findings first."""
    labels, boxes, area, crowd, own_labels, own, scores = image
    mine = labels == label
    theirs = np.flatnonzero(own_labels == label)
    theirs = theirs[np.argsort(-scores[theirs], kind="stable")][:MOST]
    if not mine.any() and not len(theirs):
        return None
    iou = overlaps(own[theirs], boxes[mine], crowd[mine])
    return area[mine], crowd[mine], iou, own[theirs, 2:].prod(axis=1), scores[theirs]


def _judge(part: tuple, limits: tuple) -> tuple:
    """Scores (D,), which are hits and which are ignored, bool (T, D), and how many truths count, of one size."""
    area, crowd, iou, own, scores = part
    low, high = limits
    aside = crowd | (area < low) | (area > high)
    if len(aside):
        hit, ignored = assign(iou, aside, crowd)
    else:
        hit, ignored = np.zeros((2, len(THRESHOLDS), len(scores)), dtype=bool)
    other = (own < low) | (own > high)
    return scores, hit, ignored | (~hit & other), int((~aside).sum())
