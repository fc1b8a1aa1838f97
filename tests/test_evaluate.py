"""Every protocol of evaluate.py: its mathematics, its recipes, its command line and its pictures."""

import copy
import dataclasses
import json
import math
import sys
import types

import numpy as np
import processes
import pytest
import reference
import test_common
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torch import nn

import common
import evaluate
import train
from common import UserError, ViT
from evaluate import Classifier, Config, LinearHeads, Row, TransformerHead

seeds = st.integers(0, 2**32 - 1)
FILL = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- figures of merit ------------------------------------------------------------------------------------------------


@given(st.integers(2, 5), st.integers(2, 5), st.integers(1, 6), seeds)
def test_davies_bouldin_matches_naive_loop(classes, each, width, seed):
    """Davies and Bouldin 1979, as MAGMA's Fig. 4 uses it."""
    features = randn(classes * each, width, seed=seed, dtype=torch.float64)
    labels = 3 * torch.arange(classes).repeat(each) + 1  # class numbers with gaps
    slow = reference.davies_bouldin(features, labels)
    torch.testing.assert_close(evaluate.davies_bouldin(features, labels), slow, rtol=1e-9, atol=1e-12)


def test_davies_bouldin_is_small_for_tight_classes_and_ignores_scale_and_shift():
    labels = torch.arange(3).repeat(20)
    centres = 100 * torch.eye(3)[labels]
    tight = centres + randn(60, 3)
    assert evaluate.davies_bouldin(tight, labels) < 0.05
    wide = centres + 50 * randn(60, 3)
    assert evaluate.davies_bouldin(wide, labels) > 0.5
    once = evaluate.davies_bouldin(wide.double(), labels)
    assert evaluate.davies_bouldin(7 * wide.double() - 3, labels) == pytest.approx(once, rel=1e-9)


@given(st.integers(2, 4), st.integers(2, 4), st.integers(1, 6), seeds)
def test_class_cosines_match_naive_loop_over_pairs(classes, each, width, seed):
    """MLO-MAE, Appendix C.3 and Table 13."""
    features = randn(classes * each + 1, width, seed=seed, dtype=torch.float64)
    labels = torch.cat([torch.arange(classes).repeat(each), torch.tensor([0])])  # classes of different size
    slow = reference.class_cosines(features, labels)
    torch.testing.assert_close(evaluate.class_cosines(features, labels), slow, rtol=1e-9, atol=1e-12)


# --- augmentation ----------------------------------------------------------------------------------------------------


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
    mixed, targets = evaluate.mix_labels(images, torch.eye(batch), mixup, cutmix)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(batch))
    assert targets.min() >= 0
    seen = targets @ torch.arange(batch, dtype=torch.float32)  # the mean value that the targets promise
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), seen, atol=1e-4, rtol=1e-4)
    if not mixup and not cutmix:
        assert torch.equal(mixed, images)
    if cutmix and not mixup:  # every pixel is from one of the two
        partner = images.flip(0)
        assert ((mixed == images) | (mixed == partner)).all()


def test_mix_labels_draws_its_weights_from_beta_and_its_windows_anywhere():
    torch.manual_seed(0)
    images, targets = torch.zeros(4000, 1, 8, 8), torch.zeros(4000, 1)
    images[:2000], targets[:2000] = 1, 1  # partners differ
    for alpha in (0.8, 5.0):
        _, mixed = evaluate.mix_labels(images, targets, alpha, 0)
        own = torch.where(targets == 1, mixed, 1 - mixed)
        beta = torch.distributions.Beta(alpha, alpha)
        assert abs(own.mean() - 0.5) < 0.02
        assert abs(own.var() - beta.variance) < 0.01
    pictures, mixed = evaluate.mix_labels(images, targets, 0, 1.0)
    other = torch.where(images == 1, 1 - pictures, pictures)[:, 0]  # 1 where the partner is seen
    assert (other.mean(dim=0) > 0.1).all()  # no pixel is safe
    spans = [(other.amax(dim=d) > 0).sum(dim=1) for d in (1, 2)]
    assert torch.equal(spans[0] * spans[1], other.sum(dim=(1, 2)).long())  # a rectangle
    half, _ = evaluate.mix_labels(images, targets, 0, 1e6)  # a window of half the area, cut off at the rims
    seen = torch.where(images == 1, 1 - half, half).mean()
    assert abs(seen - (0.5**0.5 - 0.5 / 4) ** 2) < 0.02
    both, _ = evaluate.mix_labels(images, targets, 1.0, 1.0)
    cut = ((both == 0) | (both == 1)).flatten(1).all(dim=1).float().mean()
    assert abs(cut - 0.5) < 0.05  # a coin decides


def test_random_erase_fills_one_box_of_a_share_of_the_images():
    torch.manual_seed(0)
    images = torch.full((600, 3, 20, 30), 0.25)
    std = torch.full((3, 1, 1), 0.2)
    assert torch.equal(evaluate.random_erase(images, 0.0, FILL, std), images)
    out = evaluate.random_erase(images, 0.5, FILL, std)
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
    out = getattr(evaluate, name)(images, torch.full((2,), level), FILL)
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
    def by_pillow(picture):
        if matrix is None:
            return tensor(picture.rotate(3 * level, Image.Resampling.BILINEAR))
        size, bilinear = picture.size, Image.Resampling.BILINEAR
        return tensor(picture.transform(size, Image.Transform.AFFINE, matrix(level, *size), bilinear))

    operation, level_of_all = getattr(evaluate, name), torch.tensor([level])
    images = F.interpolate(rand(1, 3, 5, 6, seed=seed), (20, 26), mode="bilinear")
    known = by_pillow(Image.new("RGB", (26, 20), "white"))[None]
    inside = F.max_pool2d(F.pad(1 - known, [1] * 4, value=1.0), 3, 1)[0] == 0  # away from rims: these blend otherwise
    out = operation(images, level_of_all, torch.zeros(3, 1, 1))[0]
    torch.testing.assert_close(out[inside], by_pillow(pillow(images[0]))[inside], atol=0.02, rtol=0)
    outside = F.max_pool2d(F.pad(known, [1] * 4, value=1.0), 3, 1)[0] == 0
    filled = operation(torch.ones_like(images), level_of_all, FILL)[0]
    torch.testing.assert_close(filled[outside], FILL.expand(3, 20, 26)[outside], atol=1e-5, rtol=0)


