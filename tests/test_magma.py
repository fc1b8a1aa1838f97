"""The equations of MAGMA against slow versions, its invariants as properties, and the method itself."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from make import generator, images_of, rand, randn, same_weights, seeds, tiny_magma
from torch.utils._python_dispatch import TorchDispatchMode

import common
import magma
from magma import RECIPES, Config
from plumbing.errors import UserError
from plumbing.settings import read_flags

batches = st.integers(3, 8)
widths = st.integers(1, 6)
factors = st.sampled_from((0.5, 1.0))


def gradients(function, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*inputs), inputs, allow_unused=True, materialize_grads=True)


def assert_same_value_and_gradient(fast, slow, *inputs, rtol=1e-9):
    torch.testing.assert_close(torch.as_tensor(fast(*inputs)), torch.as_tensor(slow(*inputs)), rtol=rtol, atol=1e-12)
    for ours, theirs in zip(gradients(fast, *inputs), gradients(slow, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol * 100, atol=1e-11)


# --- the equations ---------------------------------------------------------------------------------------------------


@given(batches, widths, seeds)
def test_squared_distances_matches_naive_loop(batch, width, seed):
    """d_ij of Eq. 4."""
    z = randn(batch, width, seed=seed)
    torch.testing.assert_close(magma.squared_distances(z), reference.squared_distances(z))


@given(batches, widths, factors, st.booleans(), seeds)
def test_affinity_matches_naive_loop_of_eq_4(batch, width, factor, diagonal, seed):
    """Eq. 4, as printed and as in the code, with its gradient."""
    z, weight = randn(batch, width, seed=seed), randn(batch, batch, seed=seed + 1)
    torch.testing.assert_close(magma.affinity(z, factor, diagonal), reference.affinity(z, factor, diagonal))
    assert_same_value_and_gradient(
        lambda x: (magma.affinity(x, factor, diagonal) * weight).sum(),
        lambda x: (reference.affinity(x, factor, diagonal) * weight).sum(),
        z,
        rtol=1e-7,
    )


@given(batches, st.booleans(), seeds)
def test_laplacian_matches_naive_loop_of_eq_7(batch, normalized, seed):
    """Eq. 7: the identity minus what is printed, or D - W."""
    w = magma.affinity(randn(batch, 4, seed=seed))
    torch.testing.assert_close(magma.laplacian(w, normalized), reference.laplacian(w, normalized))
    torch.testing.assert_close(magma.printed_laplacian(w), torch.eye(batch).double() - magma.laplacian(w))


@given(batches, widths, widths, factors, st.booleans(), st.booleans(), seeds)
def test_manifold_loss_matches_naive_loop_of_eq_6(batch, width, other, factor, diagonal, normalized, seed):
    """Eq. 6, with the gradients of both layers."""
    regularized, features = randn(batch, width, seed=seed), randn(batch, other, seed=seed + 1)
    form = "normalized" if normalized else "unnormalized"
    assert_same_value_and_gradient(
        lambda y, x: magma.manifold_loss(y, x, factor, diagonal=diagonal, form=form),
        lambda y, x: reference.manifold_loss(y, x, factor, diagonal, normalized),
        regularized,
        features,
        rtol=1e-7,
    )


@given(batches, widths, factors, seeds)
def test_inverse_manifold_loss_matches_naive_loop_of_eq_3_and_5(batch, width, factor, seed):
    """Eq. 3 with the weights of Eq. 5."""
    regularized, features = randn(batch, width, seed=seed), randn(batch, 3, seed=seed + 1)
    assert_same_value_and_gradient(
        lambda y, x: magma.inverse_manifold_loss(y, x, factor),
        lambda y, x: reference.inverse_manifold_loss(y, x, factor),
        regularized,
        features,
        rtol=1e-7,
    )


@given(st.integers(1, 6), widths, seeds)
def test_uniformity_loss_matches_naive_loop(batch, width, seed):
    """U-MAE's uniformity, between 1/B and 1."""
    z = randn(batch, width, seed=seed)
    assert_same_value_and_gradient(magma.uniformity_loss, reference.uniformity_loss, z)
    assert 1 / batch - 1e-9 <= magma.uniformity_loss(z) <= 1 + 1e-9


@given(st.integers(1, 5), widths, st.floats(0.1, 1), seeds)
def test_contrastive_loss_matches_naive_loop(batch, width, temperature, seed):
    """SimCLR's Eq. 1, the mean over all views."""
    a, b = randn(2, batch, width, seed=seed)
    assert_same_value_and_gradient(
        lambda a, b: magma.contrastive_loss(a, b, temperature),
        lambda a, b: reference.contrastive_loss(a, b, temperature),
        a,
        b,
        rtol=1e-8,
    )


@given(st.integers(2, 5), widths, seeds)
def test_vicreg_loss_matches_naive_loop(batch, width, seed):
    """VICReg's Eq. 6, of its Eq. 1 to 5."""
    a, b = randn(2, batch, width, seed=seed)
    weights = (25.0, 24.0, 1.5)
    assert_same_value_and_gradient(
        lambda a, b: magma.vicreg_loss(a, b, weights), lambda a, b: reference.vicreg_loss(a, b, weights), a, b
    )


