"""common.py: patches, vision transformer, masked autoencoder, the parts of the loop, and what `fit` promises."""

import dataclasses
import re

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from make import autoencoder, fit_magma, generator, log_of, rand, seeds, shapes, vit, without_times

import magma
from common import (
    VIT_SIZES,
    MaskedAutoencoder,
    Method,
    Stepper,
    ViT,
    attend,
    decays,
    fit,
    gradient_if,
    learning_rate,
    mask_from_noise,
    patchify,
    random_mask,
    reconstruction_loss,
    sincos_positions,
    take,
    unpatchify,
)
from plumbing.errors import UserError
from plumbing.images import BatchPlan
from plumbing.runs import restore_run
from plumbing.settings import TrainConfig

# --- patches and positions -------------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), seeds)
def test_patchify_roundtrips_and_matches_naive_loop(batch, channels, rows, columns, patch, seed):
    images = rand(batch, channels, rows * patch, columns * patch, seed=seed)
    patches = patchify(images, patch)
    assert torch.equal(patches, reference.patchify(images, patch))
    assert torch.equal(unpatchify(patches, patch, rows * patch, columns * patch), images)


def test_patchify_rejects_a_patch_that_does_not_divide():
    with pytest.raises(ValueError, match="10 x 8 cannot be cut into patches of 4 x 4"):
        patchify(torch.zeros(1, 3, 10, 8), 4)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_sincos_positions_matches_naive_loop(height, width, quarter):
    """The fixed 2-D code of MAE (He et al. 2022)."""
    positions = sincos_positions(height, width, 4 * quarter)
    torch.testing.assert_close(positions.double(), reference.sincos_positions(height, width, 4 * quarter))


def test_sincos_positions_rejects_odd_widths():
    with pytest.raises(ValueError, match="divisible by 4, not 10"):
        sincos_positions(2, 2, 10)


@given(st.integers(1, 5), st.integers(1, 40), st.floats(0, 1), seeds)
def test_random_mask_has_exact_counts_in_each_row(batch, patches, ratio, seed):
    """He et al. 2022, section 3: a share of the patches, drawn without replacement."""
    mask = random_mask(batch, patches, ratio, generator(seed))
    assert mask.dtype == torch.bool
    assert mask.shape == (batch, patches)
    assert (mask.sum(dim=1) == round(ratio * patches)).all()


def test_mask_from_noise_hides_the_patches_with_the_largest_noise():
    mask = mask_from_noise(torch.tensor([[0.3, 0.9, 0.1, 0.5]]), 0.5)
    assert mask.tolist() == [[False, True, False, True]]


def test_random_mask_is_uniform_over_patches():
    """He et al. 2022, section 3: "following a uniform distribution"."""
    share = random_mask(4000, 16, 0.75, generator(0)).float().mean(dim=0)
    assert (share - 0.75).abs().max() < 0.04


# --- vision transformer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "known"),
    [("vit_tiny", 5_524_416), ("vit_small", 21_665_664), ("vit_base", 85_798_656), ("vit_large", 303_301_632)],
)
def test_vit_has_the_well_known_number_of_parameters(name, known):
    """The counts of timm's models without head. Theirs learn the positions, 197 a channel; ours are fixed."""
    with torch.device("meta"):
        model = ViT(224, 16, **VIT_SIZES[name])
    assert sum(p.numel() for p in model.parameters()) + 197 * model.dim == known


