"""Features as they are: neighbours, linear probes on features that are kept, clusters."""

import dataclasses
import math
import types

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from make import generator, randn, seeds, settings_for, striped, subject_of, tiny_magma, vit

import common
from plumbing.errors import UserError
from plumbing.images import BatchPlan
from plumbing.probes import labelled, ridge_accuracy
from protocols import frozen, rows, training
from protocols.frozen import class_cosines, davies_bouldin, fit_on_features, run_clusters, run_knn, run_linear
from protocols.heads import LinearHeads, accuracies, make_head
from protocols.rows import load_method
from protocols.settings import Config
from protocols.training import run_protocol

# --- neighbours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "right"), [("euclidean", 0.0), ("cosine", 100.0)])
def test_knn_has_two_metrics(metric, right):
    """Bank vectors whose nearest neighbour by distance is not the nearest by angle."""
    subject = subject_of(None)
    subject.kept = {
        ("train", ""): (torch.tensor([[1.0, 0.0], [10.0, 10.0]]), torch.tensor([0, 1])),
        ("test", ""): (torch.tensor([[1.0, 0.9]]), torch.tensor([1])),
    }
    assert run_knn(subject, Config(image_size=8, k=1, metric=metric))["knn"] == right


def test_all_training_images_may_vote_and_no_more():
    subject = subject_of(None)
    assert (Config(image_size=8).k, Config(image_size=8).metric) == (10, "euclidean")  # MAGMA, section 5
    assert run_knn(subject, Config(image_size=8, k=96))["knn"] == pytest.approx(100 / 3)  # the lowest class wins a tie
    with pytest.raises(UserError, match="--k 97 is more than the 96 training images that could be neighbours"):
        run_knn(subject, Config(image_size=8, k=97))


# --- linear probes ---------------------------------------------------------------------------------------------------


def test_linear_heads_side_by_side_train_as_each_would_alone():
    features, labels = randn(60, 5, dtype=torch.float32), torch.arange(60) % 3
    fields = {"optimizer": "sgd", "epochs": 4, "batch_size": 20, "warmup_epochs": 1, "batchnorm": True, "image_size": 8}
    several = Config(**fields, base_lr=0.5, base_lrs=(0.1, 3.0))
    torch.manual_seed(0)
    heads = LinearHeads(5, 3, 2, batchnorm=True)
    alone = [LinearHeads(5, 3, 1, batchnorm=True) for _ in range(2)]
    for head, layer in zip(alone, heads.layers, strict=True):
        head.layers[0].load_state_dict(layer.state_dict())
    fit_on_features(heads, features, labels, 3, several)
    for head, layer, rate in zip(alone, heads.layers, several.base_lrs, strict=True):
        fit_on_features(head, features, labels, 3, Config(**fields, base_lr=rate))
        torch.testing.assert_close(head.layers[0].weight, layer.weight)
    assert not torch.allclose(heads.layers[0].weight, heads.layers[1].weight)
    mean = heads.train().norm(features).mean(dim=0)
    torch.testing.assert_close(mean, torch.zeros(5), atol=1e-5, rtol=0)


def test_linear_probe_learns_what_is_linear():
    features = randn(400, 6, dtype=torch.float32)
    labels = (features @ randn(6, 4, seed=1, dtype=torch.float32)).argmax(dim=1)
    torch.manual_seed(0)
    head = LinearHeads(6, 4)
    fields = {"epochs": 60, "batch_size": 256, "milestones": (40, 50), "warmup_epochs": 0, "image_size": 8}
    fields |= {"weight_decay": 0.0}
    fit_on_features(head, features, labels, 4, Config(optimizer="sgd", base_lr=0.1, **fields))
    assert accuracies(head(features), labels)[0] > 95


@pytest.mark.parametrize("batchnorm", [False, True])
def test_cached_linear_probe_equals_one_that_encodes_in_every_epoch(batchnorm, tmp_path, monkeypatch):
    fields = {"epochs": 3, "batch_size": 32, "smoothing": 0.3, "batchnorm": batchnorm}
    fields |= {"crop_min": 1.0, "flip": 0.0}  # nothing random about the images
    make, heads, out = frozen.make_head, [], []
    for room in (frozen, training):
        monkeypatch.setattr(room, "make_head", lambda *args, **more: heads.append(make(*args, **more)) or heads[-1])
    test = striped(48, seed=1)
    test = dataclasses.replace(test, images=test.images[test.labels == 0], labels=test.labels[test.labels == 0])
    for cache in (True, False):
        subject = dataclasses.replace(subject_of(vit(depth=3)), test=test)  # of one class: a batch's norm would tell it
        found = run_protocol("linear", subject, settings_for("linear", tmp_path, cache=cache, **fields))
        out.append((found, heads[-1].layers[0].weight.detach()))
    assert len(heads) == 2  # one of each room
    assert out[0][0] == out[1][0]
    torch.testing.assert_close(out[0][1], out[1][1], rtol=1e-4, atol=1e-6)
    assert (tmp_path / "linear-stripes" / "log.jsonl").exists()


