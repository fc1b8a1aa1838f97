"""MixedAE: mixing, homologous attention and contrast, the theorem on mutual information, and the method."""

import itertools
import math

import processes
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from make import generator, images_of, randn, seeds, tiny_mixedae

import common
import mixedae
from mixedae import Config
from plumbing.errors import UserError
from plumbing.settings import read_flags

SELECTIONS = [mixedae.top_keys, mixedae.top_keys_fast]


# --- mixing ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(2, 5), seeds)
def test_assignments_partition_the_positions_in_balance_and_in_cells(groups, rows, columns, cell, k, seed):
    """Eq. 1: each position comes from exactly one image, and all images get the same share, but for one cell."""
    grid = (rows * cell, columns * cell)
    patches = grid[0] * grid[1]
    found = mixedae.mixing_assignment(groups, patches, k, generator(seed), cell, grid)
    assert found.dtype == torch.long
    assert found.shape == (groups, patches)
    assert 0 <= found.min() <= found.max() < k
    counts = torch.stack([torch.bincount(row, minlength=k) for row in found])
    assert (counts % cell**2 == 0).all()
    assert (counts.amax(dim=1) - counts.amin(dim=1) <= cell**2).all()
    cells = found.view(groups, rows, cell, columns, cell)
    assert (cells == cells[:, :, :1, :, :1]).all()  # a cell comes from one image


def test_the_image_with_one_more_cell_is_drawn():
    """49 cells for 4 images in Eq. 1: 13 of one, 12 of each other."""
    drawn = [mixedae.mixing_assignment(1, 49, 4, generator(seed))[0] for seed in range(400)]
    counts = torch.stack([torch.bincount(assignment, minlength=4) for assignment in drawn])  # (400, 4)
    assert counts.amax() == 13
    assert torch.bincount(counts.argmax(dim=1), minlength=4).min() > 70


def test_mixing_assignment_refuses_cells_that_do_not_fit():
    for patches, cell, grid in ((16, 3, None), (12, 2, None), (12, 2, (3, 4))):
        with pytest.raises(ValueError, match="cannot be cut into cells"):
            mixedae.mixing_assignment(1, patches, 2, cell=cell, grid=grid)


@given(st.integers(1, 3), st.integers(2, 4), st.integers(4, 9), st.integers(1, 5), seeds)
def test_unmix_keeps_own_patches_and_fills_the_others(groups, k, patches, width, seed):
    """Unmixing takes Eq. 1 back, and filled with zeros it is the sum of Eq. A1."""
    tokens = randn(groups, k, patches, width, seed=seed)
    assignment = mixedae.mixing_assignment(groups, patches, k, generator(seed))
    mixed = mixedae.mix(tokens, assignment)
    fill = randn(width, seed=seed + 1)
    for filling in (fill, 7.0):
        apart = mixedae.unmix(mixed, assignment, filling, k)
        for g, i, n in itertools.product(range(groups), range(k), range(patches)):
            if assignment[g, n] == i:
                assert torch.equal(mixed[g, n], tokens[g, i, n])
                assert torch.equal(apart[g, i, n], tokens[g, i, n])
            else:
                assert (apart[g, i, n] == filling).all()
    assert torch.equal(mixedae.unmix(mixed, assignment, 0, k).sum(dim=1), mixed)


def test_mixing_patches_is_mixing_pixels():
    """Eq. 1 on patches and on images."""
    images, patch = images_of(4), 4
    assignment = mixedae.mixing_assignment(2, 16, 2, generator(0), cell=2)
    mixed = mixedae.mix(common.patchify(images, patch).unflatten(0, (2, 2)), assignment)
    own = F.interpolate(assignment.view(2, 1, 4, 4).float(), scale_factor=patch)
    expected = torch.where(own == 0, images[::2], images[1::2])
    assert torch.equal(common.unpatchify(mixed, patch, 16, 16), expected)


@pytest.mark.parametrize("k", [2, 4])
def test_full_mode_sees_every_patch_of_every_image_once(k):
    method = tiny_mixedae(mode="full", images_per_group=k)
    assignment = method.draw_assignment(3).view(3, k, 16)  # the mixtures of each group
    for image in range(k):
        assert torch.equal((assignment == image).sum(dim=1), torch.ones(3, 16, dtype=torch.long))


