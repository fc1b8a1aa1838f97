"""Runs side by side: which are one row, what its figures are, and what is refused. Run folders are written by hand."""

import json
import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import judged, write_run
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

import evaluate
from plumbing.errors import UserError
from plumbing.report import write_report
from plumbing.run_files import read_evaluations
from plumbing.tables import format_table
from protocols.compare import (
    check_comparison,
    compare,
    curve,
    differences,
    doubts,
    draw,
    gaps,
    grouped,
    read_runs,
    row_of,
)


def rows(*folders):
    return {name: row_of(group) for name, group in grouped(read_runs(folders)).items()}


# --- rows ------------------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_their_seed_alone_are_one_row(tmp_path):
    seeds = [write_run(tmp_path / f"magma-shapes-seed{n}", seed=n, device="cpu", workers=n) for n in range(3)]
    others = [
        write_run(tmp_path / "lam", lam=0.0, seed=3),
        write_run(tmp_path / "mixed", method="mixedae", seed=4),
        write_run(tmp_path / "started", seed=5, start="encoder.pt"),
        write_run(tmp_path / "unfinished", epochs=1, seed=6),
    ]
    groups = grouped(read_runs([*seeds, *others]))
    assert {name: len(group) for name, group in groups.items()} == {"magma-shapes (3 seeds)": 3} | {
        folder.name: 1 for folder in others
    }


