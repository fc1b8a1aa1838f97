"""Pictures of a run: where an encoder looks, how its features lie. And how they are put on paper."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make import rand, randn, seeds, subject_of, tiny_levels, tiny_magma, vit
from PIL import Image

import common
import protocols.figures
from plumbing.curves import panels
from protocols.figures import (
    Album,
    beside,
    draw_pictures,
    feature_map,
    heat,
    key_maps,
    look_inside,
    masks_of,
    principal_components,
    stretch,
)
from protocols.rows import load_method
from protocols.settings import Config
from protocols.tsne import tsne

# --- where an encoder looks ------------------------------------------------------------------------------------------


def test_look_inside_sees_the_attention_and_the_keys_of_the_encoder():
    encoder, images = vit(depth=3), rand(2, 3, 8, 8)
    attention, keys = look_inside(encoder, images)
    seen = []
    encoder.encode(encoder.embed(images), lambda q, k, v: seen.append((q, k)) or common.attend(q, k, v))
    assert len(keys) == len(encoder.blocks)
    q, k = seen[-1]
    for b in range(2):
        for h in range(2):
            scores = torch.stack([q[b, h, 0] @ k[b, h, n] / math.sqrt(8) for n in range(5)]).softmax(dim=0)
            torch.testing.assert_close(attention[b, h], scores[1:].detach())
    torch.testing.assert_close(keys[0][1, 2], seen[0][1][1, :, 3].flatten().detach())  # patch 2 follows the CLS token


@given(st.integers(2, 8), st.integers(1, 12), seeds)
def test_a_pure_position_code_vanishes_from_the_keys(images, positions, seed):
    """Keys that are the same in all images say where a patch is, not what it shows."""
    code = 100 * randn(3, 1, positions, 5, seed=seed, dtype=torch.float32)  # (blocks, 1, N, D)
    assert torch.equal(
        key_maps(code.expand(-1, images, -1, -1)), torch.zeros(images, 3, positions, dtype=torch.float64)
    )


@given(st.integers(3, 6), seeds)
def test_a_position_code_does_not_change_the_map_of_the_keys(images, seed):
    content, code = randn(2, images, 9, 4, seed=seed), 100 * randn(2, 1, 9, 4, seed=seed + 1)
    torch.testing.assert_close(key_maps(content + code), key_maps(content), rtol=0, atol=1e-6)


def test_the_map_of_the_keys_shows_the_object_and_not_the_position():
    """Keys of a strong position code and a weak object, which is elsewhere in each image."""
    code, object_key = 10 * randn(1, 1, 9, 4), randn(4, seed=1)
    there = torch.zeros(3, 9, dtype=torch.bool)
    there[0, 2] = there[1, 5] = there[2, 7] = True
    (maps,) = key_maps(code + there[None, :, :, None] * object_key).unbind(dim=1)  # (B, N)
    assert maps[there].min() > 0.99
    assert maps[~there].max() < 0.5


def test_the_keys_of_a_single_image_keep_their_mean():
    keys = randn(2, 1, 9, 4)
    expected = stretch(principal_components(keys[1, 0], 1)[:, 0], (0,))
    torch.testing.assert_close(key_maps(keys)[0, 1], expected)


@given(st.integers(3, 12), st.integers(2, 6), seeds)
def test_principal_components_match_the_singular_values(count, width, seed):
    x = randn(count, width, seed=seed)
    scores = principal_components(x, 2)
    u, s, _ = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
    torch.testing.assert_close(scores.abs(), (u * s)[:, :2].abs(), rtol=1e-6, atol=1e-9)
    assert (scores.pow(3).sum(dim=0) > -1e-9).all()


def test_the_maps_of_the_keys_of_a_block_share_one_range():
    """All images of a block are put into [0, 1] together, so that a patch's colour means the same in each."""
    keys = randn(2, 3, 9, 4)
    keys[1] *= 100
    found = key_maps(keys)
    assert found.shape == (3, 2, 9)
    for block in range(2):
        centred = (keys[block] - keys[block].mean(dim=0)).flatten(0, 1)
        scores = principal_components(centred, 1)[:, 0]
        expected = (scores - scores.min()) / (scores.max() - scores.min())
        torch.testing.assert_close(found[:, block].flatten(), expected)