@pytest.mark.parametrize("operation", evaluate.OPERATIONS, ids=lambda operation: operation.__name__)
@given(seeds)
def test_operations_stay_in_range_and_do_nothing_at_zero_strength(operation, seed):
    images = rand(3, 3, 7, 8, seed=seed)
    level = 20 * rand(3, seed=seed + 1) - 10
    out = operation(images, level, FILL)
    assert out.shape == images.shape
    assert 0 <= out.min()
    assert out.max() <= 1 + 1e-6
    at_zero = operation(images, torch.zeros(3), FILL)
    if operation in (evaluate.autocontrast, evaluate.equalize, evaluate.invert, evaluate.posterize):
        assert not torch.equal(at_zero, images)  # these know no zero strength
    else:
        torch.testing.assert_close(at_zero, images, atol=1e-5, rtol=0)


def test_flat_images_survive_autocontrast_and_equalize():
    images = torch.full((2, 3, 4, 4), 0.2)
    for operation in (evaluate.autocontrast, evaluate.equalize):
        torch.testing.assert_close(operation(images, torch.zeros(2), FILL), images)


def test_rand_augment_draws_every_operation_for_some_images_at_its_magnitude(monkeypatch):
    """RandAugment (9, 0.5): two rounds, each with probability 1/2, levels around the magnitude in both directions."""
    seen = {i: [] for i in range(15)}
    spies = [lambda x, level, fill, i=i: seen[i].append(level) or x for i in range(15)]
    monkeypatch.setattr(evaluate, "OPERATIONS", spies)
    torch.manual_seed(0)
    images = rand(3000, 3, 2, 2)
    assert torch.equal(evaluate.rand_augment(images, FILL), images)
    counts = torch.tensor([sum(map(len, seen[i])) for i in range(15)])
    assert abs(counts.sum() / 3000 - 1) < 0.05
    assert counts.min() > 140
    assert counts.max() < 260
    levels = torch.cat([torch.cat(part) for part in seen.values()])
    assert abs(levels.abs().mean() - 9) < 0.05
    assert abs(levels.abs().std() - 0.5) < 0.05
    assert levels.abs().max() <= 10
    assert abs((levels > 0).float().mean() - 0.5) < 0.03


@pytest.mark.parametrize("operation", evaluate.OPERATIONS, ids=lambda operation: operation.__name__)
def test_operations_stay_on_the_device_of_the_images(operation):
    images, level, fill = (torch.zeros(*shape, device="meta") for shape in ((2, 3, 4, 4), (2,), (3, 1, 1)))
    assert operation(images, level, fill).device.type == "meta"


def test_rand_augment_leaves_its_input_alone_and_depends_on_the_seed_alone():
    images = rand(40, 3, 8, 8)
    kept, outs = images.clone(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(evaluate.rand_augment(images, FILL))
    assert torch.equal(images, kept)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert (outs[0] != images).flatten(1).any(dim=1).float().mean() > 0.5


# --- heads, optimiser, drop path, layer-wise rates -------------------------------------------------------------------


def test_finola_goes_by_the_name_of_its_encoder_and_not_by_the_channels_of_q():
    with torch.device("meta"):
        for name, width in ((720, 192), (1440, 384), (2880, 768), (4320, 768)):
            encoder = common.MobileFormer(name, head=512)
            assert evaluate.decoder_width(evaluate.width_of(encoder)) == width
            config = evaluate.settings(
                "tran1", {"image_size": 32, "data": "x"}, "finola", evaluate.width_of(encoder), 10**6
            )
            head = evaluate.make_head("tran1", encoder.dim, 10, config, width=evaluate.width_of(encoder))
            assert head(torch.empty(2, 5, 512)).shape == (1, 2, 10)
            assert head.blocks[0].norm1.normalized_shape == (width,)
    assert evaluate.width_of(common.MobileFormer("micro", head=8)) == 8
    assert evaluate.width_of(common.ViT(8, 4, 16, 1, 2)) == 16


@pytest.mark.parametrize(("encoder", "width", "millions"), [(720, 192, 2.1), (1440, 384, 8.0), (2880, 768, 31.3)])
def test_transformer_head_has_the_parameters_of_finola(encoder, width, millions):
    """FINOLA, Table 7: what tran-4 adds to encoders of width 720, 1440 and 2880, with 1000 classes."""
    assert evaluate.decoder_width(encoder) == width
    with torch.device("meta"):
        head = TransformerHead(encoder, width, 4, 1000)
    assert sum(p.numel() for p in head.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_transformer_head_knows_no_position_and_drops_only_while_training():
    torch.manual_seed(0)
    head = TransformerHead(12, 64, 2, 5, dropout=0.5).eval()
    tokens = randn(3, 7, 12)
    out = head(tokens)
    assert out.shape == (1, 3, 5)
    torch.testing.assert_close(head(tokens[:, torch.randperm(7)]), out)
    torch.testing.assert_close(head(tokens), out)
    assert not torch.equal(head.train()(tokens), out)


def test_linear_heads_side_by_side_train_as_each_would_alone():
    features, labels = randn(60, 5), torch.arange(60) % 3
    settings = {"optimizer": "sgd", "epochs": 4, "batch_size": 20, "warmup_epochs": 1, "batchnorm": True}
    several = Config(**settings, base_lr=0.5, base_lrs=(0.1, 3.0))
    torch.manual_seed(0)
    heads = LinearHeads(5, 3, 2, batchnorm=True)
    alone = [LinearHeads(5, 3, 1, batchnorm=True) for _ in range(2)]
    for head, layer in zip(alone, heads.layers, strict=True):
        head.layers[0].load_state_dict(layer.state_dict())
    evaluate.fit_on_features(heads, features, labels, 3, several)
    for head, layer, rate in zip(alone, heads.layers, several.base_lrs, strict=True):
        evaluate.fit_on_features(head, features, labels, 3, Config(**settings, base_lr=rate))
        torch.testing.assert_close(head.layers[0].weight, layer.weight)
    assert not torch.allclose(heads.layers[0].weight, heads.layers[1].weight)
    mean = heads.norm(features).mean(dim=0) if heads.train() else None
    torch.testing.assert_close(mean, torch.zeros(5), atol=1e-5, rtol=0)


def test_linear_probe_learns_what_is_linear():
    features = randn(400, 6)
    labels = (features @ randn(6, 4, seed=1)).argmax(dim=1)
    head = LinearHeads(6, 4)
    config = Config(optimizer="sgd", base_lr=0.1, epochs=60, batch_size=256, milestones=(40, 50), warmup_epochs=0)
    evaluate.fit_on_features(head, features, labels, 4, config)
    assert evaluate.accuracies(head(features), labels)[0] > 95


@given(st.floats(0, 0.5), st.floats(0.5, 0.95), seeds)
def test_lars_matches_the_slow_version(decay, momentum, seed):
    """You et al. 2017 as MAE's linear probe has it: trust ratio 0.001, none for biases."""
    weight = nn.Parameter(randn(3, 4, seed=seed, dtype=torch.float64))
    bias = nn.Parameter(randn(3, seed=seed + 1, dtype=torch.float64))
    optimizer = evaluate.LARS([weight, bias], lr=0.7, weight_decay=decay, momentum=momentum)
    w, b, vw, vb = weight.detach().clone(), bias.detach().clone(), 0, 0
    for step in range(3):
        gw, gb = randn(3, 4, seed=step, dtype=torch.float64), randn(3, seed=step + 9, dtype=torch.float64)
        weight.grad, bias.grad = gw.clone(), gb.clone()
        optimizer.step()
        move = gw + decay * w
        vw = momentum * vw + move * 0.001 * w.norm() / move.norm()
        vb = momentum * vb + gb
        w, b = w - 0.7 * vw, b - 0.7 * vb
        torch.testing.assert_close(weight.detach(), w, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(bias.detach(), b, rtol=1e-9, atol=1e-12)


def test_lars_moves_a_weight_of_zeros():
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    evaluate.LARS([weight], lr=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), -0.5))


def test_layer_groups_count_from_the_blocks_whatever_lies_around_them():
    encoder, head = Map(), LinearHeads(8, 2)
    encoder.after = nn.Conv2d(8, 8, 1)
    scale = {id(p): g["lr_scale"] for g in evaluate.layer_groups(encoder, head, 0.5, 0.0) for p in g["params"]}
    found = [scale[id(p)] for p in (encoder.stem.weight, encoder.blocks[0].weight, encoder.blocks[1].weight)]
    assert found == [0.125, 0.25, 0.5]
    assert scale[id(encoder.after.weight)] == scale[id(head.layers[0].weight)] == 1
    with pytest.raises(UserError, match="--layer-decay needs an encoder made of blocks"):
        evaluate.layer_groups(nn.Linear(8, 8), head, 0.5, 0.0)
    assert len(evaluate.layer_groups(None, head, 1.0, 0.0)) == 2


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    assert torch.equal(evaluate.drop_path(x, 0.0), x)
    out = evaluate.drop_path(x, 0.25).flatten(1)
    assert (out == out[:, :1]).all()
    assert sorted(set(out[:, 0].tolist())) == pytest.approx([0, 4 / 3])
    assert abs(out.mean() - 1) < 0.03


def tiny_vit(**fields):
    torch.manual_seed(0)
    return ViT(**{"image_size": 8, "patch": 4, "dim": 16, "depth": 3, "heads": 2} | fields)


def test_add_drop_path_rises_from_the_first_block_to_the_last_and_stops_in_eval(monkeypatch):
    """Stochastic depth (Huang et al. 2016), on both branches of a block."""
    rates = []
    monkeypatch.setattr(evaluate, "drop_path", lambda x, rate: rates.append(rate) or x)
    encoder, images = tiny_vit(), rand(2, 3, 8, 8)
    plain = encoder(images)
    evaluate.add_drop_path(encoder, 0.2)
    torch.testing.assert_close(encoder.train()(images), plain)
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2])
    encoder.eval()(images)
    assert len(rates) == 6
    monkeypatch.setattr(evaluate, "drop_path", lambda x, rate: 0 * x)  # dropped branches leave the input as it is
    encoder.train()
    torch.testing.assert_close(encoder.blocks[1](plain[:, None]), plain[:, None])


