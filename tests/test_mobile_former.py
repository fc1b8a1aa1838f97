"""Mobile-Former: published sizes and costs, each part against plain formulas, and what its users rely on."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from make import rand, randn, seeds
from torch.utils.flop_counter import FlopCounterMode

from common import (
    MOBILE_FORMERS,
    DynamicReLU,
    LiteBottleneck,
    Method,
    MobileFormer,
    MobileFormerBlock,
    cross_attention,
    hard_sigmoid,
)
from plumbing.encoders import load_encoder, save_encoder
from plumbing.errors import UserError
from plumbing.probes import pooled_features
from plumbing.settings import TrainConfig


def micro(**fields):
    torch.manual_seed(0)
    return MobileFormer("micro", **fields)


def shaken(module, seed=0):
    """The module in float64, with weights and running statistics that differ from their start."""
    module = module.double().eval()
    for i, (name, value) in enumerate(module.state_dict().items()):
        if value.dtype.is_floating_point:
            noise = randn(*value.shape, seed=seed + i)
            value.copy_(noise.abs() + 0.5 if name.endswith("running_var") else 0.5 * noise)
    return module


def test_dynamic_relu_and_its_gradient_are_those_of_a_maximum():
    """Mobile-Former (Chen et al. 2022): max(a x, b x), here as one sum; also where a = b, and where a < b."""
    relu = shaken(DynamicReLU(8, 6))
    relu.slopes.bias.data[:] = torch.tensor([1.0, -1, 2, 0, 3, -9, 1, 1, -2, 3, 0.5, 3])  # -9, 3: a = 0, b = 1
    x, token = randn(2, 6, 3, 3).double().requires_grad_(), randn(2, 8).double().requires_grad_()
    a, b = hard_sigmoid(relu.slopes(F.relu(relu.hidden(token))))[..., None, None].chunk(2, dim=1)
    outs = relu(x, token), torch.maximum(2 * a * x, (2 * b - 1) * x)
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*[torch.autograd.grad(out.sin().sum(), [x, token]) for out in outs])


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "parameters", "multiply_adds"),
    [(720, 4.9, 5.6), (1440, 11.7, 20.4), (2880, 25.0, 77.5), (4320, 43.5, None), (5760, 67.6, None)],
)
def test_parameters_and_cost_are_those_published(width, parameters, multiply_adds):
    """Tables 2b and 18; multiply-adds at 800 x 1333, counted at every convolution, linear layer and attention."""
    with torch.device("meta"):
        encoder = MobileFormer(width).eval().requires_grad_(False)
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(parameters * 1e6, rel=0.012)
    if multiply_adds:
        with FlopCounterMode(display=False) as counter:
            encoder(torch.empty(1, 3, 800, 1333, device="meta"))
        assert counter.get_total_flops() / 2 == pytest.approx(multiply_adds * 1e9, rel=0.02)


def test_every_width_is_table_9():
    """FINOLA, Table 9, its widths by those of Tables 2b and 18."""
    rows = {width: size["rows"] for width, size in MOBILE_FORMERS.items()}
    assert [out for _, _, out in rows["720"]] == [16, 16, 28, 28, 48, 48, 48, 80, 88, 88, 120, 120, 120]
    assert [wide for _, wide, _ in rows["720"]][1:] == [32, 96, 84, 168, 144, 144, 240, 320, 480, 528, 720, 720]
    assert [out for _, _, out in rows["1440"]] == [32, 32, 56, 56, 96, 96, 96, 176, 176, 176, 240, 240, 240]
    assert [wide for _, wide, _ in rows["1440"]][1:] == [64, 192, 168, 336, 288, 288, 576, 704, 704, 1056, 1440, 1440]
    assert [out for _, _, out in rows["2880"]] == [64, 64, 112, 112, 192, 192, 192, 352, 352, 352, 480, 480, 480]
    assert [wide for _, wide, _ in rows["2880"]][7:] == [1152, 1408, 1408, 2112, 2880, 2880]
    for width in ("4320", "5760"):
        assert [out / int(width) for _, _, out in rows[width]] == [out / 2880 for _, _, out in rows["2880"]]
        assert [kind for kind, _, _ in rows[width]].count("down") == 3
    for width, size in MOBILE_FORMERS.items():  # sides are halved four times, wherever the width comes from
        assert [kind for kind, _, _ in size["rows"]].count("down") == (1 if width == "micro4" else 3)


def test_with_3072_channels_encoders_are_nearly_those_of_table_2b():
    """FINOLA, Table 2b."""
    for width, published, tolerance in ((720, 5.0, 0.05), (1440, 12.0, 0.02), (2880, 25.0, 0.01), (5760, 67.6, 0.01)):
        with torch.device("meta"):
            encoder = MobileFormer(width, head=3072)
        assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(published * 1e6, rel=tolerance)


MICRO = micro().eval()


@given(st.integers(1, 5), st.integers(1, 5))
def test_the_map_has_a_cell_for_16_pixels(rows, columns):
    encoder = MICRO
    with torch.no_grad():
        found, hidden = encoder(rand(2, 3, 16 * rows, 16 * columns), hidden=True)
    assert found.shape == (2, 256, rows, columns)
    assert len(hidden) == len(encoder.blocks)
    assert hidden[2].shape[2:] == (2 * rows, 2 * columns)  # at 1/8, the last before the last halving


def test_the_head_has_the_width_that_is_asked_for():
    assert micro(head=7).head[0].out_channels == micro(head=7).dim == 7


@torch.no_grad()
def test_a_finer_map_comes_from_as_many_blocks_without_the_last_two_halvings():
    finer = MobileFormer("micro4").eval()
    assert finer(rand(1, 3, 8, 12)).shape == (1, 256, 2, 3)
    assert (finer.stride, micro().stride, len(finer.blocks)) == (4, 16, len(micro().blocks))


# --- parts -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 2), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), seeds)
def test_cross_attention_matches_naive_loop(batch, queries, keys, heads, width, seed):
    q, k, v = (randn(batch, n, heads * width, seed=seed + i) for i, n in enumerate((queries, keys, keys)))
    found = cross_attention(q, k, v, heads)
    torch.testing.assert_close(found, reference.cross_attention(q, k, v, heads))


def plain_conv(layer, x):
    """Convolution and batch norm in eval mode, from their definitions."""
    weights, norm = layer[0], layer[1]
    assert weights.bias is None
    x = F.conv2d(x, weights.weight, None, weights.stride, weights.kernel_size[0] // 2, 1, weights.groups)
    x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
    return x * norm.weight[:, None, None] + norm.bias[:, None, None]


def plain_dynamic_relu(layer, x, token):
    h = (layer.slopes(layer.hidden(token).clamp_min(0)) / 6 + 0.5).clamp(0, 1)  # (B, 2C)
    first, second = h[:, : x.shape[1], None, None], h[:, x.shape[1] :, None, None]
    a, b = 2 * (first - 0.5) + 1, 2 * (second - 0.5)
    return torch.where(a * x > b * x, a * x, b * x)


def plain_block(block, x, tokens, down):
    """A Mobile-Former block step by step, as the released one is described."""
    seen = x.flatten(2).transpose(1, 2)
    to = block.to_former
    found = reference.cross_attention(to.query(tokens), seen, seen, 2)
    gate = 2 * (to.gate(tokens) / 6 + 0.5).clamp(0, 1)
    tokens = to.norm(tokens + to.out(found * gate))
    former = block.former
    tokens = former.norm1(tokens + former.out(reference.cross_attention(former.query(tokens), tokens, tokens, 4)))
    tokens = former.norm2(tokens + former.ffn[2](F.gelu(former.ffn[0](tokens))))
    mobile, token = block.mobile, tokens[:, 0]
    wide = plain_dynamic_relu(mobile.relu1, plain_conv(mobile.widen, x), token)
    if down:
        half = plain_conv(mobile.narrow, wide)
        inner = plain_dynamic_relu(mobile.relu2, plain_conv(mobile.widen2, half), token)
        x = half + plain_conv(mobile.narrow2, inner)
    else:
        out = plain_conv(mobile.narrow, plain_dynamic_relu(mobile.relu2, plain_conv(mobile.depthwise, wide), token))
        x = x + out if out.shape == x.shape else out
    back = block.to_mobile
    queries = x.flatten(2).transpose(1, 2)
    found = reference.cross_attention(queries, back.key(tokens), back.value(tokens), 2)
    return x + found.transpose(1, 2).reshape(x.shape), tokens


@pytest.mark.parametrize(
    ("kind", "inputs", "expanded", "out"), [("down", 4, 8, 6), ("same", 4, 10, 4), ("same", 4, 12, 6)]
)
def test_a_block_does_what_the_released_one_does(kind, inputs, expanded, out):
    block = shaken(MobileFormerBlock(kind, inputs, expanded, out, 8))
    x, tokens = randn(2, inputs, 4, 6), randn(2, 3, 8, seed=1)
    found = block(x, tokens)
    expected = plain_block(block, x, tokens, kind == "down")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("inputs", "out"), [(4, 4), (4, 6)])
def test_the_lite_bottleneck(inputs, out):
    """The row "bneck-lite" of FINOLA, Table 9."""
    lite, x = shaken(LiteBottleneck(inputs, 8, out)), 3 * randn(2, inputs, 5, 5)
    expected = plain_conv(lite.narrow, plain_conv(lite.widen, x).clamp(0, 6))
    torch.testing.assert_close(lite(x), x + expected if inputs == out else expected)


def test_the_whole_encoder_is_stem_blocks_and_head():
    encoder = shaken(micro(head=5, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)))
    images = rand(2, 3, 32, 32, dtype=torch.float64)
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    encoder.mean, encoder.std = mean, std
    x = encoder.lite(plain_conv(encoder.stem, (images - mean) / std).clamp(0, 6))
    tokens = encoder.tokens.expand(2, -1, -1)
    for block in encoder.blocks:
        x, tokens = block(x, tokens)
    torch.testing.assert_close(encoder(images), plain_conv(encoder.head, x))


def test_dynamic_relu_starts_as_relu_and_its_slopes_stay_in_range():
    """Dynamic ReLU (Chen et al. 2020): the larger of two lines whose slopes start at 1 and 0 and stay within 1."""
    layer, x = micro().blocks[0].mobile.relu1, randn(2, 64, 3, 3, dtype=torch.float32)
    torch.testing.assert_close(layer(x, torch.zeros(2, 64)), F.relu(x))
    torch.testing.assert_close(layer(x, randn(2, 64, seed=1, dtype=torch.float32)), F.relu(x), rtol=0.05, atol=0.05)
    layer.slopes.bias.data.fill_(100.0)
    torch.testing.assert_close(layer(x, torch.zeros(2, 64)), torch.maximum(2 * x, x))
    layer.slopes.bias.data.fill_(-100.0)
    torch.testing.assert_close(layer(x, torch.zeros(2, 64)), torch.maximum(0 * x, -x))


def test_weights_start_as_in_the_released_network():
    torch.manual_seed(0)
    encoder = MobileFormer(720)
    weight = encoder.blocks[-1].mobile.widen[0].weight.detach()
    assert float(weight.std()) == pytest.approx(math.sqrt(2 / weight.shape[0]), rel=0.05)
    depthwise = encoder.blocks[-1].mobile.depthwise[0].weight.detach()
    assert float(depthwise.std()) == pytest.approx(math.sqrt(2 / (9 * depthwise.shape[0])), rel=0.05)
    assert float(encoder.blocks[0].former.query.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert float(encoder.tokens.detach().std()) == pytest.approx(1, rel=0.1)
    assert encoder.tokens.shape == (6, 192)
    assert MobileFormer("micro").tokens.shape[0] == 6
    assert all(not bias.any() for name, bias in encoder.named_parameters() if name.endswith("bias"))


# --- what others rely on ---------------------------------------------------------------------------------------------


def test_every_parameter_gets_a_gradient_and_a_second_one():
    """Energies of images need the derivative of a gradient: every operation must have one."""
    encoder = micro()
    images = rand(2, 3, 32, 32).requires_grad_()
    (slope,) = torch.autograd.grad(encoder(images).square().sum(), images, create_graph=True)
    slope.square().sum().backward()
    missing = [name for name, p in encoder.named_parameters() if p.grad is None]
    assert missing == []


def test_images_do_not_see_each_other_in_eval_mode():
    encoder = micro().eval()
    images = rand(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images)[1:2], encoder(images[1:2]), rtol=1e-4, atol=1e-5)


def test_tokens_reach_the_map():
    encoder = micro().eval()
    images = rand(1, 3, 32, 32)
    with torch.no_grad():
        before = encoder(images)
        encoder.tokens[1] += 5  # not the one that drives the dynamic ReLUs
        assert not torch.allclose(encoder(images), before)


def test_encoder_files_rebuild_a_mobile_former(tmp_path):
    encoder = micro(head=12, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    encoder(rand(4, 3, 32, 32))  # its running statistics are part of it
    save_encoder(encoder, tmp_path / "encoder.pt")
    images = rand(2, 3, 32, 48)
    for size in (0, 64):  # any size of images will do
        found = load_encoder(tmp_path / "encoder.pt", image_size=size)
        with torch.no_grad():
            torch.testing.assert_close(found(images), encoder.eval()(images))
    assert found.fields == encoder.fields


def test_maps_are_probed_by_their_mean():
    encoder = micro().eval()
    images = rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(pooled_features(encoder, images), encoder(images).mean(dim=(2, 3)))


def test_tokens_have_no_weight_decay():
    method = Method()
    method.encoder = micro()
    decayed, plain = method.optimizer(TrainConfig()).param_groups
    assert any(p is method.encoder.tokens for p in plain["params"])
    assert any(p is method.encoder.stem[0].weight for p in decayed["params"])
    assert all(p.ndim >= 2 for p in decayed["params"])


def test_a_width_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="unknown Mobile-Former '100'; choose from micro, micro4, 720"):
        MobileFormer(100)
