"""What train.py is asked for: settings of another run, and a run for each seed."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make import fit_magma, log_of, narrow_networks, shapes

import magma
import train
from common import METHODS
from plumbing.asked import read_configs, saved_settings
from plumbing.errors import UserError
from plumbing.settings import read_flags


def asked(*argv, method="magma"):
    module = importlib.import_module(method)
    return read_configs(method, module.Config, module.RECIPES, [str(word) for word in argv])


def saved(tmp_path, method, *flags):
    """A config.json as a run writes it."""
    module = importlib.import_module(method)
    config = read_flags(module.Config, module.RECIPES, list(flags))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"method": method, **dataclasses.asdict(config)}))
    return config, path


# --- --config --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", ["shapes", "photos", "imagenet100"])
def test_settings_are_read_back_as_they_were(method, recipe, tmp_path):
    """Of every method and recipe, without what the new command's own recipe says."""
    module = importlib.import_module(method)
    if recipe not in {key.split()[0] for key in module.RECIPES} and recipe != "imagenet100":
        pytest.skip("no such recipe")
    flags = ["--recipe", recipe] if recipe == "photos" else ["--data", recipe]
    config, path = saved(tmp_path, method, *flags, "--seed", "7", "--no-resume", "--out", "a $b")
    assert asked("--config", path, method=method) == [config]


@given(
    st.floats(0, 1e6),
    st.lists(st.integers(-6, -1), min_size=2, max_size=4),
    st.booleans(),
    st.text(max_size=8).filter("-".__ne__),
)
def test_any_value_is_read_back_exactly(lam, layers, detach, data):
    """But for `--data=--`, which argparse takes for no value."""
    known = {"method": "magma", "lam": lam, "layers": layers, "detach_reference": detach, "data": f"-{data}"}
    known |= {"milestones": [], "start": "", "resume": True}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("plumbing.asked.read_settings", lambda path: known)
        found = saved_settings(Path("config.json"), "magma", magma.Config)
    del known["method"], known["resume"], known["milestones"]
    assert found == known | {"layers": tuple(layers)}


def test_flags_win_over_settings_of_another_run(tmp_path):
    config, path = saved(tmp_path, "magma", "--lam", "3", "--e-dur", "7")
    (found,) = asked("--config", path, "--lam", "4", "--out", "b")
    assert found == dataclasses.replace(config, lam=4.0, out="b")
    assert found.e_dur == 7
    (found,) = asked("--config", path.parent, "--epochs", "12")  # a shorter run keeps its shape
    assert (found.warmup_epochs, found.e_st) == (1, round(config.e_st / 2)) and found.moved


def test_settings_of_a_run_that_was_cut_are_told(tmp_path, capsys):
    _, path = saved(tmp_path, "magma", "--max-steps", "4")
    asked("--config", path)
    assert capsys.readouterr().out == f"note: {path} is of a run cut by --max-steps 4: its epochs are few\n"


