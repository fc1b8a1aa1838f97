"""MLO-MAE: masks, weighted loss, second derivatives, the hypergradient, the three levels."""

import functools
import itertools
import math

import processes
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from make import LevelRecorder, generator, rand, randn, seeds, shapes, tiny_levels, vit, without_times
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
import mlo_mae
import plumbing.images
from mlo_mae import Config, LevelPlan, MaskingNetwork
from plumbing.encoders import save_encoder
from plumbing.errors import UserError
from plumbing.run_files import read_log
from plumbing.settings import choices_of, field_types, read_flags

OBJECTIVES = choices_of(field_types(Config)["objective"])


def batch_of(method, levels, seed=0, dtype=torch.float32):
    """Images and labels of a cycle: (levels * B, 3, 16, 16) and (levels * B,)."""
    count = levels * method.config.batch_size
    images = rand(count, 3, 16, 16, seed=seed, dtype=dtype)
    return images, torch.randint(10, (count,), generator=generator(seed))


def parts_of(batch, levels):
    """A batch of `batch_of` as (images, labels) of each level."""
    return list(zip(*(x.chunk(levels) for x in batch), strict=True))


def stepper_of(method):
    return common.Stepper(method.optimizer(method.config), method.config, torch.device("cpu"))


# --- masks and their loss ---------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 20), st.floats(0, 1), st.booleans(), seeds)
def test_the_mask_is_the_top_and_of_equals_the_first(batch, patches, ratio, ties, seed):
    """Section 3.2: the round(r N) patches of the highest probability, whatever their order."""
    probability = rand(batch, patches, seed=seed)
    probability = (probability * 3).round() / 3 if ties else probability
    mask = mlo_mae.top_mask(probability, ratio)
    count = round(ratio * patches)
    for row, chosen in zip(probability.tolist(), mask.tolist(), strict=True):
        order = sorted(range(patches), key=lambda i: (-row[i], i))
        assert [i for i in range(patches) if chosen[i]] == sorted(order[:count])
    if not ties:
        order = torch.randperm(patches, generator=generator(seed))
        assert torch.equal(mlo_mae.top_mask(probability[:, order], ratio), mask[:, order])


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.sampled_from(["mean", "sum"]), seeds)
def test_weighted_loss_matches_the_loop_of_eq_1(batch, patches, pixels, normalization, seed):
    """Eq. 1; with all probabilities 1 it is MAE's loss."""
    prediction, target = (randn(batch, patches, pixels, seed=seed + i, dtype=torch.float32) for i in range(2))
    probability = rand(batch, patches, seed=seed)
    mask = mlo_mae.top_mask(rand(batch, patches, seed=seed + 1), 0.7)
    if not mask.any():
        return
    total = 0.0
    for b, n in itertools.product(range(batch), range(patches)):
        if mask[b, n]:
            total += float(probability[b, n]) * float((prediction[b, n] - target[b, n]).square().mean())
    expected = total / (batch if normalization == "sum" else int(mask.sum()))
    found = mlo_mae.weighted_reconstruction_loss(prediction, target, mask, probability, normalization)
    assert float(found) == pytest.approx(expected, rel=1e-4)
    if normalization == "mean":
        ones = mlo_mae.weighted_reconstruction_loss(prediction, target, mask, torch.ones_like(probability))
        torch.testing.assert_close(ones, common.reconstruction_loss(prediction, target, mask))


@given(st.integers(1, 3), st.integers(2, 8), st.floats(0.2, 0.9), seeds)
def test_soft_selections_have_the_values_of_the_mask_and_their_own_gradients(batch, patches, ratio, seed):
    """App. A.4: the identity, or SoftSort's slow formula, stands in for the derivative of the selection."""
    probability = rand(batch, patches, seed=seed, dtype=torch.float64).requires_grad_()
    weights = randn(batch, patches, seed=seed)
    hard = mlo_mae.top_mask(probability, ratio)
    gradients = {}
    for kind in ("weight", "straight_through", "softsort"):
        found = mlo_mae.soft_selection(probability, ratio, kind)
        torch.testing.assert_close(found.detach(), hard.double())
        if kind == "weight":
            assert not found.requires_grad
            continue
        if found.requires_grad:
            (gradients[kind],) = torch.autograd.grad((found * weights).sum(), probability)
    torch.testing.assert_close(gradients["straight_through"], weights)
    expected = reference.softsort(probability.detach(), round(ratio * patches), 0.1, weights)
    torch.testing.assert_close(gradients["softsort"], expected, rtol=1e-4, atol=1e-5)


def test_the_temperature_of_softsort_reaches_it():
    method = tiny_levels(mask_gradient="softsort", temperature=1.0).double()
    tokens = randn(3, 16, 16, seed=1)
    weights, probability = randn(3, 16, seed=2), method.masking(tokens).detach()
    mask, learned = method.choose(tokens)
    (found,) = torch.autograd.grad((mask * weights).sum(), learned)
    expected = reference.softsort(probability, round(method.ratio * 16), 1.0, weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_number_of_masked_patches_is_no_function_of_the_mask_to_the_gradient():
    """Eq. 1's mean: only which patches count has a gradient, not how many."""
    prediction, target, probability = randn(3, 5, 4, seed=1), randn(3, 5, 4, seed=2), rand(3, 5, seed=3).double()
    mask = (rand(3, 5, seed=4) > 0.5).double().requires_grad_()
    loss = mlo_mae.weighted_reconstruction_loss(prediction, target, mask, probability)
    expected = probability * (prediction - target).square().mean(dim=2) / mask.detach().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, mask)[0], expected)


@pytest.mark.parametrize("kind", ["weight", "straight_through", "softsort"])
def test_soft_selections_act_on_the_visible_tokens_too(kind):
    """Through the weights of Eq. 1 no gradient reaches the prediction; through a soft selection one does (App. A.4)."""
    method = tiny_levels(mask_gradient=kind)
    images, _ = batch_of(method, 1)
    prediction = method.reconstruct(images)[0]
    (gradient,) = torch.autograd.grad(prediction.square().sum(), method.masking.fc2.bias, allow_unused=True)
    assert (gradient is None) if kind == "weight" else (gradient.abs().max() > 1e-6)


def test_masking_network_is_that_of_table_11():
    """Section 3.3 and Table 11: linear to 512, ReLU, linear, sigmoid."""
    torch.manual_seed(0)
    network = MaskingNetwork(6, 4).double()
    assert network.fc1.weight.shape == (512, 24) and network.fc2.weight.shape == (6, 512)
    tokens = randn(3, 6, 4)
    hidden = (tokens.reshape(3, 24) @ network.fc1.weight.T + network.fc1.bias).clamp_min(0)
    expected = 1 / (1 + (-(hidden @ network.fc2.weight.T + network.fc2.bias)).exp())
    torch.testing.assert_close(network(tokens), expected)


# --- second derivatives and the hypergradient ------------------------------------------------------------------------