def test_the_pictures_of_a_run_show_what_their_captions_say(tmp_path, monkeypatch):
    """Reconstructions at the seed of the settings, heads and blocks in their order, features of the test images."""
    method, sheets, charts = tiny_magma(), {}, {}
    monkeypatch.setattr(Album, "sheet", lambda self, name, _, captions, rows: sheets.update({name: (captions, rows)}))
    monkeypatch.setattr(Album, "chart", lambda self, name, figure: charts.update({name: figure}))
    torch.save({"weights": method.state_dict()}, tmp_path / "last.pt")
    known = dataclasses.asdict(method.config) | {"method": "magma"}
    subject = subject_of(method.encoder)
    config = Config(image_size=8, amp="off", data="x", out=str(tmp_path), seed=4)
    torch.manual_seed(9)
    draw_pictures(tmp_path, known, subject, config)
    images = subject.test.images[:3] / 255  # one of each class
    for _, rows in sheets.values():
        torch.testing.assert_close(rows[:, 0], images)
    captions, rows = sheets["reconstructions"]
    again = load_method(tmp_path, known, dataclasses.replace(subject.test, mean=(0.4,) * 3, std=(0.3,) * 3))
    torch.manual_seed(4)
    torch.testing.assert_close(rows, again.pictures(images))
    assert captions == ("image", "masked image", "reconstruction")
    attention, keys = look_inside(method.encoder, images)
    captions, rows = sheets["attention"]
    assert captions == ["image", "head 1", "head 2", "head 3"]
    for head in range(3):
        for weights, shown in zip(attention[:, head], rows[:, 1 + head], strict=True):  # each in a range of its own
            expected = heat(((weights - weights.min()) / (weights.max() - weights.min())).view(2, 2))
            torch.testing.assert_close(shown[:, 2::4, 2::4], expected, rtol=0, atol=0.02)
    captions, rows = sheets["keys"]
    assert captions == ["image", *[f"block {i}" for i in range(1, 7)]]
    for block in range(6):
        expected = heat(key_maps(keys)[:, block].view(3, 2, 2))
        torch.testing.assert_close(rows[:, 1 + block, :, 2::4, 2::4], expected, rtol=0, atol=0.02)
    with torch.no_grad():
        points = principal_components(method.encoder(subject.test.images / 255), 2)
    for label, shown in enumerate(charts["features"].axes[0].collections):
        found = torch.tensor(shown.get_offsets().data)
        torch.testing.assert_close(found, points[subject.test.labels == label], rtol=1e-3, atol=1e-4)


def test_learned_masks_hide_the_most_probable_patches_and_random_ones_any():
    """MLO-MAE, Fig. 4: a tenth and more, each share with all patches of the smaller ones. Masked patches are grey."""
    method, images = tiny_levels(patch=2), 0.4 * rand(3, 3, 16, 16)  # 64 patches, none of them grey
    probability = method.masking(method.encoder.embed(images))
    torch.manual_seed(0)
    rows = masks_of(method, images)
    assert torch.equal(rows[:, 0], images)
    cells = rows.unfold(3, 2, 2).unfold(4, 2, 2).movedim(2, -1).flatten(4).flatten(2, 3)  # (B, K, N, P)
    grey = (cells == 0.5).all(dim=-1)
    assert torch.equal((cells == 0.5).any(dim=-1), grey)
    assert torch.equal(cells[~grey], cells[:, :1].expand_as(cells)[~grey])
    assert grey.sum(dim=2).tolist() == [[0, 6, 6, 16, 32, 48]] * 3
    for k in range(2, 6):
        for b in range(3):
            assert probability[b][grey[b, k]].min() > probability[b][~grey[b, k]].max()
    assert not torch.equal(grey[:, 1], grey[:, 2]) and not torch.equal(grey[0, 1], grey[1, 1])


# --- how features lie ------------------------------------------------------------------------------------------------


