"""Energy-inspired pretraining: corruptions, the restoration and its second derivatives, backbones, the method."""

import dataclasses
import itertools
import math

import numpy as np
import processes
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from make import ENERGY_DATA, generator, images_of, rand, randn, seeds, shapes, tiny_energy, vit
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import common
import ebm_pretrain
from common import VIT_SIZES, MobileFormer, Stepper, patchify, reconstruction_loss, replace_batch_norms
from ebm_pretrain import BACKBONES, MIXTURE, TASKS, Config, ConvNeXt, Energy, EnergyPretraining, Swin
from plumbing.encoders import load_encoder, save_encoder
from plumbing.errors import UserError
from plumbing.files import load_checkpoint
from plumbing.images import MemoryImages
from plumbing.settings import choices_of, field_types, read_flags
from plumbing.shapes import render_shapes

sides = st.integers(1, 20)
DATA_MEAN, DATA_STD = (torch.tensor(x).view(3, 1, 1) for x in (ENERGY_DATA.mean, ENERGY_DATA.std))


def energy_of(encoder, *look, size=8):
    """An energy on a backbone, with the same head each time."""
    torch.manual_seed(1)
    return Energy(encoder, images_of(2, size), *look)


# --- corruptions -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 3), sides, sides, st.integers(1, 8), st.floats(0, 1), seeds)
def test_a_gridded_mask_blanks_whole_squares_and_the_exact_share(batch, height, width, patch, ratio, seed):
    """App. A.3, gridded masks; cells at the border may be cut off."""
    images = 1 + rand(batch, 2, height, width, seed=seed)
    masked = ebm_pretrain.gridded_mask(images, patch, ratio, generator(seed))
    rows, columns = math.ceil(height / patch), math.ceil(width / patch)
    for image, whole in zip(masked, images, strict=True):
        blank = 0
        for i, j in itertools.product(range(rows), range(columns)):
            square = (slice(None), slice(i * patch, (i + 1) * patch), slice(j * patch, (j + 1) * patch))
            empty = bool((image[square] == 0).all())
            assert empty or torch.equal(image[square], whole[square])
            blank += empty
        assert blank == round(ratio * rows * columns)


@given(st.integers(1, 3), st.integers(2, 12), st.integers(2, 12), st.integers(0, 5), seeds)
def test_random_patches_match_the_loop_over_rectangles_and_pixels(batch, height, width, count, seed):
    """App. A.3, random masks."""
    images = 1 + rand(batch, 2, height, width, seed=seed)
    found = ebm_pretrain.random_patches(images, count, 0.02, 0.6, generator(seed))
    torch.testing.assert_close(found, reference.random_patches(images, count, 0.02, 0.6, generator(seed)))


def test_random_patches_have_the_areas_and_aspects_that_they_should():
    """App. A.3: sizes are shares of the area, drawn uniformly; aspects and places are ours."""
    images = torch.ones(4000, 1, 60, 40)
    blank = ebm_pretrain.random_patches(images, 1, 0.05, 0.15, generator(0))[:, 0] == 0  # (B, H, W)
    area = blank.float().mean(dim=(1, 2))
    assert area.mean() == pytest.approx(0.1, abs=0.002)
    assert 0.03 < area.min() < 0.06 and 0.14 < area.max() < 0.17
    aspect = blank.any(dim=2).sum(dim=1) / blank.any(dim=1).sum(dim=1)
    assert aspect.log().mean() == pytest.approx(0, abs=0.03)
    assert 0.4 < aspect.min() < 0.6 and 1.7 < aspect.max() < 2.4
    places = blank.float().mean(dim=0)  # nowhere never, and the same up and down, left and right
    assert places.min() > 0
    torch.testing.assert_close(places, places.flip(0, 1), rtol=0, atol=0.03)
    assert not ebm_pretrain.random_patches(images[:2], 1, 4.0, 5.0, generator(0)).any()  # a side is never too long


def test_small_and_large_patches_hide_about_the_same_share():
    """App. A.3: 75 small ones or 25 large ones, by our reading of their sizes."""
    method, shares = tiny_energy(image_size=64, encoder=vit(image_size=64)), []
    for task in ("random_small", "random_large"):
        clean, corrupted = method.corrupt(images_of(64, 64), task)
        assert ((corrupted == clean) | (corrupted == 0)).all()
        shares.append(float((corrupted == 0).float().mean()))
    assert shares == pytest.approx([0.68, 0.63], abs=0.03)


@pytest.mark.parametrize(("size", "scale"), [((16, 16), 4), ((24, 16), 8), ((10, 14), 4), ((9, 9), 2), ((5, 7), 40)])
def test_super_resolution_is_pillows_bicubic_and_repeated_pixels(size, scale):
    """App. A.2, SR s x: bicubic down, nearest neighbour up."""
    images = rand(2, 3, *size, seed=1)
    found = ebm_pretrain.super_resolution(images, scale)
    small = [max(1, round(side / scale)) for side in size]
    for image, whole in zip(found.flatten(0, 1), images.flatten(0, 1), strict=True):
        shrunk = Image.fromarray(whole.numpy()).resize(small[::-1], Image.Resampling.BICUBIC)
        rows, columns = ([int((i + 0.5) * n / side) for i in range(side)] for n, side in zip(small, size, strict=True))
        expected = np.asarray(shrunk)[rows][:, columns]
        expected = expected.clip(float(whole.min()), float(whole.max()))  # see the next test
        np.testing.assert_allclose(image.numpy(), expected, atol=1e-4)
    if all(side % scale == 0 for side in size):
        blocks = found.unflatten(3, (-1, scale)).unflatten(2, (-1, scale))
        assert (blocks == blocks[:, :, :, :1, :, :1]).all()


@given(st.integers(2, 16), st.integers(2, 16), st.integers(1, 20), seeds)
def test_super_resolution_stays_in_the_range_of_each_image(height, width, scale, seed):
    images = (rand(3, 3, height, width, seed=seed) > 0.5).double()  # edges, where bicubic overshoots
    images = images * torch.arange(1.0, 10.0, dtype=torch.float64).view(3, 3, 1, 1)
    found = ebm_pretrain.super_resolution(images, scale)
    assert found.shape == images.shape and found.dtype == images.dtype
    assert (found.amin(dim=(2, 3)) >= images.amin(dim=(2, 3))).all()
    assert (found.amax(dim=(2, 3)) <= images.amax(dim=(2, 3))).all()
    assert torch.equal(ebm_pretrain.super_resolution(images, 1), images)


def test_noise_has_the_mean_and_the_variance_of_its_gamma():
    """App. A.2, denoising: sqrt(gamma) x + sqrt(1 - gamma) eps, gamma ~ U(0, 1)."""
    images = torch.full((3, 3, 128, 128), 2.0)
    gamma = torch.tensor([0.1, 0.5, 0.9])
    found = ebm_pretrain.noise(images, gamma, generator(0))
    torch.testing.assert_close(found.mean(dim=(1, 2, 3)), 2 * gamma.sqrt(), rtol=0, atol=0.02)
    torch.testing.assert_close(found.var(dim=(1, 2, 3)), 1 - gamma, rtol=0, atol=0.02)
    assert torch.equal(ebm_pretrain.noise(images, 1.0, generator(0)), images)
    drawn = ebm_pretrain.noise(torch.zeros(2000, 1, 32, 32), generator=generator(0)).var(dim=(1, 2, 3))  # 1 - gamma
    for level in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert float((drawn < level).float().mean()) == pytest.approx(level, abs=0.04)