def test_image_features_leave_the_cls_token_out():
    """Z_i of Sec. 3.1, a mean where a sum is printed."""
    tokens = randn(2, 5, 3)
    torch.testing.assert_close(magma.image_features(tokens), sum(tokens[:, i] for i in range(1, 5)) / 4)


# --- invariants ------------------------------------------------------------------------------------------------------


@given(batches, widths, st.booleans(), seeds)
def test_affinity_is_symmetric_and_between_zero_and_one(batch, width, diagonal, seed):
    w = magma.affinity(randn(batch, width, seed=seed), diagonal=diagonal)
    assert torch.equal(w, w.T)
    assert w.min() >= 0
    assert w.max() <= 1
    assert (w.diagonal() == float(diagonal)).all()


@given(batches, widths, st.floats(-100, 100), st.floats(0.01, 100), seeds)
def test_affinity_is_invariant_to_a_common_shift_and_scale(batch, width, shift, scale, seed):
    z = randn(batch, width, seed=seed)
    torch.testing.assert_close(magma.affinity(z * scale + shift), magma.affinity(z), rtol=1e-6, atol=1e-9)


@given(batches, widths, seeds, st.randoms(use_true_random=False))
def test_affinity_is_equivariant_and_loss_invariant_to_batch_order(batch, width, seed, random):
    y, x = randn(2, batch, width, seed=seed)
    order = list(range(batch))
    random.shuffle(order)
    torch.testing.assert_close(magma.affinity(x[order]), magma.affinity(x)[order][:, order])
    torch.testing.assert_close(magma.manifold_loss(y[order], x[order]), magma.manifold_loss(y, x))


@given(batches, widths, seeds)
def test_laplacian_is_symmetric_and_positive_semidefinite_with_eigenvalues_up_to_two(batch, width, seed):
    w = magma.affinity(randn(batch, width, seed=seed))
    for normalized in (True, False):
        matrix = magma.laplacian(w, normalized)
        values = torch.linalg.eigvalsh(matrix)
        assert torch.equal(matrix, matrix.T)
        assert values.min() > -1e-12
        assert not normalized or values.max() < 2 + 1e-12
    ones = torch.ones(batch, dtype=torch.float64)  # features that are all alike cost nothing
    torch.testing.assert_close(magma.laplacian(w, normalized=False) @ ones, 0 * ones)


@given(st.integers(1, 8), widths, seeds)
def test_manifold_loss_is_never_negative(batch, width, seed):
    y, x = randn(2, batch, width, seed=seed)
    assert magma.manifold_loss(y, x) >= -1e-12


@given(batches, widths, seeds)
def test_trace_is_half_of_the_double_sum_of_eq_2_for_the_unnormalized_laplacian(batch, width, seed):
    """Eq. 2 and Eq. 6 are not the same, as the text has it."""
    y, x = randn(2, batch, width, seed=seed)
    double_sum = reference.pairwise_loss(y, magma.affinity(x))
    torch.testing.assert_close(2 * magma.manifold_loss(y, x, form="unnormalized"), double_sum)


def test_eq_7_as_printed_would_reward_what_the_text_wants_to_penalize():
    """Two pairs of near images. Features that follow the pairs must cost less than features that cross them."""
    x = torch.tensor([[0.0], [0.1], [5.0], [5.1]], dtype=torch.float64)
    follows = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=torch.float64)
    crosses = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
    for form in ("normalized", "unnormalized"):
        assert magma.manifold_loss(follows, x, form=form) < magma.manifold_loss(crosses, x, form=form)
    assert magma.manifold_loss(follows, x, form="printed") > magma.manifold_loss(crosses, x, form="printed")


