"""t-SNE: its equations against slow versions, its walk step by step, and features that have no good answer."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from make import generator, randn, seeds

import protocols.tsne
from plumbing.errors import UserError
from protocols.settings import Config
from protocols.tsne import affinities, divergence, gradient, similarities, tsne


def squares(x):
    return (x[:, None] - x[None]).square().sum(dim=2)


def some_p(count, seed):
    """Any p_ij: symmetric, of sum 1, 0 on the diagonal."""
    p = torch.rand(count, count, generator=generator(seed), dtype=torch.float64).fill_diagonal_(0)
    return (p + p.T) / (2 * p.sum())


@given(st.integers(3, 30), st.floats(0.05, 0.95), st.integers(-30, 30), seeds)
def test_each_row_has_the_entropy_of_its_perplexity(count, share, power, seed):
    """Eq. 1, and Perp = exp(H), whatever the unit of the features."""
    perplexity = 1 + share * (count - 2)
    d = squares(randn(count, 4, seed=seed)) * 2.0**power
    p = affinities(d, perplexity)
    assert torch.equal(p.diagonal(), torch.zeros(count, dtype=torch.float64)) and p.min() >= 0
    torch.testing.assert_close(p.sum(dim=1), torch.ones(count, dtype=torch.float64))
    entropy = torch.special.entr(p).sum(dim=1)
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(perplexity)), rtol=0, atol=1e-8)


def test_affinities_match_the_slow_version_of_eq_1():
    x = randn(9, 3)
    x[4:] *= 20  # rows of quite different sigma
    wanted = torch.stack([reference.tsne_row(squares(x), i, 3.3) for i in range(9)])
    torch.testing.assert_close(affinities(squares(x), 3.3), wanted, rtol=1e-6, atol=1e-9)


@given(st.integers(2, 12), st.floats(-3, 1.5), seeds)
def test_eq_5_is_the_gradient_of_the_divergence(count, size, seed):
    """In float64, near the start and far from it; and Eq. 4 sums to 1 without the diagonal."""
    p, y = some_p(count, seed), (10**size * randn(count, 2, seed=seed)).requires_grad_()
    (wanted,) = torch.autograd.grad(divergence(p, y), y)
    torch.testing.assert_close(gradient(p, y).detach(), wanted, rtol=1e-7, atol=1e-11)
    q, _ = similarities(y.detach())
    assert float(q.sum()) == pytest.approx(1) and not q.diagonal().any()


def test_the_divergence_matches_the_loop_over_pairs():
    p, y = some_p(6, 0), randn(6, 2, seed=1)
    torch.testing.assert_close(divergence(p, y), reference.tsne_cost(p, y))


def test_the_settings_are_those_of_the_paper():
    """Section 3.4: 1000 steps of rate 100, p times 4 in 50 of them, momentum 0.5 in 250, then 0.8."""
    assert (protocols.tsne.STEPS, protocols.tsne.LEARNING_RATE) == (1000, 100)
    assert (protocols.tsne.EXAGGERATION, protocols.tsne.EXAGGERATED) == (4, 50)
    assert (protocols.tsne.EARLY_MOMENTUM, protocols.tsne.EARLY, protocols.tsne.MOMENTUM) == (0.5, 250, 0.8)


@pytest.mark.parametrize(("count", "rate"), [(8, 8), (102, 100)])
def test_the_walk_is_algorithm_1(count, rate, monkeypatch):
    """Exaggeration, both momenta, gains and the start; each phase is short, as a walk enlarges what differs."""
    monkeypatch.setattr(protocols.tsne, "EXAGGERATED", 3)
    monkeypatch.setattr(protocols.tsne, "EARLY", 5)
    x, start = randn(count, 3), 1e-2 * randn(count, 2, seed=7)
    p = affinities(squares(x), (count - 1) / 3)
    for steps in (0, 1, 2, 3, 4, 5, 6, 9) if count == 8 else (2,):
        wanted = reference.tsne_walk((p + p.T) / (2 * count), start, steps, rate, exaggerated=3, early=5)
        torch.testing.assert_close(tsne(x, seed=7, steps=steps), wanted, rtol=1e-8, atol=1e-8)


def test_neighbours_stay_neighbours():
    labels = torch.arange(45) % 3
    x = 8 * randn(3, 16)[labels] + randn(45, 16, seed=1)
    apart = squares(tsne(x, steps=150)).fill_diagonal_(math.inf)
    assert torch.equal(labels[apart.argmin(dim=1)], labels)


def test_few_points_have_a_third_of_their_neighbours_for_perplexity():
    x = randn(13, 4)
    assert torch.equal(tsne(x, steps=20), tsne(x, perplexity=4.0, steps=20))
    assert not torch.equal(tsne(x, steps=20), tsne(x, perplexity=3.0, steps=20))


def test_the_seed_draws_the_start_and_a_shift_changes_nothing():
    x = randn(12, 4)
    assert torch.equal(tsne(x, 3, steps=9), tsne(x, 3, steps=9))
    assert not torch.allclose(tsne(x, 3, steps=9), tsne(x, 4, steps=9))
    torch.testing.assert_close(tsne(x + 1000, 3, steps=9), tsne(x, 3, steps=9), rtol=1e-6, atol=1e-9)


ODD = {
    "one": torch.ones(1, 3),
    "none": torch.ones(0, 3),
    "two": randn(2, 3).float(),
    "three": randn(3, 3).float(),
    "all the same": torch.ones(20, 3),
    "duplicates": randn(4, 3).float().repeat(8, 1),
    "an outlier": torch.cat([randn(30, 3), 1e9 * torch.ones(1, 3)]).float(),
    "huge": 1e30 * randn(20, 3).float(),
    "tiny": 1e-30 * randn(20, 3).float(),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_features_have_points_too(name):
    y = tsne(ODD[name], steps=55)
    assert y.shape == (len(ODD[name]), 2) and y.dtype == torch.float32 and y.isfinite().all()
    assert y.mean(dim=0).abs().max() < 1e-3 if len(y) else True
    if name == "one":
        assert not y.any()


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_the_unit_of_the_features_does_not_matter(scale):
    x = randn(20, 3)
    torch.testing.assert_close(tsne(scale * x, steps=20), tsne(x, steps=20), rtol=1e-6, atol=1e-9)


def test_points_at_one_place_share_a_row_alike():
    """More of them than the perplexity: its entropy cannot be had."""
    d = squares(torch.cat([torch.zeros(6, 2), torch.ones(3, 2)]).double())
    p = affinities(d, 2.0)
    expected = torch.full((6, 6), 0.2, dtype=torch.float64).fill_diagonal_(0)
    torch.testing.assert_close(p[:6, :6], expected)


def test_a_perplexity_below_one_is_refused():
    with pytest.raises(UserError, match="--perplexity 0.5 makes no sense; give 1 or more"):
        Config(data="x", image_size=8, perplexity=0.5)