@given(st.integers(1, 3), sides, seeds)
def test_grey_images_have_three_equal_channels_and_stay_as_they_are(batch, side, seed):
    """Sec. 3.1, colorization: the luma that Pillow has, too."""
    images = images_of(batch, side, seed)
    grey = ebm_pretrain.grayscale(images)
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 0], grey[:, 2])
    torch.testing.assert_close(ebm_pretrain.grayscale(grey), grey)
    pixels = (images[0] * 255).round().to(torch.uint8)
    expected = np.asarray(Image.fromarray(pixels.permute(1, 2, 0).numpy()).convert("L"))
    found = ebm_pretrain.grayscale(pixels[None].float())[0, 0].numpy()
    np.testing.assert_allclose(found, expected, atol=1)


def test_mixed_takes_each_image_from_one_corruption_and_all_equally_often():
    """Sec. 3.2: tasks are sampled uniformly."""
    versions = [torch.full((4000, 1, 1, 1), float(i)) for i in range(4)]
    found = ebm_pretrain.mixed(versions, generator(0)).flatten()
    for i in range(4):
        assert float((found == i).float().mean()) == pytest.approx(0.25, abs=0.03)
    some = [torch.arange(6.0).view(6, 1, 1, 1) + 10 * i for i in range(3)]
    assert (ebm_pretrain.mixed(some, generator(0)).flatten() % 10 == torch.arange(6.0)).all()


@pytest.mark.parametrize("task", TASKS)
def test_corruptions_are_determined_by_the_generator_and_independent_between_images(task):
    method, images = tiny_energy(), images_of(4)

    def run(images, seed=0):
        torch.manual_seed(seed)
        return method.corrupt(images, task)

    clean, corrupted = run(images)
    torch.testing.assert_close(clean * DATA_STD + DATA_MEAN, images)
    assert torch.equal(run(images)[1], corrupted)
    if task not in ("super_resolution", "grayscale"):
        assert not torch.equal(run(images, 1)[1], corrupted)
    others = torch.cat([images[:1], images_of(3, seed=9)])
    assert torch.equal(run(others)[1][0], corrupted[0])
    assert not torch.equal(run(others)[1][1], corrupted[1])
    if task not in ("super_resolution", "grayscale"):  # two equal images are corrupted differently
        same = run(images[:1].expand(4, -1, -1, -1))[1]
        assert any(not torch.equal(same[0], x) for x in same[1:])


def test_each_task_does_what_its_name_says():
    """Sec. 3.1 and 3.2: --task is the corruption of that name, at the strength that its settings give."""
    method, images = tiny_energy(mask_ratio=0.5, grid=8), images_of(3)
    clean, masked = method.corrupt(images, "gridded")
    squares = (masked == 0).all(dim=1).unflatten(2, (2, 8)).unflatten(1, (2, 8)).sum(dim=(2, 4))  # (B, 2, 2)
    assert ((squares == 0) | (squares == 64)).all() and (squares == 64).float().mean() == 0.5
    many = images_of(64)
    whole, drawn = method.corrupt(many, "mixed")
    grey = method.corrupt(many, "grayscale")[1]
    coarse = method.corrupt(many, "super_resolution")[1]
    kinds = {
        "gridded": [bool(((x == y) | (x == 0)).all()) for x, y in zip(drawn, whole, strict=True)],
        "grayscale": [torch.equal(x, y) for x, y in zip(drawn, grey, strict=True)],
        "super_resolution": [torch.equal(x, y) for x, y in zip(drawn, coarse, strict=True)],
    }
    assert all(5 < sum(found) < 30 for found in kinds.values())
    assert 5 < len(many) - sum(map(sum, kinds.values())) < 30  # noise
    assert torch.equal(method.corrupt(images, "super_resolution")[1], ebm_pretrain.super_resolution(clean, 4))
    torch.manual_seed(3)
    noisy = method.corrupt(images, "noise")[1]
    assert torch.equal(noisy, ebm_pretrain.noise(clean, generator=generator(3)))
    grey = method.corrupt(images, "grayscale")[1] * DATA_STD + DATA_MEAN  # grey in [0, 1], not in normalised units
    torch.testing.assert_close(grey, ebm_pretrain.grayscale(images))


# --- restoration -----------------------------------------------------------------------------------------------------


class Bowl(nn.Module):
    """E(x) = |x - c|^2 / 2."""

    def __init__(self, centre):
        super().__init__()
        self.centre = nn.Parameter(centre)

    def forward(self, x):
        return (x - self.centre).square().flatten(1).sum(dim=1) / 2


@given(st.integers(1, 3), st.integers(1, 4), st.floats(0.1, 1.5), seeds)
def test_on_a_quadratic_energy_everything_is_known(batch, side, alpha, seed):
    """Eq. 3 and the gradient of Eq. 4 by hand: for E(x) = |x - c|^2 / 2 a step is x - alpha (x - c)."""
    x, centre, target = (randn(n, 2, side, side, seed=seed + i) for i, n in enumerate((batch, 1, batch)))
    bowl, alpha = Bowl(centre), torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(ebm_pretrain.restore(bowl, x, 1, 1.0)[0], centre.expand_as(x))  # alpha = 1 is exact
    (restored,) = ebm_pretrain.restore(bowl, x, 1, alpha)
    torch.testing.assert_close(restored, x - alpha * (x - centre))
    loss = ebm_pretrain.restoration_loss([restored], target, "mse")
    loss.backward()
    error = 2 * (restored - target).detach() / x.numel()
    torch.testing.assert_close(bowl.centre.grad, (alpha * error).sum(dim=0, keepdim=True).detach())
    torch.testing.assert_close(alpha.grad, (error * (centre - x)).sum())


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_steps_are_single_steps_from_detached_images(steps):
    """Eq. 4, Algorithm 1: SG stops the gradient between steps, so that of N is the mean of N gradients of one."""
    energy = energy_of(vit()).double()
    x, target, alpha = randn(2, 3, 8, 8), randn(2, 3, 8, 8, seed=1), torch.tensor(3.0, dtype=torch.float64)
    alpha.requires_grad_()
    weights = [alpha, *energy.parameters()]
    chain = ebm_pretrain.restore(energy, x, steps, alpha)
    assert len(chain) == steps
    loss = ebm_pretrain.restoration_loss(chain, target)
    whole = torch.autograd.grad(loss, weights, allow_unused=True)
    parts, here = [], x
    for restored in chain:
        (one,) = ebm_pretrain.restore(energy, here.detach(), 1, alpha)
        torch.testing.assert_close(one, restored)
        parts.append(torch.autograd.grad(F.smooth_l1_loss(one, target) / steps, weights, allow_unused=True))
        here = one
    for found, *expected in zip(whole, *parts, strict=True):
        if found is None:
            assert all(part is None for part in expected)
        else:
            torch.testing.assert_close(found, sum(expected))


def test_a_step_follows_the_difference_quotient_of_the_energy():
    """Eq. 3: a step is alpha times the derivative of the energy by each pixel."""
    energy, x = energy_of(vit(), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)).double(), randn(2, 3, 8, 8)
    found = ebm_pretrain.descent(energy, x, 2.0)
    for place in itertools.product((0, 1), (0, 2), (0, 5), (3, 7)):
        shift = torch.zeros_like(x)
        shift[place] = 1e-5
        with torch.no_grad():
            slope = (energy(x + shift) - energy(x - shift)).sum() / 2e-5
        assert float(found[place].detach()) == pytest.approx(2 * float(slope), rel=1e-5, abs=1e-10)


def backbone(name):
    """A small one of each kind, for images of 16 x 16."""
    torch.manual_seed(0)
    look = {"mean": ENERGY_DATA.mean, "std": ENERGY_DATA.std}
    if name == "vit":
        return vit(image_size=16, **look)
    if name == "mobile_former":
        return BACKBONES["mobile_former_micro"][0](**BACKBONES["mobile_former_micro"][1], **look)
    if name == "convnext":
        encoder = ConvNeXt(dims=(8, 16), depths=(1, 2), stem=2, **look)
        for module in encoder.modules():
            if isinstance(module, ebm_pretrain.ConvNeXtBlock):
                nn.init.ones_(module.scale)  # at 1e-6 a block hardly counts
        return encoder
    return Swin(dim=8, depths=(2, 2), heads=(1, 2), window=4, stem=2, **look)


