"""`--start`: MAE's release and timm's files against an independent forward, runs of ours, and what is refused."""

import argparse
import copy
import importlib
import math
import random
import re
import sys
import types

import pytest
import reference
import torch
import torch.nn.functional as F
from make import (
    fit_magma,
    log_of,
    rand,
    shapes,
    tiny_energy,
    tiny_finola,
    tiny_levels,
    tiny_magma,
    tiny_mixedae,
    vit,
)
from torch.distributed.run import parse_args as torchrun_arguments

import common
import train
from plumbing.class_folders import IMAGENET
from plumbing.encoders import from_release, is_sound, load_encoder, save_encoder, to_timm
from plumbing.errors import UserError
from plumbing.settings import field_types, flag
from plumbing.start import start_from

BASE = {"side": 224, "patch": 16, "dim": 768, "depth": 2, "decoder": (512, 1)}  # mae_vit_base_patch16 of fewer blocks
SMALL = {"side": 16, "patch": 4, "dim": 32, "depth": 2, "decoder": (16, 1)}


LAYERS = (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4))  # widths out and in, of D


def linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def blocks(prefix, dim, depth):
    found = {}
    for name in (f"{prefix}.{i}." for i in range(depth)):
        found |= norm(name + "norm1", dim) | norm(name + "norm2", dim)
        for layer, outputs, inputs in LAYERS:
            found |= linear(name + layer, outputs * dim, inputs * dim)
    return found


