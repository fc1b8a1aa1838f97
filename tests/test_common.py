"""Patches, transformer, masked autoencoder, augmentation, data, probes and the parts of the loop."""

import dataclasses
import io
import itertools
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import common
from common import (
    SHAPES,
    VIT_SIZES,
    MaskedAutoencoder,
    MemoryImages,
    Meter,
    Method,
    NonFiniteLoss,
    Stepper,
    TrainConfig,
    UserError,
    ViT,
)

seeds = st.integers(0, 2**32 - 1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=generator(seed), dtype=dtype)


def tiny_vit(**fields):
    torch.manual_seed(0)
    return ViT(**{"image_size": 8, "patch": 4, "dim": 16, "depth": 2, "heads": 2} | fields)


# --- patches and positions -------------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), seeds)
def test_patchify_roundtrips_and_matches_naive_loop(batch, channels, rows, columns, patch, seed):
    images = rand(batch, channels, rows * patch, columns * patch, seed=seed)
    patches = common.patchify(images, patch)
    assert torch.equal(patches, reference.patchify(images, patch))
    assert torch.equal(common.unpatchify(patches, patch, rows * patch, columns * patch), images)


def test_patchify_rejects_a_patch_that_does_not_divide():
    with pytest.raises(ValueError, match="10 x 8 cannot be cut into patches of 4 x 4"):
        common.patchify(torch.zeros(1, 3, 10, 8), 4)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_sincos_positions_matches_naive_loop(height, width, quarter):
    positions = common.sincos_positions(height, width, 4 * quarter)
    torch.testing.assert_close(positions.double(), reference.sincos_positions(height, width, 4 * quarter))


def test_sincos_positions_rejects_odd_widths():
    with pytest.raises(ValueError, match="divisible by 4, not 10"):
        common.sincos_positions(2, 2, 10)


@given(st.integers(1, 5), st.integers(1, 40), st.floats(0, 1), seeds)
def test_random_mask_has_exact_counts_in_each_row(batch, patches, ratio, seed):
    mask = common.random_mask(batch, patches, ratio, generator(seed))
    assert mask.dtype == torch.bool
    assert mask.shape == (batch, patches)
    assert (mask.sum(dim=1) == round(ratio * patches)).all()


def test_mask_from_noise_hides_the_patches_with_the_largest_noise():
    mask = common.mask_from_noise(torch.tensor([[0.3, 0.9, 0.1, 0.5]]), 0.5)
    assert mask.tolist() == [[False, True, False, True]]


def test_random_mask_is_uniform_over_patches():
    share = common.random_mask(4000, 16, 0.75, generator(0)).float().mean(dim=0)
    assert (share - 0.75).abs().max() < 0.04


# --- vision transformer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "known"),
    [("vit_tiny", 5_524_416), ("vit_small", 21_665_664), ("vit_base", 85_798_656), ("vit_large", 303_301_632)],
)
def test_vit_has_the_well_known_number_of_parameters(name, known):
    """The counts of timm's models without head. Theirs learn the positions, 197 a channel; ours are fixed."""
    with torch.device("meta"):
        vit = ViT(224, 16, **VIT_SIZES[name])
    assert sum(p.numel() for p in vit.parameters()) + 197 * vit.dim == known