KINDS = ("vit", "mobile_former", "convnext", "swin")


@pytest.mark.parametrize("kind", KINDS)
def test_the_training_gradient_matches_a_difference_quotient(kind):
    """Eq. 4 by the weights: the second derivative of every kind of backbone is right."""
    energy = energy_of(backbone(kind), ENERGY_DATA.mean, ENERGY_DATA.std, size=16).double()
    x, target = randn(2, 3, 16, 16), randn(2, 3, 16, 16, seed=1)
    weights = list(energy.parameters())
    with torch.no_grad():
        alpha = float(ebm_pretrain.first_step_size(energy, x, 0.3))

    def loss():
        return ebm_pretrain.restoration_loss([x - ebm_pretrain.descent(energy, x, alpha)], target, "mse")

    gradients = torch.autograd.grad(loss(), weights, allow_unused=True)
    towards = [randn(*p.shape, seed=i) * (p.detach().abs().mean() + 0.01) for i, p in enumerate(weights)]
    slope = sum(float((g * v).sum()) for g, v in zip(gradients, towards, strict=True) if g is not None)
    ends = []
    with torch.no_grad():
        for share in (1e-6, -2e-6):
            for p, v in zip(weights, towards, strict=True):
                p += share * v
            ends.append(float(loss()))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4)


# bf16: the next test. Autocast leaves ConvNeXt's norms, of small variance, in fp16 on CPUs, where their cubes overflow.
@pytest.mark.parametrize(
    ("kind", "amp"), [(kind, amp) for kind in KINDS for amp in ("off", "fp16") if (kind, amp) != ("convnext", "fp16")]
)
def test_every_backbone_trains_and_every_weight_gets_a_gradient(kind, amp):
    method = tiny_energy(backbone(kind), amp=amp, steps=2)
    stepper = Stepper(method.optimizer(method.config), method.config, torch.device("cpu"))
    stepper.scaler = torch.amp.GradScaler("cpu", init_scale=64, enabled=amp == "fp16")  # 65536 is too much at first
    with stepper.autocast():
        out = method(images_of(4))
    assert all(value.dtype == torch.float32 for value in out.values())
    stepper.backward(out["loss"])
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    stepper.step()
    frozen = {name for name, parameter in method.named_parameters() if not parameter.requires_grad}
    last = {"mobile_former": "head.1.bias"}.get(kind, "norm.bias")
    assert frozen == {f"energy.encoder.{last}"}


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_has_nearly_the_gradient_of_float32(kind):
    gradients = []
    for amp in (False, True):
        method = tiny_energy(backbone(kind), task="super_resolution", steps=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out = method(images_of(4))
        assert all(value.dtype == torch.float32 for value in out.values())
        out["loss"].backward()
        assert all((p.grad is not None) == p.requires_grad for p in method.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.98


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_the_batch_permutes_everything(kind):
    energy = energy_of(backbone(kind), size=16).double()
    x, order = randn(5, 3, 16, 16), torch.tensor([3, 0, 4, 1, 2])
    for one, other in zip(
        ebm_pretrain.restore(energy, x, 2, 5.0), ebm_pretrain.restore(energy, x[order], 2, 5.0), strict=True
    ):
        torch.testing.assert_close(one[order], other)
    torch.testing.assert_close(energy(x)[order], energy(x[order]))


def test_energies_may_be_columns_and_the_head_has_no_bias():
    """Sec. 2.2, Listing 1: E(x) = h(psi(x)), h linear without bias."""
    energy, x = energy_of(vit()).double(), randn(2, 3, 8, 8)
    one = ebm_pretrain.restore(energy, x, 2, 1.0)
    other = ebm_pretrain.restore(lambda images: energy(images)[:, None], x, 2, 1.0)
    torch.testing.assert_close(one, other)
    features = energy.encoder(x)
    torch.testing.assert_close(energy(x), features @ energy.head.weight[0])
    assert [name for name, _ in energy.head.named_parameters()] == ["weight"]


def test_the_energy_takes_normalised_images():
    """Sec. 2.2, E(x) = h(psi(x)), of x with zero mean and unit variance."""
    encoder = vit(mean=ENERGY_DATA.mean, std=ENERGY_DATA.std)
    energy, images = energy_of(encoder, ENERGY_DATA.mean, ENERGY_DATA.std), images_of(2, 8)
    torch.testing.assert_close(energy((images - DATA_MEAN) / DATA_STD), encoder(images) @ energy.head.weight[0])


def test_restoring_without_gradients_is_the_same_and_records_nothing():
    energy, x = energy_of(vit()), randn(2, 3, 8, 8, dtype=torch.float32)
    recorded = ebm_pretrain.restore(energy, x, 2, 1.0)
    with torch.no_grad():
        plain = ebm_pretrain.restore(energy, x, 2, 1.0)
    assert all(image.requires_grad for image in recorded) and not any(image.requires_grad for image in plain)
    torch.testing.assert_close(recorded, plain)


def test_each_image_counts_alike_whatever_its_share_of_changed_pixels():
    """Eq. 4 with --scored changed."""
    images, restored = torch.zeros(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    restored[1] = 0.5
    weight = torch.zeros(2, 1, 4, 4)
    weight[0], weight[1, 0, 0, 0] = 1, 1
    loss = ebm_pretrain.restoration_loss([restored], images, "mse", weight)
    assert float(loss) == pytest.approx((1 + 0.25) / 2)
    assert float(ebm_pretrain.restoration_loss([restored], images, "mse", torch.zeros_like(weight))) == 0


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from(["smooth_l1", "mse"]), st.booleans(), seeds)
def test_restoration_loss_matches_the_loop_of_eq_4(steps, batch, criterion, masked, seed):
    """Eq. 4, and SmoothL1 of Listing 1, against numbers added up one by one."""
    images = randn(batch, 2, 3, 3, seed=seed)
    chain = [images + 2 * randn(batch, 2, 3, 3, seed=seed + i + 1) for i in range(steps)]
    weight = (randn(batch, 1, 3, 3, seed=seed + 9) > 0).double() if masked else None
    found = ebm_pretrain.restoration_loss(chain, images, criterion, weight)
    torch.testing.assert_close(found, reference.restoration_loss(chain, images, criterion, weight))


@given(st.integers(1, 6), seeds)
def test_contrast_has_the_gradient_of_eq_2_weighted_by_the_mistake(count, seed):
    """Eq. 2 with corrupted images as negatives: dE(x) - dE(corrupted)."""
    clean, corrupted = (randn(count, seed=seed + i).requires_grad_() for i in range(2))
    ebm_pretrain.contrast_loss(clean, corrupted).backward()
    mistake = torch.sigmoid(clean - corrupted).detach() / count
    torch.testing.assert_close(clean.grad, mistake)
    torch.testing.assert_close(corrupted.grad, -mistake)


def test_the_first_step_has_the_size_that_is_asked_for():
    """App. A.1: where alpha starts."""
    energy, x = energy_of(vit()), randn(4, 3, 8, 8, dtype=torch.float32)
    for target in (0.1, 0.3, 1.0):
        with torch.autocast("cpu", torch.float16):  # the gradient would be lost in it
            alpha = ebm_pretrain.first_step_size(energy, x, target)
        step = ebm_pretrain.descent(energy, x, alpha)
        assert float(step.detach().square().mean().sqrt()) == pytest.approx(target, rel=1e-4)


def test_fp16_keeps_a_gradient_that_would_be_lost_unscaled():
    energy, x = energy_of(vit()), randn(8, 3, 8, 8, dtype=torch.float32)
    nn.init.normal_(energy.head.weight, std=1e-7)
    alpha = ebm_pretrain.first_step_size(energy, x, 0.3)
    exact = ebm_pretrain.descent(energy, x, alpha)
    with torch.autocast("cpu", torch.float16):
        scaled = ebm_pretrain.descent(energy, x, alpha)
        unscaled = alpha * ebm_pretrain.descent(energy, x)
    assert scaled.dtype == torch.float32
    assert F.cosine_similarity(exact.flatten(), scaled.flatten(), dim=0) > 0.999
    assert F.cosine_similarity(exact.flatten(), unscaled.flatten(), dim=0) < 0.9


def test_a_chain_may_be_longer_than_trained_and_has_an_energy_a_step():
    """Eq. 3 for any number of steps (Fig. 1): halfway to the bottom of a bowl with each."""
    bowl, x = Bowl(randn(1, 2, 3, 3)), randn(4, 2, 3, 3, seed=1)
    chain, energies = ebm_pretrain.sample(bowl, x, 6, 0.5)
    assert chain.shape == (7, 4, 2, 3, 3) and energies.shape == (7, 4) and not energies.requires_grad
    torch.testing.assert_close(chain[0], x)
    for before, after in itertools.pairwise(chain):
        torch.testing.assert_close(after, (before + bowl.centre.detach()) / 2)
    torch.testing.assert_close(energies, torch.stack([bowl(x) for x in chain]).detach())
    assert (energies.diff(dim=0) < 0).all()


# --- second derivatives that are not there ----------------------------------------------------------------------------


class Attention(nn.Module):
    """One layer of attention between pixels, as `attend` does it; (B, 3, H, W) -> (B, 8)."""

    def __init__(self, attend=F.scaled_dot_product_attention):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.attend = nn.Linear(3, 24), attend

    def forward(self, images):
        q, k, v = self.qkv(images.flatten(2).transpose(1, 2))[:, None].chunk(3, dim=-1)
        return self.attend(q, k, v)[:, 0].tanh().mean(dim=1)


def test_fused_attention_is_replaced_inside_a_step():
    x, found = randn(2, 3, 4, 4), []
    for attend in (F.scaled_dot_product_attention, ebm_pretrain.attend_plainly):
        energy = energy_of(Attention(attend)).double()
        ebm_pretrain.descent(energy, x).square().sum().backward()
        found.append(energy.encoder.qkv.weight.grad)
    torch.testing.assert_close(*found)


class Once(torch.autograd.Function):
    """A square whose backward pass refuses to be differentiated, as fused kernels do."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class Silent(torch.autograd.Function):
    """A square whose backward pass is a kernel of its own: its derivative is missing, and nothing says so."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (2 * ctx.saved_tensors[0]).detach()


class Convolutional(nn.Module):
    """A small network of a user's own: no fields, no dim, no mean."""

    def __init__(self, activation=F.gelu):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.activation = activation

    def forward(self, images):
        return self.activation(self.second(self.activation(self.first(images))))


def test_any_module_will_do_and_its_encoder_is_saved(tmp_path):
    method = tiny_energy(Convolutional(), task="mixed")
    assert method.energy.head.weight.shape == (1, 12)
    losses = fit(method, steps=30)
    assert losses[-1] < 0.9 * losses[0]
    save_encoder(method.encoder, tmp_path / "encoder.pt")
    state = load_checkpoint(tmp_path / "encoder.pt")
    assert state["weights"].keys() == method.encoder.state_dict().keys()
    with pytest.raises(UserError, match="holds a Convolutional, not known here; import the file"):
        load_encoder(tmp_path / "encoder.pt")


class Fused(nn.Module):
    """Attention by the fused kernel of CPUs itself, which no setting can turn into the plain one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(3, 24)

    def forward(self, images):
        q, k, v = self.qkv(images.flatten(2).transpose(1, 2))[:, None].chunk(3, dim=-1)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0][:, 0].tanh().mean(dim=1)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (lambda: Fused(), "a trial step with Fused failed .*second derivative"),
        (lambda: Convolutional(Once.apply), "a trial step with Convolutional failed .*|wrong second derivative"),
        (lambda: Convolutional(Silent.apply), "Convolutional has a wrong second derivative"),
    ],
)
def test_a_kernel_without_second_derivative_is_refused(encoder, message):
    with pytest.raises(UserError, match=message):
        tiny_energy(encoder())


class Residual(nn.Module):
    """A deep network of ReLUs with group norms, as one might have lying about."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()) for _ in range(6)
        )

    def forward(self, images):
        x = self.stem(images)
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_without_steps_the_first_derivative_is_enough():
    assert tiny_energy(Convolutional(Once.apply), steps=0).energy.encoder.first.weight.requires_grad


def test_relus_dropout_and_frozen_weights_are_accepted():
    for seed in range(4):
        tiny_energy(Residual(seed))
    tiny_energy(nn.Sequential(Convolutional(), nn.Dropout(0.5)))
    frozen = Convolutional()
    frozen.first.requires_grad_(False)
    method = tiny_energy(frozen)
    assert not frozen.first.weight.requires_grad and frozen.second.weight.requires_grad
    method(images_of(2))["loss"].backward()
    assert frozen.first.weight.grad is None


def test_features_of_another_shape_are_refused():
    with pytest.raises(UserError, match=r"Sequential returns 2 x 4 x 768; an energy needs features \(B, D\)"):
        tiny_energy(nn.Sequential(nn.Flatten(1), nn.Unflatten(1, (1, 768)), nn.Conv1d(1, 4, 1)))


def test_batch_norm_is_refused_and_can_be_replaced():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.BatchNorm2d(8), nn.GELU()))
    with pytest.raises(UserError, match="Sequential has batch norms"):
        tiny_energy(encoder)
    replace_batch_norms(encoder)
    assert isinstance(encoder[1][0], nn.GroupNorm) and encoder[1][0].num_groups == 1
    tiny_energy(encoder)
    line = nn.Sequential(nn.Flatten(1), nn.Linear(768, 8), nn.BatchNorm1d(8), nn.GELU())
    replace_batch_norms(line)
    tiny_energy(line)