def test_vit_parameter_names_are_those_of_timm():
    names = {re.sub(r"blocks\.\d+", "blocks.0", name) for name in vit().state_dict()}
    block = {f"blocks.0.{layer}" for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")}
    layers = block | {"norm", "patch_embed.proj"}
    assert names == {"cls_token"} | {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


def test_vit_takes_images_that_are_not_square():
    model = vit(image_size=(8, 12))
    assert model.grid == (2, 3)
    assert model(rand(2, 3, 8, 12)).shape == (2, 16)


def test_vit_embed_equals_a_strided_convolution_plus_positions():
    model, images = vit(), rand(2, 3, 8, 8)
    weight = model.patch_embed["proj"].weight.unflatten(1, (4, 4, 3)).permute(0, 3, 1, 2)  # (D, C, p, q)
    tokens = F.conv2d(images, weight, stride=4).flatten(2).transpose(1, 2)
    positions = reference.sincos_positions(2, 2, 16).float()
    torch.testing.assert_close(model.embed(images), tokens + positions)


def test_vit_normalizes_with_the_statistics_it_carries():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    images = rand(2, 3, 8, 8)
    carried = vit(mean=mean, std=std)(images)
    by_hand = vit()((images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    torch.testing.assert_close(carried, by_hand)


def test_vit_pools_the_mean_of_the_patches_or_the_cls_token():
    images = rand(2, 3, 8, 8)
    encoded = vit().encode(vit().embed(images))
    torch.testing.assert_close(vit(pool="mean")(images), encoded[:, 1:].mean(dim=1))
    torch.testing.assert_close(vit(pool="cls")(images), encoded[:, 0])
    with pytest.raises(UserError, match="unknown pool 'max'"):
        vit(pool="max")


def test_vit_encode_returns_every_block_before_the_final_norm():
    model = vit()
    encoded, hidden = model.encode(model.embed(rand(2, 3, 8, 8)), hidden=True)
    assert len(hidden) == 2
    torch.testing.assert_close(model.norm(hidden[-1]), encoded)
    torch.testing.assert_close(model.blocks[1](hidden[0]), hidden[1])


def test_vit_encode_uses_the_attention_it_is_given():
    model, seen = vit(), []

    def no_attention(q, k, v):
        seen.append(q.shape)
        return v

    tokens = model.embed(rand(2, 3, 8, 8))
    moved = tokens.clone()
    moved[:, 0] += 1  # without attention a token cannot reach the others
    out, out_moved = model.encode(tokens, no_attention), model.encode(moved, no_attention)
    assert seen == [(2, 2, 5, 8)] * 4
    assert torch.equal(out[:, 2:], out_moved[:, 2:])
    assert not torch.equal(model.encode(tokens)[:, 2:], model.encode(moved)[:, 2:])


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), seeds)
def test_attend_matches_the_fused_kernel(batch, heads, tokens, width, seed):
    """Attention of Vaswani et al. 2017, Eq. 1."""
    q, k, v = torch.randn(3, batch, heads, tokens, width, generator=generator(seed), dtype=torch.float64)
    torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_short_rows_in_half_precision_have_a_softmax_in_float32():
    """Only there is it faster on CPUs; its gradient shows it, which is one of rounded weights otherwise."""
    for tokens, precise in ((17, True), (32, False)):
        q, k, v = torch.randn(3, 2, 3, tokens, 8, generator=generator(0)).bfloat16()
        q = q.requires_grad_()
        scores = q * 8**-0.5 @ k.transpose(-2, -1)
        want = (scores.float() if precise else scores).softmax(dim=-1).bfloat16() @ v
        (gradient,), (wanted,) = (torch.autograd.grad(x.float().sin().sum(), q) for x in (attend(q, k, v), want))
        assert torch.equal(gradient, wanted), tokens


def test_vit_rejects_sizes_that_do_not_divide():
    with pytest.raises(UserError, match="image size 10 x 10 is not a multiple of the patch size 4"):
        vit(image_size=10)
    for heads in (3, -1):
        with pytest.raises(UserError, match="a (width|transformer) of (width )?16"):
            vit(heads=heads)
    with pytest.raises(UserError, match="patch 0 cannot be built"):
        vit(patch=0)
    with pytest.raises(UserError, match="a decoder of width -8, 1 blocks, 2 heads cannot be built"):
        MaskedAutoencoder(vit(), -8, 1, 2)


# --- masked autoencoder ----------------------------------------------------------------------------------------------


def test_autoencoder_never_sees_masked_pixels():
    """He et al. 2022, section 3: the encoder is given the visible patches alone."""
    model, images = autoencoder(), rand(2, 3, 8, 8)
    mask = torch.tensor([[True, False, True, False], [False, True, True, False]])
    other = unpatchify(torch.where(mask[..., None], 0.5, patchify(images, 4)), 4, 8, 8)  # the masked pixels are grey
    assert torch.equal(model(images, mask).prediction, model(other, mask).prediction)
    assert not torch.equal(model(images, mask).prediction, model(other, ~mask).prediction)


def test_autoencoder_puts_visible_tokens_back_in_their_places():
    """Without decoder blocks a patch is predicted from its own token, so the places can be read off."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(vit(), decoder_dim=8, decoder_depth=0, decoder_heads=2, mask_ratio=0.5)
    mask = torch.tensor([[True, False, True, False], [False, True, True, False]])
    out = model(rand(2, 3, 8, 8), mask)
    for b in range(2):
        tokens = iter(out.encoded[b, 1:])
        for n in range(4):
            token = model.mask_token[0, 0] if mask[b, n] else model.decoder_embed(next(tokens))
            want = model.decoder_head(model.decoder_norm(token + model.decoder_positions[n]))
            torch.testing.assert_close(out.prediction[b, n], want)


@pytest.mark.parametrize("learned", [False, True])
def test_visible_tokens_and_their_gradients_are_those_of_the_whole_image(learned):
    """Only visible patches are embedded; He et al. 2022 embed all and then choose."""
    model = MaskedAutoencoder(vit(learned_positions=learned), 8, 1, 2, mask_ratio=0.5).double()
    images = rand(2, 3, 8, 8).double()
    mask = torch.tensor([[True, False, True, False], [False, True, True, False]])
    encoder, visible = model.encoder, torch.tensor([[1, 3], [0, 3]])
    whole = encoder.encode(take(encoder.embed(images), visible))
    outs, parameters = (model(images, mask).encoded, whole), [*encoder.parameters()]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*[torch.autograd.grad(out.sin().sum(), parameters) for out in outs])


def test_autoencoder_draws_masks_of_its_ratio():
    assert (autoencoder()(rand(3, 3, 8, 8)).mask.sum(dim=1) == 2).all()
    for ratio in (0.01, 0.99, 2.0, float("nan")):
        with pytest.raises(UserError, match=f"a mask ratio of {ratio} leaves no patch masked"):
            MaskedAutoencoder(vit(), mask_ratio=ratio)


def test_autoencoder_rejects_masks_of_different_sizes():
    mask = torch.tensor([[True, False, True, False], [False, False, True, False]])
    with pytest.raises(ValueError, match="must hide the same number of patches"):
        autoencoder()(rand(2, 3, 8, 8), mask)


@given(st.integers(1, 3), st.integers(2, 6), st.integers(1, 4), seeds)
def test_reconstruction_loss_matches_naive_loop_and_ignores_visible_patches(batch, patches, size, seed):
    """He et al. 2022, section 3: the mean squared error on masked patches only."""
    prediction, target, noise = torch.randn(3, batch, patches, size, generator=generator(seed), dtype=torch.float64)
    mask = random_mask(batch, patches, 0.5, generator(seed))
    loss = reconstruction_loss(prediction, target, mask)
    want = reference.reconstruction_loss(prediction, target, mask)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)  # float64 stays float64
    assert reconstruction_loss(prediction.bfloat16(), target.bfloat16(), mask).dtype == torch.float32
    elsewhere = prediction + noise * ~mask[..., None]
    assert torch.equal(reconstruction_loss(elsewhere, target, mask), loss)


def test_autoencoder_target_is_normalized_patch_by_patch():
    """He et al. 2022, section 3: pixels normalised by the mean and deviation of their own patch."""
    model = autoencoder(mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4))
    images = rand(2, 3, 8, 8)
    target = model.target(images)
    torch.testing.assert_close(target.mean(dim=-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.std(dim=-1), torch.ones(2, 4), atol=1e-4, rtol=0)
    model.norm_pixels = False
    torch.testing.assert_close(model.target(images), patchify(model.encoder.normalize(images), 4))


def test_autoencoder_reaches_every_parameter():
    model = autoencoder()
    out = model(rand(2, 3, 8, 8))
    reconstruction_loss(out.prediction, out.target, out.mask).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_autoencoder_pictures_keep_visible_pixels_and_draw_a_perfect_prediction_as_the_image():
    model, images = autoencoder(mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4)), rand(3, 3, 8, 8)
    torch.manual_seed(1)
    rows = model.pictures(images)
    assert rows.shape == (3, 3, 3, 8, 8)
    torch.testing.assert_close(rows[:, 0], images)
    masked = (rows[:, 1] - torch.tensor((0.3, 0.4, 0.5)).view(3, 1, 1)).abs().amax(dim=1) < 1e-6  # the mean colour
    assert masked.sum() == 3 * 2 * 16
    torch.testing.assert_close(rows[:, 2].permute(0, 2, 3, 1)[~masked], images.permute(0, 2, 3, 1)[~masked])
    model.decode = lambda encoded, visible: model.target(images)
    torch.testing.assert_close(model.pictures(images)[:, 2], images, atol=1e-4, rtol=0)


# --- parts of the loop -----------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(0, 4), st.integers(1, 6))
def test_learning_rate_rises_linearly_and_falls_as_a_cosine(steps, warmup, rest):
    """He et al. 2022, Table 8: warm-up, cosine decay, and lr = base_lr x batch size / 256."""
    config = TrainConfig(
        base_lr=0.1, batch_size=512, warmup_epochs=warmup, epochs=warmup + rest, warmup_lr=0.01 * bool(warmup)
    )
    rates = [learning_rate(step, steps, config) for step in range((warmup + rest) * steps)]
    peak = warmup * steps
    assert rates[peak] == pytest.approx(0.2)  # 0.1 * 512 / 256
    assert rates[: peak + 1] == pytest.approx(np.linspace(rates[0], 0.2, peak + 1))
    total = len(rates) - peak
    cosine = [0.1 * (1 + np.cos(np.pi * i / total)) for i in range(total)]
    assert rates[peak:] == pytest.approx(cosine)
    if warmup:
        assert rates[0] == 0.01


def test_learning_rate_falls_tenfold_at_each_milestone():
    config = TrainConfig(epochs=10, base_lr=1.0, batch_size=256, warmup_epochs=1, milestones=(6, 8))
    rates = [learning_rate(step, 2, config) for step in range(20)]
    assert rates == pytest.approx([0, 0.5] + [1.0] * 10 + [0.1] * 4 + [0.01] * 4)


@pytest.mark.parametrize("wanted", [0.0, 0.5, True])
def test_gradient_if_measures_a_term_that_is_off_without_its_gradient(wanted):
    x = torch.ones(2, requires_grad=True)
    with gradient_if(wanted):
        assert (2 * x).requires_grad == bool(wanted)
    with torch.no_grad(), gradient_if(wanted):
        assert not (2 * x).requires_grad


class Regression(Method):
    """The smallest method: fit the mean of an image by a linear layer."""

    name = "regression"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = torch.nn.Linear(12, 3)
        self.scale_token = torch.nn.Parameter(torch.ones(1, 1, 3))

    def forward(self, images, labels=None):
        error = (self.encoder(images.flatten(1)) * self.scale_token[0] - images.mean(dim=(2, 3))).square().mean()
        return {"loss": error, "error": error}


def step_once(config, images, method=None):
    method = method or Regression()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    stepper = Stepper(optimizer, config, torch.device("cpu"))
    parts = list(zip(images.chunk(config.accumulate), images.chunk(config.accumulate), strict=True))
    logged = method.update(method, parts, stepper)
    return torch.cat([p.detach().flatten() for p in method.parameters()]), logged


def test_optimizer_decays_matrices_only():
    """No decay on biases, norms and tokens, as in the code of MAE."""
    config = TrainConfig(weight_decay=0.3, betas=(0.8, 0.9))
    groups = Regression().optimizer(config).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert [[tuple(p.shape) for p in group["params"]] for group in groups] == [[(3, 12)], [(1, 1, 3), (3,)]]
    assert groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(("on", "decayed"), [("matrices", 1), ("tokens", 2), ("all", 3)])
def test_decay_may_act_on_tokens_or_on_all(on, decayed):
    """MAE's code leaves out biases and norms alone, MAGMA's nothing."""
    decaying, plain = Regression().optimizer(TrainConfig(decay_on=on)).param_groups
    shapes = [(3, 12), (1, 1, 3), (3,)]  # weight, token, bias
    assert {tuple(p.shape) for p in decaying["params"]} == set(shapes[:decayed])
    assert {tuple(p.shape) for p in plain["params"]} == set(shapes[decayed:])


@pytest.mark.parametrize("on", ["matrices", "tokens", "all"])
def test_learned_positions_decay_as_tokens_do(on):
    encoder = vit(learned_positions=True)
    found = {name: decays(name, p, on) for name, p in encoder.named_parameters()}
    assert found["positions"] == found["cls_token"] == (on != "matrices")


def test_learned_positions_start_as_timms_and_change_no_other_weight():
    """A truncated normal of deviation 0.02; all other weights are drawn as without them."""
    encoder, plain = vit(image_size=32, learned_positions=True), vit(image_size=32)
    assert isinstance(encoder.positions, torch.nn.Parameter) and encoder.positions.shape == plain.positions.shape
    values = encoder.positions.detach()
    assert float(values.std()) == pytest.approx(0.02, rel=0.1) and abs(float(values.mean())) < 0.002
    torch.testing.assert_close(
        dict(plain.named_parameters()),
        {name: p for name, p in encoder.named_parameters() if name != "positions"},
        rtol=0,
        atol=0,
    )
    assert "learned_positions" not in plain.fields  # so files of these are as they always were
    gradient = torch.autograd.grad(encoder(rand(2, 3, 32, 32)).sum(), encoder.positions)[0]
    assert (gradient.norm(dim=1) > 0).all()


def test_update_accumulates_the_gradient_of_the_whole_batch():
    images = rand(8, 3, 2, 2, dtype=torch.float32)
    whole, logged = step_once(TrainConfig(amp="off"), images)
    parts, logged_parts = step_once(TrainConfig(amp="off", accumulate=4), images)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(logged_parts["loss"], logged["loss"])


def test_update_clips_the_true_gradient_under_loss_scaling():
    """SGD moves by lr * clip exactly, however the loss was scaled."""
    start = torch.cat([p.detach().flatten() for p in Regression().parameters()])
    for amp in ("off", "fp16"):
        moved, _ = step_once(TrainConfig(amp=amp, clip=0.01), rand(8, 3, 2, 2))
        assert (moved - start).norm().item() == pytest.approx(0.1 * 0.01, rel=1e-2)


def test_a_resumed_run_goes_on_with_its_loss_scale(tmp_path):
    config, method = TrainConfig(amp="fp16"), Regression()
    first, again = (Stepper(method.optimizer(config), config, torch.device("cpu")) for _ in range(2))
    state = {"weights": method.state_dict(), "optimizer": first.optimizer.state_dict(), "sums": {}, "count": 0}
    state["scaler"] = first.scaler.state_dict() | {"scale": 8.0}
    torch.save(state | {"step": 3}, tmp_path / "last.pt")
    restore_run(method, again, tmp_path, 3)
    assert again.scaler.get_scale() == 8.0

    def too_little(state):
        raise torch.OutOfMemoryError("CUDA out of memory")

    again.optimizer.load_state_dict = too_little
    with pytest.raises(torch.OutOfMemoryError):  # no fault of the checkpoint: the command says what to do
        restore_run(method, again, tmp_path, 3)


def test_fp16_scaling_leaves_the_step_as_it_is():
    plain, _ = step_once(TrainConfig(amp="off"), rand(8, 3, 2, 2))
    scaled, _ = step_once(TrainConfig(amp="fp16"), rand(8, 3, 2, 2))
    torch.testing.assert_close(scaled, plain, atol=1e-3, rtol=0)


def test_stepper_sets_the_rate_of_a_step_in_every_group():
    config = TrainConfig(epochs=4, warmup_epochs=1, base_lr=0.1)
    plain, scaled = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [plain]}, {"params": [scaled], "lr_scale": 3.0}], lr=9.0)
    stepper = Stepper(optimizer, config, torch.device("cpu"), 5)
    for step in (0, 3, 5, 12, 19):
        rate = learning_rate(step, 5, config)
        stepper.set_rate(step)
        assert stepper.rate(step) == rate
        assert [group["lr"] for group in optimizer.param_groups] == [rate, pytest.approx(3 * rate)]


@pytest.mark.parametrize(("amp", "dtype"), [("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_stepper_computes_in_the_precision_that_amp_names(amp, dtype):
    method = Regression()
    stepper = Stepper(method.optimizer(TrainConfig()), TrainConfig(amp=amp), torch.device("cpu"))
    with stepper.autocast():
        assert method.encoder(rand(2, 12)).dtype == dtype


def test_stepper_skips_a_step_whose_scaled_gradient_overflows():
    """Loss scaling of fp16: the weights stay, the scale is halved, and the gradient does not reach the next step."""
    method = Regression()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    stepper = Stepper(optimizer, TrainConfig(amp="fp16"), torch.device("cpu"))
    before, scale = [p.detach().clone() for p in method.parameters()], stepper.scaler.get_scale()
    stepper.backward(method(rand(4, 3, 2, 2))["loss"] * 1e38)
    stepper.step()
    assert all(torch.equal(p, old) for p, old in zip(method.parameters(), before, strict=True))
    assert stepper.scaler.get_scale() == scale / 2 < scale
    assert all(p.grad is None for p in method.parameters())


# --- the contract of fit ---------------------------------------------------------------------------------------------


def test_the_loop_scales_the_learning_rate_of_each_group(tmp_path):
    seen = []

    class Scaled(magma.Magma):
        def optimizer(self, config):
            optimizer = super().optimizer(config)
            optimizer.param_groups[1]["lr_scale"] = 3.0
            return optimizer

        def update(self, model, batches, stepper):
            seen.append([group["lr"] for group in stepper.optimizer.param_groups])
            return super().update(model, batches, stepper)

    fit_magma(tmp_path / "run", "--probe-every", "0", method_class=Scaled)
    assert seen[-1][0] > 0
    for plain, scaled in seen:
        assert scaled == pytest.approx(3 * plain)


def test_the_same_seed_gives_the_same_log_and_another_seed_another(tmp_path):
    logs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit_magma(tmp_path / name, "--seed", str(seed))
        logs.append(without_times(log_of(tmp_path / name)))
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


def test_each_step_of_each_process_has_draws_of_its_own(tmp_path, monkeypatch):
    class Drawing(magma.Magma):
        def update(self, model, batches, stepper):
            drawn.append(float(torch.rand(())))
            return super().update(model, batches, stepper)

    drawn = []
    fit_magma(tmp_path / "run", "--probe-every", "0", method_class=Drawing)
    assert len(set(drawn)) == len(drawn) == 20
    monkeypatch.setattr("common.rank", lambda: 1)
    fit_magma(tmp_path / "other", "--probe-every", "0", method_class=Drawing)
    assert len(set(drawn)) == len(drawn) == 40


class Noting(Regression):
    """Notes what `fit` calls."""

    def __init__(self, views=1):
        super().__init__()
        self.views, self.calls, self.rates = views, [], []

    def start_epoch(self, epoch):
        self.calls.append(f"epoch {epoch}")

    def update(self, model, batches, stepper):
        assert model is self and self.training
        self.calls.append([(tuple(images.shape), labels.tolist()) for images, labels in batches])
        self.rates.append(stepper.optimizer.param_groups[0]["lr"])
        return {"loss": self.scale_token.detach().sum()}


def numbered(count=8):
    """Pictures of 2 x 2 whose label is their number."""
    return dataclasses.replace(shapes(count, 2), labels=torch.arange(count), classes=list("abcdefgh"))


def noted(out, views=1, **fields):
    config = {"image_size": 2, "epochs": 2, "batch_size": 4, "probe_every": 0, "warmup_epochs": 1, "amp": "off"}
    config, method = TrainConfig(**config | {"out": str(out)} | fields), Noting(views).eval()  # `fit` trains it
    fit(method, numbered(), numbered(), config)
    return config, method


@pytest.mark.parametrize("views", [1, 3])
def test_fit_hands_the_parts_of_each_batch_of_the_plan_to_the_method(views, tmp_path):
    config, method = noted(tmp_path / "run", views, accumulate=2)
    shape = (2, 3, 2, 2) if views == 1 else (2, views, 3, 2, 2)
    steps = [[(shape, part.tolist()) for part in batch.chunk(2)] for _, batch in BatchPlan(8, config).after(0)]
    assert method.calls == ["epoch 0", *steps[:2], "epoch 1", *steps[2:]]
    assert method.rates == [learning_rate(step, 2, config) for step in range(4)]


def test_fit_takes_the_batches_of_a_plan_of_the_methods_own(tmp_path, monkeypatch):
    class Backwards(BatchPlan):
        def draw(self, epoch):
            return [torch.tensor([[7 - step, step]]) for step in range(len(self))]

    monkeypatch.setattr(Noting, "plan", lambda self, images, config: Backwards(images, config))
    _, method = noted(tmp_path / "run", batch_size=2, epochs=1)
    assert [labels for call in method.calls[1:] for _, labels in call] == [[7, 0], [6, 1], [5, 2], [4, 3]]


def test_fit_starts_the_epoch_that_a_resumed_run_is_in(tmp_path, monkeypatch):
    _, whole = noted(tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Noting, "start_epoch", lambda self, epoch: interrupt() if epoch else None)
        noted(tmp_path / "cut")
    _, method = noted(tmp_path / "cut", resume=True)
    assert method.calls == whole.calls[3:]
    assert method.rates == whole.rates[2:]


def interrupt():
    raise KeyboardInterrupt


class Refusing(Regression):
    """A method of which one part says that the settings do not fit."""

    def __init__(self, part):
        super().__init__()
        setattr(self, part, self.refuse)

    def refuse(self, *_):
        raise UserError("it does not fit")


def test_fit_refuses_what_cannot_run_before_it_makes_a_folder(tmp_path):
    out = tmp_path / "run"
    config = TrainConfig(image_size=2, epochs=2, batch_size=4, probe_every=0, out=str(out))
    late, mistyped = dataclasses.replace(config), dataclasses.replace(config)
    late.batch_size, mistyped.epochs = 9, 0  # after they were checked
    tries = [
        (Regression(), late, "a batch of 9 is larger than the data set of 8"),
        (Regression(), mistyped, "--epochs 0"),
    ]
    tries += [(Refusing(part), config, "it does not fit") for part in ("plan", "optimizer")]
    for method, wrong, message in tries:
        with pytest.raises(UserError, match=message):
            fit(method, numbered(), numbered(), wrong)
        assert not out.exists()
    fit(Regression(), numbered(), numbered(), config)  # and the folder is not taken


def test_a_method_without_forward_says_so():
    with pytest.raises(TypeError, match="Method has no forward"):
        Method()(rand(1, 3, 2, 2))