def test_a_diverging_head_leaves_the_others_alone(tmp_path):
    subject, fields = subject_of(vit(depth=3)), {"epochs": 9, "batch_size": 32}
    alone = run_linear(subject, settings_for("linear", tmp_path, base_lrs=(0.1, 0.2), **fields))
    found = run_linear(subject, settings_for("linear", tmp_path, base_lrs=(0.1, 1e38), **fields))
    assert found["linear 0.1"] == alone["linear 0.1"]
    assert math.isnan(found["linear 1e+38"])


@pytest.mark.parametrize("base_lrs", [(), (0.1, 0.7)])
def test_linear_heads_are_trained_by_plain_gradient_descent(base_lrs):
    """Against softmax regression by hand: momentum, weight decay, the batches of the plan and the rate of each step."""
    features, labels, classes = randn(50, 4), torch.arange(50) % 3, 3
    fields = {"optimizer": "sgd", "momentum": 0.6, "weight_decay": 0.2, "smoothing": 0.3, "epochs": 3, "batch_size": 20}
    config = Config(**fields, warmup_epochs=1, base_lr=0.5, base_lrs=base_lrs, image_size=8)
    head = make_head("linear", 4, classes, config).double()
    slow = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in head.layers]
    fit_on_features(head, features, labels, classes, config)
    plan = BatchPlan(50, config)
    for layer, rate, (weight, bias) in zip(head.layers, base_lrs or (0.5,), slow, strict=True):
        past = [torch.zeros_like(weight), torch.zeros_like(bias)]
        for epoch in range(3):
            for step, (index,) in enumerate(plan.draw(epoch)):
                x, truth = features[index], torch.full((20, classes), 0.1, dtype=torch.float64)
                truth[range(20), labels[index]] += 0.7
                error = ((x @ weight.T + bias).softmax(dim=1) - truth) / 20
                lr = common.learning_rate(2 * epoch + step, 2, config) * rate / 0.5
                past = [0.6 * past[0] + error.T @ x + 0.2 * weight, 0.6 * past[1] + error.sum(dim=0)]  # matrices decay
                weight, bias = weight - lr * past[0], bias - lr * past[1]
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(layer.bias.detach(), bias, rtol=1e-6, atol=1e-7)


def test_the_linear_result_of_pixels_is_ridge_regression_on_the_training_images():
    """Labels that pixels do not tell: what is learned by heart on training images is of no use on test images."""
    subject = subject_of(None, "pixels")
    for data in (subject.train, subject.test):
        data.images = torch.randint(256, data.images.shape, dtype=torch.uint8, generator=generator(len(data)))
    train, test = (data.images.flatten(1) / 255 for data in (subject.train, subject.test))
    expected = ridge_accuracy(train, subject.train.labels, test, subject.test.labels, 3)
    assert run_linear(subject, Config(image_size=8))["linear"] == expected < 70
    assert run_knn(subject, Config(image_size=8, k=5))["knn"] == reference.knn_accuracy(
        train, subject.train.labels, test, subject.test.labels, 5
    )


@pytest.mark.parametrize("name", ["pixels", "trained"])
def test_only_raw_pixels_are_limited_to_twenty_thousand_images(name, monkeypatch):
    subject, asked = subject_of(None if name == "pixels" else vit(), name), []
    monkeypatch.setattr(rows, "labelled", lambda data, most: asked.append(most) or labelled(data, most))
    subject.features("train", Config(image_size=8))
    subject.features("test", Config(image_size=8, probe_images=30))
    assert asked == [20_000 if name == "pixels" else 0, 30]


@pytest.mark.parametrize("own", ["cls", "mean"])
def test_features_are_the_encoders_own_in_the_precision_of_the_settings(own):
    """With no --pool, those that it was trained to give; by --amp bf16 those of half the digits."""
    subject = subject_of(vit(pool=own))
    images = subject.test.images / 255
    with torch.no_grad():
        tokens = subject.encoder.encode(subject.encoder.embed(images))
        with torch.autocast("cpu", torch.bfloat16):
            halved = subject.encoder(images).float()
    expected = tokens[:, 0] if own == "cls" else tokens[:, 1:].mean(dim=1)
    subject.features("test", Config(image_size=8, amp="off", pool="mean" if own == "cls" else "cls"))
    torch.testing.assert_close(subject.features("test", Config(image_size=8, amp="off"))[0], expected)
    subject.kept.clear()
    found, _ = subject.features("test", Config(image_size=8, amp="bf16"))
    torch.testing.assert_close(found.float(), halved, rtol=0, atol=1e-6)
    assert not torch.allclose(found.float(), expected, rtol=0, atol=1e-5)


