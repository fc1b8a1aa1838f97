"""Encoders: what they carry, the register of their kinds, their files, and timm's names."""

import copy
import functools
import importlib
import random
import re
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from make import NARROW_ROWS, rand, vit

import common
import ebm_pretrain
from plumbing.encoders import Encoder, check_encoder, load_encoder, save_encoder, to_timm
from plumbing.errors import UserError

STATISTICS = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}


class Colours(Encoder):
    """The mean colour of an image, `times` over."""

    def __init__(self, times=1, mean=(0.0,) * 3, std=(1.0,) * 3):
        super().__init__(mean, std, times=times)
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.times = times

    def forward(self, images):
        return (self.normalize(images).mean(dim=(2, 3)) * self.scale).repeat(1, self.times)


@pytest.fixture(autouse=True)
def kinds():
    """The kinds that a test adds are forgotten again."""
    with mock.patch.dict(Encoder.kinds):
        yield


def test_an_encoder_carries_its_fields_and_normalises_with_its_statistics():
    encoder, images = Colours(times=2, **STATISTICS), rand(2, 3, 4, 4)
    assert encoder.fields == {"times": 2} | STATISTICS
    by_hand = [(images[:, c] - STATISTICS["mean"][c]) / STATISTICS["std"][c] for c in range(3)]
    torch.testing.assert_close(encoder.normalize(images), torch.stack(by_hand, dim=1))
    assert set(encoder.state_dict()) == {"scale"}  # mean and deviation are fields, no weights


def test_a_subclass_is_known_by_its_name_and_no_other_module_is(tmp_path):
    assert {"ViT", "MobileFormer", "ConvNeXt", "Swin"} <= set(Encoder.kinds)
    encoder, images, path = Colours(times=2, **STATISTICS), rand(2, 3, 4, 4), tmp_path / "encoder.pt"
    encoder.scale.data = torch.tensor([1.0, 2.0, 3.0])
    save_encoder(encoder.train(), path)
    found = load_encoder(path)
    assert type(found) is Colours and not found.training
    assert torch.equal(found(images), encoder(images))
    del Encoder.kinds["Colours"]
    with pytest.raises(UserError, match="holds a Colours, not known here; import the file that has this class first"):
        load_encoder(path)
    save_encoder(torch.nn.Linear(2, 2), path)  # of a user's own: it can be saved, and read by torch.load
    assert set(torch.load(path)["weights"]) == {"weight", "bias"}
    with pytest.raises(UserError, match="holds a Linear, not known here"):
        load_encoder(path)


def test_a_transformer_can_be_loaded_for_other_sizes(tmp_path):
    save_encoder(vit(), tmp_path / "encoder.pt")
    larger = load_encoder(tmp_path / "encoder.pt", image_size=16)
    assert larger.grid == (4, 4)
    assert larger(rand(1, 3, 16, 16)).shape == (1, 16)
    assert load_encoder(tmp_path / "encoder.pt").grid == (2, 2)