def test_layer_groups_are_those_of_mae():
    encoder, head = tiny_vit(), LinearHeads(16, 4)
    groups = evaluate.layer_groups(encoder, head, 0.5, 0.05)
    scale = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    everything = [*encoder.parameters(), *head.parameters()]
    assert sorted(scale) == sorted(map(id, everything))
    assert sum(len(group["params"]) for group in groups) == len(everything)
    assert scale[id(encoder.patch_embed["proj"].weight)] == (0.5**4, 0.05)
    assert scale[id(encoder.cls_token)] == (0.5**4, 0)
    for i, block in enumerate(encoder.blocks):
        assert scale[id(block.attn["qkv"].weight)] == (0.5 ** (3 - i), 0.05)
        assert scale[id(block.attn["qkv"].bias)] == (0.5 ** (3 - i), 0)
        assert scale[id(block.norm1.weight)] == (0.5 ** (3 - i), 0)
    assert scale[id(encoder.norm.weight)] == (1, 0)
    assert scale[id(head.layers[0].weight)] == (1, 0.05)


@given(st.integers(2, 6), st.floats(0, 0.9), seeds)
def test_soft_loss_is_cross_entropy_with_smoothed_labels_summed_over_heads(classes, smoothing, seed):
    logits, labels = randn(2, 5, classes, seed=seed), torch.arange(5) % classes
    targets = evaluate.one_hot(labels, classes, smoothing)
    expected = sum(F.cross_entropy(one, labels, label_smoothing=smoothing) for one in logits)
    torch.testing.assert_close(evaluate.soft_loss(logits, targets), expected)


# --- recipes ---------------------------------------------------------------------------------------------------------


def check(config, **expected):
    assert {name: getattr(config, name) for name in expected} == expected


def recipe(protocol, name="", dim=768, **given):
    given |= {"image_size": 224, "data": "x"} | ({"recipe": name} if name else {})
    return evaluate.settings(protocol, given, "magma", dim, 10**6)


def test_linear_recipes_are_those_of_the_papers():
    """MAGMA, "Evaluation protocol"; FINOLA, Table 13; MAE, Table 10."""
    check(
        recipe("linear"), recipe="magma", optimizer="sgd", base_lr=0.1, epochs=100, milestones=(60, 80), batch_size=256
    )
    shared = {
        "base_lr": 0.1,
        "weight_decay": 0.0,
        "epochs": 90,
        "warmup_epochs": 10,
        "milestones": (),
        "batchnorm": True,
    }
    check(recipe("linear", "finola"), optimizer="sgd", batch_size=4096, pool="mean", **shared)
    check(recipe("linear", "mae"), optimizer="lars", batch_size=16384, momentum=0.9, pool="cls", **shared)
    for name, cached in (("magma", True), ("finola", False), ("mae", False)):
        check(recipe("linear", name), cache=cached, crop_min=0.08, flip=0.5, randaugment=0.0, smoothing=0.0)


def test_transformer_recipes_are_finolas_table_13():
    for protocol in ("tran1", "tran4"):
        shared = {"optimizer": "adamw", "base_lr": 5e-4, "weight_decay": 0.1, "batch_size": 4096, "warmup_epochs": 10}
        shared |= {"epochs": 200, "randaugment": 9.0, "smoothing": 0.1, "mixup": 0.0, "cutmix": 0.0}
        for dim, dropout, erase in ((720, 0.1, 0.0), (1440, 0.2, 0.0), (2880, 0.2, 0.25)):
            check(recipe(protocol, dim=dim), dropout=dropout, erase=erase, **shared)