def test_eight_classes_at_most_are_drawn_and_without_any_the_first_eight():
    subject = subject_of(None)
    subject.test = dataclasses.replace(striped(30), labels=torch.full((30,), -1), classes=[])
    assert torch.equal(subject.one_a_class(Config(image_size=8)), subject.test.images[:8] / 255)
    subject.test = dataclasses.replace(striped(30), labels=torch.arange(30) % 10, classes=list("abcdefghij"))
    assert torch.equal(subject.one_a_class(Config(image_size=8)), subject.test.images[:8] / 255)


# --- clusters --------------------------------------------------------------------------------------------------------


@given(st.integers(2, 5), st.integers(2, 5), st.integers(1, 6), seeds)
def test_davies_bouldin_matches_naive_loop(classes, each, width, seed):
    """Davies and Bouldin 1979, as MAGMA's Fig. 4 uses it."""
    features = randn(classes * each, width, seed=seed)
    labels = 3 * torch.arange(classes).repeat(each) + 1  # class numbers with gaps
    slow = reference.davies_bouldin(features, labels)
    torch.testing.assert_close(davies_bouldin(features, labels), slow, rtol=1e-9, atol=1e-12)


def test_davies_bouldin_is_small_for_tight_classes_and_large_for_wide_ones():
    """Davies and Bouldin 1979."""
    labels = torch.arange(3).repeat(20)
    centres = 100 * torch.eye(3, dtype=torch.float64)[labels]
    assert davies_bouldin(centres + randn(60, 3), labels) < 0.05
    assert davies_bouldin(centres + 50 * randn(60, 3), labels) > 0.5


@given(st.floats(0.1, 10), st.floats(-10, 10), seeds)
def test_davies_bouldin_ignores_scale_and_shift(scale, shift, seed):
    """Davies and Bouldin 1979: a ratio of distances."""
    features, labels = randn(30, 3, seed=seed), torch.arange(3).repeat(10)
    once = davies_bouldin(features, labels)
    assert davies_bouldin(scale * features + shift, labels) == pytest.approx(once, rel=1e-9)


@given(st.integers(2, 4), st.integers(2, 4), st.integers(1, 6), seeds)
def test_class_cosines_match_naive_loop_over_pairs(classes, each, width, seed):
    """MLO-MAE, Appendix C.3 and Table 13."""
    features = randn(classes * each + 1, width, seed=seed)
    labels = torch.cat([torch.arange(classes).repeat(each), torch.tensor([0])])  # classes of different size
    slow = reference.class_cosines(features, labels)
    torch.testing.assert_close(class_cosines(features, labels), slow, rtol=1e-9, atol=1e-12)


def test_the_gap_of_cosines_is_that_of_centred_features():
    """MLO-MAE, Table 13, after the mean of all features is taken off."""
    features, labels = 3 + randn(40, 8), torch.arange(40) % 4
    found = run_clusters(types.SimpleNamespace(features=lambda *_: (features, labels)), None)
    same, different = reference.class_cosines(features - features.mean(dim=0), labels)
    assert found["cosine_gap"] == pytest.approx(float(same - different), abs=1e-6)
    assert found["cosine_ratio"] != pytest.approx(float(same / different), rel=0.1)


def test_the_table_of_clusters_has_each_figure_under_its_name():
    """Against loops over images and pairs: MAGMA's Fig. 4, MLO-MAE's Table 13."""
    features, labels = 2 + randn(24, 6) * torch.linspace(0.2, 3, 24)[:, None], torch.arange(24) % 3
    found = run_clusters(types.SimpleNamespace(features=lambda *_: (features.float(), labels)), None)
    same, other = reference.class_cosines(features.float().double(), labels)
    centred = reference.class_cosines(features.float().double() - features.float().double().mean(dim=0), labels)
    expected = {"davies_bouldin": reference.davies_bouldin(features.float().double(), labels)}
    expected |= {"same_class_cosine": same, "other_class_cosine": other, "cosine_ratio": same / other}
    expected["cosine_gap"] = centred[0] - centred[1]
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-6)


# --- a dash and a reason ---------------------------------------------------------------------------------------------

