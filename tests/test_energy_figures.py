"""What an energy learned: chains of the test images, what they leave of the error, and what they cost in energy."""

import json
import types

import pytest
import torch
from make import narrow_networks, rand, shapes, striped, tiny_energy
from PIL import Image

import ebm_pretrain
import evaluate
import train
from ebm_pretrain import MIXTURE
from plumbing.datasets import load_data
from plumbing.encoders import load_encoder
from plumbing.probes import labelled
from plumbing.run_files import read_log, read_settings
from plumbing.shapes import render_shapes
from protocols import energy_figures
from protocols.energy_figures import (
    CHAIN,
    WAY,
    chain_curves,
    descends,
    draw_energy,
    follow,
    look_into_energy,
    share_left,
    slopes,
)
from protocols.figures import Album
from protocols.rows import Subject, method_for
from protocols.settings import Config


def test_what_is_left_is_a_share_of_all_images_together():
    error = torch.tensor([[1.0, 0.5], [3.0, 0.5]])
    torch.testing.assert_close(share_left(error), torch.tensor([1.0, 0.25]))
    assert torch.equal(share_left(torch.zeros(2, 3)), torch.zeros(3))


def test_the_chart_shows_error_and_energy_along_the_chain():
    values = {"error": torch.tensor([[4.0, 2.0, 1.0]]), "energy": torch.tensor([[9.0, 6.0, 5.0]])}
    values["way"] = torch.tensor([[9.0, 8, 3, 2, 4]])
    found = {"noise": values | {"clean": torch.tensor([4.0])}, "super_resolution": values | {"clean": torch.zeros(1)}}
    figure = chain_curves(found, 2, "title")
    left, right = ({line.get_label(): line for line in axes.get_lines()} for axes in figure.axes[:2])
    assert left["noise"].get_xydata().tolist() == [[0, 1.0], [1, 0.5], [2, 0.25]]
    curves = [line.get_xydata().tolist() for line in figure.axes[1].get_lines()]
    assert curves[:2] == [[[0, 5.0], [1, 2.0], [2, 1.0]], [[0, 9.0], [1, 6.0], [2, 5.0]]]
    first, *_ = figure.axes[2].get_lines()
    assert first.get_xydata().tolist() == [[0, 5], [0.25, 4], [0.5, -1], [0.75, -2], [1, 0]]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["noise", "super resolution", "last step of the training"]
    for lines in (left, right):
        assert set(lines["last step of the training"].get_xdata()) == {2}


@pytest.fixture
def album(monkeypatch):
    """What goes on paper instead of the paper: sheets {name: (captions, rows)} and charts {name: figure}."""
    found = types.SimpleNamespace(sheets={}, charts={})
    monkeypatch.setattr(
        Album, "sheet", lambda self, name, _, captions, rows: found.sheets.update({name: (captions, rows)})
    )
    monkeypatch.setattr(Album, "chart", lambda self, name, figure: found.charts.update({name: figure}))
    return found


def draw(method, data, tmp_path, monkeypatch):
    """What `draw_energy` says of a method and the pictures of `data`."""
    monkeypatch.setattr(energy_figures, "method_for", lambda *_: method)
    subject = Subject("trained", method.encoder, data, data, torch.device("cpu"))
    return draw_energy(None, {}, subject, Config(image_size=16, amp="off", data="x", seed=5, out=str(tmp_path)))[1]


def test_the_table_is_about_the_steps_of_the_training(album, tmp_path, monkeypatch, capsys):
    """Three images whose energies fall at first and rise beyond the second step, the last of the training."""
    values = {
        "error": torch.tensor([[4.0, 3, 1, 0.5], [2, 2, 2, 0.5], [6, 4, 3, 0.5]]),
        "energy": torch.tensor([[5.0, 3, 2, 9], [5, 6, 7, 1], [5, 4, 4, 8]]),
        "clean": torch.tensor([1.0, 5, 6]),
        "way": torch.tensor([[5.0, 4, 3, 2, 1], [5, 6, 7, 6, 5], [5, 4, 6, 5, 6]]),
        "cosine": torch.tensor([0.5, 0.25, 0.75]),
        "foreign": torch.tensor([6.0, 4, 5.5]),
    }
    method = tiny_energy(task="super_resolution", steps=2)
    monkeypatch.setattr(energy_figures, "look_into_energy", lambda *_: {"super_resolution": values})
    figures = draw(method, shapes(4, 16), tmp_path, monkeypatch)
    expected = {"left": (1 + 2 + 3) / (4 + 2 + 6), "restored_lower": 2 / 3, "clean_lower": 1 / 3}
    expected |= {"way_falls": 1 / 3, "way_rises": 0, "way_cosine": 0.5}
    expected = {f"{name}_super_resolution": value for name, value in expected.items()}
    expected |= {f"descends_super_resolution_{i}": share for i, share in ((1, 2 / 3), (2, 1 / 3), (3, 1 / 3))}
    assert figures == pytest.approx(expected | {"way_foreign_above_coarse": 2 / 3, "way_foreign_above_whole": 1 / 3})
    assert capsys.readouterr().out == (
        "super_resolution: of the corrupted images' squared error 50 % is left after step 2; "
        "energy below that of the corrupted image: restored 67 %, clean 33 % of the images\n"
        "  energy goes down in 67, 33 % of the images at each step, beyond the training in 33 %\n"
        "  straight to the whole image the energy falls all the way in 33 %, rises all the way in 0 %; "
        "cosine of the first step with this way 0.50\n"
        "  with the fine detail of another picture the energy is above that of the coarse image in 67 %, "
        "above that of the whole one in 33 %\n"
    )
    (line, *_) = album.charts["chains"].axes[0].get_lines()
    assert list(line.get_ydata()) == pytest.approx([1, 9 / 12, 6 / 12, 1.5 / 12])