def toy(seed=0):
    """Three smooth losses of small vectors, and their parameters: encoder, head, masking."""
    a, b, c, d = (randn(3, 3, seed=seed + i) for i in range(4))
    target, goal = randn(3, seed=seed + 5), randn(3, seed=seed + 6)

    def level_1(encoder, masking):
        return (masking["t"].sigmoid() * (a @ encoder["e"].tanh() - target).square()).sum()

    def level_2(encoder, head):
        return (b @ encoder["e"] * head["c"] - c @ head["c"].sin()).square().sum()

    def level_3(encoder, head):
        return (d @ encoder["e"] + head["c"].tanh() - goal).square().sum()

    encoder, head, masking = ({name: randn(3, seed=seed + 7 + i)} for i, name in enumerate("ect"))
    return (level_1, level_2, level_3), encoder, head, masking


def descend(loss, at, other, rate, first=True):
    gradient = torch.func.grad(lambda x: loss(x, other) if first else loss(other, x))(at)
    return {name: value - rate * gradient[name] for name, value in at.items()}


def unrolled(losses, encoder, head, masking, lr_encoder, lr_head, cut=""):
    """Level III's loss after one gradient step of each level below; `cut` blocks one of the two ways to it."""
    after = descend(losses[0], encoder, masking, lr_encoder)
    fixed = descend(losses[0], encoder, {name: value.detach() for name, value in masking.items()}, lr_encoder)
    seen_by_head = fixed if cut == "head" else after
    last = descend(losses[1], head, seen_by_head, lr_head, first=False)
    return losses[2](fixed if cut == "encoder" else after, last)


@given(seeds, st.floats(0.05, 0.5), st.floats(0.05, 0.5))
def test_the_hypergradient_is_the_derivative_of_the_unrolled_procedure(seed, lr_encoder, lr_head):
    """Eq. 8 to 11, against autograd through the whole procedure and against a difference quotient of it."""
    losses, encoder, head, masking = toy(seed % 1000)
    after = descend(losses[0], encoder, masking, lr_encoder)
    last = descend(losses[1], head, after, lr_head, first=False)
    found = {}
    for paths, cut in ((("head", "encoder"), ""), (("head",), "encoder"), (("encoder",), "head")):
        gradient, loss = mlo_mae.hypergradient(
            *losses, (encoder, after), (head, last), masking, lr_encoder, lr_head, paths=paths
        )
        found[cut] = gradient["t"]
        torch.testing.assert_close(loss, losses[2](after, last))
        t = masking["t"].clone().requires_grad_()
        value = unrolled(losses, encoder, head, {"t": t}, lr_encoder, lr_head, cut)
        torch.testing.assert_close(found[cut], torch.autograd.grad(value, t)[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[""], found["head"] + found["encoder"])
    for i in range(3):
        shift = torch.zeros(3, dtype=torch.float64)
        shift[i] = 1e-5
        ends = [unrolled(losses, encoder, head, {"t": masking["t"] + s * shift}, lr_encoder, lr_head) for s in (1, -1)]
        assert float(found[""][i]) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-7)


def test_without_learning_rates_it_is_the_authors_reading():
    """Eq. 9 to 11 without their learning rates, with whole matrices of second derivatives."""
    losses, encoder, head, masking = toy()
    after, last = descend(losses[0], encoder, masking, 0.1), {"c": head["c"] + 0.3}
    by_encoder, by_head = torch.func.grad(losses[2], argnums=(0, 1))(after, last)
    matrix_2 = torch.func.jacrev(lambda e: torch.func.grad(losses[1], argnums=1)({"e": e}, head)["c"])(after["e"])
    matrix_1 = torch.func.jacrev(lambda t: torch.func.grad(losses[0])(encoder, {"t": t})["e"])(masking["t"])
    expected = -matrix_1.T @ (by_encoder["e"] - matrix_2.T @ by_head["c"])
    found, _ = mlo_mae.hypergradient(*losses, (encoder, after), (head, last), masking)
    torch.testing.assert_close(found["t"], expected)


def adamw_problem(seed):
    """The toy, where AdamW takes the steps: losses, parameters, its states before them, learning rates and options."""
    losses, encoder, head, masking = toy(seed)
    states = [
        {name: (randn(3, seed=seed + i), rand(3, seed=seed + i, dtype=torch.float64), 1 + (seed + 3 * i) % 40)}
        for i, name in enumerate("ec")
    ]
    states[1]["c"] = (torch.zeros(3), torch.zeros(3), 1) if seed % 3 == 0 else states[1]["c"]  # the head's first step
    options = {"betas": (0.9, 0.95 if seed % 2 else 0.999), "eps": 1e-8 if seed % 5 else 1e-2}
    return losses, encoder, head, masking, states, (0.1, 0.2), options


def rates_after(losses, encoder, head, masking, states, lrs, options):
    """torch's own AdamW takes the steps of levels I and II: the weights after each, and `adamw_derivative` of each."""
    rates, weights = [], [encoder, head]
    for level in (0, 1):
        (name,), seen = weights[level], (weights[0], masking if level == 0 else head)
        gradient = torch.func.grad(losses[level], argnums=level)(*seen)[name]
        parameter = torch.nn.Parameter(weights[level][name].clone())
        optimizer = torch.optim.AdamW([parameter], lr=lrs[level], weight_decay=0.3, **options)
        m, v, step = states[level][name]
        before = {"exp_avg": m.double().clone(), "exp_avg_sq": v.double().clone(), "step": torch.tensor(step - 1.0)}
        optimizer.state[parameter], parameter.grad = before, gradient
        optimizer.step()
        after = optimizer.state[parameter]
        moments = (after["exp_avg"], after["exp_avg_sq"], after["step"])
        rates.append({name: mlo_mae.adamw_derivative(gradient, *moments, lrs[level], **options)})
        weights[level] = {name: parameter.detach()}
    return weights, rates


@pytest.mark.parametrize("seed", range(6))
def test_through_adamw_it_is_the_derivative_of_the_unrolled_cycle(seed):
    """Eq. 8 to 11 where torch's AdamW takes the steps; where the head takes its first one, nothing was averaged yet."""
    losses, encoder, head, masking, states, lrs, options = problem = adamw_problem(seed)
    (after, last), rates = rates_after(*problem)
    t = masking["t"].clone().requires_grad_()
    value, *weights = reference.adamw_cycle(losses, encoder, head, [{"t": t}], states, lrs, decay=0.3, **options)
    torch.testing.assert_close([weights[0]["e"], weights[1]["c"]], [after["e"], last["c"]], rtol=1e-10, atol=1e-12)
    (true,) = torch.autograd.grad(value, t)
    found, loss = mlo_mae.hypergradient(*losses, (encoder, after), (head, last), masking, *rates)
    torch.testing.assert_close(found["t"], true, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss, value)


def test_with_adamw_below_the_formula_of_plain_steps_points_elsewhere():
    """Learning rates stand for a step that grows with its gradient; AdamW's hardly does."""
    losses, encoder, head, masking, _, lrs, _ = problem = adamw_problem(1)
    (after, last), rates = rates_after(*problem)
    rest = (*losses, (encoder, after), (head, last), masking)
    plain, true = (mlo_mae.hypergradient(*rest, *x)[0]["t"] for x in (lrs, rates))
    assert F.cosine_similarity(plain, true, dim=0) < 0.8