def test_encoder_file_rebuilds_the_encoder_alone(tmp_path):
    encoder, images = vit(mean=(0.1, 0.2, 0.3), pool="cls"), rand(2, 3, 8, 8)
    save_encoder(encoder, tmp_path / "encoder.pt")
    torch.testing.assert_close(load_encoder(tmp_path / "encoder.pt")(images), encoder(images))
    torch.save({"something": 1}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt is not an encoder file"):
        load_encoder(tmp_path / "other.pt")
    torch.save({"kind": "ViT", "fields": {"size": 3}, "weights": {}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt does not fit this version"):
        load_encoder(tmp_path / "other.pt")


# --- plain fields ----------------------------------------------------------------------------------------------------

FOREIGN = {
    "numpy scalars": lambda x: tuple(np.float32(v) for v in x),
    "an array": lambda x: np.array(x),
    "a float32 array": lambda x: np.array(x, dtype=np.float32),
    "a tensor": lambda x: torch.tensor(x),
    "tensors": lambda x: [torch.tensor(v) for v in x],
    "torch.Size": lambda x: torch.Size([1, 2, 3]),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_statistics_of_numpy_and_torch_are_saved_as_plain_numbers(kind, tmp_path):
    mean, std = (FOREIGN[kind](STATISTICS[name]) for name in ("mean", "std"))
    encoder = vit(
        mean=mean, std=std, image_size=np.int64(8), dim=np.int32(16), mlp_ratio=np.float32(2), pool=np.str_("cls")
    )
    save_encoder(encoder, tmp_path / "encoder.pt")
    check_encoder(tmp_path / "encoder.pt")
    found, images = load_encoder(tmp_path / "encoder.pt"), rand(2, 3, 8, 8)
    assert torch.equal(found(images), encoder(images))
    assert found.fields == encoder.fields and found.fields["mean"] == tuple(float(v) for v in mean)
    flat = [
        *found.fields["mean"],
        *found.fields["std"],
        *(v for v in found.fields.values() if not isinstance(v, tuple)),
    ]
    assert {type(value) for value in flat} == {float, int, str}


@pytest.mark.parametrize("size", [np.int64(8), (np.int32(8), 12), torch.Size([8, 12]), np.array([8, 12]), [8, 12]])
def test_an_image_size_may_be_of_any_kind_of_whole_numbers(size, tmp_path):
    encoder = vit(image_size=size)
    save_encoder(encoder, tmp_path / "encoder.pt")
    assert load_encoder(tmp_path / "encoder.pt").grid == encoder.grid
    assert encoder.grid in ((2, 2), (2, 3))


@pytest.mark.parametrize("size", ["8", 8.0, (8,), (8, 8, 8), (8, -8), 0, None, (8, "8"), ((8, 8), 8)])
def test_an_image_size_that_is_none_is_refused(size):
    with pytest.raises(
        UserError, match=r"image size .* makes no sense; expected a side, or \(height, width\), in pixels"
    ):
        vit(image_size=size)


def test_a_field_that_no_file_can_hold_is_refused_where_it_is_given(tmp_path):
    class Wrapped(Encoder):
        def __init__(self, model=None, mean=(0.0,) * 3, std=(1.0,) * 3):
            super().__init__(mean, std, model=model)

    with pytest.raises(
        UserError, match=r"field model is a torch\.nn\.modules\.linear\.Linear, which a file of weights cannot"
    ):
        Wrapped(torch.nn.Linear(1, 1))
    encoder = Wrapped()
    encoder.fields["model"] = {1, 2}  # later
    with pytest.raises(UserError, match="field model is a set, which a file of weights cannot"):
        save_encoder(encoder, tmp_path / "encoder.pt")
    assert not (tmp_path / "encoder.pt").exists()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"mean": (0.5, 0.5)}, "mean (0.5, 0.5) makes no sense; expected three numbers, one a channel"),
        ({"mean": 0.5}, "mean 0.5 makes no sense; expected three numbers, one a channel"),
        ({"mean": (0.5, np.nan, 0.5)}, "mean (0.5, nan, 0.5) makes no sense; expected three numbers, one a channel"),
        ({"mean": "abc"}, "mean abc makes no sense; expected three numbers, one a channel"),
        ({"std": (1, 1, 0)}, "std (1, 1, 0) makes no sense; expected three numbers above 0, one a channel"),
        ({"std": (1, -1, 1)}, "std (1, -1, 1) makes no sense; expected three numbers above 0, one a channel"),
        (
            {"std": np.ones((3, 1))},
            "std ((1.0,), (1.0,), (1.0,)) makes no sense; expected three numbers above 0, one a",
        ),
    ],
)
def test_statistics_that_are_none_are_refused(fields, text):
    with pytest.raises(UserError, match=re.escape(text)):
        vit(**fields)


# --- one class a name ------------------------------------------------------------------------------------------------


def test_a_second_class_of_a_name_is_refused_and_the_first_stays():
    with pytest.raises(
        UserError, match=r"there is an encoder ViT in common already; give the one in test_encoders another"
    ):

        class ViT(Encoder):
            pass

    assert Encoder.kinds["ViT"] is common.ViT


