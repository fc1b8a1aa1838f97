"""plumbing.crops against Pillow and plain loops: crops, resampling, seeds."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from make import generator, rand, seeds
from PIL import Image

from plumbing.crops import (
    Crop,
    crop_box,
    crop_boxes,
    crop_draws,
    mix_seed,
    padded_crop,
    random_resized_crop,
    resample,
    resize,
    resize_matrix,
)
from plumbing.shapes import render_shapes


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.05, 1), seeds)
def test_crop_boxes_lie_inside_and_keep_area_and_aspect(height, width, low, seed):
    sizes = torch.tensor([[float(height)], [float(width)]]).expand(2, 50)
    boxes = crop_boxes(*sizes, scale=(low, 1.0), generator=generator(seed))
    top, left, h, w = boxes.double().unbind(dim=1)
    slack = 1e-4 * max(height, width)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height + slack).all()
    assert (left + w <= width + slack).all()
    aspect = w / h
    assert (aspect > 3 / 4 - 1e-3).all()
    assert (aspect < 4 / 3 + 1e-3).all()
    share = h * w / (height * width)
    if 3 / 4 <= width / height <= 4 / 3:  # longer images may have no box of the wanted area
        assert (share > low - 1e-3).all()


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([0.05, 0.5, 0.9, 1.0]), st.booleans(), seeds)
def test_crop_box_of_one_file_is_that_of_crop_boxes_to_the_last_bit(height, width, least, clamp, seed):
    sides, many = torch.tensor([[height], [width]]).float(), [seed, *range(6)]
    for number, draw in zip(many, crop_draws(many), strict=True):
        want = crop_boxes(*sides, (least, 1.0), generator=generator(number), clamp=clamp)[0].tolist()
        assert list(crop_box(height, width, (least, 1.0), draw, clamp)) == want


def test_crop_boxes_are_uniform_in_area_place_and_the_logarithm_of_their_aspect():
    sides = torch.full((20000,), 100.0)
    boxes = crop_boxes(sides, sides, scale=(0.1, 0.3), ratio=(1 / 2, 2), generator=generator(0)).double()
    top, left, h, w = boxes.unbind(dim=1)
    place = top / (100 - h), left / (100 - w)
    for x, low, high in [(h * w / 1e4, 0.1, 0.3), ((w / h).log2(), -1, 1), (place[0], 0, 1), (place[1], 0, 1)]:
        shares = torch.linspace(0, 1, 11, dtype=torch.float64)
        torch.testing.assert_close(x.quantile(shares), low + (high - low) * shares, rtol=0, atol=0.02 * (high - low))


def test_crop_boxes_fall_back_to_the_largest_centred_box():
    boxes = crop_boxes(torch.tensor([10.0]), torch.tensor([1000.0]), scale=(1.0, 1.0), generator=generator(0))
    torch.testing.assert_close(boxes[0], torch.tensor([0.0, 500 - 20 / 3, 10.0, 40 / 3]))


def test_a_box_that_does_not_fit_is_cut_to_the_image():
    """MAE's code, util/crop.py, by hand: of one draw min(h, height) and min(w, width), then a place anywhere."""
    sides, whole = torch.tensor([[10.0, 1000.0], [1000.0, 10.0]]), {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    boxes = crop_boxes(*sides, **whole, generator=generator(0), clamp=True)  # 100 x 100, which neither has
    place = torch.rand(4, 2, 10, generator=generator(0))[2:, :, 0]
    expected = [[0.0, 900 * place[1, 0], 10.0, 100.0], [900 * place[0, 1], 0.0, 100.0, 10.0]]
    torch.testing.assert_close(boxes, torch.tensor(expected))


@pytest.mark.parametrize(("clamp", "mean", "deviation"), [(False, 0.431, 0.216), (True, 0.519, 0.240)])
def test_boxes_that_are_cut_keep_more_of_the_image(clamp, mean, deviation):
    """Shares of 0.08 to 1 of pictures of 500 x 375: 0.52 on average, or 0.43 where what does not fit is drawn anew."""
    sides = torch.full((40000,), 375.0), torch.full((40000,), 500.0)
    share = crop_boxes(*sides, generator=generator(0), clamp=clamp)[:, 2:].prod(dim=1) / (375 * 500)
    assert (float(share.mean()), float(share.std())) == pytest.approx((mean, deviation), abs=0.003)


@given(st.integers(2, 40), st.integers(2, 40), st.floats(0, 1), st.floats(0.2, 1), seeds)
def test_resample_matches_pillow_for_any_window(side, size, start, share, seed):
    """Bilinear with the low-pass of Pillow's BILINEAR, whose windows need not start at whole pixels."""
    image = torch.randint(0, 256, (1, 1, side, side), generator=generator(seed), dtype=torch.uint8)
    length = max(1.0, share * side)
    first = start * (side - length)
    matrix = resize_matrix(torch.tensor([first]), torch.tensor([length]), side, size)
    ours = resample(image.float(), matrix, matrix)[0, 0]
    box = (first, first, min(first + length, side), min(first + length, side))
    theirs = Image.fromarray(image[0, 0].numpy()).resize((size, size), Image.Resampling.BILINEAR, box=box)
    assert (ours - torch.from_numpy(np.array(theirs).astype(np.float32))).abs().max() < 1.6


def test_resize_matches_pillow_when_it_shrinks():
    image = torch.randint(0, 256, (1, 3, 96, 96), generator=generator(0), dtype=torch.uint8)
    ours = resize(image, 32)[0] * 255
    theirs = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.BILINEAR)
    assert (ours - torch.from_numpy(np.array(theirs)).permute(2, 0, 1)).abs().max() < 1.6