def test_adamws_derivative_where_a_gradient_is_zero():
    """d step / d g = lr share / eps at a gradient of 0 after none but such; elsewhere as by a difference of steps."""
    options = {"betas": (0.9, 0.95), "eps": 1e-3}
    gradient = torch.tensor([0.0, 0.0, 1e-5, -0.3, 2.0], dtype=torch.float64)
    m = torch.tensor([0.0, 0.1, 0.0, 0.2, 0.1], dtype=torch.float64)
    v = torch.tensor([0.0, 0.2, 0.0, 0.01, 1e-6], dtype=torch.float64)

    def step(gradient):
        return reference.adamw_step(torch.zeros(5, dtype=torch.float64), gradient, m, v, 4, 0.1, **options)

    _, exp_avg, exp_avg_sq = step(gradient)
    found = mlo_mae.adamw_derivative(gradient, exp_avg, exp_avg_sq, torch.tensor(4.0), 0.1, **options)
    slope = (step(gradient - 1e-9)[0] - step(gradient + 1e-9)[0]) / 2e-9
    torch.testing.assert_close(found, slope, rtol=1e-4, atol=1e-6)
    assert float(found[0]) == pytest.approx(0.1 * 0.1 / (1 - 0.9**4) / 1e-3)
    assert float(found[-1]) < 0  # a larger gradient can mean a shorter step: v grows by it too


def test_differences_err_by_the_square_of_their_length():
    """Eq. 12, bi-directional: half the radius, a quarter of the error."""
    losses, encoder, head, masking = toy(3)
    after = descend(losses[0], encoder, masking, 0.1)
    last = descend(losses[1], head, after, 0.1, first=False)
    rest = ((encoder, after), (head, last), masking, 0.1, 0.1)
    exact = mlo_mae.hypergradient(*losses, *rest)[0]["t"]
    errors = []
    for radius in (0.2, 0.1, 0.05, 0.025):
        found = mlo_mae.hypergradient(*losses, *rest, method="finite_difference", radius=radius)[0]["t"]
        errors.append(float((found - exact).norm() / exact.norm()))
    assert all(3.5 < a / b < 4.5 for a, b in itertools.pairwise(errors)), errors


@given(seeds)
def test_both_orders_of_differentiation_agree(seed):
    """The matrix of Eq. 11 times a vector, by forward and by reverse mode."""
    (_, level_2, _), encoder, head, _ = toy(seed % 1000)
    direction = {"c": randn(3, seed=seed % 1000 + 20)}
    found = [
        mlo_mae.mixed_product(lambda c, e: level_2(e, c), head, direction, encoder, method)["e"]
        for method in ("forward", "reverse")
    ]
    torch.testing.assert_close(*found)


def test_the_two_gradients_of_a_difference_see_the_same_noise():
    """Eq. 12: without that, a difference would be one of two random losses."""

    def loss(at, wanted):
        noise = torch.randn(50, dtype=torch.float64)  # enough to drown a difference of 1e-3
        return (noise * wanted["w"]).sum() + (at["a"] ** 2 * wanted["w"]).sum()

    at, direction, wanted = {"a": randn(50)}, {"a": randn(50, seed=1)}, {"w": randn(50, seed=2)}
    torch.manual_seed(0)
    found = mlo_mae.mixed_product(loss, at, direction, wanted, "finite_difference", 1e-3)["w"]
    torch.testing.assert_close(found, 2 * at["a"] * direction["a"], rtol=1e-6, atol=1e-8)


def test_a_problem_with_a_known_solution_converges_to_it():
    """Eq. 4, with E = A T and C = B E at the optimum of their levels and C = goal wanted: T = (B A)^-1 goal."""
    a, b = (torch.eye(3, dtype=torch.float64) + 0.2 * randn(3, 3, seed=i) for i in range(2))
    goal = randn(3, seed=5)

    def level_1(encoder, masking):
        return (encoder["e"] - a @ masking["t"]).square().sum() / 2

    def level_2(encoder, head):
        return (head["c"] - b @ encoder["e"]).square().sum() / 2

    def level_3(encoder, head):
        return (head["c"] - goal).square().sum() / 2

    losses, rate = (level_1, level_2, level_3), 0.9
    encoder, head, masking = ({name: torch.zeros(3, dtype=torch.float64)} for name in "ect")
    for _ in range(200):
        after = descend(level_1, encoder, masking, rate)
        last = descend(level_2, head, after, rate, first=False)
        gradient, _ = mlo_mae.hypergradient(*losses, (encoder, after), (head, last), masking, rate, rate)
        encoder, head, masking = after, last, {"t": masking["t"] - 0.3 * gradient["t"]}
    torch.testing.assert_close(masking["t"], torch.linalg.solve(b @ a, goal), rtol=1e-5, atol=1e-6)


def test_a_difference_has_the_length_that_is_asked_for():
    """App. A.2: both ends lie `radius` away, whatever the length of the direction."""
    seen = []

    def loss(at, wanted):
        seen.append(at["a"])
        return (at["a"] * wanted["w"]).sum()

    weights = ({"a": randn(5)}, {"a": 7 * randn(5, seed=1)}, {"w": randn(5)})
    mlo_mae.central_difference(loss, *weights, 0.3)
    assert float((seen[0] - seen[1]).norm()) == pytest.approx(0.6)


def test_levels_two_and_three_are_cross_entropy_of_the_cls_token():
    """Eq. 2 and 3."""
    method = tiny_levels().double()
    images, labels = batch_of(method, 1, dtype=torch.float64)
    tokens = method.encoder.encode(method.encoder.embed(images))
    scores = tokens[:, 0] @ method.head.weight.T + method.head.bias
    expected = -sum(row.log_softmax(0)[label] for row, label in zip(scores, labels, strict=True)) / len(labels)
    for level in (2, 3):
        torch.testing.assert_close(method(images, labels, level), expected)


def test_the_last_block_computes_the_cls_token_alone():
    """Eq. 2 and 3: the features and their gradients are those of the whole encoder."""
    method, found = tiny_levels().double(), []
    images, towards = batch_of(method, 1, dtype=torch.float64)[0], randn(4, 16)
    for features in (mlo_mae.cls_token(method.encoder, images), method.encoder(images)):
        gradients = torch.autograd.grad((features * towards).sum(), list(method.encoder.parameters()))
        found.append([features.detach(), *gradients])
    assert method.encoder.pool == "cls"
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "passes"),
    [
        ({}, 2),
        ({"hypergradient": "adamw", "amp": "bf16"}, 2),
        ({"amp": "fp16"}, 3),  # the hypergradient is in float32
        ({"hypergradient": "finite_difference"}, 4),
        ({"head_steps": 2}, 3),
    ],
)
def test_the_hypergradient_goes_back_through_level_twos_own_features(fields, passes, monkeypatch):
    """Eq. 11: E' has seen these images in level II already; `passes` are those of whole images in a cycle."""
    method, seen, cls_token = tiny_levels(unrolling=1, head="code", **fields), [], mlo_mae.cls_token
    monkeypatch.setattr(mlo_mae, "cls_token", lambda *args: seen.append(1) or cls_token(*args))
    method.update(method, [batch_of(method, 2 + method.config.head_steps)], stepper_of(method))
    assert len(seen) == passes


