"""The fair table: its rows, its runs, its page."""

import copy
import importlib
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import study
import study_page
from make import write_cifar

import magma
from plumbing.asked import read_configs
from plumbing.command import run_command
from plumbing.errors import NonFiniteLoss, UserError

PAGE = f"above\n{study_page.BEGIN}\nold\n{study_page.END}\nbelow\n"


def asked(**fields):
    usual = {
        "out": "runs/study",
        "root": "data",
        "equal": "passes",
        "epochs": 60,
        "seeds": [0, 1],
        "rest": [],
        "page": "page.md",
    }
    return SimpleNamespace(**usual | {"rows": list(study.ROWS)} | fields)


@pytest.mark.parametrize("name", study.ROWS)
def test_rows_are_settings_of_their_methods_alike_where_they_can_be(name):
    row, epochs = study.ROWS[name], study.epochs_of(name, asked(), {})
    module = importlib.import_module(row.method)
    (config,) = read_configs(row.method, module.Config, module.RECIPES, study.flags_of(name, epochs, asked()))
    assert config.epochs * row.passes == 60 and config.warmup_epochs == epochs / 15
    assert (config.data, config.crop_min, config.amp) == ("cifar10", 0.2, "auto")
    assert config.probe_every == epochs // 6
    if row.method == "finola":
        assert (config.width, config.image_size) == ("micro", 64)
    else:
        assert (config.model, config.image_size, config.patch) == ("vit_micro", 32, 4)
    if row.method in ("mixedae", "mlo_mae") or name in ("mae", "m-mae"):
        assert (config.decoder_dim, config.decoder_depth, config.decoder_heads) == (64, 2, 4)
    if row.method == "mlo_mae":  # passes of level I in an epoch
        assert config.unrolling * (1 - config.validation) == row.passes
    if row.method == "magma":  # the paper's strength, in its share of the run
        assert config.lam == (config.batch_size / 256 if row.title.startswith(("M-", "MU-")) else 0)
        assert not config.lam or (config.e_st, config.e_dur) == (10, 40)


def test_equal_seconds_are_those_of_mae():
    costs = {
        "mae": {"epoch": 2.0},
        "umae": {"epoch": 1.85},
        "m-mae": {"epoch": 2.25},
        "energy": {"epoch": 9.0},
        "blo-mae": {"epoch": 500.0},
    }
    equal = asked(equal="seconds")
    assert [study.epochs_of(name, equal, costs) for name in costs] == [60, 60, 53, 13, 1]
    assert [study.epochs_of(name, asked(), costs) for name in costs] == [60, 60, 60, 60, 15]
    places = [study.folder_of(name, 1, equal, costs).name for name in costs]
    assert places == [
        "mae-seed1",
        "umae-seed1",
        "m-mae-53epochs-seed1",
        "energy-13epochs-seed1",
        "blo-mae-1epochs-seed1",
    ]
    assert study.folder_of("blo-mae", 1, asked(), costs).name == "blo-mae-seed1"


def test_equal_seconds_need_costs(tmp_path):
    with pytest.raises(UserError, match="mae costs"):
        study.study(["table", "--equal", "seconds", "--out", str(tmp_path), "--page", str(tmp_path / "page.md")])
    (tmp_path / "costs.json").write_text("{}")
    with pytest.raises(UserError, match="is there"):
        study.study(["costs", "--out", str(tmp_path)])


@pytest.fixture
def pictures(tmp_path):
    write_cifar(tmp_path / "data", "cifar10", counts=(16,), test=8)
    return tmp_path / "data"


def refuse(*argv):
    raise AssertionError("nothing is left to do")


