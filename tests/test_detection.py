"""Matching, generalised IoU and average precision against slow versions, and against what COCO's evaluation gives."""

import numpy as np
import pytest
import reference
import torch

from protocols.detection import average_precision, generalized_iou, match, to_corners

# --- matching --------------------------------------------------------------------------------------------------------


def test_match_finds_what_trying_all_pairs_finds():
    """1,000 problems of at most 6 objects: whole numbers, with ties, and others, large and small."""
    draw = np.random.default_rng(0)
    for number in range(1000):
        shape = draw.integers(1, 7, 2)
        if number % 2:
            cost = draw.integers(-2, 3, shape).astype(float)
        else:
            cost = draw.normal(size=shape) * 10.0 ** draw.integers(-8, 9)
        rows, columns = match(torch.from_numpy(cost))
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert len(rows) == len(set(columns.tolist())) == len(columns) == min(shape)
        found = cost[rows, columns].sum()
        assert found == pytest.approx(reference.least_cost(cost.tolist()), rel=1e-12, abs=1e-12 * np.abs(cost).max())


def test_match_moves_earlier_pairs_where_that_is_better():
    """A greedy choice would pay 101 for either."""
    cost = torch.tensor([[1.0, 2.0], [1.0, 100.0]])
    for matrix in (cost, cost.T):
        rows, columns = match(matrix)
        assert matrix[rows, columns].sum() == 3
    wide = torch.tensor([[5.0, 4.0, 1.0]])
    assert [x.tolist() for x in match(wide)] == [[0], [2]]
    assert [x.tolist() for x in match(wide.T)] == [[2], [0]]