@given(st.integers(1, 2), st.integers(2, 3), st.booleans(), seeds)
def test_mixing_never_lowers_mutual_information(patches, k, independent, seed):
    """Eq. 5, A3 and A4: I(mixture; X1) >= I(MAE input; X1), with equality where the other images are independent.

    By exact enumeration of small images of two values, any joint distribution, and any M.
    """
    draw = generator(seed)
    assignment = torch.randint(k, (1, patches), generator=draw)
    image = list(itertools.product((1, 2), repeat=patches))  # 0 is what MAE sees of a hidden patch
    weights = torch.rand([len(image)] * k, generator=draw, dtype=torch.float64) ** 3
    if independent:
        first = torch.rand(len(image), generator=draw, dtype=torch.float64)
        weights = first.view(-1, *[1] * (k - 1)) * weights[0]
    weights /= weights.sum()
    mixture, alone = {}, {}
    for chosen in itertools.product(range(len(image)), repeat=k):
        tokens = torch.tensor([image[i] for i in chosen])[None, :, :, None]  # (1, K, N, 1)
        others_hidden = torch.cat([tokens[:, :1], torch.zeros_like(tokens[:, 1:])], dim=1)  # Eq. A2
        probability = float(weights[chosen])
        for found, group in ((mixture, tokens), (alone, others_hidden)):
            seen = tuple(mixedae.mix(group, assignment).flatten().tolist())
            key = (seen, image[chosen[0]])
            found[key] = found.get(key, 0.0) + probability
    mixed, masked = (reference.mutual_information(joint) for joint in (mixture, alone))
    assert mixed >= masked - 1e-12
    if independent:
        assert mixed == pytest.approx(masked, abs=1e-9)


def test_mixing_raises_mutual_information_where_images_are_related():
    """The inequality of Eq. 5 is strict for images that tell about each other: X2 a copy of X1."""
    both, alone = {}, {}
    for value in itertools.product((1, 2), repeat=2):
        for joint, other in ((both, value), (alone, (0, 0))):
            tokens = torch.tensor([value, other])[None, :, :, None]
            joint[(tuple(mixedae.mix(tokens, torch.tensor([[0, 1]])).flatten().tolist()), value)] = 0.25
    assert reference.mutual_information(both) == pytest.approx(2 * math.log(2))  # all of it
    assert reference.mutual_information(alone) == pytest.approx(math.log(2))  # MAE sees half


# --- attention -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 2), st.integers(1, 2), st.integers(2, 6), st.integers(1, 4), st.integers(1, 6), seeds)
def test_topk_attention_matches_naive_loop(batch, heads, patches, width, topk, seed):
    """Softmax(TopK(q k^T / sqrt(d))) v, query by query."""
    q, k, v = (randn(batch, heads, patches, width, seed=seed + i) for i in range(3))
    expected = reference.topk_attention(q, k, v, min(topk, patches))
    for select in SELECTIONS:
        torch.testing.assert_close(mixedae.topk_attention(q, k, v, topk, select=select), expected)


@given(st.integers(2, 6), seeds)
def test_topk_attention_with_all_keys_is_plain_attention(patches, seed):
    qkv = [randn(2, 3, patches, 4, seed=seed + i) for i in range(3)]
    torch.testing.assert_close(mixedae.topk_attention(*qkv, patches), F.scaled_dot_product_attention(*qkv))


@given(st.integers(2, 6), st.integers(1, 6), seeds)
def test_topk_attention_ignores_the_order_of_keys(patches, topk, seed):
    q, k, v = (randn(1, 2, patches, 4, seed=seed + i) for i in range(3))
    order = torch.randperm(patches, generator=generator(seed))
    torch.testing.assert_close(
        mixedae.topk_attention(q, k[:, :, order], v[:, :, order], topk), mixedae.topk_attention(q, k, v, topk)
    )


def test_topk_attention_has_the_right_gradient():
    """Through the kept scores only: keys that nobody keeps get none."""
    q, k, v = (randn(1, 1, 5, 3, seed=i).requires_grad_() for i in range(3))
    assert torch.autograd.gradcheck(lambda *x: mixedae.topk_attention(*x, 2), (q, k, v))
    with torch.no_grad():
        k[..., 4, :] = -100 * q.mean(dim=2)
        q += q.mean(dim=2) * 100
    mixedae.topk_attention(q, k, v, 2).square().sum().backward()
    assert (k.grad[..., 4, :] == 0).all()
    assert (v.grad[..., 4, :] == 0).all()


@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_topk_attention_survives_ties_and_overflow(dtype, select):
    """bf16 has many equal scores, fp16 overflows beyond 65504."""
    scores = torch.zeros(2, 1, 8, 8, dtype=dtype)
    keys = select(scores, 3)
    assert keys.shape == (2, 1, 8, 3), "three keys of a query, although all eight scores are equal"
    assert (keys.sort(dim=-1).values.diff(dim=-1) > 0).all(), "three different keys"
    scores[0, 0, 1, 1:], scores[0, 0, 3, 4] = -math.inf, 6e4
    scores.requires_grad_()
    weights = mixedae.sparse_softmax(scores, select(scores, 3))
    assert weights.isfinite().all()
    assert ((weights > 0).sum(dim=-1)[1] == 3).all(), "three weights of a query, although all eight scores are equal"
    assert weights[0, 0, 3, 4] == 1  # one score beyond all others
    (weights.float() ** 2).sum().backward()
    assert scores.grad.isfinite().all()
    huge = torch.full((1, 1, 8, 64), 200.0, dtype=dtype)
    assert mixedae.topk_attention(huge, huge, huge, 3).isfinite().all()