def test_the_sheets_show_the_chain_of_each_task_step_by_step(album, tmp_path, monkeypatch):
    """x <- x - alpha dE/dx from the corrupted image on (Eq. 3), one of each class; cut off to [0, 1]."""
    method, data = tiny_energy(task="mixed", steps=2), striped(7, size=16)
    torch.manual_seed(0)
    method(data.images / 255)  # sets alpha
    draw(method.eval(), data, tmp_path, monkeypatch)
    assert list(album.sheets) == [f"chain_{task}" for task in MIXTURE]
    for task in MIXTURE:
        captions, rows = album.sheets[f"chain_{task}"]
        assert captions == ["image", "corrupted", *[f"step {i}" for i in range(1, 9)]]
        assert rows.shape == (3, 2 + CHAIN, 3, 16, 16)
        torch.testing.assert_close(rows[:, 0], data.images[:3] / 255)
        torch.manual_seed(5)
        x = method.corrupt(data.images[:3] / 255, task)[1]
        for column in range(1, 2 + CHAIN):
            shown = (x * method.std + method.mean).clamp(0, 1)
            torch.testing.assert_close(rows[:, column], shown, rtol=1e-4, atol=1e-4)
            x = x.detach().requires_grad_()
            slope = torch.autograd.grad(method.energy(x).sum(), x)[0]
            x = x.detach() - method.log_alpha.exp().detach() * slope


def test_the_same_corruptions_are_measured_each_time():
    method, data = tiny_energy(task="noise", steps=1), striped(6, size=16)
    subject = Subject("trained", method.encoder, data, data, torch.device("cpu"))
    config = Config(image_size=16, amp="off", seed=3)
    method(data.images / 255)
    first, again = (look_into_energy(method.eval(), subject, config)["noise"]["error"] for _ in range(2))
    assert torch.equal(first, again)
    torch.manual_seed(3)
    clean, corrupted = method.corrupt(data.images / 255, "noise")
    torch.testing.assert_close(first[:, 0], (corrupted - clean).square().mean(dim=(1, 2, 3)))


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Short runs on a folder of pictures."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    images, labels, _ = render_shapes(60, 32)
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        place = folder / "data" / ("train" if i < 30 else "val") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i}.png")
    base = ["--data", str(folder / "data"), "--workers", "0", "--epochs", "1", "--batch-size", "10", "--task", "mixed"]
    base += ["--image-size", "32", "--model", "vit_micro", "--patch", "8", "--grid", "8", "--scale", "4"]
    base += ["--decoder-dim", "16", "--decoder-heads", "2", "--decoder-depth", "1", "--warmup-epochs", "0"]
    variants = {"energy": [], "mae": ["--objective", "mae"], "autoencoder": ["--objective", "autoencoder"]}
    with narrow_networks():
        for name, flags in (variants | {"negatives": ["--steps", "0"]}).items():
            found[name] = folder / name
            assert train.main(["ebm_pretrain", *base, *flags, "--out", str(found[name])]) == 0
        yield found


def look(run, **fields):
    """A run's method, the subject that it is judged by, and the settings."""
    known, encoder = read_settings(run / "config.json"), load_encoder(run / "encoder.pt")
    test = load_data(known["data"], split="test")
    subject = Subject("trained", encoder, test, test, torch.device("cpu"))
    config = Config(image_size=32, amp="off", workers=0, **fields)
    return method_for("energy", "ebm_pretrain", subject, run, known, config), subject, config