def test_the_forward_product_takes_plain_attention():
    """Level I has a forward-mode derivative where `attend` would take the fused kernel, which has none: in float32."""
    method, found = tiny_levels(), []
    images, weights = batch_of(method, 1)[0], method.weights("autoencoder.", copy=True)
    towards = {name: randn(*p.shape, seed=i) for i, (name, p) in enumerate(weights.items())}
    for dtype in (torch.float32, torch.float64):
        method.to(dtype)
        at, direction = ({name: x.to(dtype) for name, x in tensors.items()} for tensors in (weights, towards))
        loss = lambda weights, x: functional_call(method, weights, (x, None, 1))
        pair = torch.func.jvp(functools.partial(loss, x=images.to(dtype)), (at,), (direction,))
        found.append([float(x.detach()) for x in pair])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0][0] == pytest.approx(float(method.pretraining_loss(images.double())[0].detach()), rel=1e-5)


# --- the three levels ------------------------------------------------------------------------------------------------


def whole_procedure(method, parts, encoder, head, rates):
    """The loss of level III as a function of T: one gradient step of each level of the method below it."""

    def run(masking):
        def loss(batch, level, *weights):
            return functional_call(method, {k: v for w in weights for k, v in w.items()}, (*batch, level))

        after = descend(lambda e, t: loss((parts[0][0], None), 1, e, t), encoder, masking, rates[0])
        last = descend(lambda e, c: loss(parts[1], 2, e, c), head, after, rates[1], first=False)
        return loss(parts[2], 3, after, last), after, last

    return run


@pytest.mark.parametrize(
    ("mask_gradient", "difference"),
    [("weight", "exact"), ("weight", "finite_difference"), ("straight_through", "exact"), ("softsort", "exact")],
)
def test_the_masking_network_learns_by_the_derivative_of_the_procedure(mask_gradient, difference):
    """Eq. 8 to 11 for the whole method, against autograd and a difference quotient; App. A.4 for soft selections."""
    fields = {"mask_gradient": mask_gradient, "hypergradient": difference, "radius": 1e-6, "temperature": 1.0}
    method = tiny_levels(**fields).double()
    parts = parts_of(batch_of(method, 3, dtype=torch.float64), 3)
    encoder, head, masking = (method.weights(x, copy=True) for x in ("autoencoder.encoder.", "head.", "masking."))
    before, stepper = method.weights("autoencoder.", copy=True), LevelRecorder(method)
    rates = [group["lr"] for group in stepper.param_groups]
    rates = (rates[0], rates[2])
    assert rates == (0.64, 1.28)
    run = whole_procedure(method, parts, encoder, head, rates)
    with sdpa_kernel(SDPBackend.MATH):
        _, after, last = run(masking)
        method.load_state_dict({**method.state_dict(), **after, **last})
        method.learn_masks((parts[0][0], None), parts[1], parts[2], before, head, stepper)
        (found,) = stepper.steps
        assert set(found) == set(masking)
        if mask_gradient == "weight":  # the loss has no jumps along this direction
            towards = {name: randn(*p.shape, seed=i) for i, (name, p) in enumerate(masking.items())}
            with torch.no_grad():
                ends = [float(run(mlo_mae.moved(masking, towards, s * 1e-5))[0]) for s in (1, -1)]
            slope = sum(float((found[name] * towards[name]).sum()) for name in found)
            assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=2e-3)
        leaves = {name: p.clone().requires_grad_() for name, p in masking.items()}
        true = torch.autograd.grad(run(leaves)[0], list(leaves.values()))
    for (name, gradient), expected in zip(found.items(), true, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()), msg=name)


def snapshot(method):
    return {name: value.clone() for name, value in method.state_dict().items()}