def test_recipes_keep_their_shape_with_fewer_epochs():
    check(recipe("linear", epochs=10), milestones=(6, 8), warmup_epochs=0)
    check(recipe("finetune", "mae", epochs=20), warmup_epochs=1)
    check(recipe("finetune", "mae", epochs=20, warmup_epochs=7), warmup_epochs=7)


def test_finetune_recipes_are_those_of_the_papers():
    """MAE, Table 9; Energy-inspired pretraining, Table A; MixedAE, Table A2; FINOLA, Table 14."""
    shared = {"optimizer": "adamw", "weight_decay": 0.05, "betas": (0.9, 0.999), "warmup_epochs": 5, "randaugment": 9.0}
    shared |= {"smoothing": 0.1}
    strong = shared | {
        "batch_size": 1024,
        "epochs": 100,
        "mixup": 0.8,
        "cutmix": 1.0,
        "drop_path": 0.1,
        "head": "linear",
    }
    for name, rate, decay in (
        ("mae", 1e-3, 0.75),
        ("ebm", 1e-3, 0.75),
        ("mixedae", 5e-4, 0.7),
        ("mae_code", 5e-4, 0.65),
    ):
        check(recipe("finetune", name), base_lr=rate, layer_decay=decay, **strong)
    table = {720: (0.9, 200, 0.0, 0.0), 1440: (0.9, 150, 0.2, 0.25), 2880: (0.85, 100, 0.8, 1.0)}
    for dim, (decay, epochs, mixup, cutmix) in table.items():
        config = recipe("finetune", "finola", dim)
        check(config, base_lr=5e-4, batch_size=512, dropout=0.2, erase=0.25, head="tran1", **shared)
        check(config, layer_decay=decay, epochs=epochs, mixup=mixup, cutmix=cutmix)


def test_a_recipe_is_used_where_it_exists():
    for protocol, name in (("linear", "mae"), ("tran1", "finola"), ("finetune", "mae"), ("knn", "")):
        assert recipe(protocol, "mae").recipe == name
    assert recipe("linear", "ebm").recipe == "magma"


def test_settings_put_flags_over_recipes_and_follow_the_method(capsys):
    check(recipe("linear", "mae", epochs=3, batch_size=64), epochs=3, batch_size=64, optimizer="lars")
    given = {"image_size": 8, "data": "x"}
    for method, name in (("finola", "finola"), ("mixedae", "mixedae"), ("ebm_pretrain", "ebm"), ("magma", "mae")):
        assert evaluate.settings("finetune", given, method, 8, 9999).recipe == name
    small = evaluate.settings("finetune", given, "magma", 8, 100)
    assert small.batch_size == 100
    assert "a batch of 1024 exceeds the 100 images" in capsys.readouterr().out
    assert recipe("tran1", base_lrs=(0.1, 0.2)).base_lrs == ()  # for linear alone


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metric": "cosin"}, "unknown --metric 'cosin'; did you mean 'cosine'"),
        ({"optimizer": "adam"}, "unknown --optimizer 'adam'; did you mean 'adamw'"),
        ({"pool": "max"}, "unknown --pool 'max'; choose from cls, mean"),
        ({"head": "tran2"}, "unknown --head 'tran2'"),
        ({"drop_path": 1.0}, "--drop-path 1.0 makes no sense; give at least 0, less than 1"),
        ({"randaugment": 11.0}, "--randaugment 11.0 makes no sense; give 0 to 10"),
        ({"cutmix": math.inf}, "--cutmix inf makes no sense"),
        ({"mixup": -1.0}, "--mixup -1.0 makes no sense"),
        ({"smoothing": math.nan}, "--smoothing nan makes no sense"),
        ({"k": 0}, "--k 0 makes no sense"),
        ({"base_lr": 0.0}, "--base-lr 0.0 makes no sense"),
        ({"epochs": 0}, "--epochs 0 makes no sense"),
    ],
)
def test_settings_refuse_what_makes_no_sense(given, message):
    with pytest.raises(UserError) as error:
        evaluate.settings("finetune", {"image_size": 8, "data": "x"} | given, "magma", 8, 100)
    assert str(error.value).startswith(message)


# --- probes and fine-tuning ------------------------------------------------------------------------------------------


def striped(count, seed=0, size=8):
    """Images of three classes that a probe can tell apart: which channel is bright."""
    labels = torch.arange(count) % 3
    images = (60 * rand(count, 3, size, size, seed=seed) + 120 * F.one_hot(labels, 3)[:, :, None, None]).to(torch.uint8)
    return common.MemoryImages(images, labels, ["red", "green", "blue"], (0.5,) * 3, (0.25,) * 3)


class Map(nn.Module):
    """An encoder that returns a map (B, D, H, W), as a convolutional one does."""

    def __init__(self):
        super().__init__()
        self.dim, self.fields = 8, {"image_size": 8}
        self.stem, self.blocks = nn.Conv2d(3, 8, 2, 2), nn.ModuleList([nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)])
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
        self.register_buffer("std", torch.full((3, 1, 1), 0.25))

    def forward(self, images):
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return x


def row_of(encoder, name="trained"):
    return Row(name, encoder and encoder.eval(), striped(96), striped(48, seed=1), torch.device("cpu"))


def small(protocol, tmp_path, **given):
    given = {"image_size": 8, "data": "stripes", "out": str(tmp_path), "amp": "off"} | given
    return evaluate.settings(protocol, given, "magma", 16, 96)


QUICK = {"epochs": 2, "batch_size": 32, "base_lr": 8e-3, "warmup_epochs": 0}


@pytest.mark.parametrize("kind", ["vit", "map"])
@pytest.mark.parametrize("protocol", ["knn", "linear", "tran1", "tran4", "finetune", "clusters"])
def test_protocols_work_on_tokens_and_on_maps(protocol, kind, tmp_path):
    torch.manual_seed(0)
    row = row_of(tiny_vit() if kind == "vit" else Map())
    before = copy.deepcopy(row.encoder.state_dict())
    quick = (
        QUICK | ({"drop_path": 0.0} if kind == "map" else {}) if protocol not in ("knn", "clusters", "linear") else {}
    )
    found = evaluate.run(protocol, row, small(protocol, tmp_path, **quick))
    if protocol == "clusters":
        assert found["davies_bouldin"] > 0
    else:
        assert found[protocol] > (60 if protocol in ("knn", "linear") else 30)
    for name, value in row.encoder.state_dict().items():  # no protocol changes what the next one judges
        assert torch.equal(value, before[name])


