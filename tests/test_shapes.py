"""The built-in pictures: what they depend on, what they show, and that pixels alone do not tell their class."""

import itertools

import pytest
import torch

from plumbing.crops import resize
from plumbing.datasets import STATISTICS, load_data
from plumbing.probes import knn_accuracy
from plumbing.shapes import SHAPES, render_shapes


def test_shapes_depend_on_seed_and_index_alone():
    images, labels, masks = render_shapes(40, 16, seed=3)
    fewer = render_shapes(7, 16, seed=3)
    assert torch.equal(images[:7], fewer[0])
    assert torch.equal(masks[:7], fewer[2])
    assert not torch.equal(images[:7], render_shapes(7, 16, seed=4)[0])
    assert torch.bincount(labels).tolist() == [4] * len(SHAPES)


@pytest.mark.parametrize("size", [16, 33, 64])
def test_shapes_masks_cover_the_object(size):
    images, _, masks = render_shapes(60, size)
    share = masks.float().mean(dim=(1, 2))
    assert images.shape == (60, 3, size, size)
    assert (share > 0.03).all()
    assert (share < 0.5).all()
    inside = torch.stack([x[:, m].float().mean(dim=1) for x, m in zip(images, masks, strict=True)])
    outside = torch.stack([x[:, ~m].float().mean(dim=1) for x, m in zip(images, masks, strict=True)])
    assert ((inside - outside).abs().amax(dim=1) > 15).float().mean() > 0.95  # the object stands out


def test_shapes_are_the_same_drawing_at_any_size():
    small, _, _ = render_shapes(20, 32)
    large, _, _ = render_shapes(20, 128)
    assert (resize(large, 32) - resize(small, 32)).abs().mean() < 0.03


def test_shapes_for_training_and_for_testing_are_different_pictures():
    train, test, other = (
        load_data("shapes", split=split, image_size=16, seed=seed).images[:100].flatten(1).float()
        for split, seed in (("train", 0), ("test", 0), ("train", 1))
    )
    for a, b in itertools.combinations((train, test, other), 2):
        assert torch.cdist(a, b).min() > 0


def test_raw_pixels_are_a_poor_classifier_of_shapes():
    train, test = (load_data("shapes", split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (4096, 1024)
    pixels = [x.images.flatten(1).float() for x in (train, test)]
    assert knn_accuracy(pixels[0], train.labels, pixels[1], test.labels) < 40


def test_shapes_statistics_are_those_of_the_pixels():
    pixels = load_data("shapes").images.float().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close(pixels.mean(dim=1), torch.tensor(STATISTICS["shapes"]["mean"]), atol=2e-3, rtol=0)
    torch.testing.assert_close(pixels.std(dim=1), torch.tensor(STATISTICS["shapes"]["std"]), atol=2e-3, rtol=0)