def test_equal_distances_give_equal_affinities():
    """For d constant, S = (11^T - I) / (B - 1), up to the eps of the degrees: the limit that the code's NaN hides."""
    for batch in (2, 3, 5):
        corners = torch.eye(batch, dtype=torch.float64)
        want = (torch.ones(batch, batch).double() - corners) / (batch - 1)
        torch.testing.assert_close(magma.printed_laplacian(magma.affinity(corners)), want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", ["one", "two", "identical", "all zero", "duplicates"])
@pytest.mark.parametrize("loss", [magma.manifold_loss, magma.inverse_manifold_loss])
def test_value_and_gradient_are_finite_for_degenerate_batches(loss, case, dtype):
    y, x = randn(2, 6, 4)
    if case == "one":
        y, x = y[:1], x[:1]
    elif case == "two":
        y, x = y[:2], x[:2]
    elif case == "identical":
        x, y = x[:1].expand(6, -1), y[:1].expand(6, -1)
    elif case == "all zero":
        x, y = x * 0, y * 0
    else:
        x, y = x[[0, 0, 1, 1, 2, 3]], y[[0, 0, 1, 1, 2, 3]]
    y, x = y.to(dtype), x.to(dtype)
    assert torch.isfinite(loss(y, x))
    for gradient in gradients(loss, y, x):
        assert torch.isfinite(gradient).all()


def test_duplicates_are_pulled_nowhere():
    """Rows that are equal in both layers have equal gradients, and they do not push each other."""
    y, x = randn(2, 6, 4)
    y, x = y[[0, 0, 1, 2, 3, 4]], x[[0, 0, 1, 2, 3, 4]]
    for gradient in gradients(magma.manifold_loss, y, x):
        torch.testing.assert_close(gradient[0], gradient[1])


@pytest.mark.parametrize("form", ["normalized", "unnormalized"])
def test_float32_keeps_the_gradient_of_nearly_collapsed_features(form):
    """Features have a mean of about 30, or -30, and spread 0.01: the uncentred Gram matrix and cdist lose all of it."""
    mean = 30 * randn(1, 192, seed=3)
    x = (mean + 0.01 * randn(64, 192, seed=1)).float()
    y = (mean + 0.01 * randn(64, 192, seed=2)).float()
    loss = lambda y, x: magma.manifold_loss(y, x, form=form)
    for ours, exact in zip(gradients(loss, y, x), gradients(loss, y.double(), x.double()), strict=True):
        assert ((ours - exact).norm() / exact.norm()) < 1e-3
    uncentred = lambda x: torch.exp(-torch.cdist(x, x).square() / magma.bandwidth(torch.cdist(x, x).square())).sum()
    centred = lambda x: magma.affinity(x, diagonal=True).sum()
    exact = gradients(centred, x.double())[0]
    assert (gradients(uncentred, x)[0] - exact).norm() / exact.norm() > 0.1


@pytest.mark.parametrize(
    "function", [magma.affinity, magma.uniformity_loss, lambda z: magma.manifold_loss(z, z), magma.squared_distances]
)
def test_equations_run_in_float32_under_autocast(function):
    """Whether features come by position or by name."""
    z = randn(16, 32).bfloat16()
    torch.testing.assert_close(magma.manifold_loss(regularized=z, reference=z), magma.manifold_loss(z, z))
    with torch.autocast("cpu", torch.bfloat16):
        out = function(z)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, function(z.float()))


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(x):
                self.numel = max(self.numel, x.numel())
        return out


def test_manifold_loss_makes_no_tensor_of_pairs_times_channels():
    y, x = (randn(32, 48, seed=seed).requires_grad_() for seed in (0, 1))
    with LargestTensor() as seen:
        magma.manifold_loss(y, x).backward()
    assert seen.numel == 32 * 48  # the larger of B^2 and B D
    with LargestTensor() as seen:
        reference.squared_distances(x)
    assert seen.numel == 32 * 32 * 48


@pytest.mark.parametrize("loss", [magma.manifold_loss, magma.inverse_manifold_loss])
def test_detach_reference_keeps_the_gradient_out_of_the_reference(loss):
    y, x = randn(2, 6, 4)
    y_grad, x_grad = gradients(lambda y, x: loss(y, x, detach_reference=True), y, x)
    assert not x_grad.any()
    torch.testing.assert_close(y_grad, gradients(loss, y, x)[0])


def test_the_exponent_of_the_inverse_kernel_has_a_limit():
    """Nearly equal distances have nearly no deviation: exp would overflow."""
    x = torch.eye(8, dtype=torch.float64)
    x[0, 0] += 1e-3
    assert float(magma.inverse_affinity(x).max()) == pytest.approx(math.exp(30))


def test_inverse_loss_keeps_the_digits_of_a_small_distance():
    """Two images 1e-3 apart among others 10 apart: in float32 their distance would round to zero."""
    y, x = 10 * randn(32, 192, seed=1), randn(32, 192, seed=2)
    y[1] = y[0] + 1e-3
    y, x = y.float(), x.float()
    want = reference.inverse_manifold_loss(y.double(), x.double())
    torch.testing.assert_close(magma.inverse_manifold_loss(y, x), want, rtol=1e-3, atol=0)