def test_knn_has_two_metrics():
    """Bank vectors whose nearest neighbour by distance is not the nearest by angle."""
    row = row_of(None)
    row.kept = {
        ("train", ""): (torch.tensor([[1.0, 0.0], [10.0, 10.0]]), torch.tensor([0, 1])),
        ("test", ""): (torch.tensor([[1.0, 0.9]]), torch.tensor([1])),
    }
    for metric, right in (("euclidean", 0.0), ("cosine", 100.0)):
        assert evaluate.run_knn(row, Config(k=1, metric=metric))["knn"] == right


@pytest.mark.parametrize("batchnorm", [False, True])
def test_cached_linear_probe_equals_one_that_encodes_in_every_epoch(batchnorm, tmp_path, monkeypatch):
    fields = {"epochs": 3, "batch_size": 32, "smoothing": 0.3, "batchnorm": batchnorm}
    fields |= {"crop_min": 1.0, "flip": 0.0}  # nothing random about the images
    make, heads, out = evaluate.make_head, [], []
    monkeypatch.setattr(evaluate, "make_head", lambda *args, **more: heads.append(make(*args, **more)) or heads[-1])
    test = striped(48, seed=1)
    test = dataclasses.replace(test, images=test.images[test.labels == 0], labels=test.labels[test.labels == 0])
    for cache in (True, False):
        row = dataclasses.replace(row_of(tiny_vit()), test=test)  # of one class: statistics of a batch would tell it
        found = evaluate.run("linear", row, small("linear", tmp_path, cache=cache, **fields))
        out.append((found, heads[-1].layers[0].weight.detach()))
    assert out[0][0] == out[1][0]
    torch.testing.assert_close(out[0][1], out[1][1], rtol=1e-4, atol=1e-6)
    assert (tmp_path / "linear-stripes" / "log.jsonl").exists()


def test_protocols_do_not_change_the_features_of_the_next(tmp_path):
    """A recipe with a feature of its own leaves no trace in what comes after it."""
    row = row_of(tiny_vit(pool="mean"))
    before = evaluate.run("clusters", row, small("clusters", tmp_path))
    evaluate.run("linear", row, small("linear", tmp_path, recipe="mae", cache=True, epochs=1))
    assert row.encoder.pool == "cls"
    assert evaluate.run("clusters", row, small("clusters", tmp_path)) == before


def test_a_diverging_head_leaves_the_others_alone(tmp_path):
    row = row_of(tiny_vit())
    alone = evaluate.run("linear", row, small("linear", tmp_path, base_lrs=(0.1, 0.2), epochs=9, batch_size=32))
    found = evaluate.run("linear", row, small("linear", tmp_path, base_lrs=(0.1, 1e38), epochs=9, batch_size=32))
    assert found["linear 0.1"] == alone["linear 0.1"]
    assert math.isnan(found["linear 1e+38"])
    assert evaluate.columns("linear", Config(base_lrs=(0.1, 0.1))) == ["linear 0.1"]


def test_probe_images_limit_the_probes(tmp_path):
    row = row_of(tiny_vit())
    config = small("linear", tmp_path, probe_images=40, batch_size=32, epochs=1)
    assert evaluate.run("linear", row, config)["linear"] > 0
    assert len(row.kept[("train", "mean")][0]) == len(row.kept[("test", "mean")][0]) == 40


def test_linear_probe_takes_the_features_it_is_told_to():
    row = row_of(tiny_vit(pool="cls"))
    for pool in ("mean", "cls", "mean"):
        features, _ = row.features("test", Config(pool=pool, image_size=8, amp="off"))
        encoder = tiny_vit(pool=pool)
        torch.testing.assert_close(features, encoder(row.test.images / 255).detach())
    assert len(row.kept) == 2  # each computed once


def test_pixels_are_probed_without_an_encoder(tmp_path):
    row = row_of(None, "pixels")
    assert evaluate.run("knn", row, small("knn", tmp_path))["knn"] > 90
    several = evaluate.run("linear", row, small("linear", tmp_path, base_lrs=(0.1, 0.2)))
    assert several.keys() == {"linear 0.1", "linear 0.2"}
    assert min(several.values()) > 90
    assert not evaluate.applies("tran1", row, small("tran1", tmp_path))
    assert not evaluate.applies("finetune", row, small("finetune", tmp_path))


def test_classifier_freezes_the_encoder_and_trains_the_head(tmp_path):
    encoder = tiny_vit()
    head = TransformerHead(16, 64, 1, 3)
    config = small("tran1", tmp_path, **QUICK)
    method = Classifier("tran1", encoder, head, 3, config).train()
    assert not encoder.training
    images, labels = rand(6, 3, 8, 8), torch.arange(6) % 3
    method(images, labels)["loss"].backward()
    assert all(p.grad is None for p in encoder.parameters())
    assert all(p.grad is not None for p in head.parameters())
    grouped = [p for group in method.optimizer(config).param_groups for p in group["params"]]
    assert set(map(id, grouped)) == set(map(id, head.parameters()))


@pytest.mark.parametrize("probe_every", [0, 1])
def test_finetuning_trains_in_training_mode_and_is_judged_in_eval_mode(tmp_path, monkeypatch, probe_every):
    """Drop path, dropout and batch statistics act in training alone; encoders come in eval mode."""
    modes = {"forward": set(), "probe": set()}
    for name in modes:
        function = getattr(Classifier, name)
        spy = lambda self, *a, f=function, n=name, **k: modes[n].add(self.encoder.training) or f(self, *a, **k)
        monkeypatch.setattr(Classifier, name, spy)
    evaluate.run("finetune", row_of(tiny_vit()), small("finetune", tmp_path, **QUICK, probe_every=probe_every))
    assert modes == {"forward": {True}, "probe": {False}}


def test_a_network_from_random_weights_has_no_layer_decay(tmp_path, monkeypatch):
    decays = []
    monkeypatch.setattr(
        evaluate, "train_classifier", lambda protocol, row, config: decays.append(config.layer_decay) or {}
    )
    config = small("finetune", tmp_path, scratch=True)
    rows = [row_of(tiny_vit(), name) for name in ("trained", "untrained")]
    for row in rows:
        evaluate.run("finetune", row, config)
    assert decays == [0.75, 1.0]
    assert [evaluate.applies("finetune", row, config) for row in rows] == [False, True]
    assert [evaluate.applies("knn", row, config) for row in rows] == [
        True,
        False,
    ]  # the second row is for --scratch alone


def test_finetuning_reaches_every_parameter_and_uses_every_augmentation(tmp_path, monkeypatch):
    config = small("finetune", tmp_path, erase=0.5)
    method = Classifier("finetune", tiny_vit(), LinearHeads(16, 3), 3, config).train()
    called = []
    for name in ("rand_augment", "random_erase", "mix_labels", "drop_path"):
        function = getattr(evaluate, name)
        spy = lambda *args, f=function, n=name: called.append(n) or f(*args)
        monkeypatch.setattr(evaluate, name, spy)
    method(rand(6, 3, 8, 8), torch.arange(6) % 3)["loss"].backward()
    assert [name for name in called if name != "drop_path"] == ["rand_augment", "random_erase", "mix_labels"]
    assert called.count("drop_path") == 6
    assert all(p.grad is not None for p in method.parameters())