def test_the_same_run_once_more_is_no_other_seed(tmp_path):
    """Its deviation would be 0, or that of rounding."""
    folders = [write_run(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert list(grouped(read_runs(folders))) == ["a (2 seeds)", "b"]


def test_other_pictures_are_another_row_wherever_they_lie(tmp_path):
    for name, data, listing in (("a", "x", "1\tp"), ("b", "y/x", "1\tp"), ("c", "x", "2\tp")):
        write_run(tmp_path / name, seed=ord(name), data=data)
        (tmp_path / name / "images.tsv").write_text(listing)
    groups = grouped(read_runs([tmp_path / name for name in "abc"]))
    assert [[run.folder.name for run in group] for group in groups.values()] == [["a", "b"], ["c"]]


@given(st.lists(st.floats(0, 100), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_a_row_of_seeds_is_their_mean_and_deviation_in_any_order(tmp_path_factory, values, random):
    root = tmp_path_factory.mktemp("runs")
    folders = [write_run(root / f"r{n}", seed=n, linear=(0.0, value)) for n, value in enumerate(values)]
    random.shuffle(folders)
    (row,) = rows(*folders).values()
    (mean, deviation), digits = row["linear"]
    assert mean == pytest.approx(sum(values) / len(values))
    assert deviation == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1)), abs=1e-9)
    assert digits == 1


def test_a_row_tells_the_last_of_the_log_and_what_protocols_found(tmp_path):
    lines = [judged(value=40.0), judged(value=50.0), judged(data="cifar100"), judged("knn", 60.0, recipe="")]
    folder = write_run(tmp_path / "a", evaluations=[*lines, {"protocol": "broken", "results": None}])
    assert rows(folder)["a"] == {
        "loss": (2.0, 4),
        "linear": (30.0, 1),
        "kNN": (11.0, 1),
        "effective rank": (20.0, 1),
        "linear (magma)": (50.0, 1),  # the last one
        "linear (magma, cifar100)": (50.0, 1),
        "kNN (knn)": (60.0, 1),
        "minutes": (10 / 60, 1),
    }


def test_what_was_judged_before_is_not_lost_to_a_line_without_it(tmp_path):
    """finetune, then finetune --scratch, which has the row of the untrained encoder alone."""
    lines = [judged("finetune", 70.0), judged("finetune", 0.0) | {"results": {"untrained": {"finetune": 60.0}}}]
    folder = write_run(tmp_path / "a", evaluations=lines)
    assert rows(folder)["a"]["finetune (magma)"] == (70.0, 1)
    assert read_evaluations(folder / "eval.jsonl")[0]["results"]["untrained"] == {"finetune": 60.0}


def test_runs_of_before_and_after_a_setting_was_added_are_alike(tmp_path):
    folders = [write_run(tmp_path / name, seed=seed) for name, seed in (("a-seed9", 9), ("a-seed10", 10))]
    known = json.loads((folders[0] / "config.json").read_text())
    (folders[0] / "config.json").write_text(json.dumps({x: y for x, y in known.items() if x != "crop_pad"}))
    assert list(grouped(read_runs(folders))) == ["a (2 seeds)"]


@pytest.mark.parametrize("numbers", [(1, 10), (10, 11, 12), (0, 1)])
def test_a_row_of_seeds_has_the_name_that_they_share(numbers, tmp_path):
    folders = [write_run(tmp_path / f"x-seed{n}", seed=n) for n in numbers]
    assert list(grouped(read_runs(folders))) == [f"x ({len(numbers)} seeds)"]


def test_a_column_that_one_seed_lacks_is_not_the_rows(tmp_path):
    one, other = write_run(tmp_path / "a", seed=0, evaluations=[judged()]), write_run(tmp_path / "b", seed=1)
    (row,) = rows(one, other).values()
    assert "linear (magma)" not in row and "linear" in row


def test_rows_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [write_run(tmp_path / a / "run", lam=lam) for a, lam in (("x", 1.0), ("y", 2.0))]
    assert list(rows(*folders)) == [str(folder) for folder in folders]


def test_a_table_prints_mean_and_deviation():
    assert format_table({"a (2 seeds)": {"knn": (17.25, 1.0)}, "b": {"knn": "3.0"}}).splitlines() == [
        "                             kNN",
        "a (2 seeds)           17.2 ± 1.0",
        "b                            3.0",
    ]


# --- notes -----------------------------------------------------------------------------------------------------------


def test_what_rows_differ_in_is_told(tmp_path):
    folders = [write_run(tmp_path / "a", seed=0, out="x"), write_run(tmp_path / "b", lam=0.5, layers=[-3, -1], seed=1)]
    assert differences(grouped(read_runs(folders))) == ["a: --lam 1.0  --layers -2 -1", "b: --lam 0.5  --layers -3 -1"]
    assert differences(grouped(read_runs(folders[:1]))) == []


def test_what_cannot_be_compared_is_told(tmp_path):
    runs = [
        write_run(tmp_path / "a", evaluations=[judged()]),
        write_run(tmp_path / "b", epochs=1, data="cifar10", evaluations=[judged(epochs=90, out="o"), judged("knn")]),
    ]
    assert doubts(read_runs(runs)) == [
        f"{tmp_path}/b is at epoch 1 of 2",
        "figures of the log are on each run's own data (shapes, cifar10)",
    ]
    runs[1] = write_run(tmp_path / "c", evaluations=[judged(epochs=90, out="o"), judged("knn")])
    assert doubts(read_runs(runs)) == ["linear (magma) was not run with the same --epochs for all"]


# --- the chart -------------------------------------------------------------------------------------------------------


def test_what_only_some_seeds_have_and_what_is_older_than_the_log_is_told(tmp_path):
    seeds = [
        write_run(tmp_path / "g0", seed=0, evaluations=[judged() | {"epoch": 1}]),
        write_run(tmp_path / "g1", seed=1),
    ]
    runs = read_runs(seeds)
    assert gaps(grouped(runs)) == [f"g (2 seeds) has no linear (magma), since {tmp_path}/g1 has none"]
    assert doubts(runs) == [f"linear (magma) of {tmp_path}/g0 was run after epoch 1, and the log is at 2"]


def test_a_hundred_rows_have_a_line_each_in_the_legend(tmp_path):
    folders = [write_run(tmp_path / f"r{n}", lam=float(n)) for n in range(12)]
    figure = draw(grouped(read_runs(folders)))
    looks = {(to_hex(line.get_color()), line.get_linestyle()) for line in figure.axes[0].get_lines()}
    assert len(looks) == 12
    figure.savefig(tmp_path / "chart.png")  # no warning


def test_the_chart_shows_each_row_over_epochs_and_over_seconds(tmp_path):
    seeds = [write_run(tmp_path / f"s{n}", seed=n, linear=(10.0, 30.0 + 2 * n), seconds=5.0 + n) for n in range(3)]
    other = write_run(tmp_path / "$o$", lam=0.0, linear=(12.0, 20.0))
    figure = draw(grouped(read_runs([*seeds, other])))
    points = [[line.get_xydata().tolist() for line in axes.get_lines()] for axes in figure.axes]
    assert points[0] == [[[1, 4.0], [2, 2.0]]] * 2
    assert points[1] == [[[0, 10.0], [2, 32.0]], [[0, 12.0], [2, 20.0]]]
    assert points[4] == [[[0, 10.0], [12, 32.0]], [[0, 12.0], [10, 20.0]]]
    assert points[5] == [[[12, 20.0]], [[10, 20.0]]]
    assert [axes.get_title() for axes in figure.axes] == ["loss", "linear", "effective rank", "", "", ""]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["s (3 seeds)", "$o$"]
    assert not any(text.get_parse_math() for text in figure.legends[0].get_texts())
    colours = [line.get_color() for line in figure.legends[0].get_lines()]
    assert colours == [line.get_color() for line in figure.axes[1].get_lines()] == ["C0", "C1"]


def test_the_band_is_one_deviation(tmp_path):
    runs = read_runs([write_run(tmp_path / f"s{n}", seed=n, linear=(10.0, value)) for n, value in enumerate((30, 37))])
    at, middle, spread = curve(runs, "epoch", "linear")
    assert (at.tolist(), middle.tolist()) == ([0, 2], [10.0, 33.5])
    assert spread.tolist() == pytest.approx([0.0, statistics.stdev([30, 37])])
    assert curve(runs[:1], "seconds", "linear")[2].tolist() == [0.0, 0.0]


def test_runs_of_before_seconds_were_logged_are_drawn_over_epochs_alone(tmp_path):
    folder = write_run(tmp_path / "a")
    text = (folder / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text(text.replace('"seconds"', '"other"'))
    assert curve(read_runs([folder]), "seconds", "linear")[0].tolist() == []
    assert curve(read_runs([folder]), "epoch", "linear")[0].tolist() == [0, 2]
    draw(grouped(read_runs([folder])))


def test_without_labels_the_held_out_loss_is_drawn(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "log.jsonl").write_text((folder / "log.jsonl").read_text().replace('"linear"', '"held_out_loss"'))
    figure = draw(grouped(read_runs([folder])))
    assert figure.axes[1].get_title() == "held-out loss" and len(figure.axes[1].get_lines()[0].get_xydata()) == 2


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_comparison_is_printed_and_drawn_and_never_overwrites_another(tmp_path, capsys, monkeypatch):
    folders = [write_run(tmp_path / f"run-seed{n}", seed=n, linear=(0.0, 30.0 + n)) for n in range(2)]
    other = write_run(tmp_path / "other", method="mixedae")
    assert evaluate.main(list(map(str, folders))) == 0
    assert "run (2 seeds)         2.0000 ± 0.0000  30.5 ± 0.7  11.0 ± 0.0" in capsys.readouterr().out
    with Image.open(tmp_path / "compare.png", formats=["PNG"]) as picture:
        assert picture.size[0] > 1000
    record = json.loads((tmp_path / "compare.json").read_text())
    assert record["runs"] == {"run (2 seeds)": list(map(str, folders))}
    assert record["table"]["run (2 seeds)"]["linear"] == [30.5, statistics.stdev([30, 31])]
    monkeypatch.setattr("protocols.compare.draw", lambda groups: Figure((1, 1)))  # charts take long
    assert evaluate.main(list(map(str, reversed(folders)))) == 0  # the same ones again
    third = write_run(tmp_path / "run-seed2", seed=2)
    monkeypatch.chdir(tmp_path)  # by another spelling, and one more
    assert evaluate.main(["run-seed0", "run-seed1", "run-seed2", "--out", "."]) == 0
    assert evaluate.main([str(folders[0]), str(third)]) == 2
    folders.append(third)
    before = (tmp_path / "compare.png").read_bytes()
    capsys.readouterr()
    assert evaluate.main([str(folders[0]), str(other)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path} has a comparison of other runs; choose another folder, such as --out {tmp_path}/compare\n"
    )
    (tmp_path / "compare.json").unlink()  # a picture of whatever
    assert evaluate.main(list(map(str, folders))) == 2
    assert (tmp_path / "compare.png").read_bytes() == before
    assert evaluate.main([str(folders[0]), str(other), "--out", str(tmp_path / "new" / "place")]) == 0
    assert (tmp_path / "new" / "place" / "compare.png").exists()


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        ("finetune", "finetune-shapes"),
        ("finetune --untrained", "finetune-shapes-untrained"),
        ("finetune --scratch", "finetune-shapes-untrained"),
        ("linear --recipe mae", "linear-shapes"),  # without cache
        ("segment", "segment-scenes"),
        ("segment --pixels", "segment-scenes-pixels"),
        ("detect --data coco --recipe finola_finetune", "detect-finetune-coco"),
    ],
)
def test_a_protocol_that_trains_is_refused_before_the_first_run_where_one_has_it(tmp_path, flags, folder, capsys):
    folders = [write_run(tmp_path / name, lam=lam) for name, lam in (("a", 1.0), ("b", 2.0))]
    for run in folders:
        (run / "encoder.pt").write_bytes(b"")
    (folders[1] / folder).mkdir()
    (folders[1] / folder / "log.jsonl").write_text("")
    assert evaluate.main([*map(str, folders), "--protocol", *flags.split()]) == 2
    assert capsys.readouterr().err == f"error: {folders[1]}/{folder} exists; add --resume to go on with it\n"