@given(
    st.sampled_from(SELECTIONS),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    st.integers(1, 9),
    seeds,
)
def test_top_keys_are_the_largest_scores_of_any_sign(select, dtype, topk, seed):
    scores = (randn(3, 5, 9, seed=seed) * torch.tensor([1e-7, 1.0, 1e4])[:, None, None]).to(dtype)
    scores[0, 0] = 0.0
    scores[0, 1] = -scores[0, 1].abs()
    scores[1, 0, :3] = torch.tensor([math.inf, -math.inf, -0.0], dtype=dtype)
    keys = select(scores, topk)
    found = scores.gather(-1, keys).sort(dim=-1).values
    assert torch.equal(found, scores.sort(dim=-1).values[..., 9 - topk :])


def test_homologous_accuracy_counts_relatives_among_kept_keys():
    """Fig. 6."""
    assignment = torch.tensor([[0, 0, 1, 1]])
    keys = torch.tensor([[0, 1], [1, 2], [0, 1], [2, 3]])[None, None]
    assert mixedae.homologous_accuracy(keys, assignment) == (1 + 0.5 + 0 + 1) / 4
    everything = torch.arange(4).expand(1, 1, 4, 4)
    assert mixedae.homologous_accuracy(everything, assignment) == 0.5  # chance


def encode_patches(vit, tokens, attention):
    """The blocks and the final norm on patches alone, without a CLS token."""
    for block in vit.blocks:
        tokens = block(tokens, attention)
    return vit.norm(tokens)


def test_oracle_attention_equals_separate_encodes_of_the_visible_patches():
    """The control of Table A4a: attention within the same image is MAE's encoder on each image's own patches."""
    method = tiny_mixedae(attention="oracle", segment="off").double()
    vit, k = method.encoder, 2
    assignment = method.draw_assignment(3)
    embedded = vit.embed(images_of(6).double()).unflatten(0, (3, k))
    mixed = mixedae.mix(embedded, assignment)

    def without_cls(q, k, v):  # the method's own weights, between patches
        _, _, weights = method.attention(*(F.pad(x, (0, 0, 1, 0)) for x in (q, k, v)), assignment, look=True)
        assert (weights[:, :, 1:, 0] == 0).all()
        return weights[:, :, 1:, 1:] @ v

    oracle = encode_patches(vit, mixed, without_cls)
    for g, i in itertools.product(range(3), range(k)):
        own = assignment[g] == i
        alone = encode_patches(vit, embedded[g, i, own][None], common.attend)
        torch.testing.assert_close(oracle[g, own], alone[0], rtol=1e-9, atol=1e-9)


def test_the_cls_token_sees_every_patch_and_is_seen_by_all():
    """A choice of ours: with one key a query, patches still get the CLS token besides."""
    method = tiny_mixedae(topk=1, segment="off")
    found = method.mixed(images_of(2), method.draw_assignment(1), look=True).found
    assert len(found) == 6
    for _, weights in found:
        kept = weights > 0
        assert (kept[:, :, 1:].sum(dim=-1) == 2).all()
        assert kept[:, :, 0].all()
        assert kept[..., 0].all()
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))


@pytest.fixture
def selections(monkeypatch):
    """The number of keys of every selection that the method makes."""
    calls, select = [], mixedae.top_keys_fast
    monkeypatch.setattr(mixedae, "top_keys_fast", lambda scores, topk: calls.append(topk) or select(scores, topk))
    return calls


@pytest.mark.parametrize(
    ("fields", "calls"),
    [
        ({"attention_blocks": (0, -1)}, [8, 8]),  # round(16 patches / 2 images), in two of six blocks
        ({"topk": 3}, [3] * 6),
        ({"attention": "global"}, []),
        ({"attention": "oracle"}, []),
        ({"mode": "mae"}, []),
    ],
)
def test_attention_blocks_choose_where_it_acts(fields, calls, selections):
    method = tiny_mixedae(**fields)
    method(images_of(4))
    assert selections == calls
    assert method.special_blocks == {
        block % 6 for block in fields.get("attention_blocks", range(6 * ("mode" not in fields)))
    }


# --- contrast and segments -------------------------------------------------------------------------------------------


@given(st.integers(1, 2), st.integers(2, 7), st.integers(1, 5), st.floats(0.1, 2), seeds)
def test_homologous_contrastive_matches_naive_loop(groups, patches, width, temperature, seed):
    """Eq. 7, also where a patch has no relatives."""
    z = randn(groups, patches, width, seed=seed)
    assignment = torch.randint(3, (groups, patches), generator=generator(seed))
    expected = reference.homologous_contrastive(z, assignment, temperature)
    found = mixedae.homologous_contrastive(z, assignment, temperature)
    torch.testing.assert_close(float(found), float(expected), rtol=1e-9, atol=1e-12)


def test_homologous_contrastive_of_patches_without_relatives_is_zero():
    """Eq. 7 counts patches that have positives."""
    for patches in (1, 3):
        z = randn(2, patches, 4).requires_grad_()
        loss = mixedae.homologous_contrastive(z, torch.arange(patches).expand(2, -1))
        assert loss == 0
        loss.backward()
        assert (z.grad == 0).all()