@given(st.sampled_from(("affinity", "manifold", "inverse", "uniformity", "contrastive", "vicreg")), seeds)
def test_gradients_pass_gradcheck(name, seed):
    y, x = (z.requires_grad_() for z in randn(2, 5, 3, seed=seed))
    functions = {
        "affinity": lambda y, x: magma.affinity(x),
        "manifold": magma.manifold_loss,
        "inverse": magma.inverse_manifold_loss,
        "uniformity": lambda y, x: magma.uniformity_loss(x),
        "contrastive": magma.contrastive_loss,
        "vicreg": magma.vicreg_loss,
    }
    assert torch.autograd.gradcheck(functions[name], (y, x), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("ssl", ["mae", "simclr"])
def test_positions_are_learned_where_the_settings_say(ssl):
    """As those of SimCLR's and VICReg's encoder in the code; its matrices decay, they do not."""
    assert "positions" not in dict(tiny_magma(ssl=ssl).encoder.named_parameters())
    method = tiny_magma(ssl=ssl, positions="learned", weight_decay=0.3)
    positions = method.encoder.positions
    run(method)["loss"].backward()
    assert positions.grad.norm() > 0
    groups = method.optimizer(method.config).param_groups
    assert [group["weight_decay"] for group in groups if any(p is positions for p in group["params"])] == [0.0]


# --- views -----------------------------------------------------------------------------------------------------------

STILL = dict.fromkeys(magma.JITTER["simclr"], 0.0)
LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(3, 1, 1)


def test_jitter_of_no_strength_is_the_identity():
    for apply in (0.0, 1.0):
        images = images_of(4, 20)
        torch.testing.assert_close(magma.jitter(images, STILL | {"apply": apply}, generator(0)), images)


@pytest.mark.parametrize("name", ["simclr", "vicreg"])
def test_jitter_stays_in_range_and_follows_its_generator(name):
    images = images_of(4, 20)
    out = [magma.jitter(images, magma.JITTER[name], generator(3)) for _ in range(2)]
    assert torch.equal(*out)
    assert out[0].min() >= 0
    assert out[0].max() <= 1
    assert not torch.allclose(out[0], images)


def test_jitter_draws_for_each_image_on_its_own():
    same = images_of(1, 20).expand(8, -1, -1, -1)
    out = magma.jitter(same, magma.JITTER["vicreg"] | {"apply": 1.0}, generator(0))
    assert len({round(float(x.mean()), 6) for x in out}) == 8


def jittered(images, **strength):
    return magma.jitter(images, STILL | {"apply": 1.0} | strength, generator(1))


def grey_of(images):
    return (images * LUMA).sum(dim=1)


def test_jitter_ops_mean_what_they_say():
    """Each colour change by what it leaves alone."""
    images = 0.3 + 0.4 * images_of(4, 20).double()  # far from clipping
    ratio = jittered(images, brightness=0.3) / images
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio))
    contrasted = jittered(images, contrast=0.3)
    torch.testing.assert_close(grey_of(contrasted).mean((1, 2)), grey_of(images).mean((1, 2)))
    assert not torch.allclose(contrasted, images, atol=1e-2)
    torch.testing.assert_close(grey_of(jittered(images, saturation=0.3)), grey_of(images))
    hue = jittered(images, hue=0.1)
    torch.testing.assert_close(hue.mean(dim=1), images.mean(dim=1))  # the grey axis stays
    torch.testing.assert_close(hue.square().sum(dim=1), images.square().sum(dim=1))  # and it is a rotation
    grey = jittered(images, hue=0.1, grey=1.0)  # of the changed colours
    torch.testing.assert_close(grey, grey_of(hue)[:, None].expand_as(grey), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(hue, images, atol=1e-2)
    grey = jittered(images, grey=1.0)
    torch.testing.assert_close(grey, grey_of(images)[:, None].expand(-1, 3, -1, -1))


def test_solarisation_inverts_what_is_bright_and_a_blur_keeps_what_is_flat():
    images = images_of(4, 20).double()
    torch.testing.assert_close(jittered(images, solarize=1.0), torch.where(images >= 0.5, 1 - images, images))
    assert jittered(images, blur=1.0).var() < images.var()
    flat = torch.full_like(images, 0.4)
    torch.testing.assert_close(jittered(flat, blur=1.0), flat)


def test_contrast_turns_about_the_mean_of_the_brightened_image():
    images = torch.full((500, 3, 2, 2), 0.4, dtype=torch.float64)
    images[..., 0] = 0.2
    strength = STILL | {"apply": 1.0, "brightness": 0.3, "contrast": 0.3}
    out = magma.jitter(images, strength, generator(0))
    brightness = out.mean(dim=(1, 2, 3)) / 0.3
    contrast = (out[..., 1] - out[..., 0]).mean(dim=(1, 2)) / 0.2 / brightness
    for factor in (brightness, contrast):
        assert 0.7 <= factor.min() < 0.71 and 1.29 < factor.max() <= 1.3
    assert torch.corrcoef(torch.stack([brightness, contrast]))[0, 1].abs() < 0.15  # two draws


def test_the_hue_turns_by_up_to_its_share_of_a_circle():
    colour = torch.tensor([0.5, 0.3, 0.3], dtype=torch.float64).view(1, 3, 1, 1).expand(500, 3, 1, 1)
    out = magma.jitter(colour, STILL | {"apply": 1.0, "hue": 0.1}, generator(0))
    before, after = (x[:, :, 0, 0] - x[:, :, 0, 0].mean(dim=1, keepdim=True) for x in (colour, out))
    angle = torch.nn.functional.cosine_similarity(before, after).clamp(-1, 1).acos() / (2 * math.pi)  # in circles
    assert 0.099 < angle.max() < 0.1 + 1e-9 and angle.min() < 0.001


def test_blur_is_a_gaussian_of_up_to_two_pixels():
    images = torch.zeros(1000, 3, 41, 41, dtype=torch.float64)
    images[:, :, 20, 20] = 1.0
    out = magma.jitter(images, STILL | {"blur": 1.0}, generator(0))[:, 0]
    beside, beyond = out[:, 20, 21] / out[:, 20, 20], out[:, 20, 22] / out[:, 20, 20]
    torch.testing.assert_close(beyond, beside**4)  # exp(-d^2 / (2 sigma^2)) at d = 1 and 2
    assert math.exp(-1 / (2 * 1.95**2)) < beside.max() < math.exp(-1 / (2 * 2.0**2))
    assert math.exp(-1 / (2 * 0.1**2)) <= beside.min() < math.exp(-1 / (2 * 0.15**2))
    assert (out[:, :, 23:] == 0).all()  # a kernel of a tenth of the side
    torch.testing.assert_close(out.sum(dim=(1, 2)), torch.ones(1000, dtype=torch.float64))


# --- the method ------------------------------------------------------------------------------------------------------


def run(method, images=None, seed=0):
    torch.manual_seed(seed)
    images = images_of(6, 8) if images is None else images
    return method(images if method.views == 1 else torch.stack([images, images.flip(-1)], dim=1))


def weights_after_a_step(method):
    config = method.config
    stepper = common.Stepper(method.optimizer(config), config, torch.device("cpu"))
    torch.manual_seed(0)
    method.update(method, [(images_of(6, 8), None)], stepper)
    return torch.cat([p.detach().flatten() for _, p in sorted(method.autoencoder.named_parameters())])


def test_lambda_zero_equals_the_masked_autoencoder_step_exactly():
    """Eq. 1 with lambda = 0, against He et al.'s method written out."""

    class Mae(common.Method):
        def __init__(self):
            super().__init__()
            like = tiny_magma()
            self.encoder, self.autoencoder, self.config = like.encoder, like.autoencoder, like.config

        def forward(self, images, labels=None):
            out = self.autoencoder(images)
            return {"loss": common.reconstruction_loss(out.prediction, out.target, out.mask)}

    torch.manual_seed(0)
    vit = common.ViT(8, 4, **common.VIT_SIZES["vit_micro"], mean=(0.4,) * 3, std=(0.3,) * 3)
    plain = common.MaskedAutoencoder(vit, 64, 2, 4, mask_ratio=0.5)
    ours = tiny_magma().autoencoder.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in plain.state_dict().items())
    assert torch.equal(weights_after_a_step(tiny_magma(lam=0.0)), weights_after_a_step(Mae()))
    assert not torch.equal(weights_after_a_step(tiny_magma(lam=1.0)), weights_after_a_step(Mae()))