def changed(before, method):
    return {name.split(".")[0] for name, value in method.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("difference", ["exact", "finite_difference"])
def test_each_level_moves_its_own_weights_alone(difference):
    """Eq. 6 moves the autoencoder, Eq. 7 the head, Eq. 8 the masking network."""
    method = tiny_levels(hypergradient=difference, head="code")
    stepper = stepper_of(method)
    parts = parts_of(batch_of(method, 3), 3)
    before = snapshot(method)
    method.train_head(*parts[1], stepper)
    assert changed(before, method) == {"head"}
    before, weights = snapshot(method), [method.weights(x, copy=True) for x in ("autoencoder.", "head.")]
    method.learn_masks((parts[0][0], None), parts[1], parts[2], *weights, stepper)
    assert changed(before, method) == {"masking", "validation_loss"}
    before = snapshot(method)
    method.descend(method.pretraining_loss(parts[0][0])[0], [method.autoencoder], stepper)
    assert changed(before, method) == {"autoencoder"}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_cycle_of_every_objective(objective):
    """What each step moves: Eq. 6 to 8, Eq. 5 (blo), Eq. 13 (full), and the baselines without masks to learn."""
    method = tiny_levels(objective=objective, unrolling=2)
    recorder = LevelRecorder(method)
    levels = 4 if method.config.learns_masks else 3
    out = method.update(method, [batch_of(method, levels)], recorder)
    moved = [{name.split(".")[0] for name in step} for step in recorder.steps]
    first = {"autoencoder", "head"} if objective == "blo" else {"autoencoder"}
    expected = [first, first]
    expected += [] if objective == "blo" else [{"tuned", "head"} if objective == "full" else {"head"}]
    expected += [{"masking"}] if method.config.learns_masks else []
    assert moved == expected
    assert all(gradient.isfinite().all() for step in recorder.steps for gradient in step.values())
    if method.config.learns_masks:
        assert all(gradient.abs().max() > 0 for gradient in recorder.steps[-1].values())
    own = {"loss_validation", "probability", "entropy"} if method.config.learns_masks else set()
    assert set(out) == {"loss", "loss_head"} | own
    rows = method.pictures(batch_of(method, 1)[0])
    assert rows.shape == (4, 4, 3, 16, 16) and 0 <= rows.min() and rows.max() <= 1


def test_two_levels_learn_from_labels_and_pixels_at_once():
    """Eq. 5: the gradient of gamma times the reconstruction plus the classification."""
    method = tiny_levels(objective="blo", gamma=0.3)
    recorder = LevelRecorder(method, moves=False)
    images, labels = batch_of(method, 2)
    torch.manual_seed(0)
    method.update(method, [(images, labels)], recorder)
    torch.manual_seed(0)
    loss = 0.3 * method.pretraining_loss(images[:4])[0]
    loss = loss + method.classification_loss(method.features(images[4:]), labels[4:])
    names = [name for name, _ in method.named_parameters() if name.startswith(("autoencoder.", "head."))]
    expected = torch.autograd.grad(loss, [dict(method.named_parameters())[name] for name in names])
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(recorder.steps[0][name], gradient)


def stepped(weights, loss, states, **rates):
    """Weights after a plain gradient step of the networks named, through which autograd sees: {name: tensor}. Where
    `states` has something, an optimiser's settings and state before it, the step is AdamW's.
    """
    rate = {name: rates[name.split(".")[0]] for name in weights if name.split(".")[0] in rates}
    gradients = torch.autograd.grad(loss, [weights[name] for name in rate], create_graph=True)
    after = {name: weights[name] - rate[name] * g for name, g in zip(rate, gradients, strict=True)}
    for name, gradient in zip(rate, gradients, strict=True) if states else ():
        after[name], _, _ = reference.adamw_step(weights[name], gradient, lr=rate[name], **states[name])
    return weights | after


def states_of(recorder):
    """What `reference.adamw_step` needs for each parameter's next step: {name: {...}}; {} of plain steps."""
    found, names = {}, {p: name for name, p in recorder.method.named_parameters()}
    for group in recorder.param_groups if recorder.state else ():
        for p in group["params"]:
            state = {name: value.clone() for name, value in recorder.state[p].items()}
            state |= {"step": float(state["step"]) + 1, "betas": group["betas"], "eps": group["eps"]}
            found[names[p]] = state | {"decay": group["weight_decay"]}
    return found


def cycle(method, weights, pretext, training, states):
    """One step of the levels below T, by autograd: the weights after it, and level I's loss before.

    Eq. 6, then Eq. 7 or Eq. 13 (full); or both in one step, Eq. 5 (blo).
    """
    config = method.config
    level_1 = functional_call(method, weights, (*pretext, 1))
    if config.objective == "blo":
        loss = config.gamma * level_1 + functional_call(method, weights, (*training, 2))
        return stepped(weights, loss, states, autoencoder=0.64, head=1.28), level_1
    weights = stepped(weights, level_1, states, autoencoder=0.64)
    loss = functional_call(method, weights, (*training, 2))
    if config.objective == "full":
        names = [name for name, _ in method.tuned.named_parameters()]
        apart = [weights["tuned." + name] - weights["autoencoder.encoder." + name] for name in names]
        loss = loss + config.proximal * sum(x.square().sum() for x in apart)
        return stepped(weights, loss, states, tuned=0.64, head=1.28), level_1
    return stepped(weights, loss, states, head=1.28), level_1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"hypergradient": "finite_difference", "radius": 1e-4},
        {"normalization": "sum"},
        {"mask_gradient": "straight_through"},
        {"detach_tokens": True},
        {"objective": "blo", "gamma": 0.4},
        {"objective": "full", "proximal": 0.3},
        {"hypergradient": "adamw", "mask_gradient": "softsort"},
        {"hypergradient": "adamw", "objective": "blo", "gamma": 0.4},
        {"hypergradient": "adamw", "objective": "full", "proximal": 0.3},
    ],
)
def test_a_cycle_gives_the_masks_the_derivative_of_all_its_steps(fields):
    """Autograd through all steps as `update` makes them, plain ones or AdamW's: Eq. 6 to 11, Eq. 5 and Eq. 13."""
    method = tiny_levels(**fields, unrolling=1).double()
    batch = batch_of(method, 3, dtype=torch.float64)
    (pretext, _), training, validation = parts_of(batch, 3)
    start = {name: p.detach().clone().requires_grad_() for name, p in method.named_parameters()}
    recorder = LevelRecorder(method)
    with sdpa_kernel(SDPBackend.MATH):
        after, level_1 = cycle(method, start, (pretext, None), training, states_of(recorder))
        level_3 = functional_call(method, after, (*validation, 3))
        names = [name for name in start if name.startswith("masking.")]
        true = torch.autograd.grad(level_3, [start[name] for name in names])
        out = method.update(method, [batch], recorder)
    exact = method.config.hypergradient != "finite_difference"
    for name, expected in zip(names, true, strict=True):
        rtol, atol = (1e-6, 1e-12) if exact else (1e-3, 1e-3 * float(expected.abs().max()))
        torch.testing.assert_close(recorder.steps[-1][name], expected, rtol=rtol, atol=atol, msg=name)
    for name, parameter in method.named_parameters():
        if not name.startswith("masking."):
            torch.testing.assert_close(parameter.detach(), after[name].detach(), msg=name)
    assert float(out["loss_validation"]) == pytest.approx(float(level_3.detach()), rel=1e-6)
    assert float(out["loss"]) == pytest.approx(float(level_1.detach()), rel=1e-6)


def test_without_learning_rate_factors_the_paths_weigh_as_in_the_code(monkeypatch):
    """Eq. 9 to 11 without the learning rates: another length and another direction."""
    found, rates, true = {}, [], mlo_mae.hypergradient
    noting = lambda *args, **options: rates.append(args[6:8]) or true(*args, **options)
    monkeypatch.setattr(mlo_mae, "hypergradient", noting)
    for factors in (True, False):
        method = tiny_levels(lr_factors=factors, unrolling=1).double()
        recorder = LevelRecorder(method)
        method.update(method, [batch_of(method, 3, dtype=torch.float64)], recorder)
        found[factors] = recorder.steps[-1]["masking.fc2.bias"]
    groups = recorder.optimizer.param_groups
    assert rates == [(groups[0]["lr"], groups[2]["lr"]), (1.0, 1.0)]
    assert F.cosine_similarity(found[True], found[False], dim=0) < 0.9999
    assert float(found[False].norm() / found[True].norm()) > 1 / 0.64 / 2


def test_several_steps_below_count_the_last_one():
    """With two unrolled steps, T's gradient is that of a cycle that starts after the first of them."""
    images, labels = batch_of(tiny_levels(), 4, dtype=torch.float64)
    both = tiny_levels(unrolling=2).double()
    recorder = LevelRecorder(both)
    logged = both.update(both, [(images, labels)], recorder)
    one = tiny_levels(unrolling=1).double()
    first = one.pretraining_loss(images[:4])[0]
    one.descend(first, [one.autoencoder], LevelRecorder(one))
    other = LevelRecorder(one)
    last = one.update(one, [(images[4:], labels[4:])], other)["loss"]
    torch.testing.assert_close(logged["loss"], (first.detach() + last) / 2)
    for name, gradient in recorder.steps[-1].items():
        torch.testing.assert_close(gradient, other.steps[-1][name])