def test_a_class_may_be_read_again(tmp_path, monkeypatch):
    """By reload, as a program and as a module, and in a cell of a notebook that is run twice."""
    text = "from plumbing.encoders import Encoder\n\n\nclass Again(Encoder):\n    pass\n"
    (tmp_path / "again_encoder.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("again_encoder")
    first = module.Again
    assert importlib.reload(module).Again is Encoder.kinds["Again"] is not first
    with mock.patch.dict("sys.modules", again_program=mock.Mock(__file__=module.__file__)):
        run_as("again_program", text)
    assert Encoder.kinds["Again"].__module__ == "again_program"
    cell = "from plumbing.encoders import Encoder\nclass Cell(Encoder): pass"
    for _ in range(2):
        run_as("notebook_cell", cell)
    with pytest.raises(UserError, match="there is an encoder Cell in notebook_cell already"):
        run_as("notebook_other", cell)


def run_as(module, text):
    exec(text, {"__name__": module})  # noqa: S102 (as a notebook does)


# --- what was saved is read back -------------------------------------------------------------------------------------


class Forgetful(Encoder):
    """It does not hand its width on."""

    def __init__(self, width=1, mean=(0.0,) * 3, std=(1.0,) * 3):
        super().__init__(mean, std)
        self.scale = torch.nn.Parameter(torch.ones(width))


class Renaming(Encoder):
    def __init__(self, width=1, mean=(0.0,) * 3, std=(1.0,) * 3):
        super().__init__(mean, std, breadth=width)


class Doubling(Encoder):
    def __init__(self, width=1, mean=(0.0,) * 3, std=(1.0,) * 3):
        super().__init__(mean, std, width=2 * width)


@pytest.mark.parametrize(
    ("encoder", "text"),
    [
        (
            functools.partial(Forgetful, 2),
            "does not fit this version (Error(s) in loading state_dict for Forgetful: size",
        ),
        (Renaming, "does not fit this version (Renaming.__init__() got an unexpected keyword argument 'breadth')"),
        (Doubling, "is rebuilt with the fields {'width': 4,"),
    ],
)
def test_an_encoder_that_cannot_be_rebuilt_is_found_when_it_is_saved(encoder, text, tmp_path):
    encoder = encoder()
    Encoder.kinds[type(encoder).__name__] = type(encoder)
    save_encoder(encoder, tmp_path / "encoder.pt")
    with pytest.raises(UserError) as caught:
        check_encoder(tmp_path / "encoder.pt")
    assert text in str(caught.value)
    hint = f"; {type(encoder).__name__} must hand each argument of its __init__ on to that of Encoder, by its name"
    assert str(caught.value).endswith(hint) and "\n" not in str(caught.value)


def test_reading_back_draws_no_random_number_and_lets_other_modules_pass(tmp_path):
    save_encoder(vit(), tmp_path / "encoder.pt")
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    check_encoder(tmp_path / "encoder.pt")
    assert torch.equal(torch.rand(4), want)
    save_encoder(torch.nn.Linear(2, 2), tmp_path / "encoder.pt")
    check_encoder(tmp_path / "encoder.pt")


# --- which images an encoder takes -----------------------------------------------------------------------------------


@functools.cache
def encoders():
    """A small one of each kind, for images of 8 x 8, or of 32 x 32."""
    small = {"token_dim": 16, "head": 32, "rows": NARROW_ROWS}
    with mock.patch.dict(common.MOBILE_FORMERS, micro=small):
        former = common.MobileFormer("micro")
    convnext = ebm_pretrain.ConvNeXt(dims=(8, 16), depths=(1, 1), stem=4)
    swin = ebm_pretrain.Swin(dim=8, depths=(1, 1), heads=(1, 2), window=2, stem=4)
    return {"vit": (vit().eval(), 8), **{type(e).__name__: (e.eval(), 32) for e in (former, convnext, swin)}}


@pytest.mark.parametrize("name", ["vit", "MobileFormer", "ConvNeXt", "Swin"])
def test_every_encoder_refuses_images_of_a_wrong_kind_or_shape_by_one_line(name):
    encoder, side = encoders()[name]
    images = rand(2, 3, side, side)
    assert encoder(images).shape[0] == 2 and encoder(images.bfloat16()).shape[0] == 2
    whole = (255 * images).byte()
    for wrong, text in (
        (whole, r"images are uint8; expected floats in \[0, 1\]: images\.float\(\) / 255$"),
        (whole.long(), r"images are int64; expected floats in \[0, 1\]: a float tensor \(B, 3, H, W\)$"),
        (images > 0.5, "images are bool; expected floats"),
        (images.numpy(), "images are ndarray; expected floats"),
        (
            images[0],
            rf"have the shape \(3, {side}, {side}\); expected \(B, 3, H, W\); add a batch dimension: images\[None\]$",
        ),
        (images[:, :1], rf"images have the shape \(2, 1, {side}, {side}\); expected \(B, 3, H, W\)$"),
        (rand(2, 4, side, side), rf"images have the shape \(2, 4, {side}, {side}\); expected \(B, 3, H, W\)$"),
        (images.movedim(1, -1), rf"images have the shape \(2, {side}, {side}, 3\); expected \(B, 3, H, W\)$"),
        (images[None], "images have the shape"),
    ):
        with pytest.raises(UserError, match=text):
            encoder(wrong)


def test_images_of_another_size_are_refused_with_what_to_do(tmp_path):
    own = r"this encoder was made for 8 x 8; load_encoder\(path, image_size="
    for images, text in (
        (rand(1, 3, 16, 16), rf"^images are 16 x 16, {own}16\) or resize$"),
        (rand(1, 3, 8, 12), rf"^images are 8 x 12, {own}\(8, 12\)\) or resize$"),
    ):
        with pytest.raises(UserError, match=text):
            vit()(images)
        with pytest.raises(UserError, match=text):
            vit().embed(images)
    with pytest.raises(UserError, match="^images are 4 x 16, this encoder needs 8 x 8 or more; resize$"):
        encoders()["ConvNeXt"][0](rand(1, 3, 4, 16))
    with pytest.raises(
        UserError, match="^images are 32 x 36, this encoder needs sides that are multiples of 8; resize$"
    ):
        encoders()["Swin"][0](rand(1, 3, 32, 36))
    assert encoders()["ConvNeXt"][0](rand(1, 3, 9, 30)).shape == (1, 16, 1, 3)  # any larger one will do
    assert encoders()["MobileFormer"][0](rand(1, 3, 30, 17)).shape == (1, 32, 2, 2)


def test_checks_of_images_are_outside_of_what_is_compiled_and_transformed():
    encoder, images = vit(), rand(4, 3, 8, 8)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(encoder, backend=count, fullgraph=True)
    torch.testing.assert_close(compiled(images), encoder(images))
    assert len(graphs) == 1
    each = torch.func.vmap(lambda image: encoder.embed(image[None])[0])(images)
    torch.testing.assert_close(each, encoder.embed(images))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (30, "image size 30 x 30 is not a multiple of the patch size 4"),
        (-8, "image size -8 makes no sense"),
        ("16", "image size '16' makes no sense"),
        ((8, 8, 8), "image size (8, 8, 8) makes no sense"),
        (10**6, "image size 1000000 x 1000000 is too large for a patch size of 4"),
    ],
)
def test_a_size_that_cannot_be_is_refused_at_load(size, text, tmp_path):
    save_encoder(vit(), tmp_path / "encoder.pt")
    with pytest.raises(UserError, match=f"^{re.escape(text)}"):
        load_encoder(tmp_path / "encoder.pt", image_size=size)