def test_homologous_contrastive_is_lowest_where_relatives_coincide():
    """Eq. 7 at what it wants: equal relatives, strangers opposite."""
    assignment = torch.tensor([[0, 0, 0, 1, 1, 1]])
    apart = F.one_hot(assignment, 2).double()
    best = mixedae.homologous_contrastive(apart * torch.tensor([1.0, -1.0]), assignment)
    opposite = torch.stack([apart[..., 0] - apart[..., 1], torch.zeros_like(apart[..., 0])], dim=-1)
    lowest = mixedae.homologous_contrastive(opposite, assignment)
    assert lowest < best
    for seed in range(20):
        assert mixedae.homologous_contrastive(randn(1, 6, 2, seed=seed), assignment) > lowest


def test_homologous_contrastive_has_the_right_gradient_and_keeps_float32_under_autocast():
    assignment = torch.tensor([[0, 1, 0, 1, 2]])
    z = randn(1, 5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mixedae.homologous_contrastive(x, assignment), z)
    plain = mixedae.homologous_contrastive(z.detach().float(), assignment)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixedae.homologous_contrastive(z.detach().float(), assignment), plain)


def test_segment_code_is_a_sine_cosine_code_of_the_slot():
    """Appendix B, and what centring makes of it."""
    code = mixedae.segment_code(4, 6)
    for slot, i in itertools.product(range(4), range(3)):
        angle = slot / 10000 ** (i / 3)
        assert code[slot, i] == pytest.approx(math.sin(angle), abs=1e-6)
        assert code[slot, 3 + i] == pytest.approx(math.cos(angle), abs=1e-6)
    centred = mixedae.segment_code(4, 16, centred=True)
    torch.testing.assert_close(centred.norm(dim=1), torch.ones(4))
    away = mixedae.segment_code(4, 16).double()
    away = away - away.mean(dim=0)
    torch.testing.assert_close(centred.double(), away / away.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("segment", "blocks"), [("off", []), ("first", [0]), ("every", [0, 1, 2, 3, 4, 5])])
def test_segments_are_added_to_the_patches_at_the_input_of_blocks(segment, blocks):
    """Appendix B: to the input of each block."""
    method = tiny_mixedae(segment=segment, attention="global")
    vit, assignment = method.encoder, method.draw_assignment(2)
    mixed = mixedae.mix(vit.embed(images_of(4)).unflatten(0, (2, 2)), assignment)
    x = torch.cat([vit.cls_token.expand(2, -1, -1), mixed], dim=1)
    for i, block in enumerate(vit.blocks):
        if i in blocks:
            x = torch.cat([x[:, :1], x[:, 1:] + method.segments[assignment]], dim=1)
        x = block(x)
    torch.testing.assert_close(method.encode(mixed, assignment)[0], vit.norm(x))


# --- the method ------------------------------------------------------------------------------------------------------


def test_contrast_off_global_attention_and_no_segments_is_naive_mixing():
    """The naive baseline written out: mix, encode, unmix, decode, loss on what came from others."""
    method = tiny_mixedae(attention="global", segment="off", contrast=0.0)
    images, assignment = images_of(4), method.draw_assignment(2)
    out = method(images, assignment=assignment)
    autoencoder, vit = method.autoencoder, method.encoder
    mixed = mixedae.mix(vit.embed(images).unflatten(0, (2, 2)), assignment)
    encoded = vit.encode(mixed)
    errors = []
    for g, i in itertools.product(range(2), range(2)):
        visible = torch.nonzero(assignment[g] == i)[:, 0][None]
        tokens = torch.cat([encoded[g : g + 1, :1], common.take(encoded[g : g + 1, 1:], visible)], dim=1)
        prediction = autoencoder.decode(tokens, visible)[0]
        target = autoencoder.target(images[2 * g + i][None])[0]
        errors.append((prediction - target).square().mean(dim=-1)[assignment[g] != i])
    expected = torch.cat(errors).mean()
    torch.testing.assert_close(out["loss"], expected)
    assert torch.equal(out["loss"], out["reconstruction"])


def test_loss_is_eq_8():
    """Eq. 8 with the weights of either loss."""
    for reconstruction, contrast in ((1.0, 0.1), (0.0, 1.0), (2.0, 0.0)):
        out = tiny_mixedae(reconstruction=reconstruction, contrast=contrast)(images_of(4))
        expected = reconstruction * out["reconstruction"] + contrast * out["contrast"]
        torch.testing.assert_close(out["loss"], expected)


def test_full_mode_is_the_mean_over_its_mixtures():
    full, compose = tiny_mixedae(mode="full"), tiny_mixedae(mode="compose")
    images, assignment = images_of(4), full.draw_assignment(2)
    parts = [compose(images, assignment=assignment[s::2]) for s in range(2)]  # the first and the second of each group
    out = full(images, assignment=assignment)
    for name in ("reconstruction", "contrast"):
        torch.testing.assert_close(out[name], (parts[0][name] + parts[1][name]) / 2)


