"""Charts: panels in rows, and the curves of a run."""

import pytest

from plumbing.curves import layer_map, learning_curves, panels, regularised, wide
from protocols.figures import Album

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


def test_the_map_of_the_blocks_has_a_row_for_each_pair_and_a_column_for_each_epoch():
    """MAGMA, Fig. 3, drawn by no curve of its own."""
    log = [{"epoch": 0, "knn": 1.0}]
    log += [{"epoch": e, "loss": 1.0, "manifold_1_2": e, "manifold_2_3": 1000.0 * e} for e in range(1, 5)]
    known = {"method": "magma", "lam": 1.0, "e_st": 1, "e_dur": 2}
    axes, colours = layer_map(log, "title", known).axes
    (image,) = axes.get_images()
    assert image.get_array().tolist() == [[1, 2, 3, 4], [1000, 2000, 3000, 4000]]
    assert image.get_extent() == [0.5, 4.5, 0.5, 2.5] and image.origin == "lower"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["1 to 2", "2 to 3"]
    assert [line.get_xdata()[0] for line in axes.get_lines()] == [1.5, 3.5]  # epochs 2 and 3 of the log lie between
    assert colours.get_yscale() == "log"
    assert layer_map(log[:2], "title", known) is None and layer_map(LOG, "title", known) is None
    assert list(panels_of(learning_curves(log, "title", known))) == ["loss", "probes"]


def test_a_long_title_is_not_cut_off():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for times in (1, 3, 9):
        figure, _ = panels("mae of a folder" * times)
        FigureCanvasAgg(figure).draw()
        box = figure._suptitle.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width


@pytest.mark.parametrize(("count", "across", "down"), [(1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 3, 2), (7, 3, 3)])
def test_panels_are_at_most_three_in_a_row(count, across, down):
    figure, axes = panels("title", count, (2, 1))
    assert len(axes) == len(figure.axes) == count
    assert figure.get_size_inches().tolist() == [2 * across, down]