RUNS = {"knn": run_knn, "linear": run_linear, "clusters": run_clusters}


@pytest.mark.parametrize("name", ["trained", "pixels"])
@pytest.mark.parametrize("protocol", RUNS)
def test_features_that_are_not_finite_have_no_result_and_a_reason(protocol, name, tmp_path, capsys):
    subject, config = subject_of(None if name == "pixels" else vit(), name), settings_for(protocol, tmp_path, epochs=1)
    for split in ("train", "test"):
        subject.features(split, config)[0][[2, 7], 3] = math.nan
    capsys.readouterr()
    found = RUNS[protocol](subject, config)
    assert found and all(math.isnan(value) for value in found.values())
    titles = {"knn": "kNN", "linear": "linear", "clusters": "Davies-Bouldin, same_class_cosine, other_class_cosine"}
    counts = "2 of 48" if protocol == "clusters" else "4 of 144"
    row = {"trained": "trained encoder", "pixels": "raw pixels"}[name]
    text = f"note: {row}: features are not finite ({counts} images), so no {titles[protocol]}"
    shown = capsys.readouterr().out
    assert shown.startswith(text) and shown.count("\n") == 1


def test_every_learning_rate_has_its_dash(tmp_path, capsys):
    subject, config = subject_of(vit()), settings_for("linear", tmp_path, epochs=1, base_lrs=(0.1, 0.2))
    subject.features("test", config)[0][0] = math.inf
    found = run_linear(subject, config)
    assert found.keys() == {"linear 0.1", "linear 0.2"} and all(math.isnan(value) for value in found.values())
    assert "so no linear 0.1, linear 0.2\n" in capsys.readouterr().out


def test_a_head_that_diverged_says_so(tmp_path, capsys):
    config = settings_for("linear", tmp_path, base_lrs=(0.1, 1e38), epochs=9, batch_size=32)
    capsys.readouterr()
    run_linear(subject_of(vit(depth=3)), config)
    want = "note: linear 1e+38: the head diverged, so it has no accuracy; lower its learning rate\n"
    assert capsys.readouterr().out == want


def test_weights_that_are_not_finite_train_no_head(tmp_path, capsys):
    encoder = vit()
    encoder.norm.weight.data[0] = math.nan
    for protocol in ("finetune", "tran1"):
        config = settings_for(protocol, tmp_path, epochs=1)
        capsys.readouterr()
        found = run_protocol(protocol, subject_of(encoder), config)
        assert list(found) == [protocol] and math.isnan(found[protocol])
        text = f"note: trained encoder: its weights are not finite, so no {protocol}\n"
        assert capsys.readouterr().out == text
    assert not list(tmp_path.iterdir())  # no run was begun


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_neighbours_of_huge_and_tiny_features_are_those_of_others(metric, scale, tmp_path):
    subject, config = subject_of(vit()), settings_for("knn", tmp_path, metric=metric)
    want = run_knn(subject, config)
    for split in ("train", "test"):
        subject.features(split, config)[0].mul_(scale)
    assert run_knn(subject, config) == want


def test_clusters_of_huge_features_are_those_of_others_and_one_centre_has_no_index(capsys):
    features, labels = 3 + randn(40, 8, dtype=torch.float32), torch.arange(40) % 4
    subject = types.SimpleNamespace(name="trained", features=lambda *_: (features, labels))
    want = run_clusters(subject, None)
    features = features * 1e37
    assert run_clusters(subject, None) == pytest.approx(want, rel=1e-5)
    features = torch.zeros(40, 8)
    found = run_clusters(subject, None)
    assert math.isnan(found["davies_bouldin"]) and math.isnan(found["cosine_ratio"]) and found["cosine_gap"] == 0
    assert capsys.readouterr().out.splitlines() == [
        "note: trained encoder: classes have the same centre, so no Davies-Bouldin",
        "note: trained encoder: the mean cosine of two classes is 0, so no cosine ratio",
    ]


def test_a_batch_norm_of_one_image_is_refused(tmp_path):
    subject = dataclasses.replace(subject_of(vit()), train=striped(1))
    with pytest.raises(UserError, match="--batchnorm takes statistics of a batch: it needs two training images in one"):
        run_linear(subject, settings_for("linear", tmp_path, batchnorm=True, epochs=1))
    assert run_linear(subject, settings_for("linear", tmp_path, epochs=1))["linear"] >= 0


