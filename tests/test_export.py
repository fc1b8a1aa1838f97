"""An encoder's weights for timm: names, shapes, arithmetic, and the lines that load them."""

import json
import sys
import types

import processes
import pytest
import reference
import torch
from make import MapEncoder, rand, vit

import evaluate
from plumbing.encoders import save_encoder
from protocols.export import loading_lines, timm_weights

STATISTICS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}
SHAPES = {"square": {}, "narrow perceptron": {"mlp_ratio": 2.5}, "wide images": {"image_size": (8, 12), "heads": 4}}


def shapes_of(img_size=224, patch_size=16, embed_dim=768, depth=12, mlp_ratio=4.0):
    """The names and shapes of timm's VisionTransformer without a head, with `fc_norm=False` (timm 1.0.31)."""
    height, width = img_size if isinstance(img_size, tuple) else (img_size, img_size)
    tokens, dim, hidden = 1 + (height // patch_size) * (width // patch_size), embed_dim, int(embed_dim * mlp_ratio)
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, tokens, dim), "norm.weight": (dim,), "norm.bias": (dim,)}
    shapes |= {"patch_embed.proj.weight": (dim, 3, patch_size, patch_size), "patch_embed.proj.bias": (dim,)}
    for block in range(depth):
        layers = {
            "attn.qkv": (3 * dim, dim),
            "attn.proj": (dim, dim),
            "mlp.fc1": (hidden, dim),
            "mlp.fc2": (dim, hidden),
        }
        shapes |= {f"blocks.{block}.{name}.weight": shape for name, shape in layers.items()}
        shapes |= {f"blocks.{block}.{name}.bias": shape[:1] for name, shape in layers.items()}
        norms = [f"blocks.{block}.{norm}.{part}" for norm in ("norm1", "norm2") for part in ("weight", "bias")]
        shapes |= dict.fromkeys(norms, (dim,))
    return shapes


class VisionTransformer:
    """timm's, as far as the printed lines use it: it checks names and shapes, and computes as the reference does."""

    def __init__(self, num_heads=12, num_classes=1000, global_pool="token", fc_norm=None, **size):
        assert num_classes == 0 and global_pool in ("avg", "token")
        assert fc_norm is False or global_pool == "token", "the mean would have a norm behind it"
        self.shapes, self.heads, self.global_pool, self.mode = shapes_of(**size), num_heads, global_pool, "train"

    def load_state_dict(self, state):
        assert {name: tuple(value.shape) for name, value in state.items()} == self.shapes
        self.state = state

    def eval(self):
        self.mode = "eval"

    def __call__(self, images):
        assert self.mode == "eval"
        return reference.timm_features(self.state, images, self.heads, self.global_pool)


@pytest.fixture
def timm(monkeypatch):
    """A package of that name with what the lines import from it."""
    module = types.ModuleType("timm.models.vision_transformer")
    module.VisionTransformer = VisionTransformer
    for name in ("timm", "timm.models", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)


def a_run(folder, encoder):
    """A run folder of an encoder whose data is gone."""
    folder.mkdir()
    save_encoder(encoder, folder / "encoder.pt")
    (folder / "config.json").write_text(json.dumps({"data": "/gone", "method": "magma", "image_size": 8}))
    return folder