def test_mae_mode_is_mae_with_the_contrast_across_the_images_of_a_group():
    """Table A4: MAE, and Eq. 7 across different unmixed images."""
    method = tiny_mixedae(mode="mae", images_per_group=4, segment="off")
    images = images_of(8)
    torch.manual_seed(3)
    out = method(images)
    torch.manual_seed(3)
    plain = method.autoencoder(images)
    assert plain.mask.sum() == 8 * 12  # three quarters
    expected = common.reconstruction_loss(plain.prediction, plain.target, plain.mask)
    torch.testing.assert_close(out["reconstruction"], expected)
    tokens = plain.encoded[:, 1:].unflatten(0, (2, 4)).flatten(1, 2)  # four patches of four images
    contrast = reference.homologous_contrastive(
        tokens.detach().double(), torch.arange(4).repeat_interleave(4).expand(2, -1), 0.25
    )
    assert out["contrast"].item() == pytest.approx(contrast, rel=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mode": "full"},
        {"mode": "mae"},
        {"attention": "oracle"},
        {"attention": "global", "segment": "off"},
        {"reconstruction": 0.0},
    ],
)
def test_every_parameter_gets_a_gradient(fields):
    method = tiny_mixedae(**fields)
    method(images_of(4))["loss"].backward()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []


def test_images_without_mixing_get_the_segments_of_their_slots_too():
    """Table A4c, second row: segment embeddings without mixing."""

    def input_of_blocks(segment):
        method, seen = tiny_mixedae(mode="mae", images_per_group=4, segment=segment), []
        for block in method.encoder.blocks:
            block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        torch.manual_seed(0)
        method(images_of(8))
        assert len(seen) == 6
        return seen, method.segments

    plain, segments = input_of_blocks("off")
    added = input_of_blocks("first")[0][0] - plain[0]
    assert (added[:, 0] == 0).all()
    for image in range(8):
        torch.testing.assert_close(added[image, 1:], segments[image % 4].expand(4, -1), atol=1e-5, rtol=1e-5)
    assert torch.equal(input_of_blocks("every")[0][0], input_of_blocks("first")[0][0])
    assert not torch.allclose(input_of_blocks("every")[0][1], input_of_blocks("first")[0][1], atol=1e-2)


def test_homologous_accuracy_is_logged_for_topk_attention_alone_and_over_all_blocks():
    """Fig. 6, from the weights instead of the keys."""
    for fields in ({"attention": "oracle"}, {"attention": "global"}, {"mode": "mae"}):
        assert "homologous" not in tiny_mixedae(**fields)(images_of(4))
    method = tiny_mixedae(topk=3, cell=1)  # larger cells make M symmetric, and hide a mistake in the order of patches
    assignment = method.draw_assignment(2)
    out = method(images_of(4), assignment=assignment)
    found = method.mixed(images_of(4), assignment, look=True).found
    relatives = mixedae.same_image(assignment)[:, None]
    shares = [((weights[:, :, 1:, 1:] > 0) & relatives).sum(dim=-1) / 3 for _, weights in found]
    torch.testing.assert_close(out["homologous"], torch.stack(shares).mean())


@pytest.mark.parametrize("attention", ["topk", "oracle", "global"])
def test_looking_at_the_attention_changes_nothing(attention):
    """`look` gives weights that make the same output, and only then are they kept."""
    method = tiny_mixedae(attention=attention)
    q, k, v = (randn(2, 3, 17, 4, seed=i) for i in range(3))
    assignment = method.draw_assignment(2)
    out, accuracy, nothing = method.attention(q, k, v, assignment)
    looked, same, weights = method.attention(q, k, v, assignment, look=True)
    assert nothing is None and accuracy == same
    torch.testing.assert_close(looked, out)
    torch.testing.assert_close(weights @ v, out)


def test_the_attention_of_the_method_matches_a_loop():
    """The patches that are most similar, and the CLS token besides, which sees all."""
    method = tiny_mixedae(topk=3)
    q, k, v = (randn(2, 3, 17, 4, seed=i) for i in range(3))
    out, _, _ = method.attention(q, k, v, method.draw_assignment(2))
    for g, h, i in itertools.product(range(2), range(3), range(17)):
        scores = q[g, h, i] @ k[g, h].T / 2
        keys = list(range(17)) if i == 0 else [0, *(scores[1:].argsort(descending=True)[:3] + 1).tolist()]
        torch.testing.assert_close(out[g, h, i], scores[keys].softmax(dim=0) @ v[g, h, keys])


@pytest.mark.parametrize("attention", ["topk", "oracle", "global"])
def test_attention_survives_overflow_in_fp16(attention):
    method = tiny_mixedae(attention=attention)
    huge = torch.full((2, 3, 17, 64), 200.0, dtype=torch.float16)
    out, _, _ = method.attention(huge, huge, huge, method.draw_assignment(2), look=True)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "fields", [{}, {"attention": "oracle"}, {"attention": "global"}, {"mode": "mae"}, {"mode": "full"}]
)
def test_the_method_runs_under_autocast(fields, dtype):
    method, images = tiny_mixedae(**fields), images_of(4)
    torch.manual_seed(1)
    exact = method(images)["loss"]
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype):
        loss = method(images)["loss"]
    loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())
    torch.testing.assert_close(loss.float(), exact, rtol=0.05, atol=0.05)