def test_resize_leaves_images_of_the_right_size_alone():
    image = torch.randint(0, 256, (2, 3, 8, 8), generator=generator(0), dtype=torch.uint8)
    assert torch.equal(resize(image, 8), image.float() / 255)
    assert torch.equal(resize(image.float() / 255, 8), image.float() / 255)


@given(st.integers(1, 4), st.integers(1, 3), seeds)
def test_resample_gives_each_image_its_own_window_and_all_channels_the_same(batch, channels, seed):
    images = rand(batch, channels, 6, 7, seed=seed)
    rows, columns = rand(batch, 4, 6, seed=seed + 1), rand(batch, 5, 7, seed=seed + 1)
    out = resample(images, rows, columns)
    for i, j in itertools.product(range(batch), range(channels)):
        torch.testing.assert_close(out[i, j], rows[i] @ images[i, j] @ columns[i].T)


def test_random_resized_crop_matches_pillow_image_by_image():
    images = render_shapes(12, 40)[0][:, :, :, :32]
    ours = random_resized_crop(images, 24, generator=generator(5))
    again = generator(5)
    boxes = crop_boxes(torch.full((12,), 40.0), torch.full((12,), 32.0), generator=again).tolist()
    flipped = (torch.rand(12, generator=again) < 0.5).tolist()
    assert {True, False} == set(flipped)
    for image, crop, (top, left, h, w), mirror in zip(images, ours, boxes, flipped, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        theirs = picture.resize((24, 24), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
        theirs = theirs.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else theirs
        theirs = torch.from_numpy(np.array(theirs)).permute(2, 0, 1) / 255
        assert (crop - theirs).abs().max() < 1.6 / 255


@pytest.mark.parametrize("size", [12, 48])
def test_bicubic_crops_are_those_of_pillow_and_of_torch(size):
    """Of noise, whose edges overshoot. torch neither rounds nor cuts between rows and columns, so it is the same."""
    images = torch.randint(0, 256, (6, 3, 32, 32), generator=generator(1), dtype=torch.uint8)
    ours = random_resized_crop(images, size, Crop(interpolation="bicubic"), flip=0.0, generator=generator(5))
    boxes = crop_boxes(*torch.full((2, 6), 32.0), generator=generator(5)).tolist()
    for image, crop, (top, left, h, w) in zip(images, ours, boxes, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        theirs = picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
        assert (255 * crop - torch.from_numpy(np.array(theirs)).permute(2, 0, 1)).abs().max() < 1.6
    noise, zero = rand(2, 3, 32, 32, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    matrix = resize_matrix(zero, zero + 32, 32, size, "bicubic")
    theirs = F.interpolate(noise, (size, size), mode="bicubic", antialias=True)
    torch.testing.assert_close(resample(noise, matrix, matrix), theirs, rtol=0, atol=1e-12)


def test_bicubic_crops_differ_from_bilinear_ones_by_what_the_readings_say():
    """By 1.05 of 255, on average over crops of 0.08 to 1 of the built-in pictures."""
    images = render_shapes(100, 32)[0]
    default, bilinear, bicubic = (
        255 * random_resized_crop(images, 32, Crop(interpolation=kind), generator=generator(0))
        for kind in ("", "bilinear", "bicubic")
    )
    assert torch.equal(default, bilinear)
    assert float((bicubic - bilinear).abs().mean()) == pytest.approx(1.05, abs=0.02)


def test_random_resized_crop_is_the_identity_for_the_whole_image_and_mirrors_with_flip():
    images = torch.randint(0, 256, (5, 3, 8, 8), generator=generator(0), dtype=torch.uint8)
    whole = {"crop": (1.0, 1.0), "ratio": (1.0, 1.0)}
    same = random_resized_crop(images, 8, **whole, flip=0.0, generator=generator(1))
    torch.testing.assert_close(same, images.float() / 255)
    mirrored = random_resized_crop(images, 8, **whole, flip=1.0, generator=generator(1))
    torch.testing.assert_close(mirrored, images.flip(-1).float() / 255)


def test_random_resized_crop_gives_each_image_its_own_crop_from_the_generator():
    images = torch.randint(0, 256, (1, 3, 16, 16), generator=generator(0), dtype=torch.uint8).expand(6, -1, -1, -1)
    first = random_resized_crop(images, 12, generator=generator(1))
    assert torch.equal(first, random_resized_crop(images, 12, generator=generator(1)))
    assert first.shape == (6, 3, 12, 12)
    assert first.min() >= 0
    assert first.max() <= 1
    assert len({tuple(x.flatten().tolist()) for x in first}) == 6


@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.integers(0, 3), st.integers(1, 50))
def test_mix_seed_changes_with_each_number_and_stays_within_63_bits(numbers, place, more):
    other = list(numbers)
    other[place % len(numbers)] += more
    assert mix_seed(*numbers) == mix_seed(*numbers) != mix_seed(*other)
    assert 0 <= mix_seed(*numbers) < 2**63


def test_mix_seed_is_the_same_on_every_machine():
    """And in every version: resumed runs and the built-in pictures' crops rest on it."""
    assert mix_seed(0, 0, 0) == 7896617691693857887 and mix_seed(3, 14, 15, 9) == 5438014879190320855


@given(st.integers(1, 9), st.integers(1, 4), st.sampled_from([0.0, 0.5, 1.0]), seeds)
def test_a_padded_crop_is_the_image_moved_over_black(side, pad, flip, seed):
    """Against every place that it may have, mirrored or not."""
    images = (rand(6, 3, side, side, seed=seed) * 255).byte()
    found = (padded_crop(images, side, pad, flip, generator(seed)) * 255).round().byte()
    for image, got in zip(images.numpy(), found.numpy(), strict=True):
        framed = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
        ways = [framed[:, i : i + side, j : j + side] for i, j in itertools.product(range(2 * pad + 1), repeat=2)]
        ways = ways * (flip < 1) + [way[..., ::-1] for way in ways] * (flip > 0)
        assert any(np.array_equal(got, way) for way in ways)


def test_padded_crops_have_all_places_equally_often():
    images = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(9000, 3, 3, 3)
    found = (padded_crop(images, 3, 1, 0.5, generator(0)) * 255).round().flatten(1)
    _, counts = found.unique(dim=0, return_counts=True)
    assert len(counts) == 18  # nine places, mirrored or not
    assert 0.8 < counts.min() / 500 and counts.max() / 500 < 1.2