def test_of_several_steps_of_the_head_the_last_one_is_differentiated():
    """Section 3.2: level II may make several steps, each on a batch of its own."""
    images, labels = (x.split(4) for x in batch_of(tiny_levels(), 4, dtype=torch.float64))
    both = tiny_levels(unrolling=1, head_steps=2).double()
    recorder = LevelRecorder(both)
    logged = both.update(both, [(torch.cat(images), torch.cat(labels))], recorder)
    one = tiny_levels(unrolling=1).double()
    pretext, first, last, validation = zip(images, labels, strict=True)
    before, other = one.weights("autoencoder.", copy=True), LevelRecorder(one)
    one.train_autoencoder(pretext[0], first, other)
    one.train_head(*first, other)
    head_before = one.weights("head.", copy=True)
    loss, _ = one.train_head(*last, other)
    one.learn_masks((pretext[0], None), last, validation, before, head_before, other)
    assert len(recorder.steps) == len(other.steps) == 4
    torch.testing.assert_close(logged["loss_head"], loss.detach())
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(both.get_parameter(name), parameter, msg=name)


def test_a_fresh_head_starts_each_cycle_where_it_was_at_first():
    """Algorithm 1, line 13. The optimiser forgets what it knew of the last head."""
    method = tiny_levels(unrolling=1, fresh_head=True, weight_decay=0.0)
    first = {name: value.clone() for name, value in method.weights("head.").items()}
    stepper = common.Stepper(method.optimizer(method.config), method.config, torch.device("cpu"))
    for seed in (0, 1):
        method.update(method, [batch_of(method, 3, seed=seed)], stepper)
        assert all(stepper.optimizer.state[p]["step"] == 1 for p in method.head.parameters())
        for name, value in method.weights("head.").items():
            rate, moved_by = stepper.optimizer.param_groups[2]["lr"], (value - first[name]).abs()
            assert 0 < moved_by.max() <= 1.001 * rate  # one step of Adam from there
    assert stepper.optimizer.state[next(method.autoencoder.parameters())]["step"] == 2


def test_the_hypergradient_has_no_dropout():
    method = tiny_levels(head="code")
    images, labels = (x.split(4) for x in batch_of(method, 3))
    batches = [(images[0], None), *zip(images[1:], labels[1:], strict=True)]
    before, head_before = method.weights("autoencoder.", copy=True), method.weights("head.", copy=True)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(method.masking_gradient(*batches, before, head_before, LevelRecorder(method))[0])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize(("amp", "kind"), [("bf16", "exact"), ("fp16", "exact"), ("bf16", "adamw"), ("fp16", "adamw")])
def test_half_precision_has_nearly_the_gradient_of_float32(amp, kind):
    found = []
    for precision in ("off", amp):
        method = tiny_levels(amp=precision, unrolling=1, head="code", hypergradient=kind)
        stepper = stepper_of(method)
        stepper.optimizer.state.update(LevelRecorder(method).state)  # of AdamW, in the middle of a training
        for group in stepper.optimizer.param_groups:
            group["lr"] = 1e-3
        keep = {}
        real = method.masking_gradient
        method.masking_gradient = lambda *a, real=real, keep=keep: keep.setdefault("found", real(*a))
        torch.manual_seed(0)
        method.update(method, [batch_of(method, 3)], stepper)
        assert method.training and all(p.isfinite().all() for p in method.parameters())
        found.append(torch.cat([g.flatten().float() for g in keep["found"][0].values()]))
    assert F.cosine_similarity(*found, dim=0) > 0.97


def test_a_step_that_fp16_leaves_out_has_no_derivative():
    """Its loss scaler steps over gradients that are too large: nothing moves, so nothing depends on T."""
    method = tiny_levels(amp="fp16", unrolling=1, hypergradient="adamw")
    stepper, found, real = stepper_of(method), [], method.masking_gradient
    stepper.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    method.masking_gradient = lambda *a: found.append(real(*a)[0]) or real(*a)
    before = snapshot(method)
    method.update(method, [batch_of(method, 3)], stepper)
    assert changed(before, method) <= {"masking", "validation_loss"}  # T decays
    assert all((gradient == 0).all() for gradient in found[0].values())


