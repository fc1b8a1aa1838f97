"""What frozen features are worth: nearest neighbours and ridge regression against slow versions."""

import dataclasses

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from make import generator, randn, seeds

from plumbing.images import MemoryImages
from plumbing.probes import knn_accuracy, probe, ridge_accuracy
from plumbing.shapes import SHAPES, render_shapes


@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 5), st.integers(1, 6), seeds)
def test_knn_accuracy_matches_naive_loop(bank, queries, width, k, seed):
    """MAGMA, section 5: Euclidean neighbours, one vote each."""
    x = randn(bank + queries, width, seed=seed)  # float64: no two neighbours are as good as equally far
    y = torch.randint(0, 3, (bank + queries,), generator=generator(seed))
    want = reference.knn_accuracy(x[:bank], y[:bank], x[bank:], y[bank:], k)
    assert knn_accuracy(x[:bank], y[:bank], x[bank:], y[bank:], k, chunk=3) == want


def test_knn_accuracy_survives_a_large_common_mean():
    x = torch.randn(200, 8, generator=generator(0)) * 0.01
    y = (x[:, 0] > 0).long()
    plain = knn_accuracy(x[:150], y[:150], x[150:], y[150:])
    shifted = x + 30
    assert abs(knn_accuracy(shifted[:150], y[:150], shifted[150:], y[150:]) - plain) <= 2


@pytest.mark.parametrize("features", [25, 60])
def test_ridge_accuracy_picks_the_strength_by_true_leave_one_out(features):
    """Against refitting without each sample in turn. With noisy features, fewer than samples or more, the fit itself
    would pick the weakest strength, which scores differently on the test part."""
    x = torch.randn(240, features, generator=generator(29), dtype=torch.float64)
    y = (x[:, :3] + 0.3 * torch.randn(240, 3, generator=generator(30), dtype=torch.float64)).argmax(dim=1)
    train, test, truth = x[:40], x[40:], y[:40]
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    train_s, test_s = (train - mean) / std, (test - mean) / std
    strengths = (40 * 10.0 ** torch.arange(-5, 2)).tolist()

    def accuracy(strength):
        scores = reference.ridge_predictions(train_s, truth, test_s, 3, strength)
        return 100 * float((scores.argmax(dim=1) == y[40:]).float().mean())

    def left_out(strength):
        right = 0
        for i in range(40):
            rest = [j for j in range(40) if j != i]
            scores = reference.ridge_predictions(train_s[rest], truth[rest], train_s[i : i + 1], 3, strength)
            right += int(scores.argmax() == truth[i])
        return right

    best = max(strengths, key=left_out)  # the first of equals
    assert abs(accuracy(best) - accuracy(strengths[0])) > 3
    for x in (train, test), (train.float(), test.float()):
        assert ridge_accuracy(x[0], truth, x[1], y[40:], 3) == pytest.approx(accuracy(best))


def test_ridge_accuracy_separates_what_is_linear_and_nothing_else():
    x = torch.randn(600, 10, generator=generator(0))
    y = (x[:, 3] > 0).long()
    assert ridge_accuracy(x[:400], y[:400], x[400:], y[400:], 2) > 90
    noise = torch.randint(0, 2, (600,), generator=generator(1))
    assert ridge_accuracy(x[:400], noise[:400], x[400:], noise[400:], 2) < 65


def test_probe_leaves_unlabelled_images_out():
    images, labels, _ = render_shapes(60, 8)
    data = MemoryImages(images, labels, list(SHAPES), (0, 0, 0), (1, 1, 1))
    hidden = dataclasses.replace(data, labels=torch.where(torch.arange(60) < 30, labels, -1))
    seen = []

    def encode(batch):
        seen.append(len(batch))
        return batch.flatten(1)

    result = probe(encode, hidden, data, 8)
    assert seen == [30, 60]
    assert set(result) == {"knn", "linear"}
    probe(encode, hidden, data, 8, limit=20)
    assert seen[2:] == [20, 20]