def test_masked_self_attention_keeps_images_apart_in_the_encoder():
    """The supplement's control prevents leakage: what another image shows does not reach the patches of this one."""
    method, images = tiny_mixedae(attention="oracle", segment="off"), images_of(2)
    assignment = method.draw_assignment(1)
    changed = torch.cat([images[:1], 1 - images[1:]])
    mixtures = [mixedae.mix(method.encoder.embed(x)[None], assignment) for x in (images, changed)]
    one, other = (method.encode(mixture, assignment)[0] for mixture in mixtures)
    own = torch.nonzero(assignment[0] == 0)[:, 0] + 1
    torch.testing.assert_close(one[0, own], other[0, own])
    assert not torch.allclose(one[0, 0], other[0, 0])  # the CLS token sees all


def test_contrast_is_taken_on_the_encoded_patches_with_its_temperature():
    """Where Eq. 7 is taken, a choice of ours."""
    method, images = tiny_mixedae(temperature=0.7), images_of(4)
    assignment = method.draw_assignment(2)
    mixed = mixedae.mix(method.encoder.embed(images).unflatten(0, (2, 2)), assignment)
    encoded, _ = method.encode(mixed, assignment)
    expected = mixedae.homologous_contrastive(encoded[:, 1:], assignment, 0.7)
    torch.testing.assert_close(method(images, assignment=assignment)["contrast"], expected)


def test_the_settings_reach_the_parts():
    method = tiny_mixedae(
        image_size=32, images_per_group=5, batch_size=5, pool="cls", norm_pixels=False, segment_scale=0.5
    )
    assert method.topk == 13  # round(64 / 5)
    assert method.encoder.pool == "cls"
    assert not method.autoencoder.norm_pixels
    assert method.encoder.mean.flatten().tolist() == [0.5] * 3
    assert method.encoder.std.flatten().tolist() == [0.25] * 3
    torch.testing.assert_close(method.segments, 0.5 * mixedae.segment_code(5, 96))
    centred = tiny_mixedae(segment_scale=2.0, segment_centred=True, decoder_dim=24, decoder_depth=2, decoder_heads=3)
    torch.testing.assert_close(centred.segments, 2 * mixedae.segment_code(2, 96, centred=True))
    blocks = centred.autoencoder.decoder_blocks
    assert [(block.heads, block.attn["proj"].in_features) for block in blocks] == [(3, 24), (3, 24)]
    cells = method.draw_assignment(20).view(20, 4, 2, 4, 2)
    assert (cells == cells[:, :, :1, :, :1]).all()
    assert (tiny_mixedae(cell=1).draw_assignment(20).view(20, 2, 2, 2, 2).diff(dim=2) != 0).any()


def test_mixtures_do_not_depend_on_hidden_patches():
    """What an image loses to the others must not reach its prediction."""
    method, images = tiny_mixedae(), images_of(2)
    assignment = method.draw_assignment(1)
    hidden = F.interpolate((assignment != 0).view(1, 1, 4, 4).float(), scale_factor=4)
    changed = images.clone()
    changed[:1] = torch.where(hidden == 1, 1 - images[:1], images[:1])
    mixtures = [mixedae.mix(method.encoder.embed(x)[None], assignment) for x in (images, changed)]
    assert torch.equal(*mixtures)
    one, other = (method(x, assignment=assignment)["loss"] for x in (images, changed))
    assert one != other  # only as the target


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 18}, "image size 18 x 18 is not a multiple of the patch size 4"),
        ({"patch": 0}, "a transformer of width 96, 6 blocks, 3 heads and patch 0 cannot be built"),
        ({"reconstruction": 0.0, "contrast": 0.0}, "--reconstruction 0 --contrast 0 leave nothing to learn"),
        ({"images_per_group": 1}, "--images-per-group 1: a mixture needs two images or more"),
        ({"cell": 3}, "--cell 3 does not divide the 4 x 4 patches"),
        ({"cell": 4}, "--cell 4 leaves fewer cells than the 2 images"),
        ({"mode": "mix"}, "unknown --mode 'mix'"),
        ({"attention": "local"}, "unknown --attention 'local'"),
        ({"segment": "last"}, "unknown --segment 'last'"),
        ({"model": "vit_huge"}, "unknown --model 'vit_huge'"),
        ({"attention_blocks": (6,)}, "--attention-blocks (6,): give blocks from -6 to 5"),
        ({"temperature": 0.0}, "--temperature 0.0 makes no sense"),
        ({"temperature": math.nan}, "--temperature nan makes no sense"),
        ({"contrast": -0.1}, "--contrast -0.1 makes no sense"),
        ({"reconstruction": math.inf}, "--reconstruction inf makes no sense"),
        ({"topk": 17}, "--topk 17 keeps more than the 16 patches"),
    ],
)
def test_mixedae_refuses_what_makes_no_sense(fields, message):
    with pytest.raises(UserError) as error:
        tiny_mixedae(**fields)
    assert str(error.value).startswith(message)