def test_a_folder_that_a_protocol_starts_from_is_not_in_its_way(tmp_path):
    """Fine-tuning for detection goes on from the decoder of the frozen encoder's run."""
    folders = [str(write_run(tmp_path / name, lam=lam)) for name, lam in (("a", 1.0), ("b", 2.0))]
    for folder in map(Path, folders):
        (folder / "encoder.pt").write_bytes(b"")
        (folder / "detect-scenes").mkdir()
        (folder / "detect-scenes" / "log.jsonl").write_text("")
        (folder / "finetune-shapes").mkdir()
        (folder / "finetune-shapes" / "log.jsonl").write_text("")
    check_comparison(folders, "", {"protocol": ("detect",), "finetune": True})
    check_comparison(folders, "", {"protocol": ("finetune",), "scratch": True})  # which does not train the encoder
    check_comparison(folders, "", {"protocol": ("linear",)})
    with pytest.raises(UserError, match="a/detect-scenes exists"):
        check_comparison(folders, "", {"protocol": ("detect",)})


def test_protocols_run_on_each_run_and_then_the_runs_are_compared(tmp_path, monkeypatch):
    folders = [str(write_run(tmp_path / name, lam=lam)) for name, lam in (("a", 1.0), ("b", 2.0))]
    done = []
    for folder in folders:
        (Path(folder) / "encoder.pt").write_bytes(b"")
    monkeypatch.setattr(evaluate, "judge", lambda folder, given: done.append((str(folder), given)))
    monkeypatch.setattr(evaluate, "compare", lambda *given: done.append(given))
    assert evaluate.main([*folders, "--protocol", "knn", "--k", "5", "--out", "there"]) == 0
    given = {"protocol": ("knn",), "k": 5}
    assert done == [(folders[0], given), (folders[1], given), (folders, "there")]


