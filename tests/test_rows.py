"""What is judged: features of the encoder or of pixels, and the method of a run."""

import dataclasses

import pytest
import torch
from make import settings_for, shapes, striped, subject_of, tiny_levels, vit

import common
import magma
from plumbing.encoders import save_encoder
from plumbing.errors import UserError
from protocols.frozen import run_clusters, run_linear
from protocols.rows import load_method, method_for
from protocols.settings import Config
from protocols.training import applies, run_protocol


def test_a_subject_gives_the_features_that_it_is_told_to():
    subject = subject_of(vit(depth=3, pool="cls"))
    for pool in ("mean", "cls", "mean"):
        features, _ = subject.features("test", Config(pool=pool, image_size=8, amp="off"))
        encoder = vit(depth=3, pool=pool)
        torch.testing.assert_close(features, encoder(subject.test.images / 255).detach())
    assert len(subject.kept) == 2  # each computed once


def test_a_protocol_does_not_change_the_features_of_the_next(tmp_path):
    """A recipe with a feature of its own leaves no trace in what comes after it."""
    subject = subject_of(vit(depth=3, pool="mean"))
    before = run_clusters(subject, settings_for("clusters", tmp_path))
    run_linear(subject, settings_for("linear", tmp_path, recipe="mae", cache=True, epochs=1))
    assert subject.encoder.pool == "cls"
    assert run_clusters(subject, settings_for("clusters", tmp_path)) == before


def test_probe_images_limit_the_probes(tmp_path):
    subject = subject_of(vit(depth=3))
    config = settings_for("linear", tmp_path, probe_images=40, batch_size=32, epochs=1)
    assert run_linear(subject, config)["linear"] > 0
    assert len(subject.kept[("train", "mean")][0]) == len(subject.kept[("test", "mean")][0]) == 40


def test_pixels_are_probed_without_an_encoder(tmp_path):
    subject = subject_of(None, "pixels")
    assert run_protocol("knn", subject, settings_for("knn", tmp_path))["knn"] > 90
    several = run_protocol("linear", subject, settings_for("linear", tmp_path, base_lrs=(0.1, 0.2)))
    assert several.keys() == {"linear 0.1", "linear 0.2"}
    assert min(several.values()) > 90
    assert not applies("tran1", subject, settings_for("tran1", tmp_path))
    assert not applies("finetune", subject, settings_for("finetune", tmp_path))


def test_one_a_class_is_the_first_test_image_of_each():
    subject = subject_of(vit(depth=3))
    subject.test = dataclasses.replace(striped(12), labels=torch.tensor([-1, 2, 2, 0, 0, 1, 1, 2, 0, 1, 2, -1]))
    images = subject.one_a_class(Config(image_size=8))
    assert torch.equal(images, subject.test.images[[3, 5, 1]] / 255)


# --- the method of a run ---------------------------------------------------------------------------------------------


def test_a_run_that_went_on_from_a_file_is_rebuilt_without_it(tmp_path, monkeypatch):
    start = vit(image_size=16, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    save_encoder(start, tmp_path / "start.pt")
    monkeypatch.setitem(common.VIT_SIZES, "vit_micro", {"dim": 16, "depth": 2, "heads": 2})
    method = tiny_levels(start=str(tmp_path / "start.pt"))
    save_encoder(method.encoder, tmp_path / "encoder.pt")
    torch.save({"weights": method.state_dict()}, tmp_path / "last.pt")
    (tmp_path / "start.pt").unlink()
    known = dataclasses.asdict(method.config) | {"method": "mlo_mae"}
    again = load_method(tmp_path, known, shapes(60, 16))
    torch.testing.assert_close(again.state_dict(), method.state_dict(), rtol=0, atol=0)
    assert torch.equal(again.encoder.mean, start.mean) and torch.equal(again.encoder.std, start.std)
    other = {"amp": "bfloat16", "flip": 5, "epochs": "two", "workers": None}  # of the loop, which shape no network
    again = load_method(tmp_path, known | other, shapes(60, 16))
    torch.testing.assert_close(again.state_dict(), method.state_dict(), rtol=0, atol=0)


def test_a_protocol_of_one_paper_refuses_other_runs_and_sizes(tmp_path):
    fields = magma.RECIPES["shapes"] | {"image_size": 16, "decoder_dim": 16, "decoder_heads": 2}
    method = magma.Magma(magma.Config(**fields), shapes(10))
    torch.save({"weights": method.state_dict()}, tmp_path / "last.pt")
    known = dataclasses.asdict(method.config) | {"method": "magma"}
    subject = subject_of(method.encoder)
    again = method_for("own", "magma", subject, tmp_path, known, Config(image_size=16))
    assert torch.equal(again.encoder.cls_token, method.encoder.cls_token)
    assert not again.training
    torch.testing.assert_close(again.encoder.mean, method.encoder.mean, rtol=0, atol=0)
    with pytest.raises(UserError, match="--protocol own needs the run's own --image-size 16"):
        method_for("own", "magma", subject, tmp_path, known, Config(image_size=32))
    message = f"--protocol own looks into a run of finola with its config.json and last.pt, not into {tmp_path}"
    for known in ({"method": "magma"}, {}):
        with pytest.raises(UserError) as error:
            method_for("own", "finola", subject, tmp_path, known, Config(image_size=16))
        assert str(error.value) == message
