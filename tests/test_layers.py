"""Which neighbours images keep from block to block."""

import json
import math

import pytest
import torch
from make import MapEncoder, randn, shapes, subject_of, unlabelled, vit

import evaluate
from magma import affinity, printed_laplacian
from plumbing.encoders import save_encoder
from plumbing.errors import UserError
from plumbing.probes import effective_rank
from protocols import layers
from protocols.layers import blocks_of, counted, draw_layers, neighbours, shared
from protocols.run_folders import check_labels
from protocols.settings import Config


def nearest(z, k):
    """The sets of the k nearest other rows, one distance after the other."""
    z = z.double().tolist()
    return [
        set(sorted((j for j in range(len(z)) if j != i), key=lambda j, a=a: math.dist(a, z[j]))[:k])
        for i, a in enumerate(z)
    ]


def in_common(a, b, k):
    return sum(len(x & y) for x, y in zip(a, b, strict=True)) / (k * len(a))


def test_neighbours_are_the_nearest_others():
    z = 1e9 + randn(11, 3)  # a large mean takes no digit
    expected = nearest(z, 4)
    for chunk in (0, 3):
        assert [set(row) for row in neighbours(z, 4, chunk).tolist()] == expected


def test_what_is_shared_is_in_both_lists_in_any_order():
    assert shared(torch.tensor([[1, 2], [0, 2]]), torch.tensor([[2, 3], [2, 0]])) == 3 / 4


def test_the_term_counts_what_differs_between_neighbours_alone(monkeypatch):
    """Of what tells two far clusters apart a quarter (Eq. 4 is wide), and all of what the graph knows nothing of."""
    monkeypatch.setattr(layers, "GRAPH", 20)
    cluster = torch.arange(50) % 2
    earlier = 100.0 * cluster[:, None] + randn(50, 3)
    assert counted(cluster[:, None] + 7.0, earlier) < 0.3
    assert counted(randn(50, 4, seed=1) + 7, earlier) == pytest.approx(1, abs=0.2)
    monkeypatch.setattr(layers, "GRAPH", 64)
    y = randn(50, 4, seed=1)
    y = y - y.mean(dim=0)
    s = printed_laplacian(affinity(earlier))
    expected = sum(
        float((y[i] - s[i, j] * y[j]) @ y[i]) if i == j else -float(s[i, j] * y[i] @ y[j])
        for i in range(50)
        for j in range(50)
    )
    assert counted(y + 7, earlier) == pytest.approx(expected / float(y.square().sum()))


def test_each_block_has_its_neighbours_and_its_rank():
    """From the mean of the patches of each block's output, the CLS token left out, without any mask."""
    subject, config = subject_of(vit(depth=3, heads=1).double()), Config(image_size=8, k=4, amp="off", probe_images=20)
    with torch.no_grad():
        for i in (1, 2):  # or every block would have the same neighbours
            subject.encoder.blocks[i].mlp["fc2"].weight.mul_(100**i)
    subject.test.images = subject.test.images[:20]
    subject.test.labels = subject.test.labels[:20]
    images = subject.test.images.double() / 255
    subject.test.plain_batches = lambda chosen, size: [(images[chosen], subject.test.labels[chosen])]
    rows = blocks_of(subject, config)
    with torch.no_grad():
        hidden = subject.encoder.encode(subject.encoder.embed(images), hidden=True)[1]
    vectors = [block[:, 1:].mean(dim=1).float() for block in hidden]
    near = [nearest(layer, 4) for layer in vectors]
    assert [row["next"] for row in rows[:2]] == pytest.approx([in_common(near[i], near[i + 1], 4) for i in (0, 1)])
    assert [row["last"] for row in rows[:2]] == pytest.approx([in_common(near[i], near[2], 4) for i in (0, 1)])
    assert rows[0]["next"] != rows[0]["last"] and math.isnan(rows[2]["next"]) and math.isnan(rows[2]["last"])
    for row, layer in zip(rows, vectors, strict=True):
        centred = layer.double() - layer.double().mean(dim=0)
        assert row["rank"] == pytest.approx(effective_rank(layer))
        assert row["rank_centred"] == pytest.approx(effective_rank(centred))
        assert row["spread"] == pytest.approx(float(centred.square().sum(dim=1).mean().sqrt()))
    assert math.isnan(rows[0]["counted"]) and rows[2]["counted"] == pytest.approx(counted(vectors[2], vectors[1]))


def test_features_that_are_not_finite_have_no_neighbours(capsys):
    subject = subject_of(vit())
    with torch.no_grad():
        subject.encoder.blocks[0].mlp["fc2"].bias.fill_(math.nan)
    assert all(math.isnan(value) for row in blocks_of(subject, Config(image_size=8)) for value in row.values())
    assert "not finite" in capsys.readouterr().out


def test_what_layers_cannot_be_about(tmp_path):
    with pytest.raises(UserError, match="the blocks of a transformer; RUN holds a MapEncoder"):
        draw_layers("RUN", {}, [subject_of(MapEncoder())], Config(image_size=8, out=str(tmp_path)))
    with pytest.raises(UserError, match="--k 48 neighbours of 48 test images"):
        blocks_of(subject_of(vit()), Config(image_size=8, k=48))
    assert not list(tmp_path.iterdir())


def test_no_labels_are_needed():
    check_labels(["layers", "relatives"], unlabelled(4))


def test_a_run_is_shown_beside_its_untrained_encoder(tmp_path, monkeypatch, capsys):
    encoder = vit()
    with torch.no_grad():
        encoder.blocks[1].mlp["fc2"].weight.mul_(100)
    save_encoder(encoder, tmp_path / "encoder.pt")
    (tmp_path / "config.json").write_text('{"method": "magma", "data": "shapes"}')
    monkeypatch.setattr(evaluate, "load_data", lambda *_, **__: shapes())
    assert evaluate.main([str(tmp_path), "--protocol", "layers", "--untrained", "--pixels", "--k", "3"]) == 0
    shown = capsys.readouterr().out
    line = json.loads((tmp_path / "eval.jsonl").read_text())
    assert line["results"].keys() == {"trained", "untrained"}  # pixels have no blocks
    assert line["settings"]["amp"] == "off"  # half precision would shuffle neighbours
    trained, untrained = line["results"].values()
    assert trained != untrained and trained["neighbours_kept"] == trained["block_1_next"]
    assert trained["rank_of_last"] == trained["block_2_rank"]
    assert "untrained encoder: 3 nearest neighbours" in shown and f"{untrained['block_1_last']:.3f}" in shown
    assert shown.count("note: counted: the share of a block's variance that MAGMA's term counts") == 1
    assert "neighbours kept" in shown and "block_1" not in shown and "nan" not in shown
    report = (tmp_path / "report.html").read_text()
    assert (tmp_path / "layers" / "layers.png").exists() and "layers/layers.png" in report
