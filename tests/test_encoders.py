"""Encoders: what they carry, the register of their kinds, their files, and timm's names."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from make import rand, vit

from plumbing.encoders import Encoder, load_encoder, save_encoder, to_timm
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