def test_vit_parameter_names_are_those_of_timm():
    names = {re.sub(r"blocks\.\d+", "blocks.0", name) for name in tiny_vit().state_dict()}
    block = {f"blocks.0.{layer}" for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")}
    layers = block | {"norm", "patch_embed.proj"}
    assert names == {"cls_token"} | {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


def test_vit_takes_images_that_are_not_square():
    vit = tiny_vit(image_size=(8, 12))
    assert vit.grid == (2, 3)
    assert vit(rand(2, 3, 8, 12)).shape == (2, 16)


def test_vit_embed_equals_a_strided_convolution_plus_positions():
    vit, images = tiny_vit(), rand(2, 3, 8, 8)
    weight = vit.patch_embed["proj"].weight.unflatten(1, (4, 4, 3)).permute(0, 3, 1, 2)  # (D, C, p, q)
    tokens = F.conv2d(images, weight, stride=4).flatten(2).transpose(1, 2)
    positions = reference.sincos_positions(2, 2, 16).float()
    torch.testing.assert_close(vit.embed(images), tokens + positions)


def test_vit_normalizes_with_the_statistics_it_carries():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    images = rand(2, 3, 8, 8)
    carried = tiny_vit(mean=mean, std=std)(images)
    by_hand = tiny_vit()((images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    torch.testing.assert_close(carried, by_hand)


def test_vit_pools_the_mean_of_the_patches_or_the_cls_token():
    images = rand(2, 3, 8, 8)
    encoded = tiny_vit().encode(tiny_vit().embed(images))
    torch.testing.assert_close(tiny_vit(pool="mean")(images), encoded[:, 1:].mean(dim=1))
    torch.testing.assert_close(tiny_vit(pool="cls")(images), encoded[:, 0])
    with pytest.raises(UserError, match="unknown pool 'max'"):
        tiny_vit(pool="max")


def test_vit_encode_returns_every_block_before_the_final_norm():
    vit = tiny_vit()
    encoded, hidden = vit.encode(vit.embed(rand(2, 3, 8, 8)), hidden=True)
    assert len(hidden) == 2
    torch.testing.assert_close(vit.norm(hidden[-1]), encoded)
    torch.testing.assert_close(vit.blocks[1](hidden[0]), hidden[1])


def test_vit_encode_uses_the_attention_it_is_given():
    vit, seen = tiny_vit(), []

    def no_attention(q, k, v):
        seen.append(q.shape)
        return v

    tokens = vit.embed(rand(2, 3, 8, 8))
    moved = tokens.clone()
    moved[:, 0] += 1  # without attention a token cannot reach the others
    out, out_moved = vit.encode(tokens, no_attention), vit.encode(moved, no_attention)
    assert seen == [(2, 2, 5, 8)] * 4
    assert torch.equal(out[:, 2:], out_moved[:, 2:])
    assert not torch.equal(vit.encode(tokens)[:, 2:], vit.encode(moved)[:, 2:])


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), seeds)
def test_attend_matches_the_fused_kernel(batch, heads, tokens, width, seed):
    q, k, v = torch.randn(3, batch, heads, tokens, width, generator=generator(seed), dtype=torch.float64)
    torch.testing.assert_close(common.attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_vit_rejects_sizes_that_do_not_divide():
    with pytest.raises(UserError, match="image size 10 x 10 is not a multiple of the patch size 4"):
        tiny_vit(image_size=10)
    for heads in (3, -1):
        with pytest.raises(UserError, match="a (width|transformer) of (width )?16"):
            tiny_vit(heads=heads)
    with pytest.raises(UserError, match="patch 0 cannot be built"):
        tiny_vit(patch=0)
    with pytest.raises(UserError, match="a decoder of width -8, 1 blocks, 2 heads cannot be built"):
        MaskedAutoencoder(tiny_vit(), -8, 1, 2)


# --- masked autoencoder ----------------------------------------------------------------------------------------------


def tiny_autoencoder(**fields):
    return MaskedAutoencoder(tiny_vit(**fields), decoder_dim=8, decoder_depth=1, decoder_heads=2, mask_ratio=0.5)


def test_autoencoder_never_sees_masked_pixels():
    model, images = tiny_autoencoder(), rand(2, 3, 8, 8)
    mask = torch.tensor([[True, False, True, False], [False, True, True, False]])
    other = common.unpatchify(
        torch.where(mask[..., None], 0.5, common.patchify(images, 4)), 4, 8, 8
    )  # the masked pixels are grey
    assert torch.equal(model(images, mask).prediction, model(other, mask).prediction)
    assert not torch.equal(model(images, mask).prediction, model(other, ~mask).prediction)


def test_autoencoder_puts_visible_tokens_back_in_their_places():
    """Without decoder blocks a patch is predicted from its own token, so the places can be read off."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(tiny_vit(), decoder_dim=8, decoder_depth=0, decoder_heads=2, mask_ratio=0.5)
    mask = torch.tensor([[True, False, True, False], [False, True, True, False]])
    out = model(rand(2, 3, 8, 8), mask)
    for b in range(2):
        tokens = iter(out.encoded[b, 1:])
        for n in range(4):
            token = model.mask_token[0, 0] if mask[b, n] else model.decoder_embed(next(tokens))
            want = model.decoder_head(model.decoder_norm(token + model.decoder_positions[n]))
            torch.testing.assert_close(out.prediction[b, n], want)


def test_autoencoder_draws_masks_of_its_ratio():
    assert (tiny_autoencoder()(rand(3, 3, 8, 8)).mask.sum(dim=1) == 2).all()
    for ratio in (0.01, 0.99, 2.0, float("nan")):
        with pytest.raises(UserError, match=f"a mask ratio of {ratio} leaves no patch masked"):
            MaskedAutoencoder(tiny_vit(), mask_ratio=ratio)


def test_autoencoder_rejects_masks_of_different_sizes():
    mask = torch.tensor([[True, False, True, False], [False, False, True, False]])
    with pytest.raises(ValueError, match="must hide the same number of patches"):
        tiny_autoencoder()(rand(2, 3, 8, 8), mask)


@given(st.integers(1, 3), st.integers(2, 6), st.integers(1, 4), seeds)
def test_reconstruction_loss_matches_naive_loop_and_ignores_visible_patches(batch, patches, size, seed):
    prediction, target, noise = torch.randn(3, batch, patches, size, generator=generator(seed), dtype=torch.float64)
    mask = common.random_mask(batch, patches, 0.5, generator(seed))
    loss = common.reconstruction_loss(prediction, target, mask)
    want = reference.reconstruction_loss(prediction, target, mask).item()
    assert loss.item() == pytest.approx(want, rel=1e-5)  # the error is taken in float32
    elsewhere = prediction + noise * ~mask[..., None]
    assert torch.equal(common.reconstruction_loss(elsewhere, target, mask), loss)


def test_autoencoder_target_is_normalized_patch_by_patch():
    model = tiny_autoencoder(mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4))
    images = rand(2, 3, 8, 8)
    target = model.target(images)
    torch.testing.assert_close(target.mean(dim=-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.std(dim=-1), torch.ones(2, 4), atol=1e-4, rtol=0)
    model.norm_pixels = False
    torch.testing.assert_close(model.target(images), common.patchify(model.encoder.normalize(images), 4))


def test_autoencoder_reaches_every_parameter():
    model = tiny_autoencoder()
    out = model(rand(2, 3, 8, 8))
    common.reconstruction_loss(out.prediction, out.target, out.mask).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_autoencoder_pictures_keep_visible_pixels_and_draw_a_perfect_prediction_as_the_image():
    model, images = tiny_autoencoder(mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4)), rand(3, 3, 8, 8)
    torch.manual_seed(1)
    rows = model.pictures(images)
    assert rows.shape == (3, 3, 3, 8, 8)
    torch.testing.assert_close(rows[:, 0], images)
    masked = (rows[:, 1] - torch.tensor((0.3, 0.4, 0.5)).view(3, 1, 1)).abs().amax(dim=1) < 1e-6  # the mean colour
    assert masked.sum() == 3 * 2 * 16
    torch.testing.assert_close(rows[:, 2].permute(0, 2, 3, 1)[~masked], images.permute(0, 2, 3, 1)[~masked])
    model.decode = lambda encoded, visible: model.target(images)
    torch.testing.assert_close(model.pictures(images)[:, 2], images, atol=1e-4, rtol=0)


# --- augmentation ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.05, 1), seeds)
def test_crop_boxes_lie_inside_and_keep_area_and_aspect(height, width, low, seed):
    sizes = torch.tensor([[float(height)], [float(width)]]).expand(2, 50)
    boxes = common.crop_boxes(*sizes, scale=(low, 1.0), generator=generator(seed))
    top, left, h, w = boxes.double().unbind(dim=1)
    slack = 1e-4 * max(height, width)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height + slack).all()
    assert (left + w <= width + slack).all()
    aspect = w / h
    assert (aspect > 3 / 4 - 1e-3).all()
    assert (aspect < 4 / 3 + 1e-3).all()
    share = h * w / (height * width)
    if 3 / 4 <= width / height <= 4 / 3:  # longer images may have no box of the wanted area
        assert (share > low - 1e-3).all()


def test_crop_boxes_are_uniform_in_area_place_and_the_logarithm_of_their_aspect():
    sides = torch.full((20000,), 100.0)
    boxes = common.crop_boxes(sides, sides, scale=(0.1, 0.3), ratio=(1 / 2, 2), generator=generator(0)).double()
    top, left, h, w = boxes.unbind(dim=1)
    place = top / (100 - h), left / (100 - w)
    for x, low, high in [(h * w / 1e4, 0.1, 0.3), ((w / h).log2(), -1, 1), (place[0], 0, 1), (place[1], 0, 1)]:
        shares = torch.linspace(0, 1, 11, dtype=torch.float64)
        torch.testing.assert_close(x.quantile(shares), low + (high - low) * shares, rtol=0, atol=0.02 * (high - low))


def test_crop_boxes_fall_back_to_the_largest_centred_box():
    boxes = common.crop_boxes(torch.tensor([10.0]), torch.tensor([1000.0]), scale=(1.0, 1.0))
    torch.testing.assert_close(boxes[0], torch.tensor([0.0, 500 - 20 / 3, 10.0, 40 / 3]))


@given(st.integers(2, 40), st.integers(2, 40), st.floats(0, 1), st.floats(0.2, 1), seeds)
def test_resample_matches_pillow_for_any_window(side, size, start, share, seed):
    """Bilinear with the low-pass of Pillow's BILINEAR, whose windows need not start at whole pixels."""
    image = torch.randint(0, 256, (1, 1, side, side), generator=generator(seed), dtype=torch.uint8)
    length = max(1.0, share * side)
    first = start * (side - length)
    matrix = common.resize_matrix(torch.tensor([first]), torch.tensor([length]), side, size)
    ours = common.resample(image.float(), matrix, matrix)[0, 0]
    box = (first, first, min(first + length, side), min(first + length, side))
    theirs = Image.fromarray(image[0, 0].numpy()).resize((size, size), Image.Resampling.BILINEAR, box=box)
    assert (ours - torch.from_numpy(np.array(theirs).astype(np.float32))).abs().max() < 1.6


def test_resize_matches_pillow_when_it_shrinks():
    image = torch.randint(0, 256, (1, 3, 96, 96), generator=generator(0), dtype=torch.uint8)
    ours = common.resize(image, 32)[0] * 255
    theirs = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((32, 32), Image.Resampling.BILINEAR)
    assert (ours - torch.from_numpy(np.array(theirs)).permute(2, 0, 1)).abs().max() < 1.6


def test_resize_leaves_images_of_the_right_size_alone():
    image = torch.randint(0, 256, (2, 3, 8, 8), generator=generator(0), dtype=torch.uint8)
    assert torch.equal(common.resize(image, 8), image.float() / 255)
    assert torch.equal(common.resize(image.float() / 255, 8), image.float() / 255)


@given(st.integers(1, 4), st.integers(1, 3), seeds)
def test_resample_gives_each_image_its_own_window_and_all_channels_the_same(batch, channels, seed):
    images = torch.rand(batch, channels, 6, 7, generator=generator(seed))
    rows, columns = (torch.rand(batch, *shape, generator=generator(seed + 1)) for shape in ((4, 6), (5, 7)))
    out = common.resample(images, rows, columns)
    for i, j in itertools.product(range(batch), range(channels)):
        torch.testing.assert_close(out[i, j], rows[i] @ images[i, j] @ columns[i].T)


def test_random_resized_crop_matches_pillow_image_by_image():
    images = common.render_shapes(12, 40)[0][:, :, :, :32]
    ours = common.random_resized_crop(images, 24, generator=generator(5))
    again = generator(5)
    boxes = common.crop_boxes(torch.full((12,), 40.0), torch.full((12,), 32.0), generator=again).tolist()
    flipped = (torch.rand(12, generator=again) < 0.5).tolist()
    assert {True, False} == set(flipped)
    for image, crop, (top, left, h, w), mirror in zip(images, ours, boxes, flipped, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        theirs = picture.resize((24, 24), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
        theirs = theirs.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else theirs
        theirs = torch.from_numpy(np.array(theirs)).permute(2, 0, 1) / 255
        assert (crop - theirs).abs().max() < 1.6 / 255


def test_random_resized_crop_is_the_identity_for_the_whole_image_and_mirrors_with_flip():
    images = torch.randint(0, 256, (5, 3, 8, 8), generator=generator(0), dtype=torch.uint8)
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    same = common.random_resized_crop(images, 8, **whole, flip=0.0)
    torch.testing.assert_close(same, images.float() / 255)
    mirrored = common.random_resized_crop(images, 8, **whole, flip=1.0)
    torch.testing.assert_close(mirrored, images.flip(-1).float() / 255)


def test_random_resized_crop_gives_each_image_its_own_crop_from_the_generator():
    images = torch.randint(0, 256, (1, 3, 16, 16), generator=generator(0), dtype=torch.uint8).expand(6, -1, -1, -1)
    first = common.random_resized_crop(images, 12, generator=generator(1))
    assert torch.equal(first, common.random_resized_crop(images, 12, generator=generator(1)))
    assert first.shape == (6, 3, 12, 12)
    assert first.min() >= 0
    assert first.max() <= 1
    assert len({tuple(x.flatten().tolist()) for x in first}) == 6


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_shapes_depend_on_seed_and_index_alone():
    images, labels, masks = common.render_shapes(40, 16, seed=3)
    fewer = common.render_shapes(7, 16, seed=3)
    assert torch.equal(images[:7], fewer[0])
    assert torch.equal(masks[:7], fewer[2])
    assert not torch.equal(images[:7], common.render_shapes(7, 16, seed=4)[0])
    assert torch.bincount(labels).tolist() == [4] * len(SHAPES)


@pytest.mark.parametrize("size", [16, 33, 64])
def test_shapes_masks_cover_the_object(size):
    images, _, masks = common.render_shapes(60, size)
    share = masks.float().mean(dim=(1, 2))
    assert images.shape == (60, 3, size, size)
    assert (share > 0.03).all()
    assert (share < 0.5).all()
    inside = torch.stack([x[:, m].float().mean(dim=1) for x, m in zip(images, masks, strict=True)])
    outside = torch.stack([x[:, ~m].float().mean(dim=1) for x, m in zip(images, masks, strict=True)])
    assert ((inside - outside).abs().amax(dim=1) > 15).float().mean() > 0.95  # the object stands out


def test_shapes_are_the_same_drawing_at_any_size():
    small, _, _ = common.render_shapes(20, 32)
    large, _, _ = common.render_shapes(20, 128)
    assert (common.resize(large, 32) - common.resize(small, 32)).abs().mean() < 0.03


def test_shapes_for_training_and_for_testing_are_different_pictures():
    train, test, other = (
        common.load_data("shapes", split=split, image_size=16, seed=seed).images[:100].flatten(1).float()
        for split, seed in (("train", 0), ("test", 0), ("train", 1))
    )
    for a, b in itertools.combinations((train, test, other), 2):
        assert torch.cdist(a, b).min() > 0


def test_raw_pixels_are_a_poor_classifier_of_shapes():
    train, test = (common.load_data("shapes", split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (4096, 1024)
    pixels = [x.images.flatten(1).float() for x in (train, test)]
    assert common.knn_accuracy(pixels[0], train.labels, pixels[1], test.labels) < 40


def test_shapes_statistics_are_those_of_the_pixels():
    pixels = common.load_data("shapes").images.float().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close(pixels.mean(dim=1), torch.tensor(common.STATISTICS["shapes"]["mean"]), atol=2e-3, rtol=0)
    torch.testing.assert_close(pixels.std(dim=1), torch.tensor(common.STATISTICS["shapes"]["std"]), atol=2e-3, rtol=0)


# --- files -----------------------------------------------------------------------------------------------------------


def write_cifar(root, name, counts=(5, 3), test=4, seed=0):
    """A tiny data set in the official binary layout; returns the records of train."""
    folder, (_, label_bytes, classes, _) = common.ARCHIVES[name][0], common.CIFAR[name]
    home = root / folder
    home.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    files = [(f"data_batch_{i + 1}.bin", n) for i, n in enumerate(counts)] + [("test_batch.bin", test)]
    if name == "cifar100":
        files = [("train.bin", sum(counts)), ("test.bin", test)]
    records = {}
    for file, count in files:
        rows = rng.integers(0, 256, (count, label_bytes + 3072), dtype=np.uint8)
        rows[:, :label_bytes] = rng.integers(0, 20 if name == "cifar100" else 10, (count, label_bytes))
        rows[:, label_bytes - 1] = rng.integers(0, classes, count)
        rows.tofile(home / file)
        records[file] = rows
    return records


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_reads_the_official_binary_layout(tmp_path, name):
    records = write_cifar(tmp_path, name)
    data = common.load_data(name, tmp_path)
    rows = np.concatenate([rows for file, rows in records.items() if not file.startswith("test")])
    skip = 1 if name == "cifar10" else 2
    assert data.labels.tolist() == rows[:, skip - 1].tolist()
    assert data.images[2, 1, 5, 7] == rows[2, skip + 1024 + 5 * 32 + 7]  # planes, then rows
    assert len(common.load_data(name, tmp_path, "test")) == 4
    assert len(common.load_data(name, tmp_path / common.ARCHIVES[name][0])) == 8  # the inner folder does as well
    assert len(data.classes) == common.CIFAR[name][2]


def test_cifar_reads_class_names(tmp_path):
    write_cifar(tmp_path, "cifar10")
    names = [f"name{i}" for i in range(10)]
    (tmp_path / "cifar-10-batches-bin" / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    assert common.load_data("cifar10", tmp_path).classes == names


def test_cifar_refuses_bad_files_by_name(tmp_path):
    with pytest.raises(
        UserError,
        match=r"no cifar10 at .*cifar-10-batches-bin; give the --root .*add --download .*cifar-10-binary.tar.gz",
    ):
        common.load_data("cifar10", tmp_path)
    write_cifar(tmp_path, "cifar10")
    with pytest.raises(UserError, match=r"no cifar100 at .*train\*\.bin; remove"):
        common.read_cifar("cifar100", tmp_path, "train")
    file = tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin"
    good = file.read_bytes()
    for bad in (good[:-5], good + b"x", b""):
        file.write_bytes(bad)
        with pytest.raises(UserError, match=r"data_batch_2\.bin has \d+ bytes, expected a multiple of 3073"):
            common.load_data("cifar10", tmp_path)
    file.write_bytes(b"\x0b" + good[1:])
    with pytest.raises(UserError, match=r"data_batch_2\.bin holds the label 11, cifar10 ends at 9"):
        common.load_data("cifar10", tmp_path)


def write_folders(root, classes=("ant", "bee"), train=3, val=2, size=(40, 30), ending="png"):
    """Class folders of flat pictures, each class and file with its own colour."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                colour = (40 + 60 * label, 30 + 20 * i, 90 if split == "train" else 200)
                Image.new("RGB", size, colour).save(root / split / name / f"{i} é.{ending}")
    return root


def test_folders_name_the_files_that_are_left_out(tmp_path, capsys):
    write_folders(tmp_path)
    (tmp_path / "train" / "ant" / "note.txt").write_text("an ant")
    (tmp_path / "train" / "bee" / "bee.gif").write_bytes(b"GIF89a")
    assert len(common.load_data(str(tmp_path))) == 6
    assert re.match(r"note: 2 other files below .*train are left out, such as .*note.txt\n$", capsys.readouterr().out)
    assert len(common.load_data(str(tmp_path), split="test")) == 4
    assert capsys.readouterr().out == ""


def test_folders_list_classes_and_files_in_order(tmp_path):
    write_folders(tmp_path)
    train, test = (common.load_data(str(tmp_path), split=split) for split in ("train", "test"))
    assert train.classes == test.classes == ["ant", "bee"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(test) == 4
    images, labels = next(train.plain_batches(range(6), 8))
    assert images.shape == (6, 3, 8, 8)
    assert torch.equal(labels, train.labels)
    torch.testing.assert_close(images[:, 0, 4, 4] * 255, 40.0 + 60 * labels)


def test_folders_refuse_what_is_not_a_data_set(tmp_path):
    with pytest.raises(UserError, match="unknown dataset 'cifar11'; did you mean 'cifar10'"):
        common.load_data("cifar11")
    with pytest.raises(UserError, match="no folder .*train; expected"):
        common.load_data(str(tmp_path))
    write_folders(tmp_path)
    (tmp_path / "val" / "wasp").mkdir()
    with pytest.raises(UserError, match="class 'wasp' of .*val is not in .*train"):
        common.load_data(str(tmp_path), split="test")
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(UserError, match=r"class folder .*empty holds no image \(.jpg .jpeg .png .webp\)"):
        common.load_data(str(tmp_path))


def test_imagenet100_picks_its_classes_from_a_larger_set(tmp_path, capsys):
    assert len(set(common.IMAGENET100)) == 100
    write_folders(tmp_path, ("n01440764", "n02869837", "n01749939"))
    data = common.load_data("imagenet100", tmp_path)
    assert data.classes == ["n01749939", "n02869837"]
    assert "holds 2 of the 100 classes" in capsys.readouterr().out
    assert {Path(path).parent.name for path in data.paths} == set(data.classes)
    assert len(common.load_data("imagenet", tmp_path).classes) == 3


def test_imagenet100_needs_one_of_its_classes(tmp_path):
    with pytest.raises(UserError, match="holds none of the 100 classes"):
        common.load_data("imagenet100", write_folders(tmp_path))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1", "transparent palette"])
def test_decode_image_turns_every_kind_of_picture_into_rgb(tmp_path, mode):
    grey = np.tile(np.linspace(0, 255, 32).round().astype(np.uint8), (32, 1))
    ending = "jpg" if mode == "CMYK" else "png"
    path = tmp_path / f"picture.{ending}"
    if mode == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    elif mode == "transparent palette":
        Image.fromarray(grey).convert("P").save(path, transparency=b"\x80" * 256)
    else:
        Image.fromarray(grey).convert(mode).save(path, **({"quality": 95} if ending == "jpg" else {}))
    image = common.decode_image(path, 28)[0]
    assert image.shape == (3, 28, 28)
    assert image.dtype == torch.uint8
    want = torch.from_numpy(grey[2:-2, 2:-2].copy()).float()
    if mode == "1":  # dithered
        want, image = want.mean(), image.float().mean()
    assert (image.float() - want).abs().max() < 12


def test_decode_image_turns_a_picture_upright(tmp_path):
    upright = np.zeros((64, 48, 3), np.uint8)
    upright[:16, :, 0] = 255  # red on top
    upright[:, 12:16, 1] = 255  # a green line on the left
    for orientation, turn in ((1, 0), (6, 1), (3, 2), (8, 3)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.png"
        Image.fromarray(np.rot90(upright, turn)).save(path, exif=exif)
        image = common.decode_image(path, 32)[0].float()
        if orientation == 1:
            first = image
            assert image[0, 0].mean() > 150
        torch.testing.assert_close(image, first, atol=1, rtol=0)


def test_decode_image_lets_jpeg_skip_pixels_but_none_that_the_crop_needs(tmp_path, monkeypatch):
    stripes = (128 + 120 * np.sin(np.arange(800) * 2 * np.pi / 36)).astype(np.uint8)
    Image.fromarray(np.tile(stripes, (600, 1))).convert("RGB").save(tmp_path / "a.jpg", quality=95)
    sizes = []
    for seeds in ((None,), (1,), (2, 3, 4)):
        with monkeypatch.context() as patched:
            patched.setattr(common, "to_rgb", lambda image, real=common.to_rgb: sizes.append(image.size) or real(image))
            fast = common.decode_image(tmp_path / "a.jpg", 96, (0.3, 1.0), seeds).float()
        with monkeypatch.context() as patched:
            patched.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *_: None)
            slow = common.decode_image(tmp_path / "a.jpg", 96, (0.3, 1.0), seeds).float()
        assert fast.shape == (len(seeds), 3, 96, 96)
        assert (fast - slow).abs().mean() < 6
    assert max(sizes) < (800, 600)


@pytest.mark.parametrize("workers", [0, 2])
def test_folders_name_a_file_that_cannot_be_read(tmp_path, workers):
    write_folders(tmp_path, ending="jpg", size=(400, 300))
    bad = next((tmp_path / "train" / "bee").iterdir())
    data = common.load_data(str(tmp_path))
    for content in (bad.read_bytes()[:-200], b"not an image", b""):
        bad.write_bytes(content)  # after the check
        with pytest.raises(UserError, match=f"{re.escape(str(bad))} cannot be read as an image"):
            list(data.plain_batches(range(6), 8, workers=workers))


def test_folders_are_checked_once_and_name_every_bad_image(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write_folders(tmp_path / "set", ending="jpg", size=(400, 300))
    first, second, third = sorted((root / "train" / "bee").iterdir())
    first.write_bytes(first.read_bytes()[:-200])
    second.write_bytes(b"not an image")
    with pytest.raises(UserError) as error:
        common.load_data(str(root))
    text = str(error.value)
    assert text.startswith(f"2 of 6 images cannot be read: {first} (")
    assert f"; {second} (" in text
    assert text.endswith("; mend or remove them, or add --skip-bad-images")
    assert "\n" not in text
    data = common.load_data(str(root), skip_bad_images=True)
    assert [Path(path) for path in data.paths[3:]] == [third]
    assert data.labels.tolist() == [0, 0, 0, 1]
    assert "note: 2 of 6 images are left out" in capsys.readouterr().out

    opened, really_open = [], common.Image.open
    monkeypatch.setattr(common.Image, "open", lambda path: opened.append(path) or really_open(path))
    assert len(common.load_data(str(root), skip_bad_images=True)) == 4
    assert sorted(opened) == [str(first), str(second)]  # good ones are remembered, bad ones may have been mended
    monkeypatch.setattr(common.Image, "open", really_open)
    for damage in ("[]", "{", '["x"]', "3"):
        for file in (tmp_path / "cache").rglob("*.json"):
            file.write_text(damage if damage != "[]" else "[0, 99]")
        assert len(common.load_data(str(root), skip_bad_images=True)) == (6 if damage == "[]" else 4)
    first.write_bytes(third.read_bytes())  # mended: looked at again
    assert len(common.load_data(str(root), skip_bad_images=True)) == 5
    for path in (first, third):
        path.write_bytes(b"")
    for path in (root / "train" / "ant").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"6 of 6 images cannot be read: .*; \.\.\.; mend or remove them$"):
        common.load_data(str(root), skip_bad_images=True)


def test_folders_name_a_link_that_leads_nowhere(tmp_path):
    root = write_folders(tmp_path / "set")
    (root / "train" / "ant" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=r"1 of 7 images cannot be read: .*lost\.png \(.*No such file"):
        common.load_data(str(root))
    assert len(common.load_data(str(root), skip_bad_images=True)) == 6


def test_folders_are_checked_without_a_cache_folder_too(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # cannot hold files
    assert len(common.load_data(str(write_folders(tmp_path / "set")))) == 6


def plan_of(steps, batch=4, images=6):
    return [(step + 10, [(step + i) % images for i in range(batch)]) for step in range(steps)]


def test_folder_batches_do_not_depend_on_workers_or_on_where_a_run_resumes(tmp_path):
    rng = np.random.default_rng(0)
    write_folders(tmp_path)
    for path in tmp_path.rglob("*.png"):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    data = common.load_data(str(tmp_path))
    batches = list(data.train_batches(iter(plan_of(4)), 8, views=2))
    assert batches[0][0].shape == (4, 2, 3, 8, 8)
    for workers, first in ((2, 0), (0, 2)):
        again = list(data.train_batches(iter(plan_of(4)[first:]), 8, views=2, workers=workers))
        for (images, labels), (images_again, labels_again) in zip(batches[first:], again, strict=True):
            assert torch.equal(images, images_again)
            assert torch.equal(labels, labels_again)
    assert not torch.equal(batches[0][0][:, 0], batches[0][0][:, 1])


def test_each_image_of_a_folder_batch_has_a_crop_of_its_own(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    for i, split in enumerate(("train", "train", "val")):
        (tmp_path / split / "ant").mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / split / "ant" / f"{i}.png")
    images, _ = next(common.load_data(str(tmp_path)).train_batches(iter([(7, [0, 1])]), 8, flip=0.0))
    assert not torch.equal(images[0], images[1])


def test_views_of_an_image_stand_side_by_side():
    colours = torch.arange(6, dtype=torch.uint8) * 40
    images = colours[:, None, None, None].expand(6, 3, 16, 16).contiguous()
    data = MemoryImages(images, torch.arange(6), list("abcdef"), (0, 0, 0), (1, 1, 1))
    ((views, labels),) = data.train_batches([(1, [4, 0, 5, 2])], 8, views=3)
    assert views.shape == (4, 3, 3, 8, 8)
    expected = (colours[labels].float() / 255)[:, None, None, None, None].expand_as(views)
    torch.testing.assert_close(views, expected, atol=1e-5, rtol=0)


def test_memory_batches_do_not_depend_on_where_a_run_resumes():
    data = MemoryImages(*common.render_shapes(6, 16)[:2], list(SHAPES), (0, 0, 0), (1, 1, 1))
    whole = list(data.train_batches(plan_of(4), 12, views=2))
    assert whole[0][0].shape == (4, 2, 3, 12, 12)
    part = list(data.train_batches(plan_of(4)[2:], 12, views=2))
    assert torch.equal(whole[2][0], part[0][0])
    assert torch.equal(whole[3][1], part[1][1])


# --- probes ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 5), st.integers(1, 6), seeds)
def test_knn_accuracy_matches_naive_loop(bank, queries, width, k, seed):
    x = torch.randn(bank + queries, width, generator=generator(seed))
    y = torch.randint(0, 3, (bank + queries,), generator=generator(seed))
    want = reference.knn_accuracy(x[:bank], y[:bank], x[bank:], y[bank:], k)
    assert common.knn_accuracy(x[:bank], y[:bank], x[bank:], y[bank:], k, chunk=3) == want


def test_knn_accuracy_survives_a_large_common_mean():
    x = torch.randn(200, 8, generator=generator(0)) * 0.01
    y = (x[:, 0] > 0).long()
    plain = common.knn_accuracy(x[:150], y[:150], x[150:], y[150:])
    shifted = x + 30
    assert abs(common.knn_accuracy(shifted[:150], y[:150], shifted[150:], y[150:]) - plain) <= 2


@pytest.mark.parametrize("features", [25, 60])
def test_ridge_accuracy_picks_the_strength_by_true_leave_one_out(features):
    """Against refitting without each sample in turn. With noisy features, fewer than samples or more, the fit itself
    would pick the weakest strength, which scores differently on the test part."""
    x = torch.randn(240, features, generator=generator(29), dtype=torch.float64)
    y = (x[:, :3] + 0.3 * torch.randn(240, 3, generator=generator(30), dtype=torch.float64)).argmax(dim=1)
    train, test, truth = x[:40], x[40:], y[:40]
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    train_s, test_s = (train - mean) / std, (test - mean) / std
    strengths = (40 * 10.0 ** torch.arange(-5, 2)).tolist()

    def accuracy(strength):
        scores = reference.ridge_predictions(train_s, truth, test_s, 3, strength)
        return 100 * float((scores.argmax(dim=1) == y[40:]).float().mean())

    def left_out(strength):
        right = 0
        for i in range(40):
            rest = [j for j in range(40) if j != i]
            scores = reference.ridge_predictions(train_s[rest], truth[rest], train_s[i : i + 1], 3, strength)
            right += int(scores.argmax() == truth[i])
        return right

    best = max(strengths, key=left_out)  # the first of equals
    assert abs(accuracy(best) - accuracy(strengths[0])) > 3
    for x in (train, test), (train.float(), test.float()):
        assert common.ridge_accuracy(x[0], truth, x[1], y[40:], 3) == pytest.approx(accuracy(best))


def test_ridge_accuracy_separates_what_is_linear_and_nothing_else():
    x = torch.randn(600, 10, generator=generator(0))
    y = (x[:, 3] > 0).long()
    assert common.ridge_accuracy(x[:400], y[:400], x[400:], y[400:], 2) > 90
    noise = torch.randint(0, 2, (600,), generator=generator(1))
    assert common.ridge_accuracy(x[:400], noise[:400], x[400:], noise[400:], 2) < 65


def test_probe_leaves_unlabelled_images_out():
    images, labels, _ = common.render_shapes(60, 8)
    data = MemoryImages(images, labels, list(SHAPES), (0, 0, 0), (1, 1, 1))
    hidden = dataclasses.replace(data, labels=torch.where(torch.arange(60) < 30, labels, -1))
    seen = []

    def encode(batch):
        seen.append(len(batch))
        return batch.flatten(1)

    result = common.probe(encode, hidden, data, 8)
    assert seen == [30, 60]
    assert set(result) == {"knn", "linear"}
    common.probe(encode, hidden, data, 8, limit=20)
    assert seen[2:] == [20, 20]


# --- configuration ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Example(TrainConfig):
    """A method's configuration, for the tests of the command line."""

    epochs: int = 7  # another default
    width: int = 5  # how wide, 100% sure
    pair: tuple[float, float] = (1.0, 2.0)  # two numbers
    layers: tuple[int, ...] = (-2, -1)  # some numbers
    bright: bool = True  # a switch


RECIPES = {"shapes": {"width": 6}, "cifar10": {"width": 7, "epochs": 3}, "cifar10 --pair 3 4": {"width": 8}}


def flags(*argv):
    return common.read_flags(Example, RECIPES, list(argv))


def test_read_flags_puts_recipes_between_defaults_and_flags():
    assert (flags().width, flags().epochs) == (6, 7)
    assert flags("--data", "cifar10").epochs == 3
    assert flags("--data", "cifar10", "--width", "9").width == 9
    assert flags("--data", "cifar10", "--pair", "3", "4").width == 8
    assert flags("--data", "cifar10", "--pair", "3", "5").width == 7
    assert flags("--data", "a/folder").width == 5
    config = flags("--data", "a/folder", "--recipe", "cifar10", "--pair", "3", "4")
    assert (config.data, config.width, config.epochs) == ("a/folder", 8, 3)


def test_read_flags_reads_every_kind_of_field():
    config = flags("--layers", "-3", "0", "2", "--pair", "0.5", "4", "--no-bright", "--base-lr", "1e-2", "--compile")
    assert config.layers == (-3, 0, 2)
    assert config.pair == (0.5, 4.0)
    assert not config.bright
    assert config.base_lr == 0.01
    assert config.compile


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epoch", "3"], "unknown flag '--epoch'; did you mean --epochs?"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--pair", "1"], "argument --pair: expected 2 arguments"),
        (["stray"], "'stray' stands alone"),
        (["--lr", "3"], "unknown flag '--lr'; did you mean --base-lr?"),
        (["--recipe", "CIFAR100"], "unknown --recipe 'CIFAR100'; did you mean 'cifar10'?"),
    ],
)
def test_read_flags_refuses_what_it_does_not_know(argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        flags(*argv)


def test_help_shows_comment_and_default_of_every_field():
    text = re.sub(r"\s+", " ", common.flag_parser(Example, "", "").format_help())
    assert "how wide, 100% sure (default: 5)" in text
    assert "another default (default: 7)" in text
    assert "--no-bright" in text
    for field in dataclasses.fields(Example):
        assert common.field_comments(Example)[field.name] or field.name == "epochs"


def test_help_shows_the_defaults_of_the_recipe(capsys):
    with pytest.raises(SystemExit, match="0"):
        flags("--help", "--data", "cifar10", "--width", "9")
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "Defaults are those for --data cifar10 --width 9." in text
    assert "how wide, 100% sure (default: 7)" in text and "another default (default: 3)" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 10, "accumulate": 3}, "a batch of 10 does not divide by 1 processes x 3 parts"),
        ({"epochs": 0}, "--epochs 0 makes no sense; give 1 or more"),
        ({"clip": -1.0}, "--clip -1.0 makes no sense; give 0 or more"),
        ({"base_lr": float("nan")}, "--base-lr nan makes no sense"),
        ({"probe_images": -5}, "--probe-images -5 makes no sense"),
        ({"seed": -1}, "--seed -1 makes no sense"),
        ({"amp": "bf61"}, "unknown --amp 'bf61'; did you mean 'bf16'"),
        ({"crop_min": 0.0}, "--crop-min 0.0 is not a share of the image"),
        ({"flip": 1.5}, "--flip 1.5 is not a probability"),
        ({"betas": (2.0, 0.9)}, r"--betas \(2.0, 0.9\) must both be at least 0 and less than 1"),
    ],
)
def test_check_config_refuses_what_makes_no_sense(change, message):
    config = TrainConfig(**change)
    with pytest.raises(UserError, match=message):
        (common.check_batch if "accumulate" in change else common.check_config)(config)


# --- the loop's parts ------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(0, 4), st.integers(1, 6))
def test_learning_rate_rises_linearly_and_falls_as_a_cosine(steps, warmup, rest):
    config = TrainConfig(
        base_lr=0.1, batch_size=512, warmup_epochs=warmup, epochs=warmup + rest, warmup_lr=0.01 * bool(warmup)
    )
    rates = [common.learning_rate(step, steps, config) for step in range((warmup + rest) * steps)]
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
    rates = [common.learning_rate(step, 2, config) for step in range(20)]
    assert rates == pytest.approx([0, 0.5] + [1.0] * 10 + [0.1] * 4 + [0.01] * 4)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 5), seeds)
