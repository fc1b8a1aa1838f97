"""Heads, the groups of their optimisers, and stochastic depth."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from make import MapEncoder, rand, randn, seeds, vit
from torch import nn

import common
from ebm_pretrain import ConvNeXt, ConvNeXtBlock, Swin, SwinBlock
from plumbing.errors import UserError
from protocols import heads
from protocols.heads import (
    LARS,
    LinearHeads,
    TransformerHead,
    add_drop_path,
    drop_path,
    head_groups,
    layer_groups,
    make_head,
    make_optimizer,
    one_hot,
    soft_loss,
    token_features,
    width_of,
)
from protocols.settings import decoder_width, settings_of

# --- heads -----------------------------------------------------------------------------------------------------------


def test_finola_goes_by_the_name_of_its_encoder_and_not_by_the_channels_of_q():
    with torch.device("meta"):
        for name, width in ((720, 192), (1440, 384), (2880, 768), (4320, 768)):
            encoder = common.MobileFormer(name, head=512)
            assert decoder_width(width_of(encoder)) == width
            config = settings_of("tran1", {"image_size": 32, "data": "x"}, "finola", width_of(encoder), 10**6)
            head = make_head("tran1", encoder.dim, 10, config, width=width_of(encoder))
            assert head(torch.empty(2, 5, 512)).shape == (1, 2, 10)
            assert head.blocks[0].norm1.normalized_shape == (width,)
    assert width_of(common.MobileFormer("micro", head=8)) == 8
    assert width_of(common.ViT(8, 4, 16, 1, 2)) == 16


@pytest.mark.parametrize(("encoder", "width", "millions"), [(720, 192, 2.1), (1440, 384, 8.0), (2880, 768, 31.3)])
def test_transformer_head_has_the_parameters_of_finola(encoder, width, millions):
    """FINOLA, Table 7: what tran-4 adds to encoders of width 720, 1440 and 2880, with 1000 classes."""
    assert decoder_width(encoder) == width
    with torch.device("meta"):
        head = TransformerHead(encoder, width, 4, 1000)
    assert sum(p.numel() for p in head.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_transformer_head_knows_no_position_and_drops_only_while_training():
    torch.manual_seed(0)
    head = TransformerHead(12, 64, 2, 5, dropout=0.5).eval()
    tokens = rand(3, 7, 12)
    out = head(tokens)
    assert out.shape == (1, 3, 5)
    torch.testing.assert_close(head(tokens[:, torch.randperm(7)]), out)
    torch.testing.assert_close(head(tokens), out)
    assert not torch.equal(head.train()(tokens), out)


@pytest.mark.parametrize("std", [0.01, 2e-5])
def test_linear_heads_start_small_and_without_bias(std):
    """MAE's release: a truncated normal of 0.01 to probe, 2e-5 to fine-tune; `make_head` hands its own on."""
    torch.manual_seed(0)
    config = settings_of("linear", {"image_size": 8, "data": "x", "base_lrs": (0.1, 0.2)}, "magma", 96, 10**6)
    for head in (LinearHeads(96, 50, 2, std=std), make_head("linear", 96, 50, config, std)):
        assert len(head.layers) == 2
        for layer in head.layers:
            assert float(layer.weight.detach().std()) == pytest.approx(std, rel=0.05)
            assert not layer.bias.detach().any()
    assert float(LinearHeads(96, 50).layers[0].weight.detach().std()) == pytest.approx(0.01, rel=0.05)