def test_encoders_of_any_size_are_loaded_for_one_that_they_take(tmp_path):
    path = tmp_path / "encoder.pt"
    save_encoder(encoders()["Swin"][0], path)
    assert load_encoder(path, image_size=64).fields == encoders()["Swin"][0].fields
    with pytest.raises(UserError, match="^images are 30 x 30, this encoder needs sides that are multiples of 8"):
        load_encoder(path, image_size=30)
    save_encoder(vit(), path)
    assert load_encoder(path, image_size=(np.int64(8), 16)).grid == (2, 4)


# --- damaged files ---------------------------------------------------------------------------------------------------

ODD = [None, True, -1, 0, 1, 2, 10**6, 10**9, 0.5, 1e300, float("nan"), float("inf"), "", "8", b"8", (), (8,), (8, 8)]
ODD += [(0.5, 0.5), (0.5, 0.5, 0.0), (1, -1, 1), [8, 8], {}, {"a": 1}, torch.ones(3), torch.ones(()), 1j, 10**30]
ODD_WEIGHTS = [torch.full((2,), float("nan")), torch.zeros(1).expand(10**9), torch.ones(16, 16, dtype=torch.complex64)]
ODD_WEIGHTS += [torch.zeros(0), torch.ones(3, dtype=torch.int8), torch.empty(9, device="meta"), *ODD]
HUGE = [("depth", 10**6), ("mlp_ratio", 1e6), ("dim", 10**6), ("image_size", 10**9), ("image_size", 40_000)]