def test_batches_must_make_whole_groups():
    with pytest.raises(ValueError, match="3 images do not make groups of 2"):
        tiny_mixedae()(images_of(3))
    with pytest.raises(ValueError, match="3 assignments for 2 groups, mixed 1 times each"):
        tiny_mixedae()(images_of(4), assignment=tiny_mixedae().draw_assignment(3))
    for fields, message in (
        ({"images_per_group": 3}, "gives each process and part 8 images, not a multiple of --images-per-group 3"),
        ({"accumulate": 8}, "gives each process and part 1 images, not a multiple of --images-per-group 2"),
    ):
        method = tiny_mixedae(**fields)
        with pytest.raises(UserError, match=message):
            method.plan(100, method.config)


def test_recipes_are_table_a1():
    def config_of(*argv):
        return read_flags(Config, mixedae.RECIPES, ["--data", "imagenet", *argv])

    base, large = config_of(), config_of("--model", "vit_large")
    for config, model, batch in ((base, "vit_base", 4096), (large, "vit_large", 2048)):
        assert (config.model, config.batch_size, config.base_lr) == (model, batch, 7.5e-5)
        assert (config.epochs, config.warmup_epochs, config.weight_decay) == (1600, 40, 0.05)
        assert (config.betas, config.norm_pixels, config.mode) == ((0.9, 0.95), True, "compose")
        assert (config.images_per_group, config.cell, config.patch, config.image_size) == (4, 2, 16, 224)
        assert (config.contrast, config.temperature, config.segment, config.attention) == (0.1, 0.25, "every", "topk")
    for data in ("shapes", "cifar10"):
        config = read_flags(Config, mixedae.RECIPES, ["--data", data])
        assert (config.patch, config.cell, config.image_size, config.model) == (4, 2, 32, "vit_micro")


@pytest.mark.parametrize(
    "fields", [{}, {"mode": "full"}, {"attention": "oracle"}, {"attention": "global"}, {"mode": "mae"}]
)
def test_pictures_show_the_group_the_mixture_and_what_it_becomes(fields):
    method, images = tiny_mixedae(**fields), images_of(5)
    rows = method.pictures(images)
    assert rows.shape[1] == len(method.captions)
    assert 0 <= rows.min() <= rows.max() <= 1
    if method.config.mode == "mae":
        assert rows.shape == (4, 3, 3, 16, 16)
        return
    assert rows.shape == (2, 6, 3, 128, 128)
    torch.testing.assert_close(rows[:, :2, :, ::8, ::8].flatten(0, 1), images[:4])
    mixture, left = rows[:, 2], rows[:, 3]
    from_left = (mixture - rows[:, 0]).abs().amax(dim=1) < 1e-5
    from_right = (mixture - rows[:, 1]).abs().amax(dim=1) < 1e-5
    assert (from_left ^ from_right).float().mean() > 0.99
    torch.testing.assert_close(left[from_left[:, None].expand_as(left)], mixture[from_left[:, None].expand_as(left)])
    attention = rows[:, 5]
    red = (attention - torch.tensor([1.0, 0.1, 0.1])[:, None, None]).abs().amax(dim=1) < 1e-6
    assert (red.sum(dim=(1, 2)) == 32**2 - 24**2).all()  # the frame of one patch


def test_the_picture_of_attention_frames_the_relatives_and_lights_what_is_attended_to():
    assignment = torch.zeros(1, 16, dtype=torch.long)
    assignment[0, 1:9] = 1  # the query is patch 10, of image 0
    weights = torch.zeros(1, 2, 17, 17)
    weights[0, :, 11, 1:] = torch.arange(16.0) / 15
    grey = torch.full((1, 3, 64, 64), 0.5)
    picture = mixedae.attention_picture(grey, weights, assignment, (4, 4))[0]
    middle = picture[0, 8::16, 8::16].flatten()
    torch.testing.assert_close(middle, 0.5 * (0.15 + 0.85 * torch.arange(16.0) / 15))
    corner = picture[:, ::16, ::16].flatten(1).T  # a pixel of each frame
    white = (corner == 1).all(dim=1)
    assert white.tolist() == [i in (0, 9, 11, 12, 13, 14, 15) for i in range(16)]
    torch.testing.assert_close(corner[10], torch.tensor([1.0, 0.1, 0.1]))
    assert mixedae.attention_picture(grey, 0 * weights, assignment, (4, 4)).isfinite().all()


@pytest.mark.parametrize("fields", [{}, {"attention": "global"}, {"attention_blocks": (0, 3)}])
def test_the_pictures_show_the_attention_of_the_last_block_that_has_it(fields, monkeypatch):
    method, images, drawn = tiny_mixedae(**fields), images_of(4), []
    draw = mixedae.attention_picture
    monkeypatch.setattr(mixedae, "attention_picture", lambda *given: drawn.append(given) or draw(*given))
    method.pictures(images)
    ((_, weights, assignment, grid),) = drawn
    found = method.mixed(images, assignment, look=True).found
    assert len(found) == len(method.special_blocks)
    torch.testing.assert_close(weights, found[-1][1])
    assert not torch.allclose(weights, found[0][1])
    assert grid == (4, 4)