def test_mobile_former_can_do_without_batch_norm():
    torch.manual_seed(0)
    encoder = MobileFormer("micro", norm="group").eval()
    batch = MobileFormer("micro")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    assert sum(p.numel() for p in encoder.parameters()) == sum(p.numel() for p in batch.parameters())
    x = images_of(3, 32)
    torch.testing.assert_close(encoder(x)[:1], encoder(x[:1]))
    with pytest.raises(UserError, match="unknown norm 'layer'"):
        MobileFormer("micro", norm="layer")


# --- backbones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "millions", "products"), [(ConvNeXt, 28.6, 4.5), (Swin, 28.3, 4.5)])
def test_backbones_have_the_published_size_and_cost(kind, millions, products):
    """Table B: ConvNeXt-T and Swin-T of their papers, parameters and multiply-adds."""
    with torch.device("meta"):
        encoder = kind()
        counter = FlopCounterMode(display=False)
        with counter:
            out = encoder(torch.empty(1, 3, 224, 224))
    assert out.shape == (1, 768, 7, 7) and encoder.dim == 768
    count = sum(p.numel() for p in encoder.parameters()) + 768 * 1000 + 1000  # with the head of ImageNet
    assert count / 1e6 == pytest.approx(millions, rel=0.01)
    assert counter.get_total_flops() / 2e9 == pytest.approx(products, rel=0.04)


@pytest.mark.parametrize(("height", "width", "shifted"), [(8, 12, True), (8, 12, False), (4, 4, True), (3, 3, True)])
def test_a_swin_block_is_attention_between_the_cells_of_a_window(height, width, shifted):
    torch.manual_seed(0)
    block = ebm_pretrain.SwinBlock(8, 2, 4, shifted).double()
    nn.init.normal_(block.position_bias)
    x = randn(2, height, width, 8)
    torch.testing.assert_close(block(x), reference.swin_block(block, x))


