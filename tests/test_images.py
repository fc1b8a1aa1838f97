"""Images in files and in memory: batches, and which images a step loads."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make import fit_magma, generator, seeds, shapes, write_folders
from PIL import Image

import plumbing.images
from plumbing.crops import Crop, crop_boxes, mix_seed, padded_crop, random_resized_crop
from plumbing.datasets import load_data
from plumbing.errors import UserError
from plumbing.images import BatchPlan, MemoryImages, mirrored, shuffled
from plumbing.settings import TrainConfig
from protocols.settings import Config

# --- batches ---------------------------------------------------------------------------------------------------------


def plan_of(steps, batch=4, images=6):
    return [(step + 10, [(step + i) % images for i in range(batch)]) for step in range(steps)]


def test_folder_batches_do_not_depend_on_workers_or_on_where_a_run_resumes(tmp_path):
    rng = np.random.default_rng(0)
    write_folders(tmp_path)
    for path in tmp_path.rglob("*.png"):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    data = load_data(str(tmp_path))
    batches = list(data.train_batches(iter(plan_of(4)), 8, views=2))
    assert batches[0][0].shape == (4, 2, 3, 8, 8)
    for workers, first in ((2, 0), (0, 2)):
        data.workers = workers
        again = list(data.train_batches(iter(plan_of(4)[first:]), 8, views=2))
        for (images, labels), (images_again, labels_again) in zip(batches[first:], again, strict=True):
            assert torch.equal(images, images_again)
            assert torch.equal(labels, labels_again)
    assert not torch.equal(batches[0][0][:, 0], batches[0][0][:, 1])


def test_padded_crops_are_for_images_in_memory(tmp_path):
    data, plan = shapes(6, 8), [(3, [4, 1, 2])]
    ((images, _),) = data.train_batches(plan, 8, TrainConfig(crop_pad=2).crop, flip=0.0)
    assert torch.equal(images, padded_crop(data.images[[4, 1, 2]], 8, 2, 0.0, generator(3)))
    ((images, _),) = data.train_batches(plan, 8, TrainConfig(crop_min=0.5).crop, flip=0.0)
    assert torch.equal(
        images, random_resized_crop(data.images[[4, 1, 2]], 8, (0.5, 1.0), flip=0.0, generator=generator(3))
    )
    write_folders(tmp_path / "data", train=8)
    with pytest.raises(UserError, match="--crop-pad 2 is for images of one size in memory, not for files; give 0"):
        fit_magma(tmp_path / "run", "--crop-pad", "2", data=load_data(str(tmp_path / "data")))
    assert not (tmp_path / "run").exists()


def test_crops_of_memory_and_of_files_are_made_as_the_settings_say(tmp_path):
    """--interpolation and --crop-clamp; from files bicubic is the default, in memory bilinear."""
    data, crop = shapes(6, 8), Config(image_size=8, crop_min=0.9, interpolation="bicubic", crop_clamp=True).crop
    ((images, _),) = data.train_batches([(3, [4, 1])], 8, crop, flip=0.0)
    ways = [Crop(0.9, 1.0, *way) for way in (("bicubic", True), ("bicubic", False), ("bilinear", True))]
    found = [random_resized_crop(data.images[[4, 1]], 8, way, flip=0.0, generator=generator(3)) for way in ways]
    assert [torch.equal(images, x) for x in found] == [True, False, False]

    write_folders(tmp_path, train=2)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 60, 3), dtype=np.uint8))
    for path in tmp_path.rglob("*.png"):
        picture.save(path)
    data, sides = load_data(str(tmp_path)), torch.tensor([[20.0], [60.0]])
    ways = {"": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    for (name, kernel), clamp in itertools.product(ways.items(), (False, True)):
        crop = Config(image_size=8, crop_min=0.5, interpolation=name, crop_clamp=clamp).crop
        ((images, _),) = data.train_batches(iter([(7, [0])]), 8, crop, flip=0.0)
        boxes = crop_boxes(*sides, (0.5, 1.0), generator=generator(mix_seed(7, 0, 0)), clamp=clamp)
        top, left, h, w = boxes[0].tolist()
        theirs = picture.resize((8, 8), kernel, box=(left, top, min(left + w, 60), min(top + h, 20)))
        assert np.array_equal((images[0] * 255).round().byte().permute(1, 2, 0), np.array(theirs)), (name, clamp)


def test_padded_crops_are_not_resized_so_they_have_no_interpolation():
    for settings, style in (
        (TrainConfig, {"interpolation": "bicubic"}),
        (Config, {"interpolation": "bilinear"}),
        (Config, {"crop_clamp": True}),
    ):
        name = next(iter(style)).replace("_", "-")
        with pytest.raises(UserError, match=f"--{name}.* is of resized crops, and --crop-pad 4 .*; give --crop-pad 0"):
            settings(image_size=8, crop_pad=4, **style)


def test_each_image_of_a_folder_batch_has_a_crop_of_its_own(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    for i, split in enumerate(("train", "train", "val")):
        (tmp_path / split / "ant").mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / split / "ant" / f"{i}.png")
    images, _ = next(load_data(str(tmp_path)).train_batches(iter([(7, [0, 1])]), 8, flip=0.0))
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("height, width", [(8, 8), (3, 5)])
def test_mirrored_flips_left_and_right_of_those_that_it_should(height, width):
    """Eight bytes at a time, and where their number cannot be divided so."""
    images = torch.randint(0, 256, (4, 3, height, width), dtype=torch.uint8, generator=generator(0))
    mirror = torch.tensor([True, False, False, True])
    found = mirrored(images, mirror)
    assert all(torch.equal(x, y.flip(2) if m else y) for x, y, m in zip(found, images, mirror, strict=True))


def test_views_of_an_image_stand_side_by_side():
    colours = torch.arange(6, dtype=torch.uint8) * 40
    images = colours[:, None, None, None].expand(6, 3, 16, 16).contiguous()
    data = MemoryImages(images, torch.arange(6), list("abcdef"), (0, 0, 0), (1, 1, 1))
    ((views, labels),) = data.train_batches([(1, [4, 0, 5, 2])], 8, views=3)
    assert views.shape == (4, 3, 3, 8, 8)
    expected = (colours[labels].float() / 255)[:, None, None, None, None].expand_as(views)
    torch.testing.assert_close(views, expected, atol=1e-5, rtol=0)


def test_memory_batches_do_not_depend_on_where_a_run_resumes():
    data = shapes(6, 16)
    whole = list(data.train_batches(plan_of(4), 12, views=2))
    assert whole[0][0].shape == (4, 2, 3, 12, 12)
    part = list(data.train_batches(plan_of(4)[2:], 12, views=2))
    assert torch.equal(whole[2][0], part[0][0])
    assert torch.equal(whole[3][1], part[1][1])


# --- which images a step loads ---------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 5), seeds)
def test_batch_plan_splits_the_same_global_batches_over_any_number_of_processes(ranks, share, first, seed):
    config = TrainConfig(batch_size=ranks * share, epochs=3, seed=seed)
    images = 2 * ranks * share + (ranks * share > 1)  # two steps an epoch, and one image over where it fits

    def plan(world):
        out = []
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(plumbing.images, "world_size", lambda: world)
            for number in range(world):
                patched.setattr(plumbing.images, "rank", lambda number=number: number)
                out.append(list(BatchPlan(images, config).after(first)))
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


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), seeds)
def test_batch_plan_has_as_many_steps_as_batches_fit_and_ends_after_the_last_epoch(images, batch, epochs, seed):
    config = TrainConfig(batch_size=batch, epochs=epochs, seed=seed)
    plan = BatchPlan(images, config)
    assert len(plan) == images // batch
    if len(plan):
        steps = list(plan.after(0))
        assert len(steps) == epochs * len(plan)
        assert all(len(indices) == batch and 0 <= indices.min() <= indices.max() < images for _, indices in steps)


@given(st.integers(0, 9), seeds)
def test_batch_plan_goes_on_as_if_it_had_never_stopped(first, seed):
    plan = BatchPlan(13, TrainConfig(batch_size=4, epochs=3, seed=seed))
    whole, rest = (list(plan.after(step)) for step in (0, first))
    assert len(rest) == 9 - first
    for (number, indices), (number_again, again) in zip(whole[first:], rest, strict=True):
        assert number == number_again
        assert torch.equal(indices, again)


def test_batch_plan_loads_every_part_of_a_step_that_draw_gives(monkeypatch):
    """A step of several parts, as MLO-MAE's: each process has its share of each part, one after the other."""

    class Parts(BatchPlan):
        def draw(self, epoch):
            return [torch.arange(8).view(2, 4) + 10 * epoch] * len(self)

    config = TrainConfig(batch_size=4, epochs=2)
    monkeypatch.setattr(plumbing.images, "world_size", lambda: 2)
    for number, mine in ((0, [0, 1, 4, 5]), (1, [2, 3, 6, 7])):
        monkeypatch.setattr(plumbing.images, "rank", lambda number=number: number)
        steps = list(Parts(8, config).after(0))
        assert [indices.tolist() for _, indices in steps] == [mine, mine, *[[i + 10 for i in mine]] * 2]