def names_and_shapes(side, patch, dim, depth, decoder=None):
    """{name: shape} of the learned weights of MAE's release, with its decoder (width, blocks) or without."""
    found = {"cls_token": (1, 1, dim)} | blocks("blocks", dim, depth) | norm("norm", dim)
    found |= {"patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    if decoder:
        width, count = decoder
        found |= {"mask_token": (1, 1, width)} | blocks("decoder_blocks", width, count) | norm("decoder_norm", width)
        found |= linear("decoder_embed", width, dim) | linear("decoder_pred", 3 * patch**2, width)
    return found


def with_positions(state, side, patch, dim, depth, decoder=None):
    """And its fixed positions, with a zero for the CLS token."""
    for name, width in {"pos_embed": dim, "decoder_pos_embed": decoder and decoder[0]}.items():
        if width:
            fixed = common.sincos_positions(side // patch, side // patch, width)
            state[name] = F.pad(fixed, (0, 0, 1, 0))[None].to(state["cls_token"].dtype)
    return state


SINES = torch.sin(torch.arange(1_000_003, dtype=torch.float64).square() * 0.37).float()  # as many as a prime


def released(scale=0.1, **size):
    """A state by the names and shapes of MAE's release, whose weights are sines of their places, each with its own."""
    state, at = {}, 0
    for name, shape in names_and_shapes(**size).items():
        count = math.prod(shape)
        value = scale * SINES.roll(-at).repeat(count // len(SINES) + 1)[:count].reshape(shape)
        state[name], at = value + ("norm" in name and name.endswith("weight")), at + 7919
    return with_positions(state, **size)


def config_for(path):
    return types.SimpleNamespace(start=str(path))


class Bare(torch.nn.Module):
    """A method that is a masked autoencoder and nothing else."""

    def __init__(self, side, patch, dim, depth, heads, decoder, decoder_heads, norm_pixels=True):
        super().__init__()
        encoder = common.ViT(side, patch, dim, depth, heads)
        self.autoencoder = common.MaskedAutoencoder(encoder, *decoder, decoder_heads, norm_pixels=norm_pixels)

    @property
    def encoder(self):
        return self.autoencoder.encoder


# --- MAE's release ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "heads", "images"), [(SMALL, (4, 2), 3), (BASE, (12, 16), 1)], ids=["small", "base"])
def test_maes_release_gives_the_encoding_prediction_and_loss_of_an_independent_forward(size, heads, images, tmp_path):
    state = released(scale=0.1 if size is SMALL else 0.02, **size)
    torch.save({"model": state}, tmp_path / "mae.pth")
    method = Bare(**size, heads=heads[0], decoder_heads=heads[1])
    start_from(method, config_for(tmp_path / "mae.pth"))
    method.double()
    count = (size["side"] // size["patch"]) ** 2
    pictures, noise = rand(images, 3, size["side"], size["side"]).double(), rand(images, count, seed=1)
    mask = common.mask_from_noise(noise, 0.75)
    with torch.no_grad():
        found = method.autoencoder(pictures, mask)
        loss = common.reconstruction_loss(found.prediction, found.target, found.mask)
    mean, std = (torch.tensor(IMAGENET[name]).view(3, 1, 1) for name in ("mean", "std"))
    state = {name: value.double() for name, value in state.items()}
    expected = reference.masked_autoencoder(state, (pictures - mean) / std, noise, 0.75, *heads)
    for ours, theirs in zip((found.encoded, found.prediction, loss), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert found.prediction.std() > 0.01


def wave(shape, k):
    n = torch.arange(math.prod(shape))
    return torch.sin((((37 + 11 * k) * n + 53 * n * n + k) % 10007).double()).reshape(shape)


@pytest.mark.parametrize(("norm_pixels", "loss"), [(True, 1.40202686395), (False, 0.700519384054)])
def test_a_start_gives_the_numbers_of_the_official_code(norm_pixels, loss, tmp_path):
    """What facebookresearch/mae@efb2a80, models_mae.py MaskedAutoencoderViT.forward, gives in float64: weights
    0.2 * wave(shape, 100 + j) for the j-th name in order of the alphabet, plus 1 in norms."""
    state = {}
    for j, (name, shape) in enumerate(sorted(names_and_shapes(**SMALL).items())):
        state[name] = 0.2 * wave(shape, 100 + j) + ("norm" in name and name.endswith(".weight"))
    torch.save({"model": with_positions(state, **SMALL)}, tmp_path / "mae.pth")
    method = Bare(**SMALL, heads=4, decoder_heads=2, norm_pixels=norm_pixels).double()
    start_from(method, config_for(tmp_path / "mae.pth"))
    normalised, encoder = 0.5 + 0.3 * wave((3, 3, 16, 16), 40), method.encoder
    images = normalised * encoder.std + encoder.mean
    with torch.no_grad():
        found = method.autoencoder(images, common.mask_from_noise(wave((3, 16), 51), 0.75))
    assert float(common.reconstruction_loss(found.prediction, found.target, found.mask)) == pytest.approx(
        loss, rel=1e-9
    )
    first = [0.0767238664317, 0.342854974557, -0.813074249534, -0.691038046272]
    first += [0.367159224736, -0.570255516314, 0.148096468781, 0.533269286291]
    assert found.prediction.flatten()[:8].tolist() == pytest.approx(first, rel=1e-8)
    assert float((found.prediction * wave(found.prediction.shape, 99)).sum()) == pytest.approx(17.2400112416, rel=1e-8)


def test_the_encoder_alone_is_enough_and_the_decoder_starts_anew(tmp_path):
    state = released(**SMALL | {"decoder": None})
    torch.save({"model": state}, tmp_path / "mae.pth")
    torch.manual_seed(0)
    plain = Bare(**SMALL, heads=4, decoder_heads=2)
    torch.manual_seed(0)
    method, config = Bare(**SMALL, heads=4, decoder_heads=2), config_for(tmp_path / "mae.pth")
    start_from(method, config)
    assert torch.equal(method.encoder.blocks[1].mlp["fc1"].weight, state["blocks.1.mlp.fc1.weight"])
    assert torch.equal(method.autoencoder.decoder_head.weight, plain.autoencoder.decoder_head.weight)
    normalised = "images are normalised by ImageNet's mean and deviation; 4 heads, which the file does not tell"
    assert config.told == (f"--start {tmp_path}/mae.pth: encoder taken over; decoder starts anew; {normalised}",)


def test_a_decoder_of_another_depth_or_with_learned_positions_starts_anew(tmp_path):
    torch.save({"model": released(**SMALL | {"decoder": (16, 2)})}, tmp_path / "deep.pth")
    state = released(**SMALL)
    state["decoder_pos_embed"] = state["decoder_pos_embed"] + 0.5
    torch.save({"model": state}, tmp_path / "learned.pth")
    for name in ("deep", "learned"):
        method, config = Bare(**SMALL, heads=4, decoder_heads=2), config_for(tmp_path / f"{name}.pth")
        before = copy.deepcopy(method.autoencoder.decoder_blocks.state_dict())
        start_from(method, config)
        torch.testing.assert_close(method.autoencoder.decoder_blocks.state_dict(), before, rtol=0, atol=0)
        assert "encoder taken over; decoder starts anew" in config.told[0]


def test_timms_learned_positions_start_an_encoder_that_learns_them_and_no_other(tmp_path):
    """The features are those of an independent forward, that of the CLS token's position among them."""
    state = released(**SMALL | {"decoder": None}) | {"pos_embed": rand(1, 17, 32, seed=3)}
    torch.save(state, tmp_path / "timm.pth")
    method, config = torch.nn.Module(), config_for(tmp_path / "timm.pth")
    method.encoder = common.ViT(16, 4, 32, 2, 4, learned_positions=True)
    start_from(method, config)
    images = rand(2, 3, 16, 16)
    expected = reference.timm_features(state, method.encoder.normalize(images), 4, "avg")
    torch.testing.assert_close(method.encoder(images), expected)

    fixed = torch.nn.Module()
    fixed.encoder = common.ViT(16, 4, 32, 2, 4)
    for source, target, message in (
        (method, fixed, r"it has positions \(learned ones, of --positions learned\), for which there is no place"),
        (fixed, method, "it lacks positions, its own are fixed; give --positions fixed"),
    ):
        save_encoder(source.encoder, tmp_path / "encoder.pt")
        with pytest.raises(UserError, match=message):
            start_from(target, config_for(tmp_path / "encoder.pt"))


def test_settings_of_maes_training_beside_the_weights_are_read_and_run_nothing(tmp_path):
    """Its checkpoints hold an argparse.Namespace, which weights_only alone refuses."""
    state = {"model": released(**SMALL), "args": argparse.Namespace(lr=1e-3, names=["a"]), "epoch": 3}
    torch.save(state, tmp_path / "mae.pth")
    assert from_release(tmp_path / "mae.pth").keys() >= {"cls_token", "decoder_head.weight"}
    with pytest.raises(UserError, match="is not a checkpoint"):
        load_encoder(tmp_path / "mae.pth")  # what is ours never has one


RAN = []


def ran(*given):
    RAN.append(given)


class Evil:
    def __reduce__(self):
        return ran, (1,)


class EvilNamespace(argparse.Namespace):
    def __setstate__(self, state):
        ran(state)


def bag_with(name):
    """A Namespace that carries a function under a name that Python itself would call."""
    bag = argparse.Namespace()
    bag.__dict__[name] = ran
    return bag


HIDDEN = [EvilNamespace(a=1), Evil(), {"a": Evil()}, argparse.Namespace(a=Evil())]
HIDDEN += [bag_with(name) for name in ("_get_kwargs", "__setstate__", "__reduce__", "__repr__", "keys")]


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before zip"])
def test_code_in_a_file_is_never_run(new, tmp_path):
    """Nor one that a Namespace carries: a bag is allowed, what is in it is not."""
    method, path = Bare(**SMALL, heads=4, decoder_heads=2), tmp_path / "mae.pth"
    RAN.clear()
    for hidden in HIDDEN:
        torch.save({"model": released(**SMALL), "args": hidden}, path, _use_new_zipfile_serialization=new)
        with pytest.raises(UserError) as error:
            start_from(method, config_for(path))
        what = "EvilNamespace" if hidden is HIDDEN[0] else "ran"
        refused = f"Unsupported global: GLOBAL {__name__}.{what} was not an allowed global by default."
        assert str(error.value) == f"{path} is not a checkpoint ({refused})"
    assert not RAN
    torch.save(Evil(), path)
    torch.load(path, weights_only=False)
    assert RAN == [(1,)]  # read without care, it would have been


# --- timm's files ----------------------------------------------------------------------------------------------------


class Alone(torch.nn.Module):
    """A method that is an encoder and nothing else."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder


def random_vit(**fields):
    encoder = vit(image_size=16, **fields)
    for k, parameter in enumerate(encoder.parameters()):
        parameter.data = rand(*parameter.shape, seed=k) - 0.5
    return encoder


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"state_dict": x}, lambda x: {"model": x, "epoch": 3}])
def test_what_goes_to_timm_comes_back(wrap, tmp_path):
    """The weights bit for bit, bare or wrapped, with the head of a classifier or without."""
    encoder, again = random_vit(), vit(image_size=16)
    torch.save(wrap(to_timm(encoder) | {"head.weight": rand(10, 16), "head.bias": rand(10)}), tmp_path / "timm.pth")
    start_from(Alone(again), config_for(tmp_path / "timm.pth"))
    torch.testing.assert_close(again.state_dict(), encoder.state_dict(), rtol=0, atol=0)
    assert from_release(tmp_path / "timm.pth").keys() == encoder.state_dict().keys() | {"pos_embed"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_are_taken(dtype, tmp_path):
    """Their positions, which are rounded, are known as the fixed ones all the same."""
    encoder, again = random_vit(), vit(image_size=16)
    torch.save({name: value.to(dtype) for name, value in to_timm(encoder).items()}, tmp_path / "timm.pth")
    start_from(Alone(again), config_for(tmp_path / "timm.pth"))
    for name, value in encoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.to(dtype).float())
    assert torch.equal(again.positions, encoder.positions)


def test_safetensors_are_read_by_the_package_and_without_it_there_is_one_line(tmp_path, monkeypatch):
    path, encoder, again = tmp_path / "timm.safetensors", random_vit(), vit(image_size=16)
    path.write_bytes(b"for the stand-in")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError) as error:
        start_from(Alone(again), config_for(path))
    assert str(error.value) == f"{path} needs the package safetensors: pip install safetensors; or give a .pth"
    read = {path: to_timm(encoder)}
    monkeypatch.setitem(sys.modules, "safetensors", types.ModuleType("safetensors"))
    monkeypatch.setitem(sys.modules, "safetensors.torch", types.SimpleNamespace(load_file=lambda path: read[path]))
    start_from(Alone(again), config_for(path))
    torch.testing.assert_close(again.state_dict(), encoder.state_dict(), rtol=0, atol=0)
    read.clear()
    with pytest.raises(UserError, match=r"timm\.safetensors is not a file of safetensors \("):
        start_from(Alone(again), config_for(path))


# --- what does not fit -----------------------------------------------------------------------------------------------


def edited(**changes):
    """timm's names of a small transformer, with some changed; None takes one away."""
    state = to_timm(random_vit()) | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in state.items() if value is not None}


ONES = torch.ones(16)
LEARNED = "has learned positions, or none; ours are fixed sines and cosines, so give weights that were trained with"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos_embed": rand(1, 17, 16)}, LEARNED),  # timm's own, DeiT's
        ({"pos_embed": 0.1 + edited()["pos_embed"]}, LEARNED),
        ({"pos_embed": edited()["pos_embed"].flip(1)}, LEARNED),
        ({"pos_embed": edited()["pos_embed"][:, 1:]}, LEARNED),  # none of the CLS token, or 15 places
        ({"pos_embed": torch.cat([ONES[None, None], edited()["pos_embed"][:, 1:]], dim=1)}, LEARNED),
        ({"pos_embed": None}, LEARNED),
        (
            {"fc_norm__weight": ONES, "norm__weight": None},
            "it has fc_norm.weight (a norm behind the mean, of fine-tuning)",
        ),
        ({"dist_token": rand(1, 1, 16)}, "it has dist_token (a distillation token), for which there is no place"),
        ({"reg_token": rand(1, 4, 16)}, "it has reg_token (register tokens), for which there is no place"),
        ({"blocks__0__ls1__gamma": ONES}, "it has blocks.0.ls1.gamma (layer scale), for which there is no place"),
        ({"blocks__1__attn__q_norm__weight": ONES}, "it has blocks.1.attn.q_norm.weight, for which there is no place"),
        ({"norm__weight": None}, "does not fit this ViT: it lacks norm.weight"),
        ({"norm__weight": ONES[:8]}, "norm.weight is of (8,), not of (16,)"),
        ({"norm__weight": [1.0] * 16}, "norm.weight is a list, not of (16,)"),
        ({"norm__weight": ONES / 0}, "norm.weight is not finite"),
        ({"norm__weight": ONES.double() * 1e300}, "norm.weight is not finite"),  # as a float32
        ({"norm__weight": ONES.int()}, "norm.weight holds torch.int32, torch.strided on cpu, not plain numbers"),
        ({"norm__weight": torch.ones(1).expand(16)}, "norm.weight holds torch.float32"),  # one number for all
        ({"norm__weight": ONES.to_sparse()}, "norm.weight holds torch.float32, torch.sparse_coo"),
        (
            {"patch_embed__proj__weight": rand(16, 48)},
            "has a patch_embed.proj.weight that is no (width, 3, patch, patch)",
        ),
        ({"patch_embed__proj__weight": rand(16, 1, 4, 4)}, "that is no (width, 3, patch, patch) of floats"),
        (
            {"patch_embed__proj__weight": torch.ones(1, 1, 1, 1).expand(10**9, 3, 4, 4)},
            "that is no (width, 3, patch",
        ),
        (
            {"patch_embed__proj__weight": None},
            "holds no known weights; expected an encoder.pt or last.pt, MAE's, or timm",
        ),
    ],
)
def test_what_has_no_place_here_is_refused_by_its_name_and_nothing_is_changed(changes, message, tmp_path):
    torch.save(edited(**changes), tmp_path / "timm.pth")
    again = Alone(vit(image_size=16))
    before, fields = copy.deepcopy(again.state_dict()), dict(again.encoder.fields)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        start_from(again, config_for(tmp_path / "timm.pth"))
    assert str(tmp_path / "timm.pth") in str(error.value) and "\n" not in str(error.value)
    torch.testing.assert_close(again.state_dict(), before, rtol=0, atol=0)
    assert again.encoder.fields == fields


@pytest.fixture
def refusal(monkeypatch, capsys):
    """What train.py says of a command line, on few pictures."""
    monkeypatch.setattr(train, "load_data", lambda name, image_size, **_: shapes(8, image_size))
    return lambda argv: refused(argv, capsys)


def refused(argv, capsys):
    code = train.main([*argv.split(), "--batch-size", "8"])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1, error
    return error.removeprefix("error: ").strip()


def test_a_network_of_another_size_is_refused_with_the_flags_that_fit(tmp_path, refusal):
    path, run = tmp_path / "mae.pth", f"magma --image-size 8 --out {tmp_path}/run --start"
    torch.save({"model": released(side=16, patch=8, dim=192, depth=12)}, path)
    ours = "but this run width 96, 6 blocks, patch 4"
    expected = f"--start {path} has width 192, 12 blocks, patch 8, {ours}; give --model vit_tiny --patch 8"
    assert refusal(f"{run} {path}") == expected
    torch.save({"model": released(side=28, patch=14, dim=64, depth=3)}, path)
    sizes = ", ".join(common.VIT_SIZES)
    expected = f"--start {path} has width 64, 3 blocks, patch 14, {ours}; no --model has it: {sizes}"
    assert refusal(f"{run} {path}") == expected
    save_encoder(common.ViT(8, 4, 96, 6, heads=6), path)  # of ours, which tells its heads
    ours = "but this run width 96, 6 blocks, patch 4, 3 heads"
    expected = f"--start {path} has width 96, 6 blocks, patch 4, 6 heads, {ours}; give --model vit_micro --patch 4"
    assert refusal(f"{run} {path}") == f"{expected} --heads 6"
    expected = f"{expected.split(';')[0]}; no --model has it: {sizes}"  # these have no --heads
    for method in ("mixedae", "mlo_mae", "ebm_pretrain"):
        assert refusal(f"{method} --image-size 16 --out {tmp_path}/run --start {path}") == expected


def test_encoders_of_another_kind_are_refused(tmp_path, refusal):
    save_encoder(common.MobileFormer("micro"), tmp_path / "mobile.pt")
    torch.save({"model": released(**SMALL)}, tmp_path / "mae.pth")
    torch.save({"identity": {}, "weights": common.MobileFormer("micro").state_dict()}, tmp_path / "last.pt")
    for command, name, message in (
        ("magma --image-size 8", "mobile.pt", "holds a MobileFormer, but this run trains a ViT"),
        ("finola", "mae.pth", "holds a ViT, but this run trains a MobileFormer"),
        ("ebm_pretrain --model swin_micro", "mae.pth", "holds a ViT, but this run trains a Swin"),
        ("magma --image-size 8", "last.pt", "holds no ViT, which this run trains"),
        ("finola --channels 64", "mobile.pt", "does not fit this MobileFormer: head.0.weight is of (256, "),
        ("magma --image-size 8", "", "is a folder; give a file, of a run its last.pt or encoder.pt"),
    ):
        path = tmp_path / name
        assert refusal(f"{command} --out {tmp_path}/run --start {path}").startswith(f"--start {path} {message}")


# --- every method ----------------------------------------------------------------------------------------------------

METHODS = {  # how it is made, the size of its encoder and decoder, and whether a decoder of MAE's has a place
    "magma": (tiny_magma, {"side": 8, "dim": 96, "depth": 6, "decoder": (64, 2)}, True),
    "magma simclr": (
        lambda **f: tiny_magma(ssl="simclr", **f),
        {"side": 8, "dim": 96, "depth": 6, "decoder": (64, 2)},
        False,
    ),
    "mixedae": (tiny_mixedae, {"side": 16, "dim": 96, "depth": 6, "decoder": (16, 1)}, True),
    "mlo_mae": (tiny_levels, {"side": 16, "dim": 16, "depth": 2, "decoder": (16, 1)}, True),
    "mlo_mae full": (
        lambda **f: tiny_levels(objective="full", **f),
        {"side": 16, "dim": 16, "depth": 2, "decoder": (16, 1)},
        True,
    ),
    "energy": (tiny_energy, {"side": 16, "dim": 16, "depth": 2, "decoder": (16, 1)}, False),
    "energy mae": (
        lambda **f: tiny_energy(objective="mae", **f),
        {"side": 16, "dim": 16, "depth": 2, "decoder": (16, 1)},
        True,
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_transformers_starts_from_maes_release(name, tmp_path):
    make, size, has_decoder = METHODS[name]
    state = released(**size, patch=4)
    torch.save({"model": state}, tmp_path / "mae.pth")
    plain, method = make(), make(start=str(tmp_path / "mae.pth"))
    encoder = method.encoder
    assert torch.equal(encoder.blocks[-1].attn["qkv"].weight, state[f"blocks.{size['depth'] - 1}.attn.qkv.weight"])
    assert torch.equal(encoder.cls_token, state["cls_token"])
    assert {name: encoder.fields[name] for name in IMAGENET} == IMAGENET  # not those of the data
    torch.testing.assert_close(encoder.mean.flatten(), torch.tensor(IMAGENET["mean"]))
    torch.testing.assert_close(encoder.std.flatten(), torch.tensor(IMAGENET["std"]))
    assert encoder.pool == plain.encoder.pool
    assert has_decoder == any(torch.equal(p, state["decoder_pred.weight"]) for p in method.parameters())
    assert method.origin.startswith("--start ") and plain.origin == "" and plain.config.told == ()
    assert (method.config.notes()[0] == method.config.told[0]) and "encoder" in method.config.told[0]
    if name == "mlo_mae full":  # F of Eq. 13 starts as E
        torch.testing.assert_close(method.tuned.state_dict(), encoder.state_dict(), rtol=0, atol=0)
        assert method.tuned.fields == encoder.fields


def test_another_size_of_images_has_positions_of_its_own_and_a_note(tmp_path):
    torch.save({"model": released(side=16, patch=4, dim=96, depth=6, decoder=(64, 2))}, tmp_path / "mae.pth")
    method = tiny_magma(start=str(tmp_path / "mae.pth"), image_size=32)
    assert torch.equal(method.encoder.positions, common.sincos_positions(8, 8, 96))
    assert torch.equal(method.autoencoder.decoder_positions, common.sincos_positions(8, 8, 64))
    assert "encoder, decoder taken over;" in method.config.told[0]
    assert "fixed positions computed for 32 x 32 pixels, it was trained at 16 x 16" in method.config.told[0]
    assert "positions" not in tiny_magma(start=str(tmp_path / "mae.pth"), image_size=16).config.told[0]
    save_encoder(common.ViT(16, 4, 96, 6, 3), tmp_path / "encoder.pt")
    told = tiny_magma(start=str(tmp_path / "encoder.pt"), image_size=32).config.told[0]
    assert "fixed positions computed for 32 x 32 pixels, it was trained at 16 x 16" in told


def saved(method, folder):
    """A run folder with the weights of a method."""
    folder.mkdir()
    save_encoder(method.encoder, folder / "encoder.pt")
    torch.save({"identity": {}, "step": 3, "weights": method.state_dict()}, folder / "last.pt")
    return folder / "last.pt"


def stirred(method):
    """A method whose weights are no longer those that it is made with."""
    for k, parameter in enumerate(method.parameters()):
        parameter.data += 0.01 * rand(1, *parameter.shape, seed=k)[0]
    return method


LONGER = [tiny_magma, lambda **f: tiny_magma(ssl="vicreg", **f), tiny_mixedae, tiny_finola, tiny_levels, tiny_energy]
LONGER += [lambda **f: tiny_finola(variant="masked_b", **f), lambda **f: tiny_levels(objective="fixed", **f)]


@pytest.mark.parametrize("make", LONGER)
def test_a_last_pt_of_the_same_method_brings_all_of_it(make, tmp_path):
    """FINOLA's matrices, heads, projectors, the masking network and alpha too: the run is made longer."""
    before = stirred(make())
    before.encoder.normalize_by((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    if hasattr(before, "log_alpha"):
        before.started = True
    again = make(start=str(saved(before, tmp_path / "run")))
    torch.testing.assert_close(again.state_dict(), before.state_dict(), rtol=0, atol=0)
    assert again.encoder.fields == before.encoder.fields
    assert torch.equal(again.encoder.mean, before.encoder.mean) and torch.equal(again.encoder.std, before.encoder.std)
    assert "anew" not in again.config.told[0] and "normalised by its own mean and deviation" in again.config.told[0]
    (tmp_path / "run" / "encoder.pt").unlink()
    told = make(start=str(tmp_path / "run" / "last.pt")).config.told[0]
    assert told.endswith("normalised by the data's (no encoder.pt beside it tells its own) mean and deviation")


def test_one_method_goes_on_from_another_with_the_decoder_where_it_fits(tmp_path):
    """From MAGMA to MixedAE and to MLO-MAE: the autoencoder; to SimCLR and to the energy: the encoder."""
    small = {"image_size": 16, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    before = stirred(tiny_magma(**small))
    path = str(saved(before, tmp_path / "run"))
    again = tiny_mixedae(start=path)
    torch.testing.assert_close(again.autoencoder.state_dict(), before.autoencoder.state_dict(), rtol=0, atol=0)
    assert "encoder, decoder taken over; images" in again.config.told[0]
    views = tiny_magma(ssl="simclr", start=path, **small)
    torch.testing.assert_close(views.encoder.state_dict(), before.encoder.state_dict(), rtol=0, atol=0)
    assert "encoder taken over; projector starts anew; images" in views.config.told[0]
    wider = tiny_magma(start=path, **small | {"decoder_dim": 32})
    torch.testing.assert_close(wider.encoder.state_dict(), before.encoder.state_dict(), rtol=0, atol=0)
    assert "encoder taken over; decoder starts anew; images" in wider.config.told[0]
    energy = tiny_energy(encoder=vit(image_size=16, dim=96, depth=6, heads=3), start=path)
    torch.testing.assert_close(energy.encoder.state_dict(), before.encoder.state_dict(), rtol=0, atol=0)
    assert "encoder taken over; log_alpha, energy starts anew" in energy.config.told[0] and not energy.started


def test_a_module_of_ones_own_cannot_be_filled(tmp_path):
    torch.save(edited(), tmp_path / "timm.pth")
    own = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 4), torch.nn.GELU(), torch.nn.Conv2d(4, 4, 2))
    with pytest.raises(UserError, match="--start fills the encoders of this project, not a Sequential"):
        tiny_energy(encoder=own, start=str(tmp_path / "timm.pth"))


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_is_made_longer_and_its_continuation_knows_the_file(tmp_path, capsys):
    """The file may move, but must be there and the same; a run that starts from nothing has no origin, as before."""
    fit_magma(tmp_path / "first")
    start = tmp_path / "first" / "last.pt"
    flags = ["--start", str(start), "--epochs", "2", "--probe-every", "0"]
    fit_magma(tmp_path / "whole", *flags)
    assert (
        f"note: --start {start}: encoder, decoder taken over; images are normalised by its own"
        in capsys.readouterr().out
    )
    assert log_of(tmp_path / "whole")[-1]["mae"] < log_of(tmp_path / "first")[2]["mae"]
    identity = torch.load(tmp_path / "whole" / "last.pt")["identity"]
    assert identity["origin"].startswith("--start ") and "start" not in identity
    assert torch.load(start)["identity"]["origin"] == ""
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("last.pt", "encoder.pt"):
        (tmp_path / "first" / name).rename(moved / name)
    again = [*flags, "--resume", "--start", str(moved / "last.pt")]
    fit_magma(tmp_path / "whole", *again)
    with pytest.raises(UserError, match="there is no file .*first/last.pt"):
        fit_magma(tmp_path / "whole", *flags, "--resume")
    with pytest.raises(UserError, match=r"was trained otherwise \(origin --start \w+ -> \)"):
        fit_magma(tmp_path / "whole", *flags, "--resume", "--start", "")
    fit_magma(tmp_path / "other", "--seed", "1")
    with pytest.raises(UserError, match=r"was trained otherwise \(origin --start \w+ -> --start \w+\)"):
        fit_magma(tmp_path / "whole", *flags, "--resume", "--start", str(tmp_path / "other" / "last.pt"))


def test_torchrun_hands_every_flag_on_behind_two_dashes():
    """Without them Python 3.11's argparse takes `--start` for a short form of torchrun's own --start-method."""
    for name in common.METHODS:
        flags = [flag(field) for field in field_types(importlib.import_module(name).Config)]
        argv = [x for one in flags for x in (one, "1")]
        found = torchrun_arguments(["--nproc_per_node=2", "--", "train.py", name, *argv])
        assert found.training_script == "train.py" and found.training_script_args == [name, *argv]
        argv = [x for x in argv if x != "--start"]
        assert torchrun_arguments(["train.py", *argv]).training_script_args == argv  # all others need none


# --- odd files -------------------------------------------------------------------------------------------------------

ODD_FILES = 150
ODD = [
    None,
    True,
    -1,
    10**9,
    0.5,
    float("nan"),
    "",
    "8",
    b"8",
    (),
    (8, 8),
    [8],
    {},
    {"a": 1},
    {1: 2},
    1j,
    {"model": {}},
]
ODD += [torch.ones(3), torch.ones(()), torch.full((16,), float("nan")), torch.zeros(1).expand(10**9), torch.zeros(0)]
ODD += [torch.ones(16, dtype=torch.complex64), torch.ones(16).to_sparse(), torch.empty(16, device="meta")]
ODD += [torch.ones(16, dtype=torch.int8), torch.ones(16, 16).half().t(), torch.nn.Parameter(torch.ones(16)), Evil()]
ODD += [argparse.Namespace(a=1), bag_with("keys"), EvilNamespace(), {"\n" * 3: 1}, "x" * 10**5, torch.ones(2, 17, 16)]


def odd_file(sound: list, draw: random.Random, path):
    """A file of one of four kinds, with one to three things in it that are not as they should be, or cut, or noise."""
    state = copy.deepcopy(draw.choice(sound))
    places = [state, *(x for x in state.values() if isinstance(x, dict))]
    for _ in range(draw.randint(1, 3)):
        place = draw.choice([*places, state])
        name = draw.choice([*place, "extra", "\x1b[2J\n", "blocks.", "kind", "identity", "model", 3, None, ("a",)])
        value, what = place.get(name), draw.randrange(6)
        if what == 0:
            place.pop(name, None)
        elif what == 1 and is_sound(value):
            place[name] = draw.choice([value[:1], value[None], value.half(), value * float("nan"), value.flatten()])
        elif what == 2 and isinstance(value, torch.Tensor):
            place[draw.choice(list(place))] = value
        else:
            place[name] = draw.choice(ODD)
    state = draw.choice(ODD) if draw.random() < 0.03 else state
    torch.save(state, path, _use_new_zipfile_serialization=draw.random() < 0.8)
    if draw.random() < 0.15:
        data = bytearray(path.read_bytes())
        for _ in range(draw.randint(1, 20)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data[: draw.randrange(len(data))] if draw.random() < 0.5 else data)


def test_an_odd_file_fills_or_is_refused_in_one_line_and_runs_nothing(tmp_path):
    """Many more were tried by hand; what is here takes two seconds."""
    path, draw, filled = tmp_path / "odd.pt", random.Random(0), 0
    RAN.clear()
    method = Bare(**SMALL, heads=4, decoder_heads=2)
    torch.save({"identity": {}, "weights": method.state_dict()}, path)
    sound = [torch.load(path), {"model": released(**SMALL)}, released(**SMALL)]
    save_encoder(method.encoder, path)
    sound.append(torch.load(path))
    for _ in range(ODD_FILES):
        odd_file(sound, draw, path)
        try:
            start_from(method, config_for(path))
            filled += 1
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error) and len(str(error)) < 800
        assert all(bool(p.isfinite().all()) for p in method.state_dict().values())
    assert not RAN
    assert ODD_FILES // 20 < filled < ODD_FILES // 2