def test_the_batch_norm_of_linear_heads_learns_nothing_and_keeps_averages():
    """MAE, appendix A: a batch norm without affine weights, with 1e-6 added to the variance."""
    head, x = LinearHeads(3, 2, batchnorm=True), 1e-3 * randn(8, 3, dtype=torch.float32)
    assert [name for name, _ in head.named_parameters()] == ["layers.0.weight", "layers.0.bias"]
    normed = (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(head.train()(x)[0], head.layers[0](normed))
    mean, var = 0.1 * x.mean(dim=0), 0.9 + 0.1 * x.var(dim=0)
    torch.testing.assert_close(head.eval()(x)[0], head.layers[0]((x - mean) / (var + 1e-6).sqrt()))


def test_a_transformer_head_is_embedding_blocks_norm_mean_and_a_linear_layer():
    """FINOLA, appendix B, layer by layer, with a head of attention for every 64 channels; linear layers as MAE's."""
    torch.manual_seed(0)
    head, tokens = TransformerHead(12, 128, 2, 5).eval(), rand(3, 7, 12)
    assert len(head.blocks) == 2 and {block.heads for block in head.blocks} == {2}
    x = head.embed(tokens)
    for block in head.blocks:
        x = block(x)
    x = F.layer_norm(x, (128,), head.norm.weight, head.norm.bias, eps=1e-6).mean(dim=1)
    torch.testing.assert_close(head(tokens), head.classify(x)[None])
    for layer in (m for m in head.modules() if isinstance(m, nn.Linear)):
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5  # uniform, Glorot and Bengio 2010
        assert 0.9 * bound < float(layer.weight.detach().abs().max()) <= bound
        assert not layer.bias.detach().any()
    config = settings_of("tran4", {"image_size": 8, "data": "x", "dropout": 0.3}, "finola", 16, 10**6)
    made = make_head("tran4", 16, 5, config)
    assert (len(made.blocks), made.dropout.p, made.embed.in_features, made.classify.out_features) == (4, 0.3, 16, 5)


def test_token_features_are_those_of_the_patches_or_places():
    encoder, images = vit(), rand(2, 3, 8, 8)
    torch.testing.assert_close(token_features(encoder, images), encoder.encode(encoder.embed(images))[:, 1:])
    maps = MapEncoder().eval()
    found = token_features(maps, images)
    for row in range(4):
        for column in range(4):
            torch.testing.assert_close(found[:, 4 * row + column], maps(images)[:, :, row, column])


# --- labels and losses -----------------------------------------------------------------------------------------------


@given(st.integers(2, 6), st.floats(0, 0.9), seeds)
def test_soft_loss_is_cross_entropy_with_smoothed_labels_summed_over_heads(classes, smoothing, seed):
    """Label smoothing as Szegedy et al. 2016 have it."""
    logits, labels = randn(2, 5, classes, seed=seed, dtype=torch.float32), torch.arange(5) % classes
    targets = one_hot(labels, classes, smoothing)
    expected = sum(F.cross_entropy(one, labels, label_smoothing=smoothing) for one in logits)
    torch.testing.assert_close(soft_loss(logits, targets), expected)


# --- optimisers and their groups -------------------------------------------------------------------------------------


@given(st.floats(0, 0.5), st.floats(0.5, 0.95), seeds)
def test_lars_matches_the_slow_version(decay, momentum, seed):
    """You et al. 2017 as MAE's linear probe has it: trust ratio 0.001, none for biases."""
    weight, bias = nn.Parameter(randn(3, 4, seed=seed)), nn.Parameter(randn(3, seed=seed + 1))
    optimizer = LARS([weight, bias], lr=0.7, weight_decay=decay, momentum=momentum)
    w, b, vw, vb = weight.detach().clone(), bias.detach().clone(), 0, 0
    for step in range(3):
        gw, gb = randn(3, 4, seed=step), randn(3, seed=step + 9)
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
    LARS([weight], lr=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), -0.5))