def damaged(state: dict, draw: random.Random) -> dict:
    """One or two edits of what an encoder.pt holds."""
    state = copy.copy(state) | {"fields": dict(state["fields"]), "weights": dict(state["weights"])}
    for _ in range(draw.randint(1, 2)):
        fields, weights, what = state.get("fields"), state.get("weights"), draw.randrange(9)
        if what == 0:
            part = draw.choice(["kind", "fields", "weights"])
            state |= {part: draw.choice([*ODD, "MobileFormer", "Swin", "ConvNeXt", ["ViT"], list(state)])}
        elif what == 1:
            state.pop(draw.choice(["kind", "fields", "weights"]), None)
        elif what == 2 and isinstance(fields, dict) and fields:
            fields |= dict([draw.choice(HUGE)])
        elif what <= 4 and isinstance(fields, dict) and fields:
            fields[draw.choice(list(fields))] = draw.choice(ODD)
        elif what == 5 and isinstance(fields, dict) and fields:
            fields.pop(draw.choice(list(fields)))
        elif what == 6 and isinstance(fields, dict):
            fields[draw.choice(["extra", 3, None])] = draw.choice(ODD)
        elif isinstance(weights, dict) and weights:
            name = draw.choice(list(weights))
            value = weights.pop(name) if draw.random() < 0.3 else weights[name]
            if isinstance(value, torch.Tensor):
                changed = [
                    value.half(),
                    value.double(),
                    value.to(torch.int8),
                    value[:1],
                    value.flip(0).t() if value.ndim == 2 else value[None],
                    value * float("nan"),
                ]
                weights[draw.choice([name, name, "extra", 3])] = draw.choice([*changed, *ODD_WEIGHTS])
    return state


def test_a_damaged_file_loads_or_is_refused_and_takes_no_more_than_it_holds(tmp_path):
    encoder, path, draw, loaded = vit(), tmp_path / "encoder.pt", random.Random(0), 0
    save_encoder(encoder, path)
    sound = torch.load(path, weights_only=True)
    for _ in range(250):
        torch.save(damaged(sound, draw), path)
        try:
            load_encoder(path)
            loaded += 1
        except UserError as error:
            assert "\n" not in str(error) and str(error).startswith(str(path)) and len(str(error)) < 600
    assert 10 < loaded < 125


@pytest.mark.parametrize(("field", "value"), HUGE)
def test_a_file_cannot_ask_for_more_weights_than_it_has_bytes(field, value, tmp_path, monkeypatch):
    save_encoder(vit(), tmp_path / "encoder.pt")
    state = torch.load(tmp_path / "encoder.pt", weights_only=True)
    state["fields"][field] = value
    torch.save(state, tmp_path / "encoder.pt")
    made = []
    monkeypatch.setattr(common, "sincos_positions", lambda *sizes: made.append(sizes) or torch.zeros(1))
    drawn = mock.Mock(side_effect=torch.nn.init.kaiming_uniform_)
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", drawn)
    with pytest.raises(UserError, match="does not fit this version"):
        load_encoder(tmp_path / "encoder.pt")
    assert not made  # given up before
    assert all(call.args[0].numel() < 10**6 for call in drawn.call_args_list)  # no large one was ever touched
    assert len(drawn.call_args_list) < 200


def test_learned_positions_are_saved_and_have_one_size_of_images(tmp_path):
    encoder, images, path = vit(learned_positions=True, **STATISTICS), rand(2, 3, 8, 8), tmp_path / "encoder.pt"
    save_encoder(encoder, path)
    check_encoder(path)
    assert torch.equal(load_encoder(path)(images), encoder(images))
    assert torch.equal(load_encoder(path, image_size=8)(images), encoder(images))
    with pytest.raises(UserError, match="has learned positions, none for 16; they are of 8 pixels"):
        load_encoder(path, image_size=16)


# --- timm's names ----------------------------------------------------------------------------------------------------


def test_to_timm_has_the_names_and_shapes_of_timms_transformer():
    """Its patches are a convolution, and its positions begin with one for the CLS token."""
    encoder, images = vit(), rand(2, 3, 8, 8)
    weights = to_timm(encoder)
    own = encoder.state_dict()
    assert weights.keys() == own.keys() | {"pos_embed"}
    assert weights["pos_embed"].shape == (1, 5, 16) and not weights["pos_embed"][0, 0].any()
    convolved = F.conv2d(images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=4)
    tokens = convolved.flatten(2).transpose(1, 2) + weights["pos_embed"][:, 1:]
    torch.testing.assert_close(tokens, encoder.embed(images))
    changed = {"patch_embed.proj.weight", "pos_embed"}
    assert all(torch.equal(weights[name], own[name]) for name in own.keys() - changed)
