"""Augmentation: mixup, cutmix, erasing, and RandAugment's fifteen operations beside Pillow's."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from make import rand, seeds
from PIL import Image, ImageEnhance, ImageOps

from protocols import augment
from protocols.augment import (
    OPERATIONS,
    autocontrast,
    equalize,
    invert,
    mix_labels,
    posterize,
    rand_augment,
    random_erase,
)

FILL = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)


@given(
    st.integers(2, 6),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([0, 0.3, 1]),
    st.sampled_from([0, 0.8, 1]),
    seeds,
)
def test_mix_labels_mixes_targets_by_what_is_seen(batch, height, width, mixup, cutmix, seed):
    """mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019): flat images with value i make the weights readable."""
    torch.manual_seed(seed)
    images = torch.arange(batch, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, height, width)
    mixed, targets = mix_labels(images, torch.eye(batch), mixup, cutmix)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(batch))
    assert targets.min() >= 0
    seen = targets @ torch.arange(batch, dtype=torch.float32)  # the mean value that the targets promise
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), seen, atol=1e-4, rtol=1e-4)
    if not mixup and not cutmix:
        assert torch.equal(mixed, images)
    if cutmix and not mixup:  # every pixel is from one of the two
        partner = images.flip(0)
        assert ((mixed == images) | (mixed == partner)).all()


def partners_that_differ():
    """Images of ones and of zeros with their value as target, each with one of the other kind as its partner."""
    images, targets = torch.zeros(4000, 1, 8, 8), torch.zeros(4000, 1)
    images[:2000], targets[:2000] = 1, 1
    return images, targets


@pytest.mark.parametrize("alpha", [0.8, 5.0])
def test_mixup_draws_its_weights_from_beta(alpha):
    """Zhang et al. 2018: lambda ~ Beta(alpha, alpha)."""
    torch.manual_seed(0)
    images, targets = partners_that_differ()
    _, mixed = mix_labels(images, targets, alpha, 0)
    own = torch.where(targets == 1, mixed, 1 - mixed)
    assert abs(own.mean() - 0.5) < 0.02
    assert abs(own.var() - torch.distributions.Beta(alpha, alpha).variance) < 0.01


def test_cutmix_shows_a_rectangle_of_the_partner_anywhere():
    """Yun et al. 2019."""
    torch.manual_seed(0)
    images, targets = partners_that_differ()
    pictures, _ = mix_labels(images, targets, 0, 1.0)
    other = torch.where(images == 1, 1 - pictures, pictures)[:, 0]  # 1 where the partner is seen
    assert (other.mean(dim=0) > 0.1).all()  # no pixel is safe
    spans = [(other.amax(dim=d) > 0).sum(dim=1) for d in (1, 2)]
    assert torch.equal(spans[0] * spans[1], other.sum(dim=(1, 2)).long())


def test_the_window_of_cutmix_has_the_drawn_area_cut_off_at_the_rims():
    """Yun et al. 2019: sides sqrt(1 - lambda) of the image's; Beta(1e6, 1e6) draws 1/2. The centre is uniform."""
    torch.manual_seed(0)
    images, targets = partners_that_differ()
    half, _ = mix_labels(images, targets, 0, 1e6)
    seen = torch.where(images == 1, 1 - half, half).mean()
    assert abs(seen - (0.5**0.5 - 0.5 / 4) ** 2) < 0.02


def test_a_coin_decides_between_mixup_and_cutmix():
    torch.manual_seed(0)
    both, _ = mix_labels(*partners_that_differ(), 1.0, 1.0)
    cut = ((both == 0) | (both == 1)).flatten(1).all(dim=1).float().mean()
    assert abs(cut - 0.5) < 0.05


def test_random_erase_fills_one_box_of_a_share_of_the_images():
    """Zhong et al. 2020, with the sizes of timm: 2 to 33 % of the area."""
    torch.manual_seed(0)
    images = torch.full((600, 3, 20, 30), 0.25)
    std = torch.full((3, 1, 1), 0.2)
    assert torch.equal(random_erase(images, 0.0, FILL, std), images)
    out = random_erase(images, 0.5, FILL, std)
    changed = (out != images).any(dim=1)  # (B, H, W)
    erased = changed.flatten(1).any(dim=1)
    assert abs(erased.float().mean() - 0.5) < 0.1
    area = changed[erased].flatten(1).sum(dim=1) / 600
    assert area.min() > 0.01
    assert area.max() < 0.4  # a third, and the rounding to whole pixels
    spans = [changed.any(dim=d).sum(dim=1) for d in (1, 2)]
    assert torch.equal(spans[0] * spans[1], changed.flatten(1).sum(dim=1))
    assert 0 <= out.min() <= out.max() <= 1
    noise = torch.stack([out[:, c][changed] for c in range(3)])
    torch.testing.assert_close(noise.mean(dim=1), FILL.flatten(), atol=0.02, rtol=0)
    assert (noise.std(dim=1) - 0.2).abs().max() < 0.03