def test_patch_merging_takes_four_neighbours_column_by_column():
    merge = ebm_pretrain.PatchMerging(1)
    merge.norm, merge.reduction = nn.Identity(), nn.Identity()
    x = torch.arange(16.0).view(1, 4, 4, 1)
    assert merge(x)[0, 0, 1].tolist() == [2, 6, 3, 7]  # (0, 0), (1, 0), (0, 1), (1, 1)


def test_a_convnext_block_is_what_its_paper_says():
    torch.manual_seed(0)
    block = ebm_pretrain.ConvNeXtBlock(6).double()
    nn.init.normal_(block.scale)
    x = randn(2, 6, 5, 5)
    y = F.conv2d(x, block.depthwise.weight, block.depthwise.bias, padding=3, groups=6)
    expected = x.clone()
    for b, i, j in itertools.product(range(2), range(5), range(5)):
        cell = F.layer_norm(y[b, :, i, j], (6,), block.norm.weight, block.norm.bias, 1e-6)
        expected[b, :, i, j] += block.scale * block.fc2(F.gelu(block.fc1(cell)))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("name", [*BACKBONES, "vit_micro"])
def test_encoders_are_rebuilt_from_their_file(name, tmp_path):
    if name.split("_")[-1] not in ("micro", "720"):
        return
    encoder = ebm_pretrain.build_encoder(Config(model=name, image_size=32, patch=8), ENERGY_DATA).eval()
    save_encoder(encoder, tmp_path / "encoder.pt")
    again, images = load_encoder(tmp_path / "encoder.pt"), images_of(2, 32)
    torch.testing.assert_close(again(images), encoder(images))
    torch.testing.assert_close(torch.stack([again.mean, again.std]), torch.stack([DATA_MEAN, DATA_STD]))
    plain = type(encoder)(**{**encoder.fields, "mean": (0.0,) * 3, "std": (1.0,) * 3})
    plain.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(plain.eval()((images - DATA_MEAN) / DATA_STD), encoder(images))


def test_backbones_start_as_published():
    torch.manual_seed(0)
    convnext, swin = ConvNeXt(), Swin()
    blocks = [module for module in convnext.modules() if isinstance(module, ebm_pretrain.ConvNeXtBlock)]
    assert all((block.scale == 1e-6).all() for block in blocks)
    assert {module.eps for module in convnext.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}
    blocks = [module for module in swin.modules() if isinstance(module, ebm_pretrain.SwinBlock)]
    assert [block.shifted for block in blocks] == [False, True] * 6
    assert float(blocks[-1].position_bias.detach().std()) == pytest.approx(0.02, rel=0.1)
    for encoder in (convnext, swin):
        weights = [m.weight for m in encoder.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        assert all(float(w.detach().std()) == pytest.approx(0.02, rel=0.1) for w in weights)
        biases = {name: p for name, p in encoder.named_parameters() if name.endswith(".bias")}
        assert biases.pop("stem.0.bias").any() and not any(p.any() for p in biases.values())


def test_windows_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="a map of 10 x 10 cells cannot be cut into windows of 4 x 4"):
        Swin(dim=8, depths=(1,), heads=(1,), window=4, stem=2)(images_of(1, 20))


def test_blank_patches_do_not_have_huge_gradients():
    for kind in (ConvNeXt, Swin):
        torch.manual_seed(0)
        encoder = kind(**BACKBONES[f"{kind.__name__.lower()}_micro"][1])
        energy, x = energy_of(encoder, size=32), randn(2, 3, 32, 32, dtype=torch.float32)
        x[:, :, :16] = 0
        step = ebm_pretrain.descent(energy, x).detach().square().mean(dim=(0, 1, 3)).sqrt()
        assert step[:14].mean() < 10 * step[18:].mean()


# --- samples from noise ----------------------------------------------------------------------------------------------


def quadratic(centre, width=1.0):
    """E(x) = |x - centre|^2 / (2 width^2), of which exp(-E) / Z is a normal law."""
    return lambda x: ((x - centre) ** 2).sum(dim=(1, 2, 3)) / (2 * width**2)


@pytest.mark.parametrize(("temperature", "steps"), [(0.0, 1), (0.0, 5), (0.7, 1), (0.7, 5), (1.0, 200)])
def test_the_chain_on_a_quadratic_energy_has_the_law_that_is_known(temperature, steps):
    """Eq. 3, without noise as printed or Langevin's: x_n is normal, and its mean and variance are sums of powers.

    After many small steps it is the law exp(-E / temperature) / Z, whatever the start.
    """
    centre, width, alpha, start = 2.0, 0.8, 0.05, -3.0
    x = torch.full((4000, 1, 1, 2), start, dtype=torch.float64)
    found = ebm_pretrain.langevin(quadratic(centre, width), x, steps, alpha, temperature, generator(0))
    shrink = 1 - alpha / width**2
    mean = centre + shrink**steps * (start - centre)
    variance = 2 * alpha * temperature * sum(shrink ** (2 * i) for i in range(steps))
    assert float(found.mean()) == pytest.approx(mean, abs=4 * (variance / 8000) ** 0.5 + 1e-12)
    assert float(found.var()) == pytest.approx(variance, rel=0.06, abs=1e-12)
    if steps == 200:
        assert variance == pytest.approx(temperature * width**2, rel=0.05) and mean == pytest.approx(centre, abs=1e-3)
    assert not found.requires_grad and torch.equal(x, torch.full_like(x, start))


def test_the_likelihood_loss_has_the_gradient_of_eq_1():
    """Eq. 2, on three states of which the model has a half, a quarter and a quarter: samples in exactly this ratio."""
    energies = torch.tensor([-math.log(2), 0.0, 0.0], dtype=torch.float64).requires_grad_()
    data, sampled = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0, 1, 2])
    exact = (energies[data] + (-energies).exp().sum().log()).mean()  # E + log Z
    (expected,) = torch.autograd.grad(exact, energies)
    (found,) = torch.autograd.grad(ebm_pretrain.likelihood_loss(energies[data], energies[sampled]), energies)
    torch.testing.assert_close(found, expected)
    assert expected.abs().sum() > 0.4


def test_descent_on_eq_2_finds_the_law_of_the_data():
    """The centre of a quadratic energy goes to the mean of the data, where the likelihood is highest."""
    data, centre = 1.5 + randn(200, 1, 1, 1), torch.zeros(1, dtype=torch.float64, requires_grad=True)
    for step in range(20):
        energy = quadratic(centre)
        x = ebm_pretrain.langevin(energy, rand(200, 1, 1, 1, seed=step).double(), 10, 0.3, 1.0, generator(step))
        (gradient,) = torch.autograd.grad(ebm_pretrain.likelihood_loss(energy(data), energy(x)), centre)
        with torch.no_grad():
            centre -= 0.3 * gradient
    assert centre.item() == pytest.approx(float(data.mean()), abs=0.15)


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_sampling_is_eq_2_on_chains_from_uniform_noise(temperature):
    """Eq. 2 and 3 written out: no gradient passes through a chain, and alpha, set by the first batch, stays."""
    method = tiny_energy(objective="sampling", steps=3, first_step=0.2, temperature=temperature)
    images = images_of(4)
    torch.manual_seed(5)
    out = method(images)
    torch.manual_seed(5)
    x = (torch.rand_like(images) - DATA_MEAN) / DATA_STD
    alpha = method.log_alpha.exp()
    step = ebm_pretrain.descent(method.energy, x, alpha).detach()
    assert float(step.square().mean().sqrt()) == pytest.approx(0.2, rel=1e-4)
    for _ in range(3):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(method.energy(x).sum(), x)
        noise = (2 * alpha * temperature).sqrt() * torch.randn(x.shape) if temperature else 0
        x = (x - alpha * gradient + noise).detach()
    energies = method.energy((images - DATA_MEAN) / DATA_STD), method.energy(x)
    expected = sum(energies[0]) / 4 - sum(energies[1]) / 4
    torch.testing.assert_close(out["loss"], expected)
    torch.testing.assert_close([out["energy"], out["energy_sampled"]], [one.detach().mean() for one in energies])
    weights = [p for p in method.energy.parameters() if p.requires_grad]
    for ours, slow in zip(*(torch.autograd.grad(x, weights) for x in (out["loss"], expected)), strict=True):
        torch.testing.assert_close(ours, slow)
    assert not method.log_alpha.requires_grad and out["loss"].requires_grad and not out["energy"].requires_grad
    assert method.probe(lambda x: x.flatten(1), shapes(6, 16), shapes(6, 16), method.config).keys() == {
        *("knn", "linear", "effective_rank")
    }