# --- damaged run files -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def magma_run(tmp_path_factory):
    """A folder with what `load_method` reads of a run of MAGMA, and its settings as config.json has them."""
    folder, method = tmp_path_factory.mktemp("runs") / "magma", tiny_magma()
    folder.mkdir()
    torch.save({"weights": method.state_dict()}, folder / "last.pt")
    return folder, {"method": "magma"} | {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(method.config).items()
    }


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        ({"method": "os"}, "has no config.json that names its method; choose a run of train.py"),
        ({"method": ["magma"]}, "has no config.json that names its method; choose a run of train.py"),
        ({"model": "vit_tiny"}, "do not fit each other (Error(s) in loading state_dict for Magma: "),
        ({"mask_ratio": "half"}, "do not fit each other ("),
        ({"projector_dim": None}, "do not fit each other ("),
        ({"layers": 3}, "do not fit each other ("),
        ({"model": "vit_micr"}, "unknown --model 'vit_micr'; did you mean 'vit_micro'?"),
    ],
)
def test_settings_that_were_edited_are_refused_by_one_line(edit, text, magma_run):
    folder, known = magma_run
    assert load_method(folder, known, subject_of(None).test).name == "magma"
    with pytest.raises(UserError) as caught:
        load_method(folder, known | edit, subject_of(None).test)
    assert text in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "state", [{}, [], {"weights": 3}, {"weights": {3: 4}}, {"weights": {"encoder": torch.ones(1)}}]
)
def test_a_last_pt_that_holds_no_method_is_refused_by_one_line(state, magma_run, tmp_path):
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"^config\.json and last\.pt of .* do not fit each other \([^\n]*\)$"):
        load_method(tmp_path, magma_run[1], subject_of(None).test)


GOOD = {"origin": "", "data": "stripes", "images": 96, "batch_size": 32, "epochs": 2}


@pytest.mark.parametrize(
    "state",
    [
        *([], {}, {"identity": 3}, {"identity": GOOD | {"images": "many"}, "step": 6, "weights": {}}),
        *({"identity": GOOD | {"batch_size": 0}, "step": 6, "weights": {}}, {"identity": GOOD, "step": 6}),
    ],
)
def test_a_probe_to_start_from_that_is_none_is_passed_over(state, tmp_path, capsys):
    subject, config = subject_of(vit()), settings_for("finetune", tmp_path, epochs=1)
    head, path = torch.nn.Linear(2, 2), tmp_path / "tran1-stripes" / "last.pt"
    path.parent.mkdir()
    if isinstance(state, dict) and isinstance(state.get("identity"), dict):
        state = state | {"identity": state["identity"] | {"origin": training.digest(subject.encoder)}}
    torch.save(state, path)
    before = head.weight.clone()
    training.start_from_probe(head, "tran1", subject, config)
    assert "holds no finished probe of this encoder; --protocol tran1 makes one" in capsys.readouterr().out
    assert torch.equal(head.weight, before)


def test_a_probe_of_other_classes_is_no_start(tmp_path):
    subject, config = subject_of(vit()), settings_for("finetune", tmp_path, epochs=1)
    path = tmp_path / "tran1-stripes" / "last.pt"
    path.parent.mkdir()
    identity = GOOD | {"origin": training.digest(subject.encoder)}
    weights = {"head.weight": torch.ones(2, 2), "head.bias": torch.ones(2)}
    torch.save({"identity": identity, "step": 6, "weights": weights}, path)
    head = torch.nn.Linear(2, 2)
    training.start_from_probe(head, "tran1", subject, config)
    assert torch.equal(head.weight, weights["head.weight"])
    with pytest.raises(UserError, match=r"last\.pt does not fit \(.*\); remove its folder and make it anew$"):
        training.start_from_probe(torch.nn.Linear(2, 3), "tran1", subject, config)


def test_a_data_set_without_labels_is_told_by_one_line(tmp_path, capsys):
    hidden = dataclasses.replace(striped(48), labels=torch.full((48,), -1))
    for split in ("train", "test"):
        for protocol in ("knn", "linear") if split == "train" else RUNS:
            subject = dataclasses.replace(subject_of(vit()), **{split: hidden})
            found = RUNS[protocol](subject, settings_for(protocol, tmp_path, epochs=1))
            assert all(math.isnan(value) for value in found.values())
            kind = "training" if split == "train" else "test"
            assert f"note: trained encoder: no {kind} image has a label, so no " in capsys.readouterr().out
    with pytest.raises(UserError, match="no test image has a label"):
        subject.one_a_class(Config(image_size=8))
    method = training.Classifier("finetune", vit(), LinearHeads(16, 3), 3, settings_for("finetune", tmp_path, epochs=1))
    assert math.isnan(method.probe(None, hidden, hidden, settings_for("finetune", tmp_path))["accuracy"])