def test_loss_is_eq_1():
    """Eq. 1, with U-MAE's term and Eq. 3 beside it."""
    out = run(tiny_magma(lam=0.7, uniformity=0.3, inverse=0.2))
    terms = {name: value.item() for name, value in out.items()}
    total = terms["mae"] + 0.7 * terms["manifold"] + 0.3 * terms["uniformity"] + 0.2 * terms["inverse"]
    assert terms["loss"] == pytest.approx(total, rel=1e-5)


def features_of_blocks(method):
    """Z of every block for the images and the mask of `run`: a list of (6, 96)."""
    torch.manual_seed(0)
    hidden = method.autoencoder(images_of(6, 8)).hidden
    assert hidden[0].shape == (6, 1 + 2, 96)  # two of four patches are visible
    return [layer[:, 1:].mean(dim=1) for layer in hidden]


def test_regularizer_sees_the_mean_of_the_visible_patches_of_the_chosen_blocks():
    """K of Eq. 2, the last block and the one before it."""
    z = features_of_blocks(tiny_magma())
    torch.testing.assert_close(run(tiny_magma())["manifold"], magma.manifold_loss(z[5], z[4]))


def test_layers_and_their_pairs_are_the_sum_over_k_of_eq_2():
    """Each reference against the last one, averaged; or all ordered pairs, summed."""
    z = features_of_blocks(tiny_magma())
    several = run(tiny_magma(layers=(0, 2, 3)))["manifold"]
    torch.testing.assert_close(several, (magma.manifold_loss(z[3], z[0]) + magma.manifold_loss(z[3], z[2])) / 2)
    both = run(tiny_magma(layers=(1, 2), layer_pairs="all"))["manifold"]
    torch.testing.assert_close(both, magma.manifold_loss(z[2], z[1]) + magma.manifold_loss(z[1], z[2]))


def test_a_shuffled_graph_is_that_of_the_images_in_another_order():
    """A control of Eq. 2: the graph of the images in another order, the same for all reference layers."""
    z = features_of_blocks(tiny_magma())
    order = torch.randperm(6)  # what the method draws next
    expected = (magma.manifold_loss(z[3], z[0][order]) + magma.manifold_loss(z[3], z[2][order])) / 2
    torch.testing.assert_close(run(tiny_magma(layers=(0, 2, 3), shuffle_graph=True))["manifold"], expected)


def test_the_term_between_all_blocks_is_logged_without_a_gradient():
    """Fig. 3: each block with the one before it, by the settings of the regulariser's kernel."""
    kernel = {"kernel_factor": 0.5, "laplacian": "unnormalized"}
    z, plain = features_of_blocks(tiny_magma()), run(tiny_magma(**kernel))
    found = run(tiny_magma(log_layers=True, **kernel))
    names = [f"manifold_{i}_{i + 1}" for i in range(1, 6)]
    assert list(found) == [*plain, *names]
    assert torch.equal(found["loss"], plain["loss"]) and torch.equal(found["manifold_5_6"], found["manifold"])
    for i, name in enumerate(names):
        expected = magma.manifold_loss(z[i + 1], z[i], 0.5, form="unnormalized")
        torch.testing.assert_close(found[name], expected.detach())
        assert not found[name].requires_grad