def test_pictures_of_sampling_are_a_chain_at_every_quarter():
    method, images = tiny_energy(objective="sampling", steps=6, temperature=0.01), images_of(2)
    method(images)
    assert method.captions == ("image", "noise", "step 2", "step 3", "step 5", "step 6")
    torch.manual_seed(5)
    rows = method.pictures(images)
    torch.manual_seed(5)
    x, found = method.from_noise(images), [(images - DATA_MEAN) / DATA_STD]
    for step in range(7):
        found += [x] if step in (0, 2, 3, 5, 6) else []
        x = ebm_pretrain.langevin(method.energy, x, 1, method.log_alpha.exp(), 0.01)
    torch.testing.assert_close(rows, (torch.stack(found, dim=1) * DATA_STD + DATA_MEAN).clamp(0, 1))


# --- the method ------------------------------------------------------------------------------------------------------


def fit(method, steps, images=None, rate=3e-3):
    """Train in float32 on the same images, with a rate that rises and falls; the losses."""
    config = method.config
    stepper, losses = Stepper(method.optimizer(config), config, torch.device("cpu")), []
    images = images_of(8) if images is None else images
    for step in range(steps):
        for group in stepper.optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20, (steps - step) / 40)
        torch.manual_seed(step)
        losses.append(float(method.update(method, [(images, None)], stepper)["loss"]))
    return losses


@pytest.mark.parametrize("task", ["random_large", "super_resolution", "mixed"])
def test_an_energy_trained_on_one_image_restores_it(task):
    """Eq. 4 is met: two steps from what each corruption leaves lead back to the only image that there is."""
    method = tiny_energy(vit(image_size=16, dim=48, depth=1, mean=ENERGY_DATA.mean, std=ENERGY_DATA.std), task=task)
    image, _, _ = render_shapes(1, 16, seed=3)
    image = image / 255
    fit(method, 130, image.expand(4, -1, -1, -1), rate=1.2e-2)
    method.eval()
    torch.manual_seed(0)
    clean, corrupted = method.corrupt(image.expand(16, -1, -1, -1))
    with torch.no_grad():
        restored = method.restored(corrupted)
    errors = [float(F.mse_loss(x, clean)) for x in (corrupted, *restored)]
    assert errors[-1] < {"mixed": 0.45, "super_resolution": 0.3, "random_large": 0.2}[task] * errors[0], errors


def test_the_step_size_is_set_by_the_first_batch_and_learned_from_then_on():
    """App. A.1: alpha is learned with the network."""
    method = tiny_energy(task="super_resolution", first_step=0.2)
    images = images_of(4)
    before = method.log_alpha.item()
    method.eval()
    method.pictures(images)
    assert method.log_alpha.item() == before and not method.started  # looking sets nothing
    method.train()
    out = method(images)
    _, corrupted = method.corrupt(images)
    step = ebm_pretrain.descent(method.energy, corrupted, method.log_alpha.exp())
    assert float(step.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=1e-4)
    assert float(out["alpha"]) == pytest.approx(method.log_alpha.exp().item())
    set_to = method.log_alpha.item()
    method(images_of(4, seed=5) * 0.1)
    assert method.log_alpha.item() == set_to
    out["loss"].backward()
    assert method.log_alpha.grad != 0
    again = tiny_energy(task="super_resolution", first_step=0.7)
    again.load_state_dict(method.state_dict())
    again(images)
    assert again.log_alpha.item() == set_to  # a run that goes on does not start anew


def test_the_first_step_has_its_size_before_alpha_is_set():
    """Log alpha starts at 0, and what is looked at before the first batch has steps of the same size."""
    method = tiny_energy(task="super_resolution", first_step=0.2).eval()
    assert method.log_alpha.item() == 0
    _, corrupted = method.corrupt(images_of(4))
    moved = method.restored(corrupted)[0].detach() - corrupted
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.2, rel=1e-4)
    config = ebm_pretrain.Config()
    assert (config.first_step, config.alpha_lr, config.criterion, config.steps) == (0.3, 1.0, "smooth_l1", 2)


def test_a_checkpoint_says_whether_alpha_is_set():
    """By the names that older runs have, too; for those that have no alpha there is nothing to say."""
    method = tiny_energy()
    assert method.state_dict()["started"].dtype == torch.bool and not method.state_dict()["started"]
    method(images_of(4))
    state = method.state_dict()
    assert state["started"].item() is True and state["log_alpha"] == method.log_alpha != 0
    again = tiny_energy()
    again.load_state_dict(state)
    assert again.started is True and again.state_dict().keys() == state.keys()
    for name in ("log_alpha", "started"):
        with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
            again.load_state_dict({other: x for other, x in state.items() if other != name})
    inside = torch.nn.ModuleDict({"method": tiny_energy()})
    inside.load_state_dict(torch.nn.ModuleDict({"method": method}).state_dict())
    assert inside["method"].started is True
    baseline = tiny_energy(objective="mae")
    assert not {"started", "log_alpha"} & baseline.state_dict().keys()
    baseline.load_state_dict(baseline.state_dict())


