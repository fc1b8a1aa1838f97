"""Runs of earlier versions stay readable: a folder that one wrote, and every kind of encoder file by its bytes.

`old_run/` was written by the code of commit 17f5369, under torch 2.13 and Python 3.11, on the pictures of
`make.shapes()`. Its transformer is smaller than `vit_micro`, so `SIZE` takes its place. The command was

    python train.py magma FLAGS

and SIGTERM stopped it after step 8, in the middle of the second of three epochs. `WENT_ON` is what the same code logged
of the last two epochs where nothing stopped it.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from make import fit_magma, log_of

import common
import ebm_pretrain
import evaluate
from plumbing.encoders import load_encoder, save_encoder
from plumbing.errors import UserError
from plumbing.files import load_checkpoint
from plumbing.run_files import LATER

SIZE = {"dim": 4, "depth": 2, "heads": 1}
FLAGS = "--decoder-dim 4 --decoder-depth 1 --decoder-heads 1 --epochs 3 --probe-every 1 --warmup-epochs 1 --base-lr 0.1"
FLAGS = [*FLAGS.split(), "--amp", "off", "--device", "cpu"]  # after those of `make.TINY`
WENT_ON = [
    {"epoch": 2, "loss": 1.5762798, "mae": 1.0774472, "manifold": 0.4988326, "uniformity": 0.5232165, "lr": 2.04534e-3},
    {"epoch": 3, "loss": 1.4765203, "mae": 1.0622806, "manifold": 0.4142397, "uniformity": 0.4633452, "lr": 7.64742e-5},
]


@pytest.fixture
def old_run(tmp_path):
    return shutil.copytree(Path(__file__).parent / "old_run", tmp_path / "run")


def test_a_checkpoint_has_the_parts_that_it_always_had(old_run, tmp_path):
    """`identity` (method, origin, images, processes, precision and the settings that must not change), `step` (steps
    done), `sums` and `count` (of the unfinished epoch's scalars), `weights`, `optimizer`, `scaler`."""
    fit_magma(tmp_path / "new", *FLAGS, "--epochs", "1", "--probe-every", "0", size=SIZE)
    old, new = (load_checkpoint(folder / "last.pt") for folder in (old_run, tmp_path / "new"))
    parts = ["identity", "step", "sums", "count", "weights", "optimizer", "scaler"]
    assert list(old) == parts
    assert list(new) == [*parts, "seconds"]  # of training, which older runs did not count
    assert (old["step"], old["count"], new["step"], new["count"]) == (8, 3, 5, 5)
    assert old["sums"].keys() == new["sums"].keys()
    assert LATER | old["identity"] | {"epochs": 1} == LATER | new["identity"]
    assert [(name, x.shape) for name, x in old["weights"].items()] == [(n, x.shape) for n, x in new["weights"].items()]
    for part in ("state", "param_groups"):
        assert len(old["optimizer"][part]) == len(new["optimizer"][part])


def test_an_old_run_goes_on_as_the_code_that_began_it_did(old_run, capsys):
    before = log_of(old_run)
    fit_magma(old_run, *FLAGS, "--resume", size=SIZE)
    log = log_of(old_run)
    assert log[:3] == before
    assert len(log) == 5
    for line, expected in zip(log[3:], WENT_ON, strict=True):
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4)
        assert line.keys() == expected.keys() | {"images_per_second", "knn", "linear", "effective_rank"}
    assert "epochs      1 of 3 done, 5 steps each" in capsys.readouterr().out
    assert load_checkpoint(old_run / "last.pt")["step"] == 15


def test_an_old_run_is_refused_with_other_settings_as_before(old_run):
    with pytest.raises(UserError, match=r"was trained otherwise \(lam 1.0 -> 2.0\)"):
        fit_magma(old_run, *FLAGS, "--resume", "--lam", "2", size=SIZE)


def test_the_encoder_of_an_old_run_gives_the_features_it_gave(old_run):
    encoder = load_encoder(old_run / "encoder.pt")
    features = encoder(torch.linspace(0, 1, 192).view(1, 3, 8, 8))
    expected = torch.tensor([[1.2022857666, 0.6462931037, -0.6370022297, -1.2015174627]])
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("amp", "printed"), [("bf16", "11.0"), ("off", "10.5")])
def test_an_old_run_is_evaluated_as_before(old_run, amp, printed, capsys):
    """11.0 % is what the evaluation of that commit printed, on a processor with bfloat16; in float32 it is 10.5."""
    flags = ["--protocol", "knn", "--probe-images", "400", "--device", "cpu", "--amp", amp]
    code = evaluate.main([str(old_run), *flags])
    output = capsys.readouterr()
    assert code == 0, output.err
    assert f"trained encoder           {printed}" in output.out


# --- encoder files ---------------------------------------------------------------------------------------------------

STATISTICS = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
KINDS = {  # class, fields, a digest of the names, shapes and types of the weights, and the first outputs
    "ViT": (
        common.ViT,
        {"image_size": (8, 12), "patch": 4, "dim": 16, "depth": 2, "heads": 2, "mlp_ratio": 4.0, "pool": "cls"},
        "98b1a972e10a11cf",
        [-1.87939, -0.98035, 1.23983],
    ),
    "MobileFormer": (
        common.MobileFormer,
        {"width": "micro", "head": 12, "norm": "group"},
        "618f343f27d9df1c",
        [0.1966, 0.7102, -0.14512],
    ),
    "ConvNeXt": (
        ebm_pretrain.ConvNeXt,
        {"dims": (8, 16), "depths": (1, 2), "stem": 2},
        "50b001d6dc962863",
        [-0.03675, -0.03648, -0.03622],
    ),
    "Swin": (
        ebm_pretrain.Swin,
        {"dim": 8, "depths": (2, 1), "heads": (1, 2), "window": 2, "stem": 2},
        "fe5846ecc0bfe25a",
        [-0.36789, -0.3682, -0.3684],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_files_have_the_form_they_always_had(kind, tmp_path):
    """The same keys, plain Python numbers as fields, and weights of the same names, shapes and order; from one seed
    the same network, as all of it was at commit 17f5369."""
    made_by, fields, digest, outputs = KINDS[kind]
    torch.manual_seed(0)
    save_encoder(made_by(**fields, **STATISTICS), tmp_path / "encoder.pt")
    state = torch.load(tmp_path / "encoder.pt", weights_only=True)
    assert list(state) == ["kind", "fields", "weights"]
    assert state["kind"] == kind
    assert state["fields"] == fields | STATISTICS
    json.dumps(state["fields"])  # no tensors, no numpy
    listed = "\n".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in state["weights"].items())
    assert hashlib.sha256(listed.encode()).hexdigest()[:16] == digest, listed
    sides = fields.get("image_size", (32, 32))
    images = torch.linspace(0, 1, 3 * sides[0] * sides[1]).view(1, 3, *sides)
    with torch.no_grad():
        found = load_encoder(tmp_path / "encoder.pt")(images).flatten()[:3]
    if torch.__version__.startswith("2.13."):  # others draw the first weights otherwise
        torch.testing.assert_close(found, torch.tensor(outputs), rtol=1e-3, atol=1e-4)