def test_match_takes_any_kind_of_matrix():
    assert [x.tolist() for x in match([[0, 1], [1, 0]])] == [[0, 1], [0, 1]]
    assert [x.tolist() for x in match(torch.zeros(3, 0))] == [[], []]
    half = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    assert match(half)[1].tolist() == [1, 0]
    assert sorted(match(torch.zeros(3, 3))[1].tolist()) == [0, 1, 2]
    huge = torch.tensor([[17, 17, 17], [5, 5, 17], [5, 5, 17]], dtype=torch.float64) * 1e307  # sums are no numbers
    assert match(huge)[1][0] == 2
    near = torch.tensor([[1.0, 1.0 + 1e-12], [1.0, 1.0]], dtype=torch.float64)  # equal in float32
    assert match(near)[1].tolist() == [0, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_match_refuses_what_is_not_finite(bad):
    with pytest.raises(ValueError, match="2 of 6 costs are not finite"):
        match(torch.tensor([[bad, bad], [1.0, 2.0], [3.0, 4.0]]))
    with pytest.raises(ValueError, match="no matrix"):
        match(torch.zeros(3))


# --- boxes -----------------------------------------------------------------------------------------------------------


def corners(count, seed):
    places = torch.rand(count, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.cat([places.amin(dim=1), places.amax(dim=1)], dim=1)


def test_generalized_iou_is_that_of_counted_cells():
    """Boxes of whole sides, cell by cell."""
    draw = np.random.default_rng(1)
    for _ in range(50):
        (a, b), cells = draw.integers(0, 8, (2, 4)), np.zeros((2, 8, 8), dtype=bool)
        boxes = []
        for i, (x, y, w, h) in enumerate((a, b)):
            cells[i, y : y + 1 + h, x : x + 1 + w] = True
            boxes.append([x, y, min(8, x + 1 + w), min(8, y + 1 + h)])
        shared, union = (cells[0] & cells[1]).sum(), (cells[0] | cells[1]).sum()
        seen = np.argwhere(cells.any(axis=0))
        hull = np.prod(seen.max(axis=0) - seen.min(axis=0) + 1)
        one, two = torch.tensor(boxes)
        assert float(generalized_iou(one, two)) == pytest.approx(shared / union - (hull - union) / hull, abs=1e-6)


def test_generalized_iou_of_boxes_that_touch_and_have_no_area():
    box = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    others = {
        "itself": ([0, 0, 1, 1], 1.0),
        "touching sides": ([1, 0, 2, 1], 0.0),
        "touching corners": ([1, 1, 2, 2], -0.5),
        "a point inside": ([0.5, 0.5, 0.5, 0.5], 0.0),
        "beside": ([3, 0, 4, 1], -0.5),
        "across": ([2, 2, 3, 3], -7 / 9),
    }
    for name, (other, value) in others.items():
        other = torch.tensor(other, dtype=torch.float64)
        assert float(generalized_iou(box, other)) == pytest.approx(value, abs=1e-12), name
        assert float(generalized_iou(other, box)) == pytest.approx(value, abs=1e-12), name
    point = torch.tensor([0.3, 0.3, 0.3, 0.3], requires_grad=True)
    value = generalized_iou(point, point.detach())
    value.backward()
    assert value.item() == 0 and point.grad.isfinite().all()


def test_generalized_iou_broadcasts_and_has_the_right_gradient():
    a, b = corners(3, 0).requires_grad_(), corners(2, 1).requires_grad_()
    table = generalized_iou(a[:, None], b[None])
    assert table.shape == (3, 2) and table.dtype == torch.float64
    torch.testing.assert_close(table[2, 1], generalized_iou(a[2], b[1]))
    assert torch.autograd.gradcheck(lambda a, b: generalized_iou(a[:, None], b[None]), (a, b))
    large = torch.tensor([0.0, 0.0, 1000.0, 1000.0], dtype=torch.float16)  # its area is no number of half precision
    assert float(generalized_iou(large, large)) == 1


def test_corners_are_half_a_side_from_the_centre():
    box = torch.tensor([[0.5, 0.25, 0.5, 0.5]])
    torch.testing.assert_close(to_corners(box), torch.tensor([[0.25, 0.0, 0.75, 0.5]]))


# --- average precision -----------------------------------------------------------------------------------------------


def truth(boxes, **given):
    boxes = torch.tensor(boxes, dtype=torch.float64).view(-1, 4)
    plain = {"labels": torch.ones(len(boxes)), "area": boxes[:, 2] * boxes[:, 3], "crowd": torch.zeros(len(boxes))}
    return {"boxes": boxes} | plain | given


def findings(boxes, scores, labels=None):
    boxes = torch.tensor(boxes, dtype=torch.float64).view(-1, 4)
    return {
        "boxes": boxes,
        "scores": torch.tensor(scores),
        "labels": torch.ones(len(boxes)) if labels is None else labels,
    }


def near(value):
    return pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("j", range(10, 20))
def test_average_precision_keeps_ties_with_a_threshold(j):
    """IoU j / 20 is a threshold itself; in float32 some of them would be missed."""
    assert average_precision([truth([0, 0, 20, 10])], [findings([0, 0, j, 10], [0.5])])["AP"] == near((j - 9) / 10)


def test_average_precision_at_recalls_that_are_rounded():
    """100 truths, the k best found: recall point 35 is a hair above 35 / 100, and nine others are so too."""
    places = [[20 * (i % 10), 20 * (i // 10), 9, 9] for i in range(100)]
    short = {35, 41, 47, 57, 69, 70, 82, 83, 94, 95}
    for k in sorted(short | {1, 34, 36, 50, 71, 84, 96, 100}):
        scores = torch.linspace(0.9, 0.1, k).tolist()
        found = average_precision([truth(places)], [findings(places[:k], scores)])["AP50"]
        assert found == near((k if k in short else k + 1) / 101), k


def test_average_precision_of_one_truth():
    found = average_precision([truth([10, 10, 50, 50])], [findings([10, 10, 50, 50], [0.7])])
    assert found == {"AP": near(1), "AP50": near(1), "AP75": near(1), "APs": -1, "APm": near(1), "APl": -1}
    assert list(found) == ["AP", "AP50", "AP75", "APs", "APm", "APl"]


def test_average_precision_gives_equal_overlaps_to_the_later_truth():
    a, b = [10, 10, 50, 50], [30, 10, 50, 50]
    found = [findings([[20, 10, 50, 50], b], [0.9, 0.8])]
    assert average_precision([truth([a, b])], found)["AP50"] == near(51 / 101)  # recall 0.5
    assert average_precision([truth([b, a])], found)["AP50"] == near(1)


def test_average_precision_keeps_the_order_of_equal_scores():
    right, wrong = [10, 10, 50, 50], [100, 100, 50, 50]
    images = [truth([]), truth(right)]
    assert average_precision(images, [findings(wrong, [0.5]), findings(right, [0.5])])["AP50"] == near(0.5)
    for boxes, value in (([right, wrong], 1.0), ([wrong, right], 0.5)):
        assert average_precision(images, [findings([], []), findings(boxes, [0.5, 0.5])])["AP50"] == near(value)


def test_average_precision_sizes_truths_by_their_area():
    case = [truth([0, 0, 100, 100], area=torch.tensor([500.0]))]
    found = [findings([[0, 0, 100, 100], [120, 120, 80, 80]], [0.8, 0.95])]
    values = average_precision(case, found)
    assert values == {"AP": near(0.5), "AP50": near(0.5), "AP75": near(0.5), "APs": near(1), "APm": -1, "APl": -1}
    both = average_precision([truth([0, 0, 32, 32])], [findings([0, 0, 32, 32], [0.5])])
    assert both["APs"] == near(1) and both["APm"] == near(1) and both["APl"] == -1
    large = average_precision([truth([0, 0, 96, 96])], [findings([0, 0, 96, 96], [0.5])])
    assert large["APs"] == -1 and large["APm"] == near(1) and large["APl"] == near(1)
    plain = {name: x for name, x in case[0].items() if name != "area"}
    assert average_precision([plain], found)["APl"] == near(1)  # without areas, those of the boxes


def test_average_precision_leaves_crowds_out():
    crowd, small = [0, 0, 100, 100], [150, 150, 20, 20]
    inside = [10, 10, 20, 20]
    alone = average_precision([truth(crowd, crowd=torch.ones(1))], [findings(inside, [0.9])])
    assert set(alone.values()) == {-1}
    case = truth([crowd, small], crowd=torch.tensor([1, 0]))
    assert average_precision([case], [findings([inside, inside, small], [0.9, 0.8, 0.5])])["AP"] == near(1)
    without = {name: x for name, x in case.items() if name != "crowd"}  # no truth is a crowd then
    assert average_precision([without], [findings([inside, small], [0.9, 0.5])])["AP50"] == near(0.5 * 51 / 101)


def test_average_precision_of_nothing():
    nothing = findings([], [])
    assert set(average_precision([truth([])], [nothing]).values()) == {-1}
    assert set(average_precision([], []).values()) == {-1}
    found = average_precision([truth([0, 0, 20, 20])], [nothing])
    assert found == {"AP": 0, "AP50": 0, "AP75": 0, "APs": 0, "APm": -1, "APl": -1}
    other = findings([0, 0, 20, 20], [0.9], labels=torch.tensor([7]))  # of a class that no truth has
    assert average_precision([truth([0, 0, 20, 20])], [other])["AP"] == 0


def test_average_precision_takes_the_best_hundred_of_a_class():
    box, false = [0, 0, 20, 20], [50, 50, 20, 20]
    for count, value in ((99, 1 / 100), (100, 0)):
        scores = torch.linspace(0.9, 0.5, count).tolist()
        found = findings([box] + [false] * count, [0.1, *scores])
        assert average_precision([truth(box)], [found])["AP50"] == near(value)


def test_average_precision_matches_a_literal_loop():
    """Boxes on a coarse grid and rounded scores, so that there are ties of overlaps and of scores; crowds, sizes."""
    draw = np.random.default_rng(0)
    for number in range(25):
        images, answers = [], []
        for _ in range(draw.integers(1, 5)):
            n, k, step = draw.integers(0, 6), draw.integers(0, 9), 10 if number % 2 else 1
            boxes = np.concatenate([draw.integers(0, 120, (n, 2)), draw.integers(10, 120, (n, 2))], axis=1)
            own = np.concatenate([draw.integers(0, 120, (k, 2)), draw.integers(10, 120, (k, 2))], axis=1)
            own_labels = draw.integers(0, 3, k)
            labels = draw.integers(0, 3, n)
            if n:
                close, chosen = draw.random(k) < 0.7, draw.integers(0, n, k)
                own = np.where(close[:, None], boxes[chosen] + draw.integers(-9, 10, (k, 4)), own)
                own_labels = np.where(close, labels[chosen], own_labels)
            boxes, own = (np.maximum(np.round(x / step) * step, [0, 0, 1, 1]) for x in (boxes, own))
            area = boxes[:, 2] * boxes[:, 3] * draw.choice([1.0, 0.5], n)
            images.append({"boxes": boxes, "labels": labels, "area": area, "crowd": draw.random(n) < 0.2})
            answers.append({"boxes": own, "labels": own_labels, "scores": np.round(draw.random(k), 1)})
        slow = reference.average_precision(images, answers)
        assert average_precision(images, answers) == {name: near(value) for name, value in slow.items()}, number


def test_average_precision_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="1 images of truth, 0 of findings"):
        average_precision([truth([0, 0, 5, 5])], [])
    with pytest.raises(ValueError, match="finite"):
        average_precision([truth([0, 0, 5, 5])], [findings([0, 0, 5, 5], [float("nan")])])
