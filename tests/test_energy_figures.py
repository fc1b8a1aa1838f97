"""What an energy learned: chains of the test images, what they leave of the error, and what they cost in energy."""

import json

import pytest
import torch
from PIL import Image

import ebm_pretrain
import evaluate
import train
from ebm_pretrain import MIXTURE
from plumbing.datasets import load_data
from plumbing.encoders import load_encoder
from plumbing.probes import labelled
from plumbing.run_files import read_log
from plumbing.shapes import render_shapes
from protocols.energy_figures import CHAIN, chain_curves, look_into_energy, share_left
from protocols.rows import Subject, method_for
from protocols.run_folders import read_settings
from protocols.settings import Config


def test_what_is_left_is_a_share_of_all_images_together():
    error = torch.tensor([[1.0, 0.5], [3.0, 0.5]])
    torch.testing.assert_close(share_left(error), torch.tensor([1.0, 0.25]))
    assert torch.equal(share_left(torch.zeros(2, 3)), torch.zeros(3))


def test_the_chart_shows_error_and_energy_along_the_chain():
    values = {"error": torch.tensor([[4.0, 2.0, 1.0]]), "energy": torch.tensor([[9.0, 6.0, 5.0]])}
    found = {"noise": values | {"clean": torch.tensor([4.0])}, "super_resolution": values | {"clean": torch.zeros(1)}}
    figure = chain_curves(found, 2, "title")
    left, right = ({line.get_label(): line for line in axes.get_lines()} for axes in figure.axes)
    assert left["noise"].get_xydata().tolist() == [[0, 1.0], [1, 0.5], [2, 0.25]]
    curves = [line.get_xydata().tolist() for line in figure.axes[1].get_lines()]
    assert curves[:2] == [[[0, 5.0], [1, 2.0], [2, 1.0]], [[0, 9.0], [1, 6.0], [2, 5.0]]]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["noise", "super resolution", "last step of the training"]
    for lines in (left, right):
        assert set(lines["last step of the training"].get_xdata()) == {2}


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
    for name, flags in (variants | {"negatives": ["--steps", "0"]}).items():
        found[name] = folder / name
        assert train.main(["ebm_pretrain", *base, *flags, "--out", str(found[name])]) == 0
    return found


def look(run, **fields):
    """A run's method, the subject that it is judged by, and the settings."""
    known, encoder = read_settings(run), load_encoder(run / "encoder.pt")
    test = load_data(known["data"], split="test")
    subject = Subject("trained", encoder, test, test, torch.device("cpu"))
    config = Config(image_size=32, amp="off", workers=0, **fields)
    return method_for("energy", "ebm_pretrain", subject, run, known, config), subject, config


def test_what_the_protocol_measures(runs):
    """Along the chain x <- x - alpha dE/dx: squared error and energy of every test image, step by step."""
    method, subject, config = look(runs["energy"], probe_images=12)
    found = look_into_energy(method, subject, config)["grayscale"]
    ((images, _),) = subject.test.plain_batches(labelled(subject.test, 12), 32)
    clean, corrupted = method.corrupt(images, "grayscale")
    alpha = method.log_alpha.exp().detach()
    chain = [corrupted, *ebm_pretrain.restore(method.energy, corrupted, CHAIN, alpha)]
    for i, x in enumerate(chain):
        torch.testing.assert_close(found["error"][:, i], (x - clean).square().mean(dim=(1, 2, 3)).detach())
        torch.testing.assert_close(found["energy"][:, i], method.energy(x).detach())
    torch.testing.assert_close(found["clean"], method.energy(clean).detach())


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