@given(st.integers(1, 3), st.integers(1, 8), seeds)
def test_entropy_is_in_bits(batch, patches, seed):
    probability = rand(batch, patches, seed=seed, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    bits = [-p * math.log2(p) - (1 - p) * math.log2(1 - p) for p in probability.flatten().tolist()]
    assert float(mlo_mae.entropy(probability)) == pytest.approx(sum(bits) / len(bits))
    assert float(mlo_mae.entropy(torch.full((2, 3), 0.5))) == pytest.approx(1)


def test_pictures_show_probabilities_from_blue_to_yellow():
    """Each image's lowest probability is blue and its highest yellow, in the patch where it belongs."""
    method, images = tiny_levels(), batch_of(tiny_levels(), 1)[0]
    rows = method.pictures(images)
    _, probability = method.choose(method.encoder.embed(images))
    for row, p in zip(rows, probability, strict=True):
        patches = common.patchify(row[1][None], 4)[0].unflatten(1, (16, 3))  # (N, pixels, colours)
        assert (patches == patches[:, :1]).all()
        assert patches[p.argmin(), 0].tolist() == [0, 0, 1] and patches[p.argmax(), 0].tolist() == [1, 1, 0]
        share = (p - p.min()) / (p.max() - p.min())
        torch.testing.assert_close(patches[:, 0], torch.stack([share, share, 1 - share], dim=1))


def test_probabilities_are_float32_whatever_the_precision():
    method, images = tiny_levels(), batch_of(tiny_levels(), 1)[0]
    with torch.autocast("cpu", torch.bfloat16):
        tokens = method.encoder.embed(images)
        _, probability = method.choose(tokens)
    assert probability.dtype == torch.float32
    torch.testing.assert_close(probability, method.masking(tokens.float()))


def test_unlabelled_images_are_for_level_one_alone():
    data = shapes(60, 16)
    data.labels[:20] = -1
    method = mlo_mae.MultiLevelMAE(tiny_levels().config, data)
    assert len(method.held_out) == 8 and len(method.trained_on) == 32
    assert min(method.held_out.min(), method.trained_on.min()) >= 20
    seen = torch.cat([indices[:4] for _, indices in method.plan(60, method.config).after(0)])
    assert (seen < 20).any() and not set(seen.tolist()) & set(method.held_out.tolist())


def test_between_updates_the_masking_network_stands_still():
    method = tiny_levels(update_every=2)
    stepper = stepper_of(method)
    for levels, still in ((3, False), (2, True)):
        before = snapshot(method)
        out = method.update(method, [batch_of(method, levels)], stepper)
        assert ("masking" not in changed(before, method)) == still
    assert out["loss_validation"] == method.validation_loss and out["loss_validation"] > 0


def test_detached_tokens_keep_the_encoder_from_learning_through_the_masks():
    gradients = []
    for detach in (False, True):
        method = tiny_levels(detach_tokens=detach)
        _, probability = method.choose(method.encoder.embed(batch_of(method, 1)[0]))
        gradients.append(torch.autograd.grad(probability.sum(), method.encoder.parameters(), allow_unused=True))
    assert any(g is not None for g in gradients[0]) and all(g is None for g in gradients[1])


def test_baselines_mask_at_random_or_always_the_same():
    images = batch_of(tiny_levels(), 1)[0]
    for objective, same in (("mae", False), ("fixed", True)):
        method = tiny_levels(objective=objective)
        _, _, first, weight = method.reconstruct(images)
        _, _, second, _ = method.reconstruct(images)
        assert torch.equal(first, second) == same and (weight == 1).all()
        assert (first.sum(dim=1) == 12).all()
        assert not same or (first == first[:1]).all()
    torch.manual_seed(3)
    loss = method.pretraining_loss(images)[0]
    out = method.autoencoder(images, first.bool())
    torch.testing.assert_close(loss, common.reconstruction_loss(out.prediction, out.target, out.mask))


def test_the_mask_ratio_follows_its_curriculum():
    """Table 17: from 0.5 to 0.9, linearly."""
    method = tiny_levels(mask_ratio=0.5, mask_ratio_end=0.9, epochs=5)
    found = []
    for epoch in range(5):
        method.start_epoch(epoch)
        found.append(method.ratio)
        assert method.reconstruct(batch_of(method, 1)[0])[2].sum(dim=1).tolist() == [round(16 * method.ratio)] * 4
    assert found == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level1_data", ["train", "all"])
def test_what_level_three_sees_is_seen_by_no_other(level1_data):
    """Eq. 3: the validation images are in no other level, but for --level1-data all, as in the code."""
    method = tiny_levels(level1_data=level1_data, unrolling=2, update_every=5)
    held, own = set(method.held_out.tolist()), set(method.trained_on.tolist())
    assert len(held) == 12 and len(own) == 48 and not held & own
    plan = method.plan(60, method.config)
    assert len(plan) == 12
    seen, steps = [set(), set(), set()], list(plan.after(0))
    assert len(steps) == 24
    for step, (_, indices) in enumerate(steps):
        assert len(indices) == (16 if step % 5 == 0 else 12)  # counted over epochs: 12 is no multiple of 5
        for level, part in enumerate((indices[:8], indices[8:12], indices[12:])):
            seen[level] |= set(part.tolist())
        if step == 11:
            assert seen[1] == own  # an epoch is one pass of level II
    assert seen[0] == (own if level1_data == "train" else own | held)
    assert seen[2] <= held
    for (seed, indices), (expected_seed, expected) in zip(plan.after(7), steps[7:], strict=True):
        assert seed == expected_seed and torch.equal(indices, expected)


@given(seeds)
def test_levels_and_epochs_have_orders_of_their_own(seed):
    """Otherwise levels I and II would learn from the same batch in the same cycle, or from the same in each epoch."""
    config = Config(data="shapes", seed=seed, batch_size=8, unrolling=1, epochs=2)
    plan = LevelPlan(72, config, trained_on=torch.arange(64), held_out=torch.arange(64, 72))
    first, second = (torch.stack([batch[:2] for batch in plan.draw(epoch)]) for epoch in (0, 1))  # (8, 2, 8)
    assert not torch.equal(first[:, 0], first[:, 1])
    assert not torch.equal(first[:, 0], second[:, 0]) and not torch.equal(first[:, 1], second[:, 1])


@given(seeds)
def test_a_plan_has_the_form_that_its_example_tells(seed):
    """That of LevelPlan's docstring: ten images, 8 and 9 held out, level I twice a cycle, III in every second one."""
    settings = {"batch_size": 2, "unrolling": 2, "update_every": 2, "epochs": 1}
    config = Config(data="shapes", seed=seed, **settings)
    plan = LevelPlan(10, config, trained_on=torch.arange(8), held_out=torch.tensor([8, 9]))
    batches = plan.draw(0)
    assert len(plan) == len(batches) == 4
    assert [tuple(batch.shape) for batch in batches] == [(4, 2), (3, 2), (4, 2), (3, 2)]
    assert all(batch[:3].max() <= 7 for batch in batches)  # levels I and II
    assert torch.cat([batch[2] for batch in batches]).sort().values.tolist() == list(range(8))  # II: one pass
    assert torch.cat([batch[:2] for batch in batches]).flatten().bincount().tolist() == [2] * 8  # I: two passes
    assert all(sorted(batch[3].tolist()) == [8, 9] for batch in batches[::2])  # III
    config.head_steps = 2
    batches = LevelPlan(10, config, trained_on=torch.arange(8), held_out=torch.tensor([8, 9])).draw(0)
    assert [tuple(batch.shape) for batch in batches] == [(5, 2), (4, 2)]
    assert torch.cat([batch[2:4] for batch in batches]).flatten().sort().values.tolist() == list(range(8))


def test_processes_share_each_levels_batch(monkeypatch):
    method, asked = tiny_levels(unrolling=2), []
    plan = method.plan(60, method.config)
    whole = [indices for _, indices in plan.after(0)]
    monkeypatch.setattr(plumbing.images, "world_size", lambda: 2)
    parts = []
    for number in range(2):
        monkeypatch.setattr(plumbing.images, "rank", lambda number=number: asked.append(number) or number)
        parts.append([indices for _, indices in plan.after(0)])
    assert set(asked) == {0, 1}
    for indices, *shares in zip(whole, *parts, strict=True):
        assert len(indices) == 16
        for level in range(4):
            expected = indices[4 * level : 4 * level + 4]
            assert torch.equal(torch.cat([share[2 * level : 2 * level + 2] for share in shares]), expected)


@pytest.mark.parametrize("fields", [{}, {"objective": "full", "proximal": 1.0}, {"hypergradient": "adamw"}])
def test_two_processes_have_the_gradients_of_one(fields):
    method = tiny_levels(unrolling=1, **fields)
    images, labels = batch_of(method, 3, seed=5)
    recorder = LevelRecorder(method)
    method.update(method, [(images, labels)], recorder)
    for steps in processes.start(processes.gradients_of_levels, images, labels, fields):
        for name, gradient in ((name, g) for step in recorder.steps for name, g in step.items()):
            torch.testing.assert_close(steps[name], gradient, rtol=1e-3, atol=1e-7, msg=name)


def test_resume_matches_an_uninterrupted_run(tmp_path):
    """Of the objective with the most networks; test_faults.py kills and resumes a run of the other."""

    def run(out, resume=False, stop=False):
        method = tiny_levels(objective="full", update_every=2, out=str(tmp_path / out), resume=resume, probe_every=2)
        if stop:
            keep = method.start_epoch

            def start_epoch(epoch):
                if epoch == 1:
                    raise KeyboardInterrupt
                keep(epoch)

            method.start_epoch = start_epoch
        data = shapes(60, 16)
        common.fit(method, data, data, method.config)
        return method.state_dict()

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop=True)
    again = run("stopped", resume=True)
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
    logs = [read_log(tmp_path / name / "log.jsonl")[1] for name in ("whole", "stopped")]
    assert without_times(logs[0]) == without_times(logs[1])


