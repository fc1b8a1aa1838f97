"""The table that training and evaluating end with: its printed values."""

import pytest

from plumbing.tables import format_table


def test_format_table_prints_linear_and_knn_with_one_digit():
    results = {
        "trained": {"linear": 75.94, "knn": 54.06},
        "untrained": {"linear": 40.0, "knn": 33.349},
        "pixels": {"linear": 20.05, "knn": 100.0},
    }
    assert format_table(results, "accuracy (%)").splitlines() == [
        "accuracy (%)            linear       kNN",
        "trained encoder           75.9      54.1",
        "untrained encoder         40.0      33.3",
        "raw pixels                20.1     100.0",
    ]


def test_format_table_shows_a_dash_for_what_a_row_lacks_and_for_what_has_no_value():
    assert format_table({"trained": {"knn": None, "psnr": 21.25}, "pixels": {"accuracy": 3.0}}).splitlines() == [
        "                           kNN      PSNR   accuracy",
        "trained encoder              -      21.2          -",
        "raw pixels                   -         -        3.0",
    ]
    assert format_table({"trained": {"knn": float("nan")}}).split()[-1] == "-"
    assert format_table({}, "accuracy (%)").split() == ["accuracy", "(%)"]


@pytest.mark.parametrize(
    ("name", "title", "shown"),
    [
        ("knn", "kNN", "1.2"),
        ("psnr_of_mean", "mean image", "1.2"),
        ("dz/dx", "dz/dx", "1.235"),
        ("curvature", "curvature", "1.235"),
        ("encoder_curvature", "encoder curvature", "1.235"),
        ("encoder_seam", "encoder seam", "1.2"),
        ("davies_bouldin", "Davies-Bouldin", "1.23"),
        ("cosine_ratio", "cosine ratio", "1.235"),
        ("left_super_resolution", "left of super resolution", "1.235"),
        ("linear @4", "linear @4", "1.2"),
    ],
)
def test_each_result_has_its_title_and_digits_and_room_for_both(name, title, shown):
    head, row = format_table({"trained": {name: 1.2346}}).splitlines()
    width = max(10, len(title) + 3)
    assert head[20:] == f"{title:>{width}}"
    assert row[20:] == f"{shown:>{width}}"


def test_results_that_are_only_logged_are_not_shown():
    hidden = ("same_class_cosine", "other_class_cosine", "restored_lower_gridded", "clean_lower_mixed")
    results = {"trained": {"knn": 1.0} | dict.fromkeys(hidden, 5.0)}
    assert format_table(results).splitlines()[0].split() == ["kNN"]