def test_the_picture_of_attention_is_the_mean_over_heads_as_bright_as_its_largest_value():
    """However small the weights: the brightest patch of each group is shown as it is, one without any at 0.15."""
    weights = torch.zeros(2, 2, 17, 17)
    weights[:, 0, 11, 1], weights[:, 1, 11, 4], weights[1, 0, 11, 6] = 0.02, 0.01, 0.04  # patches 0, 3 and 5
    white, alone = torch.ones(2, 3, 64, 64), torch.arange(16).expand(2, -1)  # no patch has relatives
    picture = mixedae.attention_picture(white, weights, alone, (4, 4))
    for group, light in ((0, {0: 1.0, 3: 0.5}), (1, {0: 0.5, 3: 0.25, 5: 1.0})):
        middle = picture[group, 0, 8::16, 8::16].flatten()
        torch.testing.assert_close(middle, 0.15 + 0.85 * torch.tensor([light.get(i, 0.0) for i in range(16)]))


@pytest.mark.parametrize("mode", ["compose", "full"])
def test_captions_stand_over_what_they_name(mode):
    """Each image beside the others of its group, the mixture of these by M, and what becomes of each in it."""
    method, images = tiny_mixedae(mode=mode, images_per_group=4), images_of(9)
    assert method.captions == (
        *("image 1", "image 2", "image 3", "image 4", "mixture"),
        *("reconstruction 1", "reconstruction 2", "reconstruction 3", "reconstruction 4", "attention"),
    )
    torch.manual_seed(3)
    rows = method.pictures(images)[..., ::8, ::8]
    torch.manual_seed(3)
    assignment = method.draw_assignment(2)[:: 4 if mode == "full" else 1]
    groups = images[:8].view(2, 4, 3, 16, 16)  # the ninth makes no group
    torch.testing.assert_close(rows[:, :4], groups)
    prediction = method.mixed(images[:8], assignment).prediction
    patches = common.patchify(method.encoder.normalize(images[:8]), 4)
    mean, std = patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    restored = common.unpatchify((prediction * std + mean) * 0.25 + 0.5, 4, 16, 16).clamp(0, 1).view(2, 4, 3, 16, 16)
    for group, row, column in itertools.product(range(2), range(4), range(4)):
        here = (group, slice(None), slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
        owner = int(assignment[group, 4 * row + column])
        torch.testing.assert_close(rows[:, 4][here], groups[:, owner][here])
        for image in range(4):
            expected = groups if image == owner else restored
            torch.testing.assert_close(rows[:, 5 + image][here], expected[:, image][here], rtol=1e-4, atol=1e-4)


def test_without_mixing_the_pictures_are_maes():
    """Three quarters of each of four images are grey; what is left is seen, and the rest is what comes out."""
    method, images = tiny_mixedae(mode="mae", images_per_group=4), images_of(4)
    assert method.captions == ("image", "masked image", "reconstruction")
    assert method.autoencoder.mask_ratio == 0.75
    torch.manual_seed(2)
    rows = method.pictures(images)
    torch.manual_seed(2)
    seen = method.unmixed(images)
    hidden = F.interpolate(seen.mask.view(4, 1, 4, 4).float(), scale_factor=4) > 0
    torch.testing.assert_close(rows[:, 0], images)
    torch.testing.assert_close(rows[:, 1], torch.where(hidden, 0.5, images))
    torch.testing.assert_close(torch.where(hidden, 0.5, rows[:, 2]), rows[:, 1])
    torch.testing.assert_close(rows, method.autoencoder.pictures_of(images, seen.prediction, seen.mask))
    assert not torch.allclose(rows[:, 2], images, atol=0.1)


def test_a_perfect_prediction_is_drawn_as_the_image(monkeypatch):
    method, images = tiny_mixedae(), images_of(4)
    monkeypatch.setattr(method, "reconstruct", lambda encoded, assignment: method.autoencoder.target(images))
    rows = method.pictures(images)[..., ::8, ::8]
    torch.testing.assert_close(rows[:, 3:5].flatten(0, 1), images, atol=1e-4, rtol=0)


def test_pictures_of_fewer_images_than_a_group_repeat_them():
    rows = tiny_mixedae(images_per_group=4).pictures(images_of(3))[..., ::8, ::8]
    assert rows.shape == (1, 10, 3, 16, 16)
    torch.testing.assert_close(rows[0, :4], images_of(3)[[0, 1, 2, 0]])


def test_mixtures_in_two_processes_are_those_of_one():
    """Split one global batch over two ranks: the averaged gradient is that of one process."""
    images = images_of(8, seed=5)
    method = tiny_mixedae()
    assignment = method.draw_assignment(4)
    method(images, assignment=assignment)["loss"].backward()
    whole = {name: p.grad for name, p in method.named_parameters()}
    for part in processes.start(processes.gradients_of_mixedae, images, assignment):
        for name, gradient in part.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6)