def test_what_the_protocol_measures(runs):
    """Along the chain x <- x - alpha dE/dx: squared error and energy of every test image, step by step."""
    method, subject, config = look(runs["energy"], probe_images=12)
    every = look_into_energy(method, subject, config)
    found = every["grayscale"]
    ((images, _),) = subject.test.plain_batches(labelled(subject.test, 12), 32)
    clean, corrupted = method.corrupt(images, "grayscale")
    alpha = method.log_alpha.exp().detach()
    chain = [corrupted, *ebm_pretrain.restore(method.energy, corrupted, CHAIN, alpha)]
    for i, x in enumerate(chain):
        torch.testing.assert_close(found["error"][:, i], (x - clean).square().mean(dim=(1, 2, 3)).detach())
        torch.testing.assert_close(found["energy"][:, i], method.energy(x).detach())
    torch.testing.assert_close(found["clean"], method.energy(clean).detach())
    for i in range(WAY):
        x = (1 - i / 4) * corrupted + i / 4 * clean
        torch.testing.assert_close(found["way"][:, i], method.energy(x).detach(), rtol=1e-4, atol=1e-6)
    step, lost = (x.flatten(1) for x in (chain[1] - corrupted, clean - corrupted))
    torch.testing.assert_close(found["cosine"], ((step * lost).sum(1) / step.norm(dim=1) / lost.norm(dim=1)).detach())
    clean, coarse = method.corrupt(images, "super_resolution")
    assert [task for task in every if "foreign" in every[task]] == ["super_resolution"]
    foreign = [method.energy((coarse[i] + clean[i - 1] - coarse[i - 1])[None]) for i in range(12)]
    torch.testing.assert_close(every["super_resolution"]["foreign"], torch.cat(foreign).detach(), rtol=1e-4, atol=1e-6)


def test_a_chain_is_at_least_as_long_as_that_of_the_training():
    config = Config(image_size=16, amp="off")
    for steps, longest in ((2, CHAIN), (9, 9)):
        chain, energies = follow(tiny_energy(steps=steps).eval(), rand(1, 3, 16, 16), config)
        assert len(chain) == len(energies) == 1 + longest


def test_energies_go_down_by_step_and_by_line():
    energy = torch.tensor([[3.0, 2, 2, 1], [3, 4, 2, 0]])
    assert descends(energy).tolist() == [0.5, 0.5, 1]
    assert slopes(energy) == (0, 0) and slopes(energy[:, [0, 2, 3]]) == (1, 0) and slopes(-energy[:, [0, 3]]) == (0, 1)
    assert slopes(torch.tensor([[3.0, 2, 1], [1, 2, 3], [1, 2, 2], [4, 5, 6]])) == (0.25, 0.5)


def test_a_run_is_trained_probed_and_looked_into(runs, capsys):
    run = runs["energy"]
    last = read_log(run / "log.jsonl")[1][-1]
    assert {f"left_{task}" for task in MIXTURE} < last.keys() and last["alpha"] > 0
    assert evaluate.main([str(run), "--protocol", "energy", "knn", "--probe-images", "24", "--amp", "off"]) == 0
    shown = capsys.readouterr().out
    names = {path.name for path in (run / "energy").iterdir()}
    assert names == {"chains.png", *[f"chain_{task}.png" for task in MIXTURE]}
    assert "left of noise" in shown and "energy below that of the corrupted image" in shown
    line = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    assert line["protocol"] == "energy" and line["test_images"] == 24
    method, found = look(run)[0], line["results"]["trained"]
    for task, values in look_into_energy(*look(run, probe_images=24)).items():
        energy, steps = values["energy"], method.config.steps
        assert found[f"left_{task}"] == pytest.approx(float(share_left(values["error"])[steps]))
        assert found[f"restored_lower_{task}"] == float((energy[:, steps] < energy[:, 0]).float().mean())
        assert found[f"clean_lower_{task}"] == float((values["clean"] < energy[:, 0]).float().mean())


def test_every_objective_logs_what_it_has(runs):
    tasks = {f"left_{task}" for task in MIXTURE}
    for name, expected in {"mae": set(), "autoencoder": tasks | {"left"}, "negatives": {"told_apart"}}.items():
        last = read_log(runs[name] / "log.jsonl")[1][-1]
        assert {key for key in last if key.startswith(("left", "told", "alpha"))} == expected


def test_the_protocol_wants_an_energy(runs, capsys):
    for name in ("mae", "autoencoder", "negatives"):
        assert evaluate.main([str(runs[name]), "--protocol", "energy"]) == 2
        assert "needs --objective energy" in capsys.readouterr().err
    assert evaluate.main([str(runs["energy"]), "--protocol", "energy", "--image-size", "16"]) == 2
    assert "needs the run's own --image-size 32" in capsys.readouterr().err