def test_logging_all_layers_changes_no_bit_of_the_training():
    """Weights and the optimiser's moments, before the regulariser, with it and after it."""
    states = []
    for fields in ({}, {"log_layers": True}):
        method = tiny_magma(e_st=1, e_dur=1, **fields)
        stepper = common.Stepper(method.optimizer(method.config), method.config, torch.device("cpu"))
        for step in range(3):
            method.start_epoch(step)
            torch.manual_seed(step)
            method.update(method, [(images_of(6, 8), None)], stepper)
        states.append((method.state_dict(), stepper.optimizer.state_dict()["state"]))
    (weights, moments), (others, other_moments) = states
    assert same_weights(weights, others) and moments.keys() == other_moments.keys()
    assert all(same_weights(state, other_moments[i]) for i, state in moments.items())


def test_the_settings_of_the_kernel_reach_the_regularizer():
    z = features_of_blocks(tiny_magma())
    text = run(tiny_magma(laplacian="printed", kernel_factor=0.5, diagonal=True))["manifold"]
    torch.testing.assert_close(text, magma.manifold_loss(z[5], z[4], 0.5, diagonal=True, form="printed"))
    inverse = run(tiny_magma(inverse=1.0))["inverse"]  # Eq. 5 has its own 1/2, that of the text
    torch.testing.assert_close(inverse, magma.inverse_manifold_loss(z[5], z[4], 0.5))
    method, found = tiny_magma(inverse=1.0, detach_reference=True), []
    z, weight = features_of_blocks(method), method.encoder.blocks[0].attn["qkv"].weight
    for loss in (run(method)["inverse"], magma.inverse_manifold_loss(z[5], z[4].detach())):
        found += torch.autograd.grad(loss, weight, retain_graph=True)
    torch.testing.assert_close(*found)


def test_uniformity_is_taken_on_the_cls_token_after_the_final_norm():
    method = tiny_magma()
    torch.manual_seed(0)
    encoded = method.autoencoder(images_of(6, 8)).encoded
    torch.testing.assert_close(run(method)["uniformity"], magma.uniformity_loss(encoded[:, 0]))


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 12))
def test_regularizer_is_active_from_e_st_for_e_dur_epochs_and_measured_always(e_st, e_dur, epoch):
    """Eq. 1's schedule; the term is measured outside of it, too, as in Fig. 2a."""
    method = tiny_magma(e_st=e_st, e_dur=e_dur, inverse=0.2)  # Eq. 3 has the same schedule
    method.start_epoch(epoch)
    out = run(method)
    active = epoch >= e_st and epoch < e_st + e_dur
    assert out["manifold"].item() > 0
    assert out["manifold"].requires_grad == out["inverse"].requires_grad == active
    terms = out["manifold"].item() + 0.2 * out["inverse"].item()
    assert out["loss"].item() == pytest.approx(out["mae"].item() + active * terms, rel=1e-6)


@pytest.mark.parametrize("ssl", ["mae", "simclr", "vicreg"])
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_training_reaches_every_parameter(ssl, pool):
    method = tiny_magma(ssl=ssl, pool=pool)
    run(method)["loss"].backward()
    silent = {name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()}
    # A bias that the next step takes away again (the batch norm, the covariance) has a gradient of rounding errors.
    assert silent == set()


@pytest.mark.parametrize("ssl", ["mae", "simclr", "vicreg"])
def test_a_few_steps_lower_the_loss(ssl):
    method = tiny_magma(ssl=ssl, base_lr=0.05)
    config = method.config
    stepper = common.Stepper(method.optimizer(config), config, torch.device("cpu"))
    for group in stepper.optimizer.param_groups:
        group["lr"] = 2e-3
    losses = []
    for _ in range(12):
        torch.manual_seed(0)
        images = images_of(6, 8) if ssl == "mae" else torch.stack([images_of(6, 8)] * 2, dim=1)
        losses.append(float(method.update(method, [(images, None)], stepper)["loss"]))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("ssl", ["simclr", "vicreg"])
def test_two_views_are_compared_and_the_first_is_regularized(ssl):
    method = tiny_magma(ssl=ssl).eval()  # batch norm in eval mode keeps the images apart
    views = images_of(12, 8).view(6, 2, 3, 8, 8)
    torch.manual_seed(0)
    out = method(views)
    torch.manual_seed(0)
    seen = magma.jitter(torch.cat([views[:, 0], views[:, 1]]), magma.JITTER[ssl])
    a, b = method.projector(method.encoder(seen)).chunk(2)
    want = magma.contrastive_loss(a, b, 0.2) if ssl == "simclr" else magma.vicreg_loss(a, b)
    torch.testing.assert_close(out[ssl], want)
    _, hidden = method.encoder.encode(method.encoder.embed(seen[:6]), hidden=True)
    features = [magma.image_features(layer) for layer in hidden]
    torch.testing.assert_close(out["manifold"], magma.manifold_loss(features[-1], features[-2]), rtol=1e-4, atol=1e-6)
    first = method.encoder.encode(method.encoder.embed(seen[:6]))[:, 0]
    torch.testing.assert_close(out["uniformity"], magma.uniformity_loss(first))


def test_each_view_has_batch_statistics_of_its_own():
    method, seen = tiny_magma(ssl="vicreg"), []
    method.projector.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    run(method)
    assert seen == [6, 6]