def test_settings_that_are_not_known_are_told(tmp_path, capsys):
    config, path = saved(tmp_path, "magma")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour_of_sky": "blue"}))
    assert asked("--config", path) == [config]
    assert capsys.readouterr().out == f"note: {path} has settings that magma does not know: colour_of_sky\n"


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, "", "--config {path}: there is no such file; give the config.json of a run"),
        ("noise", "", "{path} cannot be read"),
        ("[1]", "", "{path} holds no settings of a run"),
        ("[" * 100_000, "", "{path} cannot be read ("),
        ('{"method": "mixedae"}', "", "--config {path} holds settings of mixedae, not of magma"),
        ('{"epochs": 3}', "", "--config {path} holds settings of no method, not of magma"),
        ('{"method": "magma", "epochs": "x"}', "", "--config {path}: argument --epochs: invalid int value: 'x'"),
        ('{"method": "magma", "gather": ["--out", "z"]}', "", "--config {path}: gather ['--out', 'z'] is no value of"),
        ('{"method": "magma", "out": {"a": 1}}', "", "--config {path}: out {{'a': 1}} is no value of --out"),
        ('{"method": "magma", "epochs": 0}', "--epochs -1", "--epochs -1 makes no sense; give 1 or more"),
        ('{"method": "magma", "flip": 3}', "", "--flip 3.0 is not a probability"),
        ('{"method": "magma", "epochs": 3}', "--recipe photos", "--recipe photos and --config both say"),
        ('{"method": "magma"}', "--seeds 1 2 1", "--seeds 1 2 1: give each seed once, and no --seed beside them"),
        ('{"method": "magma"}', "--seeds 1 2 --seed 3", "--seeds 1 2: give each seed once, and no --seed"),
        ('{"method": "magma"}', "--seeds 1 -2", "--seed -2 makes no sense; give 0 or more"),
        ('{"method": "magma"}', "--seeds one", "argument --seeds: invalid int value: 'one'"),
        ('{"method": "magma"}', "--seed 1 2", "'2' stands alone; a value needs its flag"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(content, flags, message, tmp_path):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        asked("--config", path, *flags.split())
    assert str(caught.value).startswith(message.format(path=path))


def test_help_shows_both_and_the_settings_of_the_other_run(tmp_path, capsys):
    _, path = saved(tmp_path, "magma", "--lam", "3.25")
    with pytest.raises(SystemExit):
        asked("--config", path, "--help")
    text = capsys.readouterr().out
    assert "--seeds SEEDS" in text and "--config FILE" in text and "(default: 3.25)" in text
    assert "Defaults are those of --config, beside" in text


# --- --seeds ---------------------------------------------------------------------------------------------------------


def test_each_seed_has_settings_and_a_folder_of_its_own():
    configs = asked("--seeds", "3", "0", "--epochs", "12", "--data", "some/photos")
    (one,) = asked("--epochs", "12", "--data", "some/photos")
    for config, seed in zip(configs, (3, 0), strict=True):
        assert config == dataclasses.replace(one, seed=seed, out=f"runs/magma-photos-seed{seed}")
        assert config.moved == one.moved != []
    assert [config.out for config in asked("--seeds", "1", "--out", "x/y")] == ["x/y-seed1"]


FLAGS = [
    "--image-size",
    "8",
    "--mask-ratio",
    "0.5",
    "--epochs",
    "1",
    "--batch-size",
    "20",
    "--probe-every",
    "0",
    "--decoder-depth",
    "1",
]


def test_seeds_are_runs_that_can_be_gone_on_with(tmp_path, capsys, monkeypatch):
    """Each equals the run of its seed alone; those that are taken are told before any starts."""
    monkeypatch.setattr(train, "load_data", lambda *_, **__: shapes())
    with narrow_networks():
        assert train.main(["magma", *FLAGS, "--seeds", "0", "1", "--out", str(tmp_path / "run")]) == 0
        out = capsys.readouterr().out
        assert out.endswith(f"compare them: python evaluate.py {tmp_path}/run-seed0 {tmp_path}/run-seed1\n")
        assert train.main(["magma", *FLAGS, "--seed", "1", "--out", str(tmp_path / "alone")]) == 0
        assert (tmp_path / "run-seed0" / "report.html").exists()
        losses = [log_of(tmp_path / name)[-1]["loss"] for name in ("run-seed0", "run-seed1", "alone")]
        assert losses[1] == losses[2] != losses[0]
        capsys.readouterr()
        assert train.main(["magma", *FLAGS, "--seeds", "5", "1", "--out", str(tmp_path / "run")]) == 2
        assert capsys.readouterr().err.startswith(f"error: {tmp_path}/run-seed1 exists; add --resume to go on with it")
        assert not (tmp_path / "run-seed5").exists()
        assert train.main(["magma", *FLAGS, "--seeds", "0", "1", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count("the run is finished: nothing is left to do") == 2


def test_a_run_by_another_ones_settings_is_that_run(tmp_path):
    fit_magma(tmp_path / "run", "--lam", "2")
    (config,) = asked("--config", tmp_path / "run" / "config.json", "--out", tmp_path / "again")
    again = ["--config", tmp_path / "run", "--out", tmp_path / "again", "--probe-every", "0"]
    assert dataclasses.replace(config, probe_every=0) == asked(*again)[0]
    assert config.lam == 2.0 and config.epochs == 4 and config.e_dur == 2