def test_optimisers_and_their_groups_take_what_the_settings_say():
    given = {"image_size": 8, "data": "x", "base_lr": 0.2, "weight_decay": 0.3, "momentum": 0.4, "betas": (0.5, 0.6)}
    kinds = {"sgd": torch.optim.SGD, "lars": LARS, "adamw": torch.optim.AdamW}
    for name, kind in kinds.items():
        config = settings_of("linear", given | {"optimizer": name, "base_lrs": (0.1, 0.4)}, "magma", 16, 10**6)
        optimizer = make_optimizer(head_groups(LinearHeads(16, 3, 2), config), config)
        assert type(optimizer) is kind
        found = [(group["lr_scale"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
        assert found == [(0.5, 0.3, 1), (0.5, 0.0, 1), (2.0, 0.3, 1), (2.0, 0.0, 1)]  # weights and biases of two heads
        for group in optimizer.param_groups:
            assert group.get("betas", (0.5, 0.6)) == (0.5, 0.6) and group.get("momentum", 0.4) == 0.4
    groups = head_groups(TransformerHead(16, 64, 1, 3), config)
    assert {(group["lr_scale"], group["weight_decay"]) for group in groups} == {(1, 0.3), (1, 0)}


def test_layer_groups_are_those_of_mae():
    """MAE, Table 9: layer-wise decay of the learning rate; no weight decay on biases, norms and tokens."""
    encoder, head = vit(depth=3), LinearHeads(16, 4)
    groups = layer_groups(encoder, head, 0.5, 0.05)
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


def test_layer_groups_count_from_the_blocks_whatever_lies_around_them():
    encoder, head = MapEncoder(), LinearHeads(8, 2)
    encoder.after = nn.Conv2d(8, 8, 1)
    scale = {id(p): g["lr_scale"] for g in layer_groups(encoder, head, 0.5, 0.0) for p in g["params"]}
    found = [scale[id(p)] for p in (encoder.stem.weight, encoder.blocks[0].weight, encoder.blocks[1].weight)]
    assert found == [0.125, 0.25, 0.5]
    assert scale[id(encoder.after.weight)] == scale[id(head.layers[0].weight)] == 1
    with pytest.raises(UserError, match="--layer-decay needs an encoder made of blocks"):
        layer_groups(nn.Linear(8, 8), head, 0.5, 0.0)
    assert len(layer_groups(None, head, 1.0, 0.0)) == 2
    for on in ("matrices", "tokens", "all"):  # as `common.decays` says
        groups = layer_groups(None, head, 1.0, 0.3, on)
        decayed = {id(p) for group in groups if group["weight_decay"] == 0.3 for p in group["params"]}
        assert decayed == {id(p) for name, p in head.named_parameters() if common.decays(name, p, on)}


# --- stochastic depth ------------------------------------------------------------------------------------------------


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    assert torch.equal(drop_path(x, 0.0), x)
    out = drop_path(x, 0.25).flatten(1)
    assert (out == out[:, :1]).all()
    assert sorted(set(out[:, 0].tolist())) == pytest.approx([0, 4 / 3])
    assert abs(out.mean() - 1) < 0.03


def branches_of(block):
    """What a block adds to its input, one function of the input after the other; of a copy without stochastic depth."""
    if isinstance(block, ConvNeXtBlock):
        return [lambda x: block(x) - x]
    alone = [copy.deepcopy(block) for _ in range(2)]
    for silenced, other in zip(("mlp.fc2", "attn.proj"), alone, strict=True):
        for parameter in other.block.get_submodule(silenced).parameters():
            nn.init.zeros_(parameter)
    return [lambda x, only=only: only(x) - x for only in alone]


@pytest.mark.parametrize("rate", [0.0, 0.7])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (ConvNeXt, {"dims": (4, 8), "depths": (1, 2), "stem": 2}),
        # 16 windows an image, then 4; those of every second block are shifted
        (Swin, {"dim": 4, "depths": (2, 2), "heads": (1, 2), "window": 2, "stem": 2}),
    ],
)
@torch.no_grad()
def test_drop_path_of_maps_leaves_out_branches_image_by_image(kind, fields, rate):
    """Against each branch by itself, on one image by itself. Energy-inspired pretraining, Table A, of Table B."""
    torch.manual_seed(0)
    encoder, images = kind(**fields).double(), rand(5, 3, 16, 16, dtype=torch.float64)
    for i, parameter in enumerate(encoder.parameters()):
        parameter.copy_(0.3 * randn(*parameter.shape, seed=i))
    plain, whole = copy.deepcopy(encoder), encoder(images)
    add_drop_path(encoder, rate)
    torch.manual_seed(0)
    found = encoder.train()(images)
    torch.manual_seed(0)
    x, kept = plain.stem(plain.normalize(images)), []
    x = x.movedim(1, -1) if isinstance(plain, Swin) else x
    blocks = [block for block in plain.blocks if isinstance(block, ConvNeXtBlock | SwinBlock)]
    for block in plain.blocks:
        if block not in blocks:  # between two stages
            x = block(x)
            continue
        share = rate * blocks.index(block) / (len(blocks) - 1)
        for branch in branches_of(block):
            kept.append(torch.rand(5) >= share)
            parts = zip(x.split(1), kept[-1], strict=True)
            x = torch.cat([one + branch(one) / (1 - share) if keep else one for one, keep in parts])
    x = plain.norm(x)
    torch.testing.assert_close(found, x.movedim(-1, 1) if isinstance(plain, Swin) else x, rtol=1e-9, atol=1e-9)
    assert 0 < torch.stack(kept).sum() < torch.stack(kept).numel() or rate == 0
    assert torch.equal(encoder.eval()(images), whole) and (rate > 0 or torch.equal(found, whole))


def test_add_drop_path_rises_from_the_first_block_to_the_last_and_stops_in_eval(monkeypatch):
    """Stochastic depth (Huang et al. 2016), on both branches of a block."""
    rates = []
    monkeypatch.setattr(heads, "drop_path", lambda x, rate: rates.append(rate) or x)
    encoder, images = vit(depth=3), rand(2, 3, 8, 8)
    plain = encoder(images)
    add_drop_path(encoder, 0.2)
    torch.testing.assert_close(encoder.train()(images), plain)
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2])
    encoder.eval()(images)
    assert len(rates) == 6
    monkeypatch.setattr(heads, "drop_path", lambda x, rate: 0 * x)  # dropped branches leave the input as it is
    encoder.train()
    torch.testing.assert_close(encoder.blocks[1](plain[:, None]), plain[:, None])
