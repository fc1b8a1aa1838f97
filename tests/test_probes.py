"""What frozen features are worth: nearest neighbours and ridge regression against slow versions."""

import dataclasses
import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from make import generator, randn, seeds

from plumbing.images import MemoryImages
from plumbing.probes import effective_rank, knn_accuracy, probe, ridge_accuracy, smallest
from plumbing.shapes import SHAPES, render_shapes


@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 5), st.integers(1, 6), st.booleans(), seeds)
def test_knn_accuracy_matches_naive_loop(bank, queries, width, k, weigh, seed):
    """MAGMA, section 5: Euclidean neighbours, one vote each, or 1 / distance as in its code."""
    x = randn(bank + queries, width, seed=seed)  # float64: no two neighbours are as good as equally far
    y = torch.randint(0, 3, (bank + queries,), generator=generator(seed))
    want = reference.knn_accuracy(x[:bank], y[:bank], x[bank:], y[bank:], k, weigh)
    assert knn_accuracy(x[:bank], y[:bank], x[bank:], y[bank:], k, chunk=3, weigh=weigh) == want


def test_a_neighbour_that_is_the_query_itself_outvotes_all_others():
    x, y = randn(12, 3), torch.arange(12) % 4
    assert knn_accuracy(x, y, x, y, k=12, weigh=True) == 100.0
    assert knn_accuracy(x, y, x, y, k=12) == 25.0


@given(st.integers(1, 4), st.integers(1, 6), st.integers(2, 5), st.integers(0, 70), st.booleans(), seeds)
def test_the_smallest_are_found_block_by_block(rows, k, block, columns, few, seed):
    x = randn(rows, k + columns, seed=seed)
    x = x.round() if few else x  # many equal ones
    found = smallest(x, k, block)
    assert all(len(set(row)) == k for row in found.tolist())
    torch.testing.assert_close(x.gather(1, found), x.sort(dim=1).values[:, :k], rtol=0, atol=0)


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
    assert set(result) == {"knn", "linear", "effective_rank"}
    probe(encode, hidden, data, 8, limit=20)
    assert seen[2:] == [20, 20]


# --- effective rank --------------------------------------------------------------------------------------------------


@given(seed=seeds, count=st.integers(1, 12), width=st.integers(1, 12))
def test_effective_rank_is_that_of_rankmes_equations(seed, count, width):
    """RankMe, Eq. 1 and 2, by numpy's singular values and a loop."""
    features = randn(count, width, seed=seed)
    values = np.linalg.svd(features.numpy(), compute_uv=False)
    entropy = 0.0
    for value in values:
        share = value / sum(values) + 1e-7
        entropy -= share * math.log(share)
    assert effective_rank(features) == pytest.approx(math.exp(entropy), rel=1e-9)
    assert 1 - 1e-4 < effective_rank(features) < min(count, width) + 1e-4
    assert effective_rank(features * 1000) == pytest.approx(effective_rank(features), rel=1e-9)


def test_effective_rank_counts_directions_of_features_that_are_not_centred():
    for k in (1, 3, 8):
        assert effective_rank(torch.eye(8)[:k].repeat(5, 1)) == pytest.approx(k, rel=1e-4)
    shifted = randn(50, 6) + 1000
    assert effective_rank(shifted) < 1.1
    assert effective_rank(shifted - shifted.mean(dim=0)) > 5
    assert effective_rank(torch.zeros(5, 3)) == pytest.approx(1, abs=1e-4)
    assert math.isnan(effective_rank(torch.tensor([[1.0, math.nan]])))
    assert math.isnan(effective_rank(torch.empty(0, 3)))


def test_a_probe_without_labels_tells_the_rank_alone():
    images, labels, _ = render_shapes(60, 8)
    data = MemoryImages(images, torch.full_like(labels, -1), [], (0, 0, 0), (1, 1, 1))
    seen = []

    def encode(batch):
        seen.append(len(batch))
        return batch.flatten(1)

    found = probe(encode, data, data, 8)
    assert found == {"effective_rank": pytest.approx(effective_rank(images.flatten(1) / 255), rel=1e-4)}
    assert seen == [60]
    probe(encode, data, data, 8, limit=20)
    assert seen[1:] == [20]


# --- features that say nothing, or too much for float32 --------------------------------------------------------------

BOTH = (knn_accuracy, lambda *parts: ridge_accuracy(*parts, 3))


def features_and_labels(count=60, width=5, seed=0, dtype=torch.float32):
    """Features that tell three classes apart, in two halves: features, labels, features, labels."""
    labels = torch.arange(count) % 3
    features = randn(count, width, seed=seed, dtype=dtype) + 4 * torch.eye(3, width, dtype=dtype)[labels]
    half = count // 2
    return features[:half], labels[:half], features[half:], labels[half:]