class Readings(TorchDispatchMode):
    """Counts how often a number is read from a tensor: where that is on a GPU, each reading waits for it."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("fields", [{}, {"steps": 0}, {"objective": "autoencoder"}, {"scored": "changed"}])
def test_a_step_reads_no_number_from_the_device(fields):
    method = tiny_energy(task="mixed", **fields)
    method(images_of(4))  # sets alpha
    with Readings() as readings:
        method(images_of(4))["loss"].backward()
    assert readings.count == 0
    with readings:
        assert bool(torch.tensor(True))
    assert readings.count == 1


@pytest.mark.parametrize("decay_on", ["matrices", "tokens", "all"])
def test_log_alpha_has_a_group_of_its_own_without_decay(decay_on):
    """App. A.1: alpha is learned, Table A: weight decay is of the weights."""
    method = tiny_energy(alpha_lr=5.0, decay_on=decay_on)
    groups = method.optimizer(method.config).param_groups
    (own,) = [group for group in groups if any(p is method.log_alpha for p in group["params"])]
    assert len(own["params"]) == 1 and own["weight_decay"] == 0 and own["lr_scale"] == 5.0
    trainable = [p for p in method.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(trainable)


def test_tables_of_relative_positions_do_not_decay():
    swin = tiny_energy(backbone("swin"))
    decayed = swin.optimizer(swin.config).param_groups[0]["params"]
    tables = [p for name, p in swin.named_parameters() if name.endswith("position_bias")]
    assert tables and not any(p is table for p in decayed for table in tables)


def test_alpha_is_positive_whatever_the_optimiser_does():
    method = tiny_energy()
    method(images_of(2))
    with torch.no_grad():
        method.log_alpha.sub_(1000)
        assert method.step_size(images_of(2)) >= 0


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 0},
        {"steps": 1, "scored": "changed", "task": "random_small"},
        {"steps": 3, "criterion": "mse", "task": "mixed"},
        {"objective": "autoencoder", "task": "super_resolution"},
        {"objective": "autoencoder", "task": "noise"},
        {"objective": "mae"},
    ],
)
def test_every_switch_trains_and_draws(fields):
    method = tiny_energy(**fields)
    out = method(images_of(4))
    out["loss"].backward()
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    method.zero_grad()
    losses = fit(method, 40)
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    rows = method.pictures(images_of(3))
    assert rows.shape == (3, len(method.captions), 3, 16, 16) and 0 <= rows.min() and rows.max() <= 1
    torch.testing.assert_close(rows[:, 0], images_of(3))


def test_loss_is_eq_4_of_the_restored_images():
    """Eq. 4, from the images on."""
    method = tiny_energy(task="gridded", criterion="mse", scored="changed", steps=2)
    images = images_of(4)
    torch.manual_seed(7)
    out = method(images)
    torch.manual_seed(7)
    clean, corrupted = method.corrupt(images)
    chain = [x.detach() for x in ebm_pretrain.restore(method.energy, corrupted, 2, method.log_alpha.exp())]
    blank = (corrupted == 0).all(dim=1, keepdim=True).double()
    expected = reference.restoration_loss([x.double() for x in chain], clean.double(), "mse", blank)
    assert out["loss"].item() == pytest.approx(float(expected), rel=1e-5)
    left = (chain[-1] - clean).square().mean() / (corrupted - clean).square().mean()
    assert float(out["left"]) == pytest.approx(float(left), rel=1e-5)


def test_a_pixel_counts_where_any_of_its_channels_changed(monkeypatch):
    """Eq. 4 with --scored changed, from the images on."""
    method, images = tiny_energy(scored="changed", criterion="mse", steps=1), images_of(2)
    clean, _ = method.corrupt(images)
    corrupted = clean.clone()
    corrupted[:, 1, :4] += 1  # one channel of some pixels
    monkeypatch.setattr(method, "corrupt", lambda images: (clean, corrupted))
    loss = method(images)["loss"]
    restored = method.restored(corrupted)[0].detach()
    assert loss.item() == pytest.approx(float((restored - clean)[:, :, :4].square().mean()), rel=1e-5)


def test_without_steps_corrupted_images_are_the_negatives():
    """Fig. A, N = 0: Eq. 2 with corrupted images for those that are sampled."""
    method = tiny_energy(steps=0, task="grayscale")
    images = images_of(4)
    clean, corrupted = method.corrupt(images)
    out = method(images)
    energies = method.energy(clean), method.energy(corrupted)
    torch.testing.assert_close(out["loss"], F.softplus(energies[0] - energies[1]).mean())
    assert float(out["told_apart"]) == float((energies[0] < energies[1]).float().mean())


def test_the_autoencoder_sees_the_corrupted_image_and_nothing_else():
    """Table 2, AE: the encoder on the whole corrupted image, then MAE's decoder."""
    method = tiny_energy(objective="autoencoder", task="super_resolution")
    _, corrupted = method.corrupt(images_of(2))
    (out,) = method.restored(corrupted)
    assert out.shape == corrupted.shape
    autoencoder, encoder = method.autoencoder, method.encoder
    hidden = autoencoder.decoder_embed(encoder.encode(encoder.embed(corrupted * DATA_STD + DATA_MEAN)))
    patches = autoencoder.predict(hidden[:, :1], hidden[:, 1:])
    torch.testing.assert_close(patchify(out, 4), patches)
    assert not autoencoder.mask_token.requires_grad and not autoencoder.norm_pixels


def test_mae_is_the_masked_autoencoder():
    """Table 1, MAE: its loss on masked patches alone, each normalised."""
    method, images = tiny_energy(objective="mae", mask_ratio=0.5), images_of(2)
    torch.manual_seed(1)
    loss = method(images)["loss"]
    torch.manual_seed(1)
    out = method.autoencoder(images)
    torch.testing.assert_close(loss, reconstruction_loss(out.prediction, out.target, out.mask))
    assert method.autoencoder.norm_pixels and out.mask.float().mean() == 0.5


def test_accumulated_parts_add_up():
    """Eq. 4 is a mean over images, whatever the parts of a batch."""
    gradients = []
    for parts in (1, 2):
        method = tiny_energy(task="super_resolution")
        images = images_of(8)
        method(images)  # sets alpha
        method.zero_grad()
        for part in images.chunk(parts):
            (method(part)["loss"] / parts).backward()
        gradients.append([p.grad for p in method.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)


def stepped(update, parts, dtype=torch.float64, **fields):
    """The weights after one plain step of a fresh energy, made by `update`; what is logged; and how far they moved."""
    method = tiny_energy(first_step=0.2, **fields).to(dtype)
    stepper = Stepper(torch.optim.SGD(method.parameters(), 1.0), method.config, torch.device("cpu"))
    torch.manual_seed(0)
    out = update(method, method, [(part.to(dtype), None) for part in images_of(8).chunk(parts)], stepper)
    found, before = dict(method.state_dict()), tiny_energy(first_step=0.2, **fields).state_dict()
    moved = torch.stack(
        [(found[name] - p).norm() for name, p in before.items() if name not in ("log_alpha", "started")]
    )
    return found, out, float(moved.norm())


@pytest.mark.parametrize(
    ("parts", "fields"),
    [
        (1, {"task": "mixed"}),
        (2, {"task": "gridded", "steps": 3, "scored": "changed", "criterion": "mse", "clip": 1e-3}),
        (1, {"steps": 1}),
        (2, {"steps": 0}),
        (2, {"objective": "autoencoder"}),
        (1, {"objective": "mae"}),
        (2, {"objective": "sampling"}),
    ],
)
def test_step_by_step_is_the_gradient_of_the_whole_loss(parts, fields):
    """Eq. 4: each term has a backward pass of its own. Against `Method.update`, which differentiates `forward`."""
    found, wanted = (stepped(kind.update, parts, **fields) for kind in (EnergyPretraining, common.Method))
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-6, atol=0)
    assert found[2] > 1e-4


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_step_by_step_in_half_precision(amp):
    """Autocast and fp16's loss scaler, with clipping, are where `Method.update` has them."""
    fields = {"task": "gridded", "amp": amp, "clip": 1e-3, "steps": 2}
    found, wanted = (stepped(kind.update, 2, torch.float32, **fields) for kind in (EnergyPretraining, common.Method))
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=2e-6)
    assert found[2] == pytest.approx(1e-3, rel=0.03)  # the length that --clip leaves, but for alpha


def test_one_step_is_in_memory_at_a_time(monkeypatch):
    """The backward pass of a step comes before the next step."""
    seen, descent, method = [], ebm_pretrain.descent, tiny_energy(steps=3)
    method(images_of(2))  # sets alpha
    monkeypatch.setattr(ebm_pretrain, "descent", lambda *args: seen.append("step") or descent(*args))
    recorder = processes.Recorder(method)
    recorder.backward = lambda loss: seen.append("backward") or loss.backward()
    method.update(method, [(images_of(2), None)], recorder)
    assert seen == ["step", "backward"] * 3


def test_two_processes_have_the_step_size_and_the_gradients_of_one():
    """Eq. 4 and alpha's start (App. A.1) depend on the global batch, not on its processes."""
    images = images_of(8, seed=4)
    images[4:] *= 0.2  # the ranks' own step sizes would differ
    order = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])  # alpha is set by the first parts of both ranks
    method = tiny_energy(task="super_resolution")
    method(images[order[:4]])
    method(images)["loss"].backward()
    expected = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
    for part in processes.start(processes.gradients_of_energy, images):
        assert part.pop("alpha") == pytest.approx(method.log_alpha.item(), rel=1e-5)
        assert part.pop("averaged") == 1
        assert part.keys() == expected.keys()
        for name, gradient in part.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=name)


RUN = ["--model", "vit_micro", "--image-size", "16", "--patch", "8", "--grid", "8", "--scale", "4"]
RUN += ["--batch-size", "8", "--workers", "0", "--warmup-epochs", "0"]


