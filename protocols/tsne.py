"""t-SNE, exact: points in the plane whose neighbours are those of their features.

Van der Maaten and Hinton, *Visualizing Data using t-SNE*, JMLR 9, 2008; numbers of equations are theirs. Every pair of
points counts, so memory and time grow with the square of their number: a thousand are a matter of seconds.
"""

import math

import torch
from torch import Tensor

STEPS = 1000  # as many as in section 3.4, with the settings that stand there
LEARNING_RATE = 100
EXAGGERATION, EXAGGERATED = 4, 50  # factor of p in the first steps, and how many steps these are
MOMENTUM, EARLY_MOMENTUM, EARLY = 0.8, 0.5, 250  # the momentum, another one in the first steps, and how many these are
GROW, SHRINK, LEAST = 0.2, 0.8, 0.01  # of the gains (Jacobs 1988): numbers of van der Maaten's code, the text has none


def affinities(distances: Tensor, perplexity: float) -> Tensor:
    """Eq. 1: squared distances (N, N) -> p(j | i) = exp(-d_ij / 2 sigma_i^2) / sum_k, rows that sum to 1 without i.

    By bisection, of all rows at once, sigma_i is such that the entropy of row i is log(perplexity), 1 to N - 1. Where a
    point has more nearest neighbours at one and the same distance than that, these share the row alike.
    """
    itself = torch.eye(len(distances), dtype=torch.bool, device=distances.device)
    d = distances.masked_fill(itself, math.inf)
    d = d / d.masked_fill(itself, 0).mean(dim=1, keepdim=True).clamp_min(torch.finfo(d.dtype).tiny)
    low = torch.full_like(d[:, :1], -20)  # of log2(1 / 2 sigma^2), in units of the row's mean distance
    high = torch.full_like(low, 60)
    for _ in range(50):
        middle = (low + high) / 2
        p = (-d * middle.exp2()).softmax(dim=1)
        too_wide = torch.special.entr(p).sum(dim=1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(too_wide, middle, low), torch.where(too_wide, high, middle)
    return p


def similarities(y: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 4: points (N, 2) -> q_ij, which sum to 1, and their weights before the division, 1 / (1 + |y_i - y_j|^2)."""
    norms = y.square().sum(dim=1)
    apart = torch.addmm(1 + norms, y, y.T, alpha=-2) + norms[:, None]  # (N, N), 1 + |y_i - y_j|^2
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    weights = apart.clamp_min(1).reciprocal().masked_fill(itself, 0)
    return weights / weights.sum(), weights


def divergence(p: Tensor, y: Tensor) -> Tensor:
    """Section 3.1: C = KL(P || Q) = sum_ij p_ij log(p_ij / q_ij), p (N, N), y (N, 2). Eq. 5 is its gradient by y."""
    q, _ = similarities(y)
    return (torch.xlogy(p, p) - torch.xlogy(p, q.where(p > 0, 1))).sum()


def gradient(p: Tensor, y: Tensor) -> Tensor:
    """Eq. 5: dC/dy_i = 4 sum_j (p_ij - q_ij) (y_i - y_j) / (1 + |y_i - y_j|^2), p (N, N), y (N, 2) -> (N, 2)."""
    q, weights = similarities(y)
    pull = (p - q) * weights  # (N, N)
    return 4 * (pull.sum(dim=1, keepdim=True) * y - pull @ y)


def tsne(features: Tensor, seed: int = 0, perplexity: float = 40, steps: int = STEPS) -> Tensor:
    """Algorithm 1 on features (N, D) -> points (N, 2), centred; the start is drawn by the seed.

    With fewer than 3 perplexities of neighbours, the perplexity is a third of them. Below a hundred points the learning
    rate is their number: a larger one throws them far apart, for good. A single point is at 0. Features are taken as
    they are, where the paper's experiments first reduce pixels to 30 principal components.
    """
    if len(features) < 2:
        return features.new_zeros(len(features), 2)
    x = features.double() - features.double().mean(dim=0)
    perplexity = max(1.0, min(perplexity, (len(x) - 1) / 3))
    p = affinities(torch.cdist(x, x).square(), perplexity)
    p = ((p + p.T) / (2 * len(x))).to(torch.promote_types(features.dtype, torch.float32))  # section 3.1: p_ij
    y = torch.randn(len(x), 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(p) * 1e-2
    velocity, gains, rate = torch.zeros_like(y), torch.ones_like(y), min(LEARNING_RATE, len(y))
    for step in range(steps):
        slope = gradient(p * EXAGGERATION if step < EXAGGERATED else p, y)
        gains = torch.where(slope.sign() == velocity.sign(), gains * SHRINK, gains + GROW).clamp_min(LEAST)
        velocity = (EARLY_MOMENTUM if step < EARLY else MOMENTUM) * velocity - rate * gains * slope
        y = y + velocity
        y = y - y.mean(dim=0)
    return y