def test_the_feature_map_shows_each_class_under_its_name():
    features, labels = randn(60, 5), torch.arange(60) % 12
    classes = ["_under", "$a$", "a name that is longer than what a legend can hold", *"defghijkl"]
    figure = feature_map(features, labels, classes, "title")
    (axes,) = figure.axes
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["_under", "$a$", "a name that is longer t…", *"defghij"]  # ten at most
    assert not any(text.get_parse_math() for text in axes.get_legend().get_texts())  # a name is no formula
    points = principal_components(features[labels < 10], 2)
    for label, shown in enumerate(axes.collections):
        expected = points[labels[labels < 10] == label]
        torch.testing.assert_close(torch.tensor(shown.get_offsets().data), expected)
    assert len({tuple(shown.get_facecolor()[0]) for shown in axes.collections}) == 10


def test_the_feature_map_has_the_points_that_it_is_given():
    """At most so many images, the same for any encoder, each in the colour of its class."""
    labels, seen = torch.arange(66) % 11, []

    def place(features):
        seen.append(features)
        return 2 * features[:, 1:3]

    features = randn(66, 5)
    features[:, 0] = torch.arange(66)  # which image it is
    for x in (features, torch.cat([features[:, :1], randn(66, 4, seed=1)], dim=1)):
        (axes,) = feature_map(x, labels, [*"abcdefghijk"], "title", place, most=40).axes
        assert not axes.get_xlabel() + axes.get_ylabel()
    assert torch.equal(seen[0][:, 0], seen[1][:, 0])
    drawn = seen[1][:, 0].long()
    assert len(drawn) == 40 and len(drawn.unique()) == 40 and labels[drawn].max() == 9
    assert drawn[:20].max() > 40 and drawn[20:].min() < 20  # from all over
    for label, shown in enumerate(axes.collections):
        expected = 2 * seen[1][labels[drawn] == label, 1:3]
        torch.testing.assert_close(torch.tensor(shown.get_offsets().data), expected)
    feature_map(features, labels, [*"abcdefghijk"], "title", place, most=60)
    assert len(seen[2]) == 60  # all of ten classes


def test_the_map_by_tsne_stands_beside_the_components(tmp_path, monkeypatch):
    """MLO-MAE, Fig. 6: test features, seed and perplexity of the settings, a title that says so."""
    encoder, charts, asked = vit(), {}, []
    monkeypatch.setattr(Album, "sheet", lambda *_: None)
    monkeypatch.setattr(Album, "chart", lambda self, name, figure: charts.update({name: figure}))
    monkeypatch.setattr(protocols.figures, "tsne", lambda x, **given: asked.append(given) or tsne(x, **given, steps=9))
    subject = subject_of(encoder)
    given = {"image_size": 8, "amp": "off", "data": "x", "out": str(tmp_path), "seed": 4, "perplexity": 7.5}
    draw_pictures(tmp_path, {}, subject, Config(**given))
    assert "tsne" not in charts and "features" in charts
    draw_pictures(tmp_path, {}, subject, Config(**given, map="tsne"))
    with torch.no_grad():
        points = tsne(encoder(subject.test.images / 255), seed=4, perplexity=7.5, steps=9).double()
    assert asked == [{"seed": 4, "perplexity": 7.5}]
    assert charts["tsne"].get_suptitle() == "encoder on x: test features by t-SNE, perplexity 7.5"
    for label, shown in enumerate(charts["tsne"].axes[0].collections):
        found = torch.tensor(shown.get_offsets().data)
        torch.testing.assert_close(found, points[subject.test.labels == label], rtol=1e-3, atol=1e-4)


def test_features_that_are_not_finite_have_no_map(tmp_path, monkeypatch, capsys):
    charts, encoder = {}, vit()
    encoder.norm.bias.data[0] = math.nan
    monkeypatch.setattr(Album, "sheet", lambda *_: None)
    monkeypatch.setattr(Album, "chart", lambda self, name, figure: charts.update({name: figure}))
    given = {"image_size": 8, "amp": "off", "data": "x", "out": str(tmp_path), "map": "tsne"}
    draw_pictures(tmp_path, {}, subject_of(encoder), Config(**given))
    assert not charts
    assert "note: no map of the features: features are not finite (48 of 48 images)" in capsys.readouterr().out