def test_a_table_is_made_stopped_gone_on_with_and_written(tmp_path, pictures, monkeypatch):
    """Two rows of one epoch; the first is stopped in its first step."""
    monkeypatch.setattr(study, "FINETUNE", study.FINETUNE.replace("--epochs 10", "--epochs 1"))
    monkeypatch.setattr(magma.Magma, "pictures", lambda self, images: images[:, None])
    out, page, forward = tmp_path / "runs", tmp_path / "page.md", magma.Magma.forward
    words = ["--out", str(out), "--rows", "mae", "umae", "--seeds", "0", "--epochs", "1"]
    train = [*words, "--root", str(pictures), "--image-size", "8", "--batch-size", "8"]

    def stopped(self, *inputs):
        os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *inputs)

    with monkeypatch.context() as patched:
        patched.setattr(magma.Magma, "forward", stopped)
        assert run_command(study.study, ["table", *train]) == 130
    assert not (out / "mae-seed0/eval.jsonl").exists()
    study.study(["costs", *train, "--rounds", "1"])
    study.study(["table", *train])
    command = json.loads((out / "mae-seed0/log.jsonl").read_text().splitlines()[0])["command"]
    assert command.startswith("train.py magma --data cifar10") and str(out / "mae-seed0") in command
    with monkeypatch.context() as patched:
        patched.setattr(study.train, "train", refuse)
        patched.setattr(study.evaluate, "evaluate", refuse)
        study.study(["table", *train])
    page.write_text(PAGE)
    study.study(["write", *words, "--page", str(page)])
    text = page.read_text()
    assert text.startswith("above\n<!--") and text.endswith("-->\nbelow\n") and "old" not in text
    assert text.count("| MAE | ") == text.count("| U-MAE | ") == text.count("| untrained | ") == 2  # in both tables
    assert (tmp_path / "study.png").stat().st_size > 1000
    evaluations = [json.loads(line) for line in (out / "mae-seed0/eval.jsonl").read_text().splitlines()]
    assert [list(line["results"]) for line in evaluations] == [["trained"], ["untrained"]]