def test_two_processes_train_probe_and_draw(tmp_path):
    """Process 0 alone probes and draws the untrained energy: nothing there may wait for the others."""
    flags = [*RUN, "--epochs", "1", "--out", str(tmp_path / "run")]
    first, second = processes.start(processes.fit_energy, flags)
    for name, weights in first.items():
        assert torch.equal(weights, second[name]), name
    assert (tmp_path / "run" / "pictures.png").exists()


def test_resume_matches_an_uninterrupted_run(tmp_path):
    flags = [*RUN, "--epochs", "2", "--probe-every", "0", "--task", "mixed"]
    whole = processes.fit_energy([*flags, "--out", str(tmp_path / "whole")])
    stopped = [*flags, "--out", str(tmp_path / "stopped")]
    with pytest.raises(KeyboardInterrupt):
        processes.fit_energy(stopped, stop_after=1)
    again = processes.fit_energy([*stopped, "--resume"])
    for name, weights in whole.items():
        assert torch.equal(weights, again[name]), name


def test_the_probe_says_what_is_left_task_by_task():
    images = (images_of(20) * 255).to(torch.uint8)
    data = MemoryImages(images, torch.arange(20) % 2, ["a", "b"], ENERGY_DATA.mean, ENERGY_DATA.std)
    method = tiny_energy(task="mixed", steps=2)
    method(images_of(4))
    method.eval()
    found = method.probe(lambda x: x.flatten(1), data, data, method.config)
    assert {name for name in found if name.startswith("left_")} == {f"left_{task}" for task in MIXTURE}
    clean, corrupted = method.corrupt(images / 255, "grayscale")
    restored = ebm_pretrain.restore(method.energy, corrupted, 2, method.log_alpha.exp())[-1]
    expected = (restored - clean).square().mean() / (corrupted - clean).square().mean()
    assert found["left_grayscale"] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert found == method.probe(lambda x: x.flatten(1), data, data, method.config)


@pytest.mark.parametrize(("wanted", "most"), [(0, 2000), (50, 5), (3, 1)])
def test_the_probe_restores_a_tenth_of_the_images_that_it_takes(wanted, most, monkeypatch):
    method, data, asked = tiny_energy(), shapes(6, 16), []
    monkeypatch.setattr(ebm_pretrain, "labelled", lambda data, limit: asked.append(limit) or torch.arange(len(data)))
    method.probe(lambda x: x.flatten(1), data, data, dataclasses.replace(method.config, probe_images=wanted))
    assert asked == [most]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "griddled"}, "unknown --task 'griddled'; did you mean 'gridded'"),
        ({"objective": "energie"}, "unknown --objective 'energie'"),
        ({"criterion": "l1"}, "unknown --criterion 'l1'"),
        ({"scored": "masked"}, "unknown --scored 'masked'"),
        ({"steps": -1}, "--steps -1 makes no sense"),
        ({"steps": 0, "objective": "sampling"}, "--steps 0 makes no sense; give 1 or more"),
        ({"temperature": -1.0}, "--temperature -1.0 makes no sense"),
        ({"grid": 0}, "--grid 0 makes no sense"),
        ({"scale": 0}, "--scale 0 makes no sense"),
        ({"mask_ratio": 1.0}, "--mask-ratio 1.0 blanks nothing or all"),
        ({"first_step": 0.0}, "--first-step 0.0 makes no sense"),
        ({"compile": True}, "--compile does not work here"),
        ({"objective": "mae", "encoder": "convnext"}, "--objective mae needs a vit, not ConvNeXt; try --model"),
        ({"grid": 16}, r"--grid 16 makes 1 square\(s\), of which --mask-ratio 0.7 blanks none or all; change one"),
    ],
)
def test_mistakes_are_named(fields, message):
    encoder = backbone(fields.pop("encoder")) if "encoder" in fields else None
    with pytest.raises(UserError, match=message):
        tiny_energy(encoder, **fields)


def test_the_choices_of_model_are_all_backbones_that_there_are():
    """They are written out where the appendix is not yet known."""
    choices = choices_of(field_types(Config)["model"])
    assert len(choices) == len(set(choices)) and set(choices) == {*VIT_SIZES, *BACKBONES}


def test_an_unknown_backbone_is_named():
    with pytest.raises(UserError, match="unknown --model 'convnext_tyni'; did you mean 'convnext_tiny'"):
        EnergyPretraining(Config(model="convnext_tyni"), ENERGY_DATA)


@pytest.mark.parametrize(("model", "stride"), [("convnext_micro", 8), ("swin_micro", 8), ("mobile_former_micro", 16)])
def test_images_that_the_cells_do_not_fit_are_refused(model, stride):
    with pytest.raises(UserError, match=f"--image-size 36 is not a multiple of {stride}, which {model} needs; give 32"):
        EnergyPretraining(Config(model=model, image_size=36, grid=4), ENERGY_DATA)


def test_recipes_are_table_a():
    def read(*argv):
        return read_flags(Config, ebm_pretrain.RECIPES, ["--data", "imagenet", *argv])

    config = read()
    assert (config.model, config.patch, config.image_size, config.epochs) == ("vit_small", 16, 224, 100)
    assert (config.base_lr, config.batch_size, config.weight_decay) == (1e-4, 256, 0.05)
    assert config.betas == (0.9, 0.95) and config.flip == 0.5 and not config.milestones
    assert (config.steps, config.task, config.grid, config.mask_ratio, config.scale) == (2, "gridded", 16, 0.7, 16)
    assert (config.criterion, config.scored, config.objective) == ("smooth_l1", "all", "energy")
    assert (config.decoder_dim, config.decoder_depth, config.decoder_heads) == (512, 8, 16)
    for model in ("vit_base", "convnext_tiny", "swin_tiny"):
        config = read("--model", model)
        assert (config.epochs, config.task, config.base_lr) == (200, "mixed", 1e-4)
    mae = read("--objective", "mae")
    assert (mae.epochs, mae.warmup_epochs, mae.base_lr) == (400, 40, 1.5e-4)


def test_captions_stand_over_what_they_name():
    """A corrupted image and its steps for each of the four tasks, or what an autoencoder makes of it."""
    for fields, steps in (({"steps": 2}, ["step 1", "step 2"]), ({"objective": "autoencoder"}, ["output"])):
        method, images = tiny_energy(task="mixed", **fields), images_of(2)
        torch.manual_seed(0)
        method(images)
        names = ["gridded", "super resolution", "noise", "grayscale"]
        assert method.captions == ("image", *[caption for name in names for caption in (name, *steps)])
        torch.manual_seed(6)
        rows, column = method.pictures(images), 1
        torch.manual_seed(6)
        for task in MIXTURE:
            _, corrupted = method.corrupt(images, task)
            for x in (corrupted, *method.restored(corrupted)):
                shown = (x.detach() * DATA_STD + DATA_MEAN).clamp(0, 1)
                torch.testing.assert_close(rows[:, column], shown)
                column += 1
        assert column == rows.shape[1]
    mae = tiny_energy(objective="mae")
    assert mae.captions == ("image", "masked image", "reconstruction")
    torch.manual_seed(6)
    rows = mae.pictures(images)
    torch.manual_seed(6)
    torch.testing.assert_close(rows, mae.autoencoder.pictures(images))


def test_pictures_show_the_steps_in_their_order():
    method, images = tiny_energy(task="super_resolution", steps=2), images_of(2)
    method(images)
    assert method.captions == ("image", "super resolution", "step 1", "step 2")
    clean, corrupted = method.corrupt(images)
    chain = [x.detach() for x in method.restored(corrupted)]
    expected = [(x * DATA_STD + DATA_MEAN).clamp(0, 1) for x in (clean, corrupted, *chain)]
    torch.testing.assert_close(method.pictures(images), torch.stack(expected, dim=1))