# --- sheets and charts -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 4), min_size=3, max_size=3), st.floats(-5, 5), st.floats(0.1, 5), seeds)
def test_stretch_reaches_from_0_to_1(shape, shift, scale, seed):
    x = shift + scale * randn(*shape, 5, seed=seed)
    out, low, high = stretch(x, (1, 3)), x.amin(dim=(1, 3), keepdim=True), x.amax(dim=(1, 3), keepdim=True)
    assert out.min() == 0
    assert out.amax(dim=(1, 3)).min() > 1 - 1e-9
    torch.testing.assert_close(low + (high - low) * out, x)
    assert torch.equal(stretch(torch.full_like(x, shift), (1, 3)), torch.zeros_like(x))


def test_heat_runs_from_dark_blue_to_yellow():
    colours = heat(torch.tensor([[0.0, 1.0]])) * 255  # (3, 1, 2)
    torch.testing.assert_close(colours[:, 0, 0], torch.tensor([68.0, 1, 84]), atol=0.5, rtol=0)
    torch.testing.assert_close(colours[:, 0, 1], torch.tensor([253.0, 231, 37]), atol=0.5, rtol=0)


def test_maps_stand_beside_their_images_each_cell_over_its_pixels():
    images, maps = rand(2, 3, 8, 8), rand(2, 3, 2, 2, seed=1)
    rows = beside(images, maps)
    assert rows.shape == (2, 4, 3, 8, 8)
    assert torch.equal(rows[:, 0], images)
    for i in range(8):
        for j in range(8):
            torch.testing.assert_close(rows[1, 3, :, i, j], heat(maps[1, 2])[:, i // 4, j // 4])


def test_a_sheet_puts_pictures_in_rows_and_columns_under_a_title(tmp_path):
    rows = torch.zeros(2, 3, 3, 4, 4)
    for r in range(2):
        for k in range(3):
            rows[r, k, 0], rows[r, k, 1] = 0.4 * r + 0.2, 0.2 * k + 0.1
    album = Album(tmp_path / "album", "a title")
    album.sheet("sheet", "heading", ("one", "two"), rows)
    assert album.written == [tmp_path / "album" / "sheet.png"]
    with Image.open(album.written[0], formats=["PNG"]) as image:
        image = image.convert("RGB")
        for r in range(2):
            for k in range(3):
                expected = (255 * (0.4 * r + 0.2), 255 * (0.2 * k + 0.1), 0)
                x, y = 4 + k * 132 + 64, image.height - (1 - r) * 132 - 4 - 64  # pictures of 128 pixels, 4 between two
                assert image.getpixel((x, y)) == pytest.approx(expected, abs=1)
        head = image.crop((0, 0, image.width, image.height - 2 * 132 - 4))
        assert len(head.getcolors()) > 5  # letters


def test_a_sheet_reduces_large_pictures(tmp_path):
    rows = torch.ones(1, 2, 3, 256, 256)
    rows[:, :, :, :128] = 0.5
    Album(tmp_path, "title").sheet("sheet", "heading", ("one", "two"), rows)
    with Image.open(tmp_path / "sheet.png", formats=["PNG"]) as image:
        assert image.width == 4 + 2 * 132
        bottom = image.height - 4 - 128
        for y, value in ((bottom + 20, 127.5), (bottom + 108, 255)):
            assert image.convert("RGB").getpixel((60, y)) == pytest.approx((value,) * 3, abs=1)


@pytest.mark.parametrize("title", ["$\\foo$", "图片", "a title that is " + "very " * 40 + "long"])
def test_any_title_will_do(title, tmp_path):
    """The name of a folder stands in it, which may be anything: no formula, in any letters, of any length."""
    album = Album(tmp_path, title)
    album.chart("chart", panels(title)[0])
    album.sheet("sheet", "heading", (title, "b"), rand(1, 2, 3, 8, 8))
    assert [path.name for path in album.written] == ["chart.png", "sheet.png"]


def test_a_chart_is_written_whole_or_not_at_all(tmp_path):
    class Full:
        def savefig(self, file, format):
            file.write(b"half")
            raise OSError("no space left on device")

    (tmp_path / "chart.png").write_bytes(b"before")
    album = Album(tmp_path, "title")
    with pytest.raises(OSError, match="no space left on device"):
        album.chart("chart", Full())
    assert (tmp_path / "chart.png").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["chart.png"]
    assert album.written == []