def test_finetuning_from_a_probed_decoder_starts_where_the_probe_ended(tmp_path, monkeypatch, capsys):
    """FINOLA, Appendix C: the decoder weights are initialised from the tran-1 probing stage."""
    row, started = row_of(tiny_vit()), []
    fit = common.fit
    monkeypatch.setattr(common, "fit", lambda m, *a: started.append(copy.deepcopy(m.head.state_dict())) or fit(m, *a))
    evaluate.run("finetune", row, small("finetune", tmp_path / "a", head="tran1", **QUICK))
    assert "holds no finished probe of this encoder; --protocol tran1 makes one" in capsys.readouterr().out
    evaluate.run("tran1", row, small("tran1", tmp_path / "b", **QUICK))
    evaluate.run("finetune", row, small("finetune", tmp_path / "b", head="tran1", **QUICK))
    probed = common.load_checkpoint(tmp_path / "b" / "tran1-stripes" / "last.pt")["weights"]
    for name, value in started[2].items():
        assert torch.equal(value, probed["head." + name])
    assert not torch.equal(started[0]["classify.weight"], started[2]["classify.weight"])

    with torch.no_grad():
        row.encoder.norm.bias += 1  # another encoder: neither its old decoder nor an old run of its own is taken
    config = small("finetune", tmp_path / "b", head="tran1", **QUICK)
    capsys.readouterr()
    with pytest.raises(UserError, match=r"finetune-stripes was trained otherwise \(origin \w+ -> \w+\)"):
        evaluate.run("finetune", row, dataclasses.replace(config, resume=True))
    assert "holds no finished probe of this encoder" in capsys.readouterr().out


def test_finetuning_does_not_start_from_a_probe_that_is_not_finished(tmp_path, capsys):
    row, path = row_of(tiny_vit()), tmp_path / "tran1-stripes" / "last.pt"
    evaluate.run("tran1", row, small("tran1", tmp_path, **QUICK))
    state = common.load_checkpoint(path)
    torch.save(state | {"step": state["step"] - 1}, path)
    evaluate.run("finetune", row, small("finetune", tmp_path, head="tran1", **QUICK))
    assert "holds no finished probe of this encoder" in capsys.readouterr().out


def test_the_gap_of_cosines_is_that_of_centred_features():
    features, labels = 3 + randn(40, 8), torch.arange(40) % 4
    found = evaluate.run_clusters(types.SimpleNamespace(features=lambda *_: (features, labels)), None)
    same, different = reference.class_cosines(features - features.mean(dim=0), labels)
    assert found["cosine_gap"] == pytest.approx(float(same - different), abs=1e-6)
    assert found["cosine_ratio"] != pytest.approx(float(same / different), rel=0.1)