def test_the_boxes_of_random_erasing_have_the_sizes_and_shapes_of_timm():
    """Zhong et al. 2020: 2 to 33 % of the area, aspect 0.3 to 3.3, anywhere; noise of each channel's own deviation."""
    torch.manual_seed(0)
    images, std = torch.full((800, 3, 40, 40), 2.0), torch.tensor([0.02, 0.05, 0.1]).view(3, 1, 1)
    out = random_erase(images, 1.0, torch.full((3, 1, 1), 0.5), std)
    box = (out != images).any(dim=1)  # (B, H, W)
    height, width = (box.any(dim=d).sum(dim=1) for d in (2, 1))
    area, aspect = box.flatten(1).sum(dim=1) / 1600, height / width
    assert 0.01 < area.min() < 0.03 and 0.29 < area.max() < 0.36
    assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.02
    assert 0.25 < aspect.min() < 0.4 and 2.5 < aspect.max() < 4  # pixels are whole
    assert abs(aspect.log().mean()) < 0.1 and box.any(dim=0).float().mean() > 0.95
    noise = torch.stack([out[:, c][box] for c in range(3)])
    torch.testing.assert_close(noise.std(dim=1), std.flatten(), rtol=0.03, atol=0)
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.02  # the channels have draws of their own


def test_rand_augment_draws_for_each_image_on_its_own(monkeypatch):
    """Twice, with probability 1/2: a quarter of the images stay, half change once, a quarter twice."""
    monkeypatch.setattr(augment, "OPERATIONS", [lambda x, level, fill: x + 1])
    torch.manual_seed(0)
    counts = torch.bincount(rand_augment(torch.zeros(2000, 3, 1, 1), FILL)[:, 0, 0, 0].long(), minlength=3) / 2000
    torch.testing.assert_close(counts, torch.tensor([0.25, 0.5, 0.25]), atol=0.04, rtol=0)


def pillow(image):
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


LEVELS = st.sampled_from([-10.0, -9.0, -5.3, -0.5, 0.0, 0.5, 5.3, 9.0, 10.0])
AS_PILLOW = {  # name: (what Pillow does at a level, largest difference in steps of 1/255)
    "brightness": (lambda x, m: ImageEnhance.Brightness(x).enhance(1 + 0.09 * m), 1),
    "contrast": (lambda x, m: ImageEnhance.Contrast(x).enhance(1 + 0.09 * m), 2),
    "colour": (lambda x, m: ImageEnhance.Color(x).enhance(1 + 0.09 * m), 2),
    "sharpness": (lambda x, m: ImageEnhance.Sharpness(x).enhance(1 + 0.09 * m), 2),
    "autocontrast": (lambda x, m: ImageOps.autocontrast(x), 1),
    "equalize": (lambda x, m: ImageOps.equalize(x), 0),
    "invert": (lambda x, m: ImageOps.invert(x), 0),
    "posterize": (lambda x, m: x.point(lambda v: v & (256 - 2 ** (8 - 4 + int(abs(m) * 0.4)))), 0),
    "solarize": (lambda x, m: ImageOps.solarize(x, 256 - int(abs(m) * 25.6)), 0),
    "solarize_add": (lambda x, m: x.point(lambda v: min(255, v + int(abs(m) * 11)) if v < 128 else v), 0),
}


@pytest.mark.parametrize("name", AS_PILLOW)
@given(LEVELS, st.sampled_from([(9, 12), (31, 40)]), seeds)
def test_colour_operations_match_pillow(name, level, size, seed):
    """RandAugment's operations as timm's rand-m9-mstd0.5-inc1 defines their levels.

    Only pictures of some hundred pixels and more have anything to equalise.
    """
    images = (1.3 * rand(2, 3, *size, seed=seed).pow(1.5)).clamp(0, 1)  # many pixels at the upper end
    images[1] = images[1] * 0.5 + 0.2  # a range to stretch
    images = (images * 255).round() / 255
    out = getattr(augment, name)(images, torch.full((2,), level), FILL)
    apply, steps = AS_PILLOW[name]
    expected = torch.stack([tensor(apply(pillow(image), level)) for image in images])
    torch.testing.assert_close(out, expected, atol=(steps + 0.5) / 255, rtol=0)