def test_what_diverges_or_is_anothers_does_not_stop_the_others(tmp_path, monkeypatch):
    began = []

    def diverge(argv):
        began.append(argv[-1])
        raise NonFiniteLoss("step 3: loss nan")

    lock = study.lock_run

    def locked(folder, resume):
        if folder.name.startswith("umae"):
            raise UserError("another process is writing it")
        return lock(folder, resume)

    monkeypatch.setattr(study.train, "train", diverge)
    monkeypatch.setattr(study, "lock_run", locked)
    for name in ("mae-seed0", "m-mae-seed0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text('{"epoch": 0, "linear": 1}\n')
    for _ in range(2):  # the second time they are left as they are
        study.study(["table", "--out", str(tmp_path), "--rows", "mae", "umae", "m-mae", "--seeds", "0"])
    assert len(began) == 2
    assert (tmp_path / "m-mae-seed0/diverged.txt").read_text() == "step 3: loss nan\n"
    assert study.result_of(tmp_path / "mae-seed0", 60).state == "diverged"


def test_cheap_rows_come_first_and_seeds_one_after_the_other(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(study.train, "train", lambda argv: made.append(argv[argv.index("--out") + 1]))
    costs = {"energy": {"epoch": 9.0}, "mae": {"epoch": 2.0}, "mlo-mae": {"epoch": 12.0}}
    (tmp_path / "costs.json").write_text(json.dumps({"rows": costs}))
    study.study(["table", "--out", str(tmp_path), "--rows", *costs, "--seeds", "0", "1"])
    names = ["mae-seed0", "mlo-mae-seed0", "energy-seed0", "mae-seed1", "mlo-mae-seed1", "energy-seed1"]
    assert made == [str(tmp_path / name) for name in names]


def test_a_tenth_of_the_labels_is_every_tenth_of_each_class(tmp_path, monkeypatch):
    """It is made once. A kill in the midst of it leaves nothing that stays."""
    records = write_cifar(tmp_path / "data", "cifar10", counts=(200, 90), test=5)
    wanted, claim, move = asked(out=tmp_path, root=str(tmp_path / "data")), tmp_path / "claim", Path.replace
    claim.mkdir()

    def killed_at_the_last(path, target):
        if path.name == "test_batch.bin":
            raise KeyboardInterrupt
        return move(path, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", killed_at_the_last)
        study.tenth_of(wanted, claim)
    assert not (tmp_path / "tenth" / "cifar-10-batches-bin" / "test_batch.bin").exists()
    for file in ("data_batch_1.bin", "test_batch.bin"):
        (claim / file).write_bytes(b"half of it")
    place = study.tenth_of(wanted, claim) / "cifar-10-batches-bin"
    assert not list(claim.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(np, "fromfile", refuse)
        assert study.tenth_of(wanted, claim) == place.parent
    for file, rows in records.items():
        found = np.fromfile(place / file, dtype=np.uint8).reshape(-1, 3073)
        wanted = [row for label in range(10) for row in rows[rows[:, 0] == label][::10]]
        assert np.array_equal(found, rows if file == "test_batch.bin" else np.array(wanted))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["claim", "data", "tenth"]
    assert not list(claim.iterdir())


# --- the page --------------------------------------------------------------------------------------------------------


def record(folder, linear, tuned=None, last=2):
    """A run folder with a log of so many epochs, and its fine-tuning on a tenth of the labels, and on all."""
    folder.mkdir()
    lines = [{"command": "train.py", "versions": {"torch": "2.x"}}]
    lines += [{"epoch": 0, "linear": 20.0, "knn": 10.0, "effective_rank": 5.0, "pixels": {"linear": 31.0, "knn": 21.0}}]
    lines += [{"epoch": i, "linear": linear - last + i, "knn": 12.0, "effective_rank": 7.0} for i in range(1, last + 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [("all", "mae", {"trained": {"finetune": 99.0}})]
    lines += [("runs/tenth", "mae_code", {"trained": {"finetune": tuned}, "untrained": {"finetune": 25.0}})] * bool(
        tuned
    )
    names = ("root", "recipe")
    lines = [{"protocol": "finetune", "results": x[2], "settings": dict(zip(names, x[:2], strict=True))} for x in lines]
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_page_has_means_deviations_and_what_is_missing(tmp_path):
    record(tmp_path / "mae-seed0", 50.0, 40.0)
    record(tmp_path / "mae-seed1", 60.0, 42.0)
    record(tmp_path / "umae-seed0", 55.0)
    record(tmp_path / "umae-seed1", 55.0, last=1)  # not at its end
    record(tmp_path / "m-mae-seed1", 55.0, last=1)
    (tmp_path / "m-mae-seed1/diverged.txt").write_text("step 3")
    (tmp_path / "page.md").write_text(PAGE)
    (tmp_path / "costs.json").write_text(json.dumps({"rows": {"mae": {"epoch": 3.0}, "umae": {"epoch": 6.0}}}))
    words = ["write", "--out", str(tmp_path), "--page", str(tmp_path / "page.md"), "--epochs", "2", "--seeds", "0", "1"]
    study.study(words)
    passes, seconds = (tmp_path / "page.md").read_text().split("Equal seconds")
    assert "| MAE | 55.0 ± 7.1 | 12.0 ± 0.0 | 41.0 ± 1.4 | 7.0 ± 0.0 | 2 | 6 | 2 of 2 |\n" in passes
    assert "| U-MAE | 55.0 | 12.0 | - | 7.0 | 2 | 12 | 1 of 2 |\n" in passes
    assert "| M-MAE (MAGMA) | - | - | - | - | 2 | - | 0 of 2, 1 diverged |\n" in passes
    assert "| untrained | 20.0 ± 0.0 | 10.0 ± 0.0 | 25.0 ± 0.0 | 5.0 ± 0.0 | 0 | 0 | 2 of 2 |\n" in passes
    assert "| pixels | 31.0 | 21.0 | - | - | - | - | - |\n\nNo finished run yet: MU-MAE; MixedAE" in passes
    assert "table --root DIR --epochs 2`:" in passes
    assert "| MAE | 55.0 ± 7.1 |" in seconds and "No finished run yet: U-MAE." in seconds
    assert "torch 2.x" in seconds
    before = (tmp_path / "page.md").read_text()
    study.study(words)
    assert (tmp_path / "page.md").read_text() == before


def test_runs_that_are_gone_stay_in_the_record_and_later_ones_join_them(tmp_path):
    """A second folder of runs, as on another machine, has the second seed, and a new result of one that is known."""
    (tmp_path / "page.md").write_text(PAGE)
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
    record(tmp_path / "first/mae-seed0", 50.0, 40.0)
    record(tmp_path / "first/umae-seed0", 30.0)
    (tmp_path / "first/costs.json").write_text(json.dumps({"rows": {"mae": {"epoch": 3.0}, "umae": {"epoch": 6.0}}}))
    record(tmp_path / "second/mae-seed1", 60.0)
    record(tmp_path / "second/umae-seed0", 34.0)
    words = ["write", "--page", str(tmp_path / "page.md"), "--epochs", "2", "--seeds", "0", "1", "--out"]
    for place in ("first", "second"):
        study.study([*words, str(tmp_path / place)])
    text = (tmp_path / "page.md").read_text()
    assert "| MAE | 55.0 ± 7.1 | 12.0 ± 0.0 | 40.0 | 7.0 ± 0.0 | 2 | 6 | 2 of 2 |\n" in text  # and the costs stay
    assert "| U-MAE | 34.0 | 12.0 | - | 7.0 | 2 | 12 | 1 of 2 |\n" in text
    runs = study_page.read_record(tmp_path / "study.json")["runs"]
    assert list(runs) == ["mae-2epochs-seed0", "mae-2epochs-seed1", "umae-2epochs-seed0"]
    assert runs["mae-2epochs-seed0"] == study.result_of(tmp_path / "first/mae-seed0", 2)
    assert [line["linear"] for line in runs["mae-2epochs-seed1"].log] == [20.0, 59.0, 60.0]
    (tmp_path / "second/costs.json").write_text(json.dumps({"rows": {"mae": {"epoch": 3.0}}}))  # the rest stays
    made = study.epochs_of(
        "umae", asked(equal="seconds"), study.read_costs(asked(page=tmp_path / "page.md", out=tmp_path / "second"))
    )
    assert made == 30  # half of MAE's, by the costs of the record


def test_runs_on_other_pictures_do_not_join(tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    for seed, listing in ((0, "7\tdata_batch_1.bin\n"), (1, "9\tdata_batch_1.bin\n")):
        record(tmp_path / f"mae-seed{seed}", 50.0)
        (tmp_path / f"mae-seed{seed}/images.tsv").write_text(listing)
    with pytest.raises(UserError, match="other pictures"):
        study.study(["write", "--out", str(tmp_path), "--page", str(tmp_path / "page.md"), "--epochs", "2"])
    assert (tmp_path / "page.md").read_text() == PAGE and not (tmp_path / "study.json").exists()


def test_the_page_of_results_is_what_its_record_makes(tmp_path):
    """A figure that was changed by hand, or in the record alone, is found out."""
    docs, page = Path(study.ROOT) / "docs", tmp_path / "results.md"
    written = (docs / "results.md").read_text()
    page.write_text(written)
    shutil.copy(docs / "study.json", tmp_path)
    study.study(["write", "--out", str(tmp_path / "none"), "--page", str(page), "--epochs", "30"])
    # But the line with machine and date.
    tables = [re.sub(r"^\*.*", "", text, flags=re.MULTILINE) for text in (written, page.read_text())]
    assert tables[0] == tables[1] and "± " in tables[0]
    assert (docs / "study.json").read_text() == (tmp_path / "study.json").read_text()


def test_the_chart_counts_passes_and_cpu_seconds(tmp_path):
    for seed in (0, 1):
        record(tmp_path / f"x-seed{seed}", 50.0 + 10 * seed)
    runs = [study.result_of(tmp_path / f"x-seed{seed}", 2) for seed in (0, 1)]
    before = copy.deepcopy(runs)
    tables = {"passes": study_page.table_of([study_page.Entry("MLO-MAE", "", 4.0, 3.0, 2, runs)])[1]}
    assert runs == before
    over_passes, over_seconds = study_page.chart_of(tables, ["MAE", "MLO-MAE"]).axes
    for one, across in ((over_passes, [0, 4, 8]), (over_seconds, [0, 3, 6])):
        (line,) = one.get_lines()
        assert line.get_xdata().tolist() == across and line.get_ydata().tolist() == [20, 54, 55]
        assert line.get_color() == "C1"
        heights = one.collections[0].get_paths()[0].vertices[:, 1]
        assert heights.max() == pytest.approx(55 + 50**0.5)  # the deviation of 50 and 60


def test_the_chart_leaves_out_results_of_which_the_end_alone_is_known(tmp_path):
    for seed in (0, 1):
        record(tmp_path / f"x-seed{seed}", 50.0 + 10 * seed)
    runs = [study.result_of(tmp_path / f"x-seed{seed}", 2) for seed in (0, 1)]
    runs[0].log = runs[0].log[-1:]
    table, groups = study_page.table_of([study_page.Entry("MAE", "untrained", 1.0, 3.0, 2, runs)])
    assert "55.0 ± 7.1" in table[2] and table[3].startswith("| untrained | 20.0 |") and "| pixels | 31.0" in table[4]
    (line, *_) = study_page.chart_of({"passes": groups}, ["MAE"]).axes[0].get_lines()
    assert line.get_ydata().tolist() == [20, 59, 60]
    assert line.get_linestyle() == "-"
    groups["MAE"][1].log = [groups["MAE"][1].log[i] for i in (0, 2)]  # nothing between: no line
    one = study_page.chart_of({"passes": groups}, ["MAE"]).axes[0]
    assert one.get_lines()[0].get_ydata().tolist() == [20, 60] and one.get_lines()[0].get_linestyle() == "None"
    assert not one.collections  # and no band


def test_the_legend_names_every_line_of_every_panel(tmp_path):
    record(tmp_path / "x-seed0", 50.0)
    runs, tables = [study.result_of(tmp_path / "x-seed0", 2)], {}
    for equal, titles in (("passes", ["MAE"]), ("seconds", ["MAE", "MLO-MAE"])):
        tables[equal] = study_page.table_of([study_page.Entry(x, "", 1.0, 3.0, 2, runs) for x in titles])[1]
    (legend,) = study_page.chart_of(tables, ["MAE", "MLO-MAE"]).legends
    assert [text.get_text() for text in legend.get_texts()] == ["MAE", "MLO-MAE"]


def test_a_cell_tells_of_the_values_that_there_are():
    assert [study_page.told(x) for x in ([], [None, math.nan], [2.0, None], [1.0, 2.0, math.nan])] == [
        "-",
        "-",
        "2.0",
        "1.5 ± 0.7",
    ]


@pytest.mark.parametrize("text", ["", "no place", study_page.END + study_page.BEGIN, PAGE + PAGE])
def test_a_page_without_its_markers_is_refused_and_left_as_it_is(tmp_path, text):
    record(tmp_path / "mae-seed0", 50.0)
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(UserError, match="needs a line"):
        study.study(["write", "--out", str(tmp_path), "--page", str(tmp_path / "page.md"), "--epochs", "2"])
    assert (tmp_path / "page.md").read_text() == text


def test_a_page_without_runs_is_refused(tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    with pytest.raises(UserError, match="no run is finished"):
        study.study(["write", "--out", str(tmp_path), "--page", str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text() == PAGE


@pytest.mark.parametrize(
    ("words", "why"), [("write --flipp 3", "no flag of write"), ("table --max-steps=3", "give --epochs")]
)
def test_flags_that_would_do_nothing_or_harm_are_refused(words, why):
    with pytest.raises(UserError, match=why):
        study.study(words.split())