@pytest.mark.parametrize("ssl", ["simclr", "vicreg"])
def test_views_are_made_in_float32_under_autocast(ssl):
    method, images = tiny_magma(ssl=ssl, colour=0.5, blur=1.0), images_of(4, 20)
    strength = magma.JITTER[ssl] | {"blur": 1.0}
    strength |= {name: 0.5 * strength[name] for name in ("brightness", "contrast", "saturation", "hue")}
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        seen = method.view(images)
    torch.manual_seed(0)
    assert torch.equal(seen, magma.jitter(images, strength))


def test_projectors_have_the_widths_of_solo_learn():
    simclr = [
        layer for layer in tiny_magma(ssl="simclr", projector_dim=2048).projector if hasattr(layer, "out_features")
    ]
    vicreg = [
        layer for layer in tiny_magma(ssl="vicreg", projector_dim=2048).projector if hasattr(layer, "out_features")
    ]
    assert [layer.out_features for layer in simclr] == [2048, 256]
    assert [layer.out_features for layer in vicreg] == [2048, 2048, 2048]


def test_pictures_are_rows_in_range():
    for ssl in ("mae", "simclr"):
        method = tiny_magma(ssl=ssl)
        rows = method.pictures(images_of(5, 8))
        assert rows.shape == (5, len(method.captions), 3, 8, 8)
        torch.testing.assert_close(rows[:, 0], images_of(5, 8))
        assert rows.min() >= 0
        assert rows.max() <= 1


def test_captions_stand_over_what_they_name():
    """MAE's three pictures, or the image and two views of it, each with a draw of its own."""
    images = images_of(5, 8)
    mae, views = tiny_magma(), tiny_magma(ssl="simclr")
    assert mae.captions == ("image", "masked image", "reconstruction")
    assert views.captions == ("image", "view", "view") and views.views == 2
    for method, expected in ((mae, mae.autoencoder.pictures), (views, lambda x: [x, views.view(x), views.view(x)])):
        torch.manual_seed(3)
        rows = method.pictures(images)
        torch.manual_seed(3)
        expected = expected(images)
        expected = expected if torch.is_tensor(expected) else torch.stack(expected, dim=1)
        torch.testing.assert_close(rows, expected)
        assert not torch.allclose(rows[:, 1], rows[:, 2], atol=0.05)


def test_views_change_as_often_and_as_much_as_the_papers_say():
    """SimCLR, appendix A; VICReg, appendix C.1. --colour scales what a jitter does, --blur is a probability."""
    both = {"apply": 0.8, "grey": 0.2, "blur": 0.5}
    strengths = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "solarize": 0.0}
    assert magma.JITTER["simclr"] == both | strengths
    strengths = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "solarize": 0.1}
    assert magma.JITTER["vicreg"] == both | strengths


@pytest.mark.parametrize(
    ("name", "share"), [("apply", 0.8), ("apply", 0.3), ("grey", 0.2), ("solarize", 0.1), ("blur", 0.5)]
)
def test_a_share_of_the_views_is_changed(name, share):
    images = (0.2 + 0.6 * rand(1, 3, 4, 4)).expand(3000, -1, -1, -1)
    strength = STILL | {name: share} | ({"brightness": 0.2} if name == "apply" else {})
    out = magma.jitter(images, strength, generator(0))
    if name == "grey":
        out = out.var(dim=1).amax(dim=(1, 2)) < 1e-6
    else:
        out = (out - images).abs().amax(dim=(1, 2, 3)) > 1e-6
    assert float(out.float().mean()) == pytest.approx(share, abs=0.03)


def test_the_settings_reach_the_losses_and_the_parts():
    views = images_of(12, 8).view(6, 2, 3, 8, 8)
    for ssl, fields in (("simclr", {"temperature": 0.7}), ("vicreg", {"vicreg": (3.0, 5.0, 7.0)})):
        method = tiny_magma(ssl=ssl, **fields).eval()
        torch.manual_seed(0)
        found = method(views)[ssl]
        torch.manual_seed(0)
        seen = method.view(torch.cat([views[:, 0], views[:, 1]]))
        a, b = method.projector(method.encoder(seen)).chunk(2)
        slow = reference.contrastive_loss if ssl == "simclr" else reference.vicreg_loss
        torch.testing.assert_close(found, slow(a, b, *fields.values()), rtol=1e-4, atol=1e-5)
    method = tiny_magma(norm_pixels=False, mask_ratio=0.75, decoder_dim=24, decoder_depth=1, decoder_heads=3)
    assert (method.autoencoder.mask_ratio, method.autoencoder.norm_pixels) == (0.75, False)
    (block,) = method.autoencoder.decoder_blocks
    assert (block.heads, block.attn["proj"].in_features) == (3, 24)
    encoder = tiny_magma(heads=6, pool="cls").encoder
    assert (encoder.blocks[0].heads, encoder.pool, encoder.fields["pool"]) == (6, "cls", "cls")


def test_projectors_have_norms_between_their_layers_as_the_papers_say():
    """SimCLR: linear, ReLU, linear. VICReg: batch norm and ReLU behind the first two of three linear layers."""
    kinds = {"simclr": "Linear ReLU Linear", "vicreg": "Linear BatchNorm1d ReLU Linear BatchNorm1d ReLU Linear"}
    for ssl, layers in kinds.items():
        assert [type(layer).__name__ for layer in magma.projector(ssl, 8, 16)] == layers.split()