@pytest.mark.parametrize("judge", BOTH)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", [0, 2])
def test_one_value_that_is_not_finite_leaves_no_accuracy(judge, value, part):
    parts = features_and_labels()
    assert judge(*parts) > 80
    parts[part][3, 1] = value
    assert math.isnan(judge(*parts))


@pytest.mark.parametrize("judge", BOTH)
@pytest.mark.parametrize("scale", [1e30, 1e37, 1e-30])
def test_huge_features_are_judged_as_others_are(judge, scale):
    """Their squares would leave the range of float32; tiny ones are as good as constant to a ridge."""
    bank, labels, queries, truth = features_and_labels()
    if judge is knn_accuracy or scale > 1:
        assert judge(bank * scale, labels, queries * scale, truth) == judge(bank, labels, queries, truth)
    else:
        assert judge(bank * scale, labels, queries * scale, truth) == pytest.approx(100 / 3)


def test_one_huge_column_hides_no_other_from_a_ridge():
    bank, labels, queries, truth = features_and_labels()
    noise = 1e30 * randn(60, 1, seed=1, dtype=torch.float32)
    with_noise = torch.cat([bank, noise[:30]], dim=1), labels, torch.cat([queries, noise[30:]], dim=1), truth
    ordinary = (
        torch.cat([bank, noise[:30] / 1e30], dim=1),
        labels,
        torch.cat([queries, noise[30:] / 1e30], dim=1),
        truth,
    )
    assert ridge_accuracy(*with_noise, 3) == pytest.approx(ridge_accuracy(*ordinary, 3))


@pytest.mark.parametrize("judge", BOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_judged_in_float32(judge, dtype):
    bank, labels, queries, truth = features_and_labels()
    bank, queries = bank.to(dtype), queries.to(dtype)
    assert judge(bank, labels, queries, truth) == judge(bank.float(), labels, queries.float(), truth)


@pytest.mark.parametrize("judge", BOTH)
def test_few_images_few_classes_and_equal_features_have_an_accuracy(judge):
    bank, labels, queries, truth = features_and_labels()
    assert judge(bank, labels * 0, queries, truth * 0) == 100  # one class
    assert judge(bank[:1], labels[:1], queries, truth) == pytest.approx(100 / 3)  # one image: all are of its class
    some = labels < 2  # no example of the third class
    known = 100 * float((truth < 2).float().mean())
    assert known - 10 < judge(bank[some], labels[some], queries, truth) <= known
    same = torch.ones(30, 5)  # no feature tells anything: one class for all
    assert judge(same, labels, same, truth) == pytest.approx(100 / 3)
    doubled = torch.cat([bank, bank], dim=1), labels, torch.cat([queries, queries], dim=1), truth
    assert judge(*doubled) == judge(bank, labels, queries, truth)
    assert judge(bank, labels, queries[:1], truth[:1]) == 100
    for empty in ((bank[:0], labels[:0], queries, truth), (bank, labels, queries[:0], truth[:0])):
        assert math.isnan(judge(*empty))


def test_a_ridge_without_a_solution_has_no_accuracy(monkeypatch, capsys):
    seen = []

    def fail(matrix):
        seen.append(matrix)
        raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    parts = features_and_labels()
    assert math.isnan(ridge_accuracy(*parts, 3)) and seen
    images, labels, _ = render_shapes(40, 8)
    data = MemoryImages(images, labels, list(SHAPES), (0, 0, 0), (1, 1, 1))
    found = probe(lambda batch: batch.flatten(1), data, data, 8)
    assert found["linear"] is None and found["knn"] > 0
    assert capsys.readouterr().out == "note: ridge regression finds no solution for these features: no linear\n"


def test_a_probe_without_a_value_says_why(capsys):
    images, labels, _ = render_shapes(40, 8)
    data = MemoryImages(images, labels, list(SHAPES), (0, 0, 0), (1, 1, 1))

    def broken(batch):
        out = batch.flatten(1).clone()
        out[[1, 5, 8], 0] = math.nan
        return out

    assert probe(broken, data, data, 8) == {"knn": None, "linear": None, "effective_rank": None}
    assert capsys.readouterr().out == "note: features are not finite (6 of 80 images): no kNN, no linear\n"
    none = dataclasses.replace(data, labels=torch.full((40,), -1))
    for train, test, split in ((none, data, "training"), (data, none, "test")):
        found = probe(lambda batch: batch.flatten(1), train, test, 8)
        assert (found["knn"], found["linear"], found["effective_rank"] is None) == (None, None, train is none)
        assert capsys.readouterr().out == f"note: no {split} image has a label: no kNN, no linear\n"