def test_batch_plan_draws_another_order_for_another_seed():
    orders = [BatchPlan(40, TrainConfig(batch_size=40, seed=seed)).draw(0)[0].tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


# --- epochs of a given length ----------------------------------------------------------------------------------------


@given(images=st.integers(1, 20), wanted=st.integers(1, 70), seed=seeds)
def test_shuffled_takes_every_image_once_in_each_pass(images, wanted, seed):
    order = shuffled(images, wanted, seed)
    assert len(order) == wanted
    passes = order.split(images)
    assert all(sorted(part.tolist()) == list(range(images)) for part in passes if len(part) == images)
    assert len(set(passes[-1].tolist())) == len(passes[-1])
    assert torch.equal(order[:images], torch.randperm(images, generator=generator(seed))[:wanted])


@given(images=st.integers(1, 30), batch=st.integers(1, 12), steps=st.integers(1, 9), seed=st.integers(0, 99))
def test_an_epoch_may_have_any_number_of_steps(images, batch, steps, seed):
    config = TrainConfig(batch_size=batch, epochs=3, epoch_steps=steps, seed=seed)
    plan = BatchPlan(images, config)
    drawn = list(plan.after(0))
    assert len(plan) == steps and len(drawn) == 3 * steps
    assert all(len(part) == batch for _, part in drawn)
    one = torch.cat([part for _, part in drawn[:steps]]).bincount(minlength=images)
    assert int(one.max() - one.min()) <= 1
    later = list(plan.after(2 * steps - 1))
    assert [seed for seed, _ in later] == [seed for seed, _ in drawn[2 * steps - 1 :]]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(later, drawn[2 * steps - 1 :], strict=True))