@pytest.mark.parametrize(
    ("runs", "flags", "message"),
    [
        ("a none", "", "no run folder {tmp}/none; give one that train.py wrote, such as runs/magma-shapes"),
        ("a empty", "", "{tmp}/empty holds no log.jsonl with an epoch; give folders that train.py wrote"),
        ("a b a", "", "{tmp}/a is given twice; give each run once"),
        ("a b", "--k 5 --data shapes", "--k --data is of no use here: several runs are compared by their logs"),
        ("a b", "--out {tmp}/a/log.jsonl", "--out {tmp}/a/log.jsonl is a file; give a folder"),
        ("a odd", "", "{tmp}/odd/config.json holds no settings of a run"),
        ("a b", "--protocol knn", "{tmp}/a holds no encoder.pt to run a protocol on; leave it out, or --protocol"),
        ("a b", "--out {tmp}/pictures/train/ant", "the folder {tmp}/pictures/train/ant lies among the images of"),
    ],
)
def test_a_mixture_that_cannot_be_compared_is_one_clear_line(runs, flags, message, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures" / "train" / "ant").mkdir(parents=True)
    for name in ("a", "b", "odd"):
        write_run(tmp_path / name, lam=float(ord(name[0])), data=str(tmp_path / "pictures"))
    (tmp_path / "odd" / "config.json").write_text("[]")
    before = sorted(tmp_path.rglob("*"))
    folders = [str(tmp_path / name) for name in runs.split()]
    assert evaluate.main([*folders, *flags.format(tmp=tmp_path).split()]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: " + message.format(tmp=tmp_path)) and output.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_comparison_of_foreign_files_is_refused_or_drawn(tmp_path):
    """Whatever a log or an eval.jsonl holds, there is no traceback, in the report neither."""
    folder = write_run(tmp_path / "a", evaluations=[judged()])
    odd = [None, [1], "x", {"a": 1}, True, 2**70, 10**400, 1e308, float("inf")]
    names = ("loss", "linear", "knn", "effective_rank", "seconds", "pixels", "versions", "command", "epoch")
    lines = [{"epoch": 5, "loss": 1.0} | {name: value} for name in names for value in odd]
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "loss": null, "seconds": "x", "linear": [1]}\n{"epoch": 4, "loss": 1e400}\nnoise\n')
    with open(folder / "eval.jsonl", "a") as file:
        file.write('{"protocol": 3, "results": {"trained": 5}}\n{"results": {}}\n[1]\nnoise\n')
        for value in odd:
            file.write(json.dumps({"protocol": "knn", "results": {"trained": {"knn": value}, "pixels": value}}) + "\n")
            file.write(json.dumps({"protocol": "x", "results": {"trained": {"y": 1.0}}, "epoch": value}) + "\n")
    with open(folder / "log.jsonl", "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    write_report(folder)
    compare([folder, write_run(tmp_path / "b", lam=0.0)])
    (tmp_path / "compare.json").write_text("{}")
    with pytest.raises(UserError, match="has a comparison of other runs"):
        check_comparison([folder], "")