def test_finetuning_learns_and_logs_its_test_accuracy(tmp_path):
    fields = QUICK | {"epochs": 6, "randaugment": 0.0, "mixup": 0.0, "cutmix": 0.0, "probe_every": 2}
    found = evaluate.run("finetune", row_of(tiny_vit()), small("finetune", tmp_path, **fields))
    assert found["finetune"] > 80
    log = evaluate.read_log(tmp_path / "finetune-stripes" / "log.jsonl")
    assert [line["epoch"] for line in log if "accuracy" in line] == [0, 2, 4, 6]
    assert log[-1]["accuracy"] == found["finetune"]
    encoder = common.load_encoder(tmp_path / "finetune-stripes" / "encoder.pt")  # can be evaluated in turn
    assert encoder.fields["pool"] == "mean"


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of magma on a tiny CIFAR-10: (run folder, data folder)."""
    root = tmp_path_factory.mktemp("data")
    test_common.write_cifar(root, "cifar10", counts=(30, 30), test=40)
    test_common.write_cifar(root, "cifar100", counts=(30, 30), test=40)
    run = tmp_path_factory.mktemp("runs") / "magma-cifar10"
    flags = "--model vit_micro --epochs 2 --batch-size 20 --decoder-depth 1 --probe-every 1 --amp off"
    assert train.main(f"magma --data cifar10 --root {root} --out {run} {flags}".split()) == 0
    return run, root


def lines_of(run):
    return [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]


@pytest.fixture
def run_folder(finished, tmp_path):
    """A copy that a test may write into."""
    for file in finished[0].iterdir():
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "run"


def test_evaluate_prints_a_table_and_appends_a_line_a_protocol(run_folder, capsys):
    argv = f"{run_folder} --protocol knn linear clusters --untrained --pixels --epochs 2".split()
    assert evaluate.main(argv) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[-2:] == [
        "Davies-Bouldin: lower is better",
        "linear of raw pixels: by ridge regression, whatever the recipe",
    ]
    table = table[:-2]
    assert [line[:20].strip() for line in table[-4:]] == ["", "trained encoder", "untrained encoder", "raw pixels"]
    for title in ("kNN", "linear", "Davies-Bouldin", "cosine ratio", "cosine gap"):
        assert title in table[-4]
    lines = lines_of(run_folder)
    assert [line["protocol"] for line in lines] == ["knn", "linear", "clusters"]
    for line in lines:
        assert line["results"].keys() == {"trained", "untrained", "pixels"}
        assert line["data"] == "cifar10"
        assert (line["train_images"], line["test_images"]) == (60, 40)
        assert line["settings"]["seed"] == 0
    assert lines[1]["settings"]["epochs"] == 2
    assert f"{lines[0]['results']['trained']['knn']:.1f}" in table[-3]
    assert evaluate.main(argv[:3]) == 0
    shown = capsys.readouterr().out
    assert "--untrained adds what the encoder knew before" in shown and "--pixels adds what raw pixels say" in shown
    again = lines_of(run_folder)
    assert len(again) == 4
    assert again[-1]["results"]["trained"] == lines[0]["results"]["trained"]  # the same figure twice


def test_evaluate_knn_is_the_figure_that_the_training_logged(run_folder):
    assert evaluate.main([str(run_folder), "--protocol", "knn", "--untrained", "--pixels", "--amp", "off"]) == 0
    results = lines_of(run_folder)[0]["results"]
    log = evaluate.read_log(run_folder / "log.jsonl")
    assert results["trained"]["knn"] == log[-1]["knn"]
    assert results["untrained"]["knn"] == log[0]["knn"]
    assert results["pixels"]["knn"] == log[0]["pixels"]["knn"]


def test_evaluate_needs_the_encoder_file_alone(run_folder, finished, capsys):
    for file in ("config.json", "last.pt", "log.jsonl"):
        (run_folder / file).unlink()
    assert evaluate.main([str(run_folder)]) == 2
    assert "has no config.json to tell the data set; give --data" in capsys.readouterr().err
    data = ["--data", "cifar10", "--root", str(finished[1])]
    assert evaluate.main([str(run_folder), *data, "--protocol", "knn", "pictures"]) == 0
    out = capsys.readouterr().out
    assert "no reconstructions" in out
    assert "no curves" in out


def test_evaluate_transfers_to_another_set_and_size(run_folder, finished, tmp_path):
    where = [str(run_folder), "--protocol", "knn"]
    assert evaluate.main([*where, "--data", "cifar100", "--root", str(finished[1])]) == 0
    folders = test_common.write_folders(tmp_path / "folders", train=12, size=(50, 40))
    assert evaluate.main([*where, "--data", str(folders), "--workers", "0"]) == 0
    assert evaluate.main([*where, "--image-size", "16", "--pool", "cls"]) == 0
    lines = lines_of(run_folder)
    assert [line["data"] for line in lines] == ["cifar100", str(folders), "cifar10"]
    assert lines[2]["settings"]["image_size"] == 16


def test_evaluate_finetunes_beside_scratch_and_resumes(run_folder, capsys):
    argv = f"{run_folder} --protocol finetune --epochs 1 --batch-size 30 --amp off".split()
    assert evaluate.main([*argv, "--untrained"]) == 0
    assert lines_of(run_folder)[-1]["results"].keys() == {"trained", "untrained"}
    before = (run_folder / "finetune-cifar10" / "last.pt").read_bytes()
    capsys.readouterr()
    assert evaluate.main(argv) == 2
    assert "finetune-cifar10 exists; add --resume to go on with it" in capsys.readouterr().err
    assert evaluate.main([*argv, "--resume"]) == 0
    assert (run_folder / "finetune-cifar10" / "last.pt").read_bytes() == before
    assert evaluate.main([*argv, "--scratch", "--out", str(run_folder / "more")]) == 0
    line = lines_of(run_folder)[-1]
    assert line["results"] == {"untrained": lines_of(run_folder)[0]["results"]["untrained"]}
    assert [path.name for path in (run_folder / "more").iterdir()] == ["finetune-cifar10-untrained"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("{tmp}/none", "no run folder {tmp}/none; give one that train.py wrote"),
        ("{tmp}", "{tmp} holds no encoder.pt"),
        ("--protocol knn", "give the run folder first: python evaluate.py RUN --protocol knn"),
        ("{run} --protocol knm", "unknown protocol 'knm'; did you mean 'knn'"),
        ("{run} --protocols knn", "unknown flag '--protocols'; did you mean --protocol?"),
        ("{run} --recipe finolla", "unknown recipe of knn linear 'finolla'; did you mean 'finola'"),
        ("{run} --protocol finetune --recipe magma", "unknown recipe of finetune 'magma'; choose from"),
        ("{run} --protocol knn --recipe mae", "unknown recipe of knn 'mae'; choose from none"),
        ("{run} --protocol linear --recipe mae --batch-size 1", "--batchnorm needs two images in each part"),
        ("{run} --data cifar11", "unknown dataset 'cifar11'"),
        ("{run} --data stl10", "no stl10 at data/stl10_binary; give the --root that holds stl10_binary"),
        ("{run} --image-size 30", "image size 30 x 30 is not a multiple of the patch size 4"),
        ("{run} --k 0", "--k 0 makes no sense"),
        ("{run} --protocol knn --k 61", "--k 61 is more than the 60 training images"),
    ],
)
def test_evaluate_answers_a_mistake_with_one_line_and_code_2(argv, message, finished, tmp_path, capsys):
    run, _ = finished
    assert evaluate.main(argv.format(tmp=tmp_path, run=run).split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: " + message.format(tmp=tmp_path, run=run))
    assert err.count("\n") == 1


def test_evaluate_names_a_damaged_encoder(run_folder, capsys):
    (run_folder / "encoder.pt").write_bytes(b"nothing")
    assert evaluate.main([str(run_folder)]) == 2
    assert f"{run_folder}/encoder.pt is not a checkpoint" in capsys.readouterr().err


def test_evaluate_looks_for_old_folders_before_it_starts(run_folder, capsys):
    (run_folder / "finetune-cifar10").mkdir()
    assert evaluate.main([str(run_folder), "--protocol", "knn", "finetune"]) == 2
    assert "finetune-cifar10 exists" in capsys.readouterr().err
    assert not (run_folder / "eval.jsonl").exists()


def test_evaluate_prints_what_it_has_when_a_protocol_fails(run_folder, capsys):
    assert evaluate.main([str(run_folder), "--protocol", "knn", "linear", "--base-lr", "1e38"]) == 1
    assert "trained encoder" in capsys.readouterr().out
    assert [line["protocol"] for line in lines_of(run_folder)] == ["knn"]


def test_notes_name_only_flags_that_would_add_something():
    trained, pixels = {"trained": {"knn": 1.0}}, {"pixels": {"knn": 1.0}}
    untrained = {"untrained": {"knn": 1.0}}
    assert len(evaluate.notes_on(trained, ["knn"])) == 2
    assert evaluate.notes_on(trained | untrained | pixels, ["knn"]) == []
    assert evaluate.notes_on(trained, ["energy"]) == []
    assert evaluate.notes_on(trained, ["tran1"]) == ["--untrained adds what the encoder knew before"]
    ignored = evaluate.notes_on(trained | untrained | {"pixels": {}}, ["finetune"])
    assert ignored == ["--pixels is for knn, linear and clusters alone"]


def test_evaluate_loads_no_unlabelled_images(run_folder, monkeypatch):
    splits, load = [], common.load_data
    monkeypatch.setattr(common, "load_data", lambda *args, **more: splits.append(more["split"]) or load(*args, **more))
    assert evaluate.main([str(run_folder), "--protocol", "knn"]) == 0
    assert splits == ["labelled", "test"]


def test_evaluate_counts_the_images_that_it_used(run_folder):
    assert evaluate.main([str(run_folder), "--protocol", "knn", "--probe-images", "33"]) == 0
    assert (lines_of(run_folder)[0]["train_images"], lines_of(run_folder)[0]["test_images"]) == (33, 33)


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"data": 5}', '{"data": "shapes", "image_size": "x"}', "\x00"])
def test_evaluate_survives_a_damaged_config(run_folder, text, capsys):
    (run_folder / "config.json").write_text(text)
    assert evaluate.main([str(run_folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_evaluate_ignores_settings_that_it_does_not_know_and_imports_no_stranger(run_folder, capsys):
    path = run_folder / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"of_a_later_version": [1]}))
    assert evaluate.main([str(run_folder), "--protocol", "knn", "pictures"]) == 0
    assert "reconstructions.png" in capsys.readouterr().out
    path.write_text(json.dumps(settings | {"method": "antigravity"}))
    assert evaluate.main([str(run_folder), "--protocol", "knn", "pictures"]) == 0
    assert "antigravity" not in sys.modules


def test_pictures_go_on_without_reconstructions_that_do_not_fit(run_folder, capsys):
    settings = json.loads((run_folder / "config.json").read_text())
    (run_folder / "config.json").write_text(json.dumps(settings | {"decoder_dim": 32}))
    assert evaluate.main([str(run_folder), "--protocol", "pictures"]) == 0
    out = capsys.readouterr().out
    assert "no reconstructions, last.pt and config.json do not fit" in out
    assert "curves.png" in out


def test_evaluate_stops_at_a_loss_that_is_not_finite(run_folder, capsys):
    argv = [str(run_folder), "--protocol", "linear"]
    assert evaluate.main([*argv, "--base-lr", "1e38"]) == 1
    assert "the loss is not finite; lower --base-lr" in capsys.readouterr().err
    assert not (run_folder / "eval.jsonl").exists()
    assert evaluate.main([*argv, "--base-lrs", "0.1", "1e38"]) == 0
    assert lines_of(run_folder)[0]["results"]["trained"]["linear 1e+38"] is None
    assert "nan" in capsys.readouterr().out


def test_evaluate_help_lists_the_flags(capsys):
    for argv in ([], ["--help"]):
        assert evaluate.main(argv) == 0
        assert "--layer-decay LAYER_DECAY" in capsys.readouterr().out


def test_evaluate_in_two_processes_equals_one(run_folder, finished):
    """kNN and the cached probe on process 0, fine-tuning on both: the same figures as in one process."""
    flags = "--protocol knn linear finetune --epochs 1 --batch-size 20 --amp off --randaugment 0 --mixup 0 --cutmix 0"
    flags += " --drop-path 0 --crop-min 1 --flip 0"
    argv = [str(run_folder), *flags.split(), "--out"]
    assert evaluate.main([*argv, str(run_folder / "one")]) == 0
    codes = processes.start(processes.evaluate_main, [*argv, str(run_folder / "two")])
    assert codes == [0, 0]
    one, two = lines_of(run_folder)[:3], lines_of(run_folder)[3:]
    assert [line["protocol"] for line in two] == ["knn", "linear", "finetune"]
    assert [line["results"] for line in two] == [line["results"] for line in one]
    weights = [
        common.load_encoder(run_folder / n / "finetune-cifar10" / "encoder.pt").state_dict() for n in ("one", "two")
    ]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-5)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_evaluate_draws_every_picture(run_folder, capsys):
    assert evaluate.main([str(run_folder), "--protocol", "pictures"]) == 0
    names = ["reconstructions", "attention", "keys", "features", "curves"]
    out = capsys.readouterr().out
    for name in names:
        path = run_folder / "pictures" / f"{name}.png"
        assert f"wrote {path}" in out
        with Image.open(path) as image:
            assert min(image.size) > 250
            assert len(image.getcolors(image.size[0] * image.size[1])) > 20  # something is on it
    assert not (run_folder / "eval.jsonl").exists()


def test_write_sheet_puts_pictures_in_rows_and_columns(tmp_path):
    rows = torch.zeros(2, 3, 3, 4, 4)
    for r in range(2):
        for k in range(3):
            rows[r, k, 0], rows[r, k, 1] = 0.4 * r + 0.2, 0.2 * k + 0.1
    evaluate.write_sheet(tmp_path / "sheet.png", "a title", ("one", "two"), rows, side=40)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (6 + 3 * 46, 64 + 2 * 46)
        for r in range(2):
            for k in range(3):
                expected = (255 * (0.4 * r + 0.2), 255 * (0.2 * k + 0.1), 0)
                assert image.getpixel((6 + k * 46 + 20, 64 + r * 46 + 20)) == pytest.approx(expected, abs=1)


def test_look_inside_sees_the_attention_and_the_keys_of_the_encoder():
    encoder, images = tiny_vit(), rand(2, 3, 8, 8)
    attention, keys = evaluate.look_inside(encoder, images)
    seen = []
    encoder.encode(encoder.embed(images), lambda q, k, v: seen.append((q, k)) or common.attend(q, k, v))
    assert len(keys) == len(encoder.blocks)
    q, k = seen[-1]
    for b in range(2):
        for h in range(2):
            scores = torch.stack([q[b, h, 0] @ k[b, h, n] / math.sqrt(8) for n in range(5)]).softmax(dim=0)
            torch.testing.assert_close(attention[b, h], scores[1:].detach())
    torch.testing.assert_close(keys[0][1, 2], seen[0][1][1, :, 3].flatten().detach())  # patch 2 follows the CLS token


@given(st.integers(3, 12), st.integers(2, 6), seeds)
def test_principal_components_match_the_singular_values(count, width, seed):
    x = randn(count, width, seed=seed, dtype=torch.float64)
    scores = evaluate.principal_components(x, 2)
    centred = x - x.mean(dim=0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(scores.abs(), (u * s)[:, :2].abs(), rtol=1e-6, atol=1e-9)
    assert (scores.pow(3).sum(dim=0) > -1e-9).all()


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e4))
def test_ticks_are_few_round_and_inside(low, span):
    found = evaluate.ticks(low, low + span)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-6 * span <= value <= low + span * (1 + 1e-6) for value in found)


def test_heat_runs_from_dark_blue_to_yellow():
    colours = evaluate.heat(torch.tensor([[0.0, 1.0]])) * 255  # (3, 1, 2)
    torch.testing.assert_close(colours[:, 0, 0], torch.tensor([68.0, 1, 84]))
    torch.testing.assert_close(colours[:, 0, 1], torch.tensor([253.0, 231, 37]))


def test_curves_need_two_epochs(tmp_path):
    one = [{"epoch": 0, "knn": 10.0}, {"epoch": 1, "loss": 2.0, "knn": 11.0}]
    assert not evaluate.draw_curves(one, "title", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
    flat = [*one, {"epoch": 2, "loss": 2.0}]
    assert evaluate.draw_curves(flat, "title", tmp_path / "curves.png")  # a range of zero
    assert (tmp_path / "curves.png").exists()


def test_config_comments_help_with_every_flag():
    comments = common.field_comments(Config)
    assert all(
        comments[field.name] for field in dataclasses.fields(Config) if field.name not in ("epochs", "image_size")
    )