def test_the_probe_tells_the_heads_accuracy_and_how_often_the_object_is_masked():
    """`accuracy` is the linear probe of appendix B.3: level II's head on test images."""
    method, data = tiny_levels(), shapes(20, 16)
    method.eval()
    found = method.probe(lambda x: x.flatten(1), data, data, method.config)
    images = data.images / 255
    scores = method.head(method.features(images))
    assert found["accuracy"] == pytest.approx(100 * float((scores.argmax(dim=1) == data.labels).float().mean()))
    mask, _ = method.choose(method.encoder.embed(images))
    hidden = common.unpatchify(mask[..., None].expand(-1, -1, 16), 4, 16, 16)[:, 0] > 0.5
    share = data.masks[hidden].float().mean() / data.masks.float().mean()
    assert found["object"] == pytest.approx(float(share), rel=1e-5)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_recipes_are_tables_11_and_12():
    def read(*argv):
        return read_flags(Config, mlo_mae.RECIPES, [*argv])

    config = read("--data", "imagenet")
    assert (config.model, config.image_size, config.patch, config.epochs, config.batch_size) == (
        "vit_base",
        224,
        16,
        50,
        256,
    )
    assert (config.base_lr, config.head_lr, config.mask_lr, config.weight_decay) == (1e-4, 4e-5, 4e-5, 0.05)
    assert (config.unrolling, config.mask_ratio, config.betas, config.hidden) == (1, 0.75, (0.9, 0.95), 512)
    for name in ("cifar10", "cifar100"):
        config = read("--data", name)
        assert (config.model, config.image_size, config.patch, config.epochs) == ("vit_base", 32, 2, 200)
        assert (config.base_lr, config.batch_size, config.weight_decay) == (1e-3, 128, 0.05)
        assert (config.head_lr * 128 / 256, config.mask_lr * 128 / 256) == (1e-3, 1e-3)
        assert (config.unrolling, config.validation, config.level1_data) == (2, 0.2, "train")
        assert (config.crop_pad, config.flip) == (4, 0.5)
    crops = read("--data", "cifar10", "--model", "vit_micro").crop[:2], read("--data", "imagenet").crop_pad
    assert crops == ((0.5, 1.0), 0)


def test_the_gradient_of_the_masking_network_is_clipped():
    method = tiny_levels(clip=1e-9, unrolling=1).double()
    recorder = LevelRecorder(method)
    method.update(method, [batch_of(method, 3, dtype=torch.float64)], recorder)
    norm = torch.stack([gradient.norm() for gradient in recorder.steps[-1].values()]).norm()
    assert float(norm) == pytest.approx(1e-9, rel=1e-3)


def test_the_head_of_the_code_has_a_norm_and_dropout():
    head = tiny_levels(head="code").head
    assert [type(layer).__name__ for layer in head] == ["LayerNorm", "Dropout", "Linear"]
    assert (head[0].eps, head[1].p) == (1e-6, 0.1)


def test_optimiser_has_groups_of_its_own_for_every_level():
    method = tiny_levels(objective="full")
    groups = method.optimizer(method.config).param_groups
    assert [group["lr_scale"] for group in groups] == [1, 1, 2, 2, 1, 1, 1, 1]
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0] * 4
    assert [group["eps"] for group in groups] == [1e-8] * 4 + [1e-15] * 2 + [1e-8] * 2
    assert all(p.ndim > 1 for group in groups[::2] for p in group["params"])
    everything = tiny_levels(decay_on="all")
    plain = [group["params"] for group in everything.optimizer(everything.config).param_groups[1::2]]
    assert plain == [[], [], []]  # no group without decay has anything
    assert {tuple(group["betas"]) for group in groups} == {(0.9, 0.95)}
    assert sum(len(group["params"]) for group in groups) == len(list(method.parameters()))


def test_pretraining_goes_on_from_an_encoder(tmp_path):
    """Section 3.6; whatever the pool it was trained with, MLO-MAE takes the CLS token."""
    first = vit(image_size=16, pool="mean")
    save_encoder(first, tmp_path / "encoder.pt")
    with pytest.raises(
        UserError, match="but this run width 192, 12 blocks, patch 4, 3 heads; give --model vit_micro --patch 4"
    ):
        tiny_levels(start=str(tmp_path / "encoder.pt"), model="vit_tiny")
    with pytest.raises(
        UserError, match="but this run width 16, 2 blocks, patch 8, 2 heads; give --model vit_micro --patch 4"
    ):
        tiny_levels(start=str(tmp_path / "encoder.pt"), patch=8)
    with pytest.raises(UserError, match="unknown --model 'vit_none'"):
        tiny_levels(start=str(tmp_path / "encoder.pt"), model="vit_none")
    again = tiny_levels(start=str(tmp_path / "encoder.pt"))
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.encoder.state_dict()[name])
    assert again.encoder.training and again.encoder.pool == again.encoder.fields["pool"] == "cls"
    save_encoder(common.MobileFormer("micro"), tmp_path / "other.pt")
    with pytest.raises(UserError, match="holds a MobileFormer, but this run trains a ViT"):
        tiny_levels(start=str(tmp_path / "other.pt"))


def test_the_tuned_encoder_starts_as_the_pretrained_one():
    """Eq. 13: F is E at the start, with weights of its own."""
    method = tiny_levels(objective="full")
    torch.testing.assert_close(method.tuned.state_dict(), method.encoder.state_dict(), rtol=0, atol=0)
    ours, theirs = (list(module.parameters()) for module in (method.tuned, method.encoder))
    assert not {p.data_ptr() for p in ours} & {p.data_ptr() for p in theirs}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "mlp"}, "unknown --objective 'mlp'; did you mean 'mlo'"),
        ({"hypergradient": "exakt"}, "unknown --hypergradient 'exakt'"),
        ({"hypergradient": "adamw", "clip": 1.0}, "adamw does not differentiate --clip"),
        ({"hypergradient": "adamw", "lr_factors": False}, "leave out --no-lr-factors"),
        ({"mask_gradient": "hard"}, "unknown --mask-gradient 'hard'"),
        ({"unrolling": 0}, "--unrolling 0 makes no sense"),
        ({"head_steps": 0}, "--head-steps 0 makes no sense"),
        ({"objective": "blo", "fresh_head": True}, "--objective blo has no level II"),
        ({"update_every": 0}, "--update-every 0 makes no sense"),
        ({"validation": 1.0}, "--validation 1.0 is no share"),
        ({"accumulate": 2}, "--accumulate does not work here"),
        ({"compile": True}, "--compile does not work here"),
        ({"mask_lr": 0.0}, "--mask-lr 0.0 makes no sense; give more than 0"),
        ({"temperature": 0.0}, "--temperature 0.0 makes no sense"),
        ({"gamma": -1.0}, "--gamma -1.0 makes no sense"),
        ({"mask_ratio": 0.01}, "leaves no patch masked"),
        ({"mask_ratio_end": 0.99}, "leaves no patch masked or none visible"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        tiny_levels(**fields)


def test_a_batch_must_fit_into_every_level():
    method = tiny_levels(batch_size=20)
    with pytest.raises(UserError, match="a batch of 20 is larger than the 12 images of level III"):
        method.plan(60, method.config)