def lines_in(out):
    return out.split("what follows loads it where timm is installed:\n\n")[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_weights_have_timms_names_and_shapes_and_nothing_else(shape):
    encoder = vit(depth=3, **SHAPES[shape])
    weights, fields = timm_weights(encoder), encoder.fields
    size = {"img_size": fields["image_size"], "patch_size": 4, "embed_dim": 16, "depth": 3}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    assert found == shapes_of(**size, mlp_ratio=fields["mlp_ratio"])
    assert type(weights) is dict and all(type(value) is torch.Tensor for value in weights.values())
    assert all(x.is_contiguous() and x.dtype == torch.float32 and not x.requires_grad for x in weights.values())
    assert len({value.untyped_storage().data_ptr() for value in weights.values()}) == len(weights)


def test_learned_positions_are_exported_by_timms_name_alone():
    encoder = vit(learned_positions=True)
    weights, fixed = timm_weights(encoder), timm_weights(vit())
    assert weights.keys() == fixed.keys() and not any(x.requires_grad for x in weights.values())
    assert torch.equal(weights["pos_embed"][0, 1:], encoder.positions) and not weights["pos_embed"][0, 0].any()


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_independent_forward_of_the_weights_is_the_encoder(shape, pool):
    """To 1e-12 in float64: timm's arithmetic on its own layout, on images that were normalised by hand."""
    encoder = vit(pool=pool, **STATISTICS, **SHAPES[shape]).double()
    for index, parameter in enumerate(encoder.parameters()):  # norms and biases begin as 1 and 0
        parameter.data += 0.1 * rand(*parameter.shape, seed=index, dtype=torch.float64)
    images = rand(3, 3, *encoder.image_sides, dtype=torch.float64)
    mean, std = (encoder.fields[name] for name in ("mean", "std"))
    normalised = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    encoder.mean, encoder.std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (mean, std))
    found = reference.timm_features(
        timm_weights(encoder), normalised, encoder.fields["heads"], {"mean": "avg", "cls": "token"}[pool]
    )
    torch.testing.assert_close(found, encoder(images), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_printed_lines_give_the_features_of_the_encoder(shape, pool, timm, tmp_path, capsys):
    """In float32, by the file; they would not be these without the normalisation that stands there."""
    encoder = vit(pool=pool, **STATISTICS, **SHAPES[shape])
    run = a_run(tmp_path / "run 'é'\n", encoder)
    assert evaluate.main([str(run), "--protocol", "export"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"wrote {run}/timm.pth\n")
    images = rand(2, 3, *encoder.image_sides)
    names = {"images": images}
    exec(lines_in(out), names)  # noqa: S102
    torch.testing.assert_close(names["features"], encoder(images), rtol=0, atol=2e-6)
    assert (names["vit"](images) - encoder(images)).abs().max() > 0.05


def test_another_pool_and_another_size_are_exported_as_asked(timm, tmp_path, capsys):
    encoder = vit(pool="mean", **STATISTICS)
    run, images = a_run(tmp_path / "run", encoder), rand(2, 3, 16, 16)
    flags = ["--pool", "cls", "--image-size", "16", "--out", str(tmp_path / "a" / "b")]
    assert evaluate.main([str(run), "--protocol", "export", *flags]) == 0
    names = {"images": images}
    exec(lines_in(capsys.readouterr().out), names)  # noqa: S102
    larger = vit(pool="cls", image_size=16, **STATISTICS)
    torch.testing.assert_close(names["features"], larger(images), rtol=0, atol=1e-6)
    assert (tmp_path / "a" / "b" / "timm.pth").exists() and not (run / "timm.pth").exists()


def test_what_is_there_is_never_overwritten(tmp_path, capsys):
    run = a_run(tmp_path / "run", vit())
    argv, path = [str(run), "--protocol", "export"], run / "timm.pth"
    assert evaluate.main(argv) == 0
    before, shown = path.read_bytes(), lines_in(capsys.readouterr().out)
    assert evaluate.main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{path} is there already, with these weights\n") and lines_in(out) == shown
    assert path.read_bytes() == before
    other = vit()
    other.norm.bias.data += 1
    save_encoder(other, run / "encoder.pt")
    assert evaluate.main(argv) == 2
    assert capsys.readouterr().err == (
        f"error: {path} holds other weights; move it away, or choose another folder by --out\n"
    )
    assert path.read_bytes() == before
    for text in (b"mine", b""):
        path.write_bytes(text)
        assert evaluate.main(argv) == 2
        assert capsys.readouterr().err.startswith(f"error: {path} is not a checkpoint")
        assert path.read_bytes() == text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--pool max", "unknown --pool 'max'"),
        ("--image-size 9", "image size 9 x 9 is not a multiple of the patch size 4"),
        ("--image-size -4", "--image-size -4 makes no sense"),
        ("--protocol export knn", "--protocol export is a command of its own"),
        ("--protocol export features", "--protocol export is a command of its own"),
        ("--recipe mae", "unknown recipe of export 'mae'; choose from none"),
        ("--out {run}/encoder.pt", "cannot make the folder {run}/encoder.pt"),
        ("--out {run}/encoder.pt/x", "cannot make the folder {run}/encoder.pt/x"),
    ],
)
def test_export_answers_a_mistake_with_one_line(flags, message, tmp_path, capsys):
    run = a_run(tmp_path / "run", vit())
    flags = flags.format(run=run).split()
    argv = [str(run), *([] if "--protocol" in flags else ["--protocol", "export"]), *flags]
    assert evaluate.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: " + message.format(run=run)) and err.count("\n") == 1
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "encoder.pt"]


def test_an_encoder_that_timm_has_not_is_refused(tmp_path, capsys):
    run = a_run(tmp_path / "run", MapEncoder())
    assert evaluate.main([str(run), "--protocol", "export"]) == 2
    assert capsys.readouterr().err == (
        f"error: --protocol export writes transformers (ViT) for timm, {run} holds a MapEncoder: not that one\n"
    )
    assert not (run / "timm.pth").exists()


def test_several_processes_export_once(tmp_path):
    run = a_run(tmp_path / "run", vit())
    assert processes.start(processes.evaluate_main, [str(run), "--protocol", "export"]) == [0, 0]
    weights = torch.load(run / "timm.pth", weights_only=True)
    assert all(torch.equal(value, weights[name]) for name, value in timm_weights(vit()).items())


def test_a_line_shows_the_mlp_ratio_only_where_it_is_not_timms(tmp_path):
    assert "mlp_ratio" not in loading_lines(vit().fields, tmp_path)
    assert "mlp_ratio=2.5" in loading_lines(vit(mlp_ratio=2.5).fields, tmp_path)
