"""Images in files and in memory: decoding, the check of every file, batches, and which images a step loads."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make import seeds, shapes, write_folders
from PIL import Image

import plumbing.decoding
from plumbing.datasets import load_data
from plumbing.decoding import decode_image, to_rgb
from plumbing.errors import UserError
from plumbing.images import BatchPlan, MemoryImages
from plumbing.settings import TrainConfig

# --- decoding --------------------------------------------------------------------------------------------------------


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
    image = decode_image(path, 28)[0]
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
        image = decode_image(path, 32)[0].float()
        if orientation == 1:
            first = image
            assert image[0, 0].mean() > 150
        torch.testing.assert_close(image, first, atol=1, rtol=0)


def test_decode_image_lets_jpeg_skip_pixels_but_none_that_the_crop_needs(tmp_path, monkeypatch):
    stripes = (128 + 120 * np.sin(np.arange(800) * 2 * np.pi / 36)).astype(np.uint8)
    Image.fromarray(np.tile(stripes, (600, 1))).convert("RGB").save(tmp_path / "a.jpg", quality=95)
    sizes, drafts = [], []
    for crops in ((None,), (1,), (2, 3, 4)):
        with monkeypatch.context() as patched:
            patched.setattr(plumbing.decoding, "to_rgb", lambda image: sizes.append(image.size) or to_rgb(image))
            fast = decode_image(tmp_path / "a.jpg", 96, (0.3, 1.0), crops).float()
        with monkeypatch.context() as patched:
            patched.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *_: drafts.append(1))
            slow = decode_image(tmp_path / "a.jpg", 96, (0.3, 1.0), crops).float()
        assert fast.shape == (len(crops), 3, 96, 96)
        assert (fast - slow).abs().mean() < 6
    assert len(sizes) == len(drafts) == 3
    assert max(sizes) < (800, 600)


# --- the check of every file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_folders_name_a_file_that_cannot_be_read(tmp_path, workers):
    write_folders(tmp_path, ending="jpg", size=(400, 300))
    bad = next((tmp_path / "train" / "bee").iterdir())
    data = load_data(str(tmp_path), workers=workers)
    for content in (bad.read_bytes()[:-200], b"not an image", b""):
        bad.write_bytes(content)  # after the check
        with pytest.raises(UserError, match=f"{re.escape(str(bad))} cannot be read as an image"):
            list(data.plain_batches(range(6), 8))


def test_folders_are_checked_once_and_name_every_bad_image(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write_folders(tmp_path / "set", ending="jpg", size=(400, 300))
    first, second, third = sorted((root / "train" / "bee").iterdir())
    first.write_bytes(first.read_bytes()[:-200])
    second.write_bytes(b"not an image")
    with pytest.raises(UserError) as error:
        load_data(str(root))
    text = str(error.value)
    assert text.startswith(f"2 of 6 images cannot be read: {first} (")
    assert f"; {second} (" in text
    assert text.endswith("; mend or remove them, or add --skip-bad-images")
    assert "\n" not in text
    data = load_data(str(root), skip_bad_images=True)
    assert [Path(path) for path in data.paths[3:]] == [third]
    assert data.labels.tolist() == [0, 0, 0, 1]
    assert "note: 2 of 6 images are left out" in capsys.readouterr().out

    opened, really_open = [], plumbing.decoding.Image.open
    monkeypatch.setattr(plumbing.decoding.Image, "open", lambda path: opened.append(path) or really_open(path))
    assert len(load_data(str(root), skip_bad_images=True)) == 4
    assert sorted(opened) == [str(first), str(second)]  # good ones are remembered, bad ones may have been mended
    monkeypatch.setattr(plumbing.decoding.Image, "open", really_open)
    for damage in ("[]", "{", '["x"]', "3"):
        for file in (tmp_path / "cache").rglob("*.json"):
            file.write_text(damage if damage != "[]" else "[0, 99]")
        assert len(load_data(str(root), skip_bad_images=True)) == (6 if damage == "[]" else 4)
    first.write_bytes(third.read_bytes())  # mended: looked at again
    assert len(load_data(str(root), skip_bad_images=True)) == 5
    for path in (first, third):
        path.write_bytes(b"")
    for path in (root / "train" / "ant").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"6 of 6 images cannot be read: .*; \.\.\.; mend or remove them$"):
        load_data(str(root), skip_bad_images=True)


def test_folders_name_a_link_that_leads_nowhere(tmp_path):
    root = write_folders(tmp_path / "set")
    (root / "train" / "ant" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=r"1 of 7 images cannot be read: .*lost\.png \(.*No such file"):
        load_data(str(root))
    assert len(load_data(str(root), skip_bad_images=True)) == 6


def test_folders_are_checked_without_a_cache_folder_too(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # cannot hold files
    assert len(load_data(str(write_folders(tmp_path / "set")))) == 6


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


def test_each_image_of_a_folder_batch_has_a_crop_of_its_own(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    for i, split in enumerate(("train", "train", "val")):
        (tmp_path / split / "ant").mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / split / "ant" / f"{i}.png")
    images, _ = next(load_data(str(tmp_path)).train_batches(iter([(7, [0, 1])]), 8, flip=0.0))
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