def test_a_masked_autoencoder_starts_as_maes_release():
    """Linear layers by Glorot and Bengio's uniform without bias, tokens with deviation 0.02, norms that add 1e-6."""
    torch.manual_seed(0)
    method = tiny_magma(decoder_dim=64, decoder_heads=4)
    linear = {name: m for name, m in method.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(linear) == 1 + 4 * 6 + 1 + 4 * 2 + 1  # patches, encoder, embedding, decoder, pixels
    for name, layer in linear.items():
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert 0.95 * bound < float(layer.weight.detach().abs().max()) <= bound, name
        assert float(layer.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05), name
        assert not layer.bias.detach().any(), name
    for token in (method.encoder.cls_token, method.autoencoder.mask_token):
        assert float(token.detach().std()) == pytest.approx(0.02, rel=0.25)
    assert {m.eps for m in method.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


def test_recipes_are_tables_4_and_5():
    def recipe(text):
        return read_flags(Config, RECIPES, text.split())

    rows = {  # Table 4: model, patch, epochs, batch, lr, e_st, crop
        "cifar100": ("vit_tiny", 4, 2000, 256, 1.5e-4, 60, 32),
        "tinyimagenet": ("vit_tiny", 8, 800, 512, 1e-3, 10, 64),
        "stl10": ("vit_tiny", 12, 800, 512, 3e-4, 10, 96),
        "imagenet100": ("vit_base", 16, 400, 256, 1.5e-4, 10, 224),
    }
    for data, row in rows.items():
        c = recipe(f"--data {data}")
        assert (c.model, c.patch, c.epochs, c.batch_size, c.base_lr, c.e_st, c.image_size) == row
        assert (c.mask_ratio, c.lam, c.e_dur, c.crop_min, c.flip, c.warmup_epochs) == (0.75, 1, 100, 0.08, 0.5, 10)
        assert (c.decoder_dim, c.decoder_depth, c.decoder_heads, c.weight_decay) == (512, 8, 16, 0.05)
        assert (c.betas, c.pool, c.uniformity, c.layers) == ((0.9, 0.95), "cls", 0.0, (-2, -1))
        assert c.warmup_lr == (0 if data == "imagenet100" else 3e-5)  # as released; the text has 3e-5 for all
        assert c.heads == (0 if data == "imagenet100" else 12)  # 0: ViT-B's own
        for ssl in ("simclr", "vicreg"):  # Table 5
            c = recipe(f"--data {data} --ssl {ssl}")
            assert (c.model, c.patch, c.batch_size, c.base_lr, c.e_st) == ("vit_tiny", row[1], 256, 1e-3, 10)
            assert (c.epochs, c.image_size) == (200 if data == "imagenet100" else 1000, row[6])
            assert (c.warmup_lr, c.heads, c.betas) == (3e-5, 3, (0.9, 0.999))
            assert (c.temperature, c.vicreg, c.projector_dim) == (0.2, (25.0, 25.0, 1.0), 2048)
            assert (c.blur, c.colour) == ((0.0, 0.5 if ssl == "simclr" else 1.0) if data == "cifar100" else (0.5, 1.0))
    assert recipe("--data a/folder").model == "vit_base"
    assert recipe("--data imagenet").e_st == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "vit_tny"}, "unknown --model 'vit_tny'; did you mean 'vit_tiny'"),
        ({"ssl": "moco"}, "unknown --ssl 'moco'; choose from mae, simclr, vicreg"),
        ({"laplacian": "none"}, "unknown --laplacian 'none'"),
        ({"layer_pairs": "some"}, "unknown --layer-pairs 'some'"),
        ({"layers": (3,)}, "give two or more different blocks from -6 to 5"),
        ({"layers": (-1, 5)}, "give two or more different blocks from -6 to 5"),
        ({"layers": (0, 6)}, "give two or more different blocks from -6 to 5"),
        ({"lam": -1.0}, "--lam -1.0 makes no sense; give 0 or more"),
        ({"shuffle_graph": True, "layer_pairs": "all"}, "--shuffle-graph does not go with --gather or --layer-pairs"),
        ({"shuffle_graph": True, "gather": True}, "--shuffle-graph does not go with --gather or --layer-pairs"),
        ({"gather_graph": False}, "--no-gather-graph says what --gather leaves out"),
        ({"temperature": 0.0}, "--temperature 0.0 makes no sense; give more than 0"),
        ({"kernel_factor": math.inf}, "--kernel-factor inf makes no sense"),
        ({"vicreg": (25.0, math.nan, 1.0)}, "--vicreg 25.0 nan 1.0 makes no sense; give three weights of 0 or more"),
        ({"blur": 7.0}, "--blur 7.0 is not a probability; give 0 to 1"),
        ({"image_size": 10}, "image size 10 x 10 is not a multiple of the patch size 4"),
    ],
)
def test_magma_refuses_settings_that_do_not_exist(fields, message):
    with pytest.raises(UserError, match=message):
        tiny_magma(**fields)