def test_batch_plan_splits_the_same_global_batches_over_any_number_of_processes(ranks, share, first, seed):
    config = TrainConfig(batch_size=ranks * share, epochs=3, seed=seed)
    images = 2 * ranks * share + (ranks * share > 1)  # two steps an epoch, and one image over where it fits

    def plan(world):
        out = []
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(common, "world_size", lambda: world)
            for number in range(world):
                patched.setattr(common, "rank", lambda number=number: number)
                out.append(list(common.batch_plan(images, config, first)))
        return out

    alone, together = plan(1)[0], plan(ranks)
    assert len(alone) == max(0, 6 - first)
    for step, (_, indices) in enumerate(alone):
        assert torch.equal(torch.cat([part[step][1] for part in together]), indices)
    all_seeds = [seed for part in together for seed, _ in part]
    assert len(set(all_seeds)) == len(all_seeds)
    if first == 0:
        if ranks * share > 4:  # another order in each epoch
            assert not torch.equal(alone[0][1], alone[2][1])
        seen = torch.cat([alone[0][1], alone[1][1]])
        assert len(seen.unique()) == 2 * ranks * share  # an epoch shows no image twice


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
    config = TrainConfig(weight_decay=0.3, betas=(0.8, 0.9))
    groups = Regression().optimizer(config).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert [[tuple(p.shape) for p in group["params"]] for group in groups] == [[(3, 12)], [(1, 1, 3), (3,)]]
    assert groups[0]["betas"] == (0.8, 0.9)


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
    common.restore_run(method, again, tmp_path, 3)
    assert again.scaler.get_scale() == 8.0


