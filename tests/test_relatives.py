"""What tells MixedAE the relatives of a patch."""

import math

import pytest
import torch
from make import shapes, subject_of, tiny_mixedae

from mixedae import homologous_contrastive, mix
from plumbing.errors import UserError
from protocols import relatives
from protocols.relatives import CASES, cases_of, contrast_floor, draw_relatives
from protocols.rows import Subject
from protocols.settings import Config

SMALL = Config(image_size=16, amp="off", seed=3)


def subject_for(method, count=8, name="trained"):
    data = shapes(count, 16)
    return Subject(name, method.encoder.eval(), data, data, torch.device("cpu"))


def test_no_tokens_have_a_lower_loss_than_the_floor():
    """At the corners of a regular simplex the loss is the floor; a hundred steps downhill do not get below it."""
    owners = torch.arange(12)[None] % 3
    corners = torch.eye(3, dtype=torch.float64) - 1 / 3
    floor = contrast_floor(12, 3, 0.25)
    assert float(homologous_contrastive(corners[owners], owners, 0.25)) == pytest.approx(floor)
    tokens = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(100):
        tokens = tokens.detach().requires_grad_()
        loss = homologous_contrastive(tokens, owners, 0.25)
        tokens = tokens - 3 * torch.autograd.grad(loss, tokens)[0]
    assert floor - 1e-9 <= loss.item() < floor + 0.01
    assert contrast_floor(64, 4, 0.25) == pytest.approx(math.log(15 + 48 * math.exp(-16 / 3)))
    assert contrast_floor(16, 1, 0.25) == pytest.approx(math.log(15))


def test_codes_of_others_change_what_is_encoded_and_nothing_else():
    """The tokens are those of images whose slots these are; the accuracy counts the slots that were given."""
    method = tiny_mixedae(segment_scale=2.0, segment_centred=True, images_per_group=4).eval()
    tokens = torch.randn(2, 16, method.encoder.dim, generator=torch.Generator().manual_seed(0))
    owners, codes = (torch.arange(16)[None].repeat(2, 1) // size % 4 for size in (1, 4))
    encoded, found = method.encode(tokens, owners, codes=codes)
    expected, of_codes = method.encode(tokens, codes)
    assert torch.equal(encoded, expected) and not torch.equal(encoded, method.encode(tokens, owners)[0])
    assert [a for a, _ in found] != [a for a, _ in of_codes]


def test_codes_that_drown_the_pictures_give_the_answer_alone():
    method = tiny_mixedae(segment_scale=1e3, segment_centred=True)
    found, floor = cases_of(method, subject_for(method), SMALL), contrast_floor(16, 2, 0.25)
    for case in ("as_trained", "one_picture", "drawn_by_code"):
        assert found[case][1] == pytest.approx(floor, abs=1e-2)
    for case in ("no_codes", "drawn_by_image"):
        assert found[case][1] > floor + 0.3


@torch.no_grad()
def test_each_case_is_what_it_says(monkeypatch):
    """Six images in batches of four and three: two mixtures and one, the seventh is left out; by the seed's draws."""
    method, data = tiny_mixedae(segment_centred=True, temperature=0.5).eval(), shapes(7, 16)
    subject = Subject("trained", method.encoder, data, data, torch.device("cpu"))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    pictures = data.images[order] / 255

    def batches(data, chosen, size):
        return [(data.images[part] / 255, None) for part in (chosen[:4], chosen[4:], chosen[:1])]

    monkeypatch.setattr(type(data), "plain_batches", batches)
    bare = tiny_mixedae(segment="off", temperature=0.5).eval()
    bare.load_state_dict(method.state_dict())
    expected = {case: [] for case in CASES}
    torch.manual_seed(3)
    for images in (pictures[:4], pictures[4:6]):
        owners, drawn = (method.draw_assignment(len(images) // 2) for _ in range(2))
        for i in range(len(images) // 2):
            tokens, a, b = method.encoder.embed(images[2 * i : 2 * i + 2]), owners[i : i + 1], drawn[i : i + 1]
            mixture, alone = mix(tokens[None], a), tokens[:1]
            told = {"as_trained": (method, mixture, a, a), "one_picture": (method, alone, a, a)}
            told |= {"no_codes": (bare, mixture, a, a), "drawn_by_image": (method, mixture, a, b)}
            for case, (one, x, by, codes) in (told | {"drawn_by_code": (method, mixture, b, b)}).items():
                encoded, found = one.encode(x, by, codes=codes)
                accuracy = sum(float(value) for value, _ in found) / len(found)
                expected[case].append((accuracy, float(homologous_contrastive(encoded[:, 1:], by, 0.5))))
    found = cases_of(method, subject, SMALL)
    for case, values in expected.items():
        means = [sum(column) / 3 for column in zip(*values, strict=True)]
        assert found[case] == pytest.approx(means, abs=1e-5), case
    assert method.config.segment == "every"


def test_rows_stand_beside_each_other(monkeypatch, capsys):
    """Trained and untrained, each with the weights of its own encoder; raw pixels have none."""
    method, other = tiny_mixedae(segment_centred=True), tiny_mixedae(segment_centred=True)
    with torch.no_grad():
        for parameter in other.encoder.parameters():
            parameter.mul_(1.5)
    subjects = [subject_for(method), subject_for(other, name="untrained"), subject_of(None, "pixels")]
    monkeypatch.setattr(relatives, "method_for", lambda *_: tiny_mixedae(segment_centred=True).eval())
    written, found = draw_relatives(None, {}, subjects, SMALL)
    assert written == [] and list(found) == ["trained", "untrained"]
    for row, one in zip(found.values(), (method, other), strict=True):
        expected = cases_of(one, subject_for(one), SMALL)
        assert row["homologous"] == expected["as_trained"][0] == row["case_as_trained_homologous"]
        assert row["case_no_codes_contrast"] == expected["no_codes"][1]
        assert row["case_floor"] == contrast_floor(16, 2, 0.25)
    assert found["trained"] != found["untrained"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["trained", "encoder", "homologous", "keys", "contrast"]
    assert lines[1].startswith("as in training") and f"{found['trained']['homologous']:.3f}" in lines[1]
    assert lines[-1].split()[-2:] == ["0.500", f"{contrast_floor(16, 2, 0.25):.3f}"]


@pytest.mark.parametrize("flags", [{"mode": "mae"}, {"attention": "global"}])
def test_a_run_without_homologous_attention_is_refused(flags, monkeypatch):
    method = tiny_mixedae(**flags)
    monkeypatch.setattr(relatives, "method_for", lambda *_: method)
    with pytest.raises(UserError, match="needs mixtures and homologous attention: this run has"):
        draw_relatives(None, {}, [subject_for(method)], SMALL)


def test_too_few_images_and_other_runs_are_refused(tmp_path):
    method = tiny_mixedae()
    with pytest.raises(UserError, match="1 test images do not make a mixture of 2"):
        cases_of(method, subject_for(method, 1), SMALL)
    with pytest.raises(UserError, match="looks into a run of mixedae"):
        draw_relatives(tmp_path, {"method": "magma"}, [subject_for(method)], SMALL)