@pytest.mark.parametrize(
    ("name", "matrix"),
    [
        ("shear_x", lambda m, w, h: (1, 0.03 * m, 0, 0, 1, 0)),
        ("shear_y", lambda m, w, h: (1, 0, 0, 0.03 * m, 1, 0)),
        ("translate_x", lambda m, w, h: (1, 0, 0.045 * m * w, 0, 1, 0)),
        ("translate_y", lambda m, w, h: (1, 0, 0, 0, 1, 0.045 * m * h)),
        ("rotate", None),
    ],
)
@given(LEVELS, seeds)
def test_geometric_operations_match_pillow_and_fill_what_lies_outside(name, matrix, level, seed):
    """RandAugment's operations as timm's rand-m9-mstd0.5-inc1 defines their levels."""

    def by_pillow(picture):
        if matrix is None:
            return tensor(picture.rotate(3 * level, Image.Resampling.BILINEAR))
        size, bilinear = picture.size, Image.Resampling.BILINEAR
        return tensor(picture.transform(size, Image.Transform.AFFINE, matrix(level, *size), bilinear))

    operation, level_of_all = getattr(augment, name), torch.tensor([level])
    images = F.interpolate(rand(1, 3, 5, 6, seed=seed), (20, 26), mode="bilinear")
    known = by_pillow(Image.new("RGB", (26, 20), "white"))[None]
    inside = F.max_pool2d(F.pad(1 - known, [1] * 4, value=1.0), 3, 1)[0] == 0  # away from rims: these blend otherwise
    out = operation(images, level_of_all, torch.zeros(3, 1, 1))[0]
    torch.testing.assert_close(out[inside], by_pillow(pillow(images[0]))[inside], atol=0.02, rtol=0)
    outside = F.max_pool2d(F.pad(known, [1] * 4, value=1.0), 3, 1)[0] == 0
    filled = operation(torch.ones_like(images), level_of_all, FILL)[0]
    torch.testing.assert_close(filled[outside], FILL.expand(3, 20, 26)[outside], atol=1e-5, rtol=0)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
@given(seeds)
def test_operations_stay_in_range_and_do_nothing_at_zero_strength(operation, seed):
    images = rand(3, 3, 7, 8, seed=seed)
    level = 20 * rand(3, seed=seed + 1) - 10
    out = operation(images, level, FILL)
    assert out.shape == images.shape
    assert 0 <= out.min()
    assert out.max() <= 1 + 1e-6
    at_zero = operation(images, torch.zeros(3), FILL)
    if operation in (autocontrast, equalize, invert, posterize):
        assert not torch.equal(at_zero, images)  # these know no zero strength
    else:
        torch.testing.assert_close(at_zero, images, atol=1e-5, rtol=0)


def test_flat_images_survive_autocontrast_and_equalize():
    images = torch.full((2, 3, 4, 4), 0.2)
    for operation in (autocontrast, equalize):
        torch.testing.assert_close(operation(images, torch.zeros(2), FILL), images)


def test_rand_augment_draws_every_operation_for_some_images_at_its_magnitude(monkeypatch):
    """RandAugment (9, 0.5): two rounds, each with probability 1/2, levels around the magnitude in both directions."""
    seen = {i: [] for i in range(15)}
    spies = [lambda x, level, fill, i=i: seen[i].append(level) or x for i in range(15)]
    monkeypatch.setattr(augment, "OPERATIONS", spies)
    torch.manual_seed(0)
    images = rand(3000, 3, 2, 2)
    assert torch.equal(rand_augment(images, FILL), images)
    counts = torch.tensor([sum(map(len, seen[i])) for i in range(15)])
    assert abs(counts.sum() / 3000 - 1) < 0.05
    assert counts.min() > 140
    assert counts.max() < 260
    levels = torch.cat([torch.cat(part) for part in seen.values()])
    assert abs(levels.abs().mean() - 9) < 0.05
    assert abs(levels.abs().std() - 0.5) < 0.05
    assert levels.abs().max() <= 10
    assert abs((levels > 0).float().mean() - 0.5) < 0.03


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_operations_stay_on_the_device_of_the_images(operation):
    images, level, fill = (torch.zeros(*shape, device="meta") for shape in ((2, 3, 4, 4), (2,), (3, 1, 1)))
    assert operation(images, level, fill).device.type == "meta"


def test_rand_augment_leaves_its_input_alone_and_depends_on_the_seed_alone():
    images = rand(40, 3, 8, 8)
    kept, outs = images.clone(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(rand_augment(images, FILL))
    assert torch.equal(images, kept)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert (outs[0] != images).flatten(1).any(dim=1).float().mean() > 0.5
