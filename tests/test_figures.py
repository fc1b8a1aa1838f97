"""Pictures of a run: where an encoder looks, how its features lie, how it learned. And how they are put on paper."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make import rand, randn, seeds, vit
from PIL import Image

import common
from protocols.figures import (
    Album,
    beside,
    feature_map,
    heat,
    key_maps,
    learning_curves,
    look_inside,
    panels,
    principal_components,
    regularised,
    stretch,
    wide,
)

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


# --- how a run learned -----------------------------------------------------------------------------------------------

LOG = [
    {"epoch": 0, "knn": 10.0, "linear": 12.0, "psnr": 9.0},
    {"epoch": 1, "loss": 2.0, "manifold": 50.0, "lr": 0.1, "images_per_second": 99},
    {"epoch": 2, "loss": 1.0, "manifold": 0.4, "lr": 0.2, "images_per_second": 98, "knn": 20.0, "linear": 30.0},
]


def panels_of(figure):
    """{title: {label: points}} of the lines in a figure."""
    return {
        axes.get_title(): {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
        for axes in figure.axes
    }


def test_curves_show_what_the_log_holds():
    found = panels_of(learning_curves(LOG, "title", {}))
    assert list(found) == ["loss", "probes", "PSNR", "manifold"]
    assert found["PSNR"] == {"PSNR": [[0, 9.0]]}
    assert found["loss"] == {"loss": [[1, 2.0], [2, 1.0]]}
    assert found["manifold"] == {"manifold": [[1, 50.0], [2, 0.4]]}
    assert found["probes"] == {"kNN": [[0, 10.0], [2, 20.0]], "linear": [[0, 12.0], [2, 30.0]]}


def test_curves_that_span_two_decades_have_a_logarithmic_axis():
    scales = {axes.get_title(): axes.get_yscale() for axes in learning_curves(LOG, "title", {}).axes}
    assert scales == {"loss": "linear", "probes": "linear", "PSNR": "linear", "manifold": "log"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, 101], True), ([101, 50, 1], True), ([1, 100], False), ([0, 1000], False), ([-1, 1000], False), ([3], False)],
)
def test_an_axis_is_logarithmic_for_positive_values_over_two_decades(values, expected):
    assert wide(values) is expected


def test_curves_need_two_epochs():
    assert learning_curves(LOG[:2], "title", {}) is None
    assert learning_curves([], "title", {}) is None


def test_a_curve_may_be_flat(tmp_path):
    flat = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 2.0}]
    Album(tmp_path, "title").chart("curves", learning_curves(flat, "title", {}))
    assert (tmp_path / "curves.png").exists()


def test_curves_shade_the_epochs_of_the_regulariser():
    """MAGMA, Eq. 1: the term acts in epochs e_st to e_st + e_dur - 1, counted from 0; the log counts from 1."""
    log = [{"epoch": epoch, "loss": 1.0, "manifold": 2.0} for epoch in range(1, 9)]
    known = {"method": "magma", "lam": 1.0, "e_st": 2, "e_dur": 3}
    for axes in learning_curves(log, "title", known).axes:
        (shade,) = axes.patches
        points = [epoch for epoch in range(1, 9) if shade.get_x() < epoch <= shade.get_x() + shade.get_width()]
        assert points == [3, 4, 5]
    assert not any(axes.patches for axes in learning_curves(log, "title", known | {"method": "mixedae"}).axes)


@pytest.mark.parametrize(
    ("change", "last", "expected"),
    [
        ({}, 24, (5, 24)),
        ({"e_dur": 10}, 24, (5, 15)),
        ({}, 5, None),  # it has not begun
        ({"e_dur": 0}, 24, None),
        ({"lam": 0.0}, 24, None),
        ({"lam": 0.0, "inverse": 1.0}, 24, (5, 24)),
        ({"method": "finola"}, 24, None),
        ({"e_st": "5"}, 24, None),  # no config of ours
    ],
)
def test_where_the_regulariser_acts(change, last, expected):
    """MAGMA, Eq. 1."""
    assert (
        regularised({"method": "magma", "lam": 1.0, "inverse": 0.0, "e_st": 5, "e_dur": 100} | change, last) == expected
    )


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


def test_a_long_title_is_not_cut_off():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for times in (1, 3, 9):
        figure, _ = panels("mae of a folder" * times)
        FigureCanvasAgg(figure).draw()
        box = figure._suptitle.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width


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


@pytest.mark.parametrize(("count", "across", "down"), [(1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 3, 2), (7, 3, 3)])
def test_panels_are_at_most_three_in_a_row(count, across, down):
    figure, axes = panels("title", count, (2, 1))
    assert len(axes) == len(figure.axes) == count
    assert figure.get_size_inches().tolist() == [2 * across, down]