def test_fp16_scaling_leaves_the_step_as_it_is():
    plain, _ = step_once(TrainConfig(amp="off"), rand(8, 3, 2, 2))
    scaled, _ = step_once(TrainConfig(amp="fp16"), rand(8, 3, 2, 2))
    torch.testing.assert_close(scaled, plain, atol=1e-3, rtol=0)


def test_pick_precision_is_bf16_only_where_the_processor_has_it(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert common.pick_precision("auto", cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert common.pick_precision("auto", cpu) is None
    assert common.pick_precision("fp16", cpu) == torch.float16
    assert common.pick_precision("off", cpu) is None


def test_meter_averages_and_stops_at_a_loss_that_is_not_finite(tmp_path):
    meter = Meter()
    for step, value in enumerate((1.0, 2.0, 6.0)):
        meter.add(step, {"loss": torch.tensor(value)})
        meter.flush(tmp_path / "last.pt")
    assert meter.means() == {"loss": 3.0}
    meter.add(7, {"loss": torch.tensor(float("nan")), "part": torch.tensor(1.5)})
    with pytest.raises(NonFiniteLoss, match=r"step 7: loss nan, part 1.5; no checkpoint was written"):
        meter.flush(tmp_path / "last.pt")


def test_write_atomically_leaves_the_old_file_when_the_write_dies(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def die(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        common.write_atomically(path, die)
    assert path.read_text() == "old"
    # The last moment before the new file is there.
    monkeypatch.setattr(os, "replace", lambda *_: die(io.BytesIO()))
    with pytest.raises(OSError, match="disk full"):
        common.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_text() == "old"


def test_load_checkpoint_runs_no_code_and_names_a_bad_file(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    path = tmp_path / "last.pt"
    torch.save({"weights": Payload()}, path)
    with pytest.raises(UserError, match=r"last\.pt is not a checkpoint"):
        common.load_checkpoint(path)
    assert not (tmp_path / "pwned").exists()
    torch.save({"weights": torch.zeros(1000)}, path)
    good = path.read_bytes()
    assert zipfile.is_zipfile(path)
    for bad in (good[:500], b"", b"text"):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"last\.pt is not a checkpoint"):
            common.load_checkpoint(path)


def test_encoder_file_rebuilds_the_encoder_alone(tmp_path):
    vit, images = tiny_vit(mean=(0.1, 0.2, 0.3), pool="cls"), rand(2, 3, 8, 8)
    common.save_encoder(vit, tmp_path / "encoder.pt")
    torch.testing.assert_close(common.load_encoder(tmp_path / "encoder.pt")(images), vit(images))
    torch.save({"something": 1}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt is not an encoder file"):
        common.load_encoder(tmp_path / "other.pt")
    torch.save({"kind": "ViT", "fields": {"size": 3}, "weights": {}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt does not fit this version"):
        common.load_encoder(tmp_path / "other.pt")


def test_read_log_drops_what_a_resumed_run_does_again(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [{"command": "x"}, *({"epoch": epoch, "loss": 1.0} for epoch in range(4))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"epoch": 4, "lo')
    assert common.rewind_log(path, 2, "header") == lines[1:4]
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines[:4]
    path.write_bytes(b'\xff\xfe[1]\n[2]\n{"epoch": 1}\n')
    assert common.rewind_log(path, 2, '{"command": "again"}\n') == [{"epoch": 1}]
    assert path.read_text() == '{"command": "again"}\n{"epoch": 1}\n'
    path.unlink()
    assert common.rewind_log(path, 2, "header\n") == []


def test_save_pictures_writes_rows_of_tiles(tmp_path):
    rows = torch.zeros(2, 3, 3, 8, 8)
    rows[1, 2, 0] = 1.0
    common.save_pictures(rows, tmp_path / "p.png", side=16)
    with Image.open(tmp_path / "p.png") as file:
        picture = np.array(file)
    assert picture.shape == (2 * 20, 3 * 20, 3)
    assert picture[30, 50].tolist() == [255, 0, 0]
    assert picture[10, 10].tolist() == [0, 0, 0]
    assert picture[0, 0].tolist() == [255, 255, 255]


def test_gather_is_the_identity_in_one_process():
    x = rand(3, 2)
    assert common.gather(x) is x


def test_cpu_is_always_there_and_an_unknown_device_is_refused(monkeypatch):
    assert common.start_distributed("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device 'cuda': this torch sees no GPU; try --device cpu"):
        common.start_distributed("cuda")
    with pytest.raises(UserError, match="device 'gpu' cannot be used here"):
        common.start_distributed("gpu")


def test_several_processes_do_not_share_a_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="device 'cuda:1' would be shared by all processes"):
        common.start_distributed("cuda:1")
