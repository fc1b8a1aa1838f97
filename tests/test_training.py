"""The protocols that encode each image anew: which run, what is trained, augmented, frozen, resumed and logged."""

import copy
import dataclasses

import pytest
import torch
from make import QUICK, MapEncoder, rand, settings_for, subject_of, vit

from plumbing.encoders import load_encoder
from plumbing.errors import UserError
from plumbing.files import load_checkpoint
from plumbing.run_files import read_log
from protocols import heads, training
from protocols.heads import LinearHeads, TransformerHead
from protocols.training import Classifier, applies, learn_positions, run_protocol


@pytest.mark.parametrize("kind", ["vit", "map"])
@pytest.mark.parametrize("protocol", ["knn", "linear", "tran1", "tran4", "finetune", "clusters"])
def test_protocols_work_on_tokens_and_on_maps(protocol, kind, tmp_path):
    torch.manual_seed(0)
    subject = subject_of(vit(depth=3) if kind == "vit" else MapEncoder())
    before, quick = copy.deepcopy(subject.encoder.state_dict()), {}
    if protocol in ("tran1", "tran4", "finetune"):
        quick = QUICK | ({"drop_path": 0.0} if kind == "map" else {})
    found = run_protocol(protocol, subject, settings_for(protocol, tmp_path, **quick))
    if protocol == "clusters":
        assert found["davies_bouldin"] > 0
    else:
        assert found[protocol] > (60 if protocol in ("knn", "linear") else 30)
    for name, value in subject.encoder.state_dict().items():  # no protocol changes what the next one judges
        assert torch.equal(value, before[name])


def test_a_map_has_no_path_to_drop(tmp_path):
    with pytest.raises(UserError, match="--drop-path needs a ViT, a Swin or a ConvNeXt; this encoder is none"):
        run_protocol("finetune", subject_of(MapEncoder()), settings_for("finetune", tmp_path, **QUICK))


# --- which rows ------------------------------------------------------------------------------------------------------


def test_a_network_from_random_weights_has_no_layer_decay(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(
        training, "train_classifier", lambda protocol, subject, config: rates.append(config.layer_decay) or {}
    )
    config = settings_for("finetune", tmp_path, scratch=True)
    subjects = [subject_of(vit(depth=3), name) for name in ("trained", "untrained")]
    for subject in subjects:
        run_protocol("finetune", subject, config)
    assert rates == [0.75, 1.0]
    assert [applies("finetune", subject, config) for subject in subjects] == [False, True]
    alone = [applies("knn", subject, config) for subject in subjects]
    assert alone == [True, False]  # the second subject is there for --scratch alone


# --- what is trained -------------------------------------------------------------------------------------------------


def test_classifier_freezes_the_encoder_and_trains_the_head(tmp_path):
    encoder, head = vit(depth=3), TransformerHead(16, 64, 1, 3)
    config = settings_for("tran1", tmp_path, **QUICK)
    method = Classifier("tran1", encoder, head, 3, config).train()
    assert not encoder.training
    torch.manual_seed(0)
    method(rand(6, 3, 8, 8), torch.arange(6) % 3)["loss"].backward()
    assert all(p.grad is None for p in encoder.parameters())
    assert all(p.grad is not None for p in head.parameters())
    grouped = [p for group in method.optimizer(config).param_groups for p in group["params"]]
    assert set(map(id, grouped)) == set(map(id, head.parameters()))


@pytest.mark.parametrize("probe_every", [0, 1])
def test_finetuning_trains_in_training_mode_and_is_judged_in_eval_mode(tmp_path, monkeypatch, probe_every):
    """Drop path, dropout and batch statistics act in training alone; encoders come in eval mode."""
    modes = {"forward": set(), "probe": set()}
    for name in modes:
        function = getattr(Classifier, name)
        spy = lambda self, *a, f=function, n=name, **k: modes[n].add(self.encoder.training) or f(self, *a, **k)
        monkeypatch.setattr(Classifier, name, spy)
    config = settings_for("finetune", tmp_path, **QUICK, probe_every=probe_every)
    run_protocol("finetune", subject_of(vit(depth=3)), config)
    assert modes == {"forward": {True}, "probe": {False}}


def test_finetuning_reaches_every_parameter_and_uses_every_augmentation(tmp_path, monkeypatch):
    config = settings_for("finetune", tmp_path, erase=0.5)
    method = Classifier("finetune", vit(depth=3), LinearHeads(16, 3), 3, config).train()
    called = []
    for room, name in [(training, n) for n in ("rand_augment", "random_erase", "mix_labels")] + [(heads, "drop_path")]:
        function = getattr(room, name)
        spy = lambda *args, f=function, n=name: called.append(n) or f(*args)
        monkeypatch.setattr(room, name, spy)
    torch.manual_seed(0)
    method(rand(6, 3, 8, 8), torch.arange(6) % 3)["loss"].backward()
    assert [name for name in called if name != "drop_path"] == ["rand_augment", "random_erase", "mix_labels"]
    assert called.count("drop_path") == 6
    assert all(p.grad is not None for p in method.parameters())


@pytest.mark.parametrize(("protocol", "std", "pool"), [("finetune", 2e-5, "mean"), ("linear", 0.01, "cls")])
def test_heads_start_as_in_maes_release(protocol, std, pool, tmp_path, monkeypatch):
    """2e-5 to fine-tune, 0.01 to probe; by the seed of the settings, whatever was drawn before. The feature is that of
    the recipe, or the encoder's own where it has none.
    """
    started = []

    def fit(method, *_):
        started.append(method.head.layers[0].weight.detach())
        assert method.encoder.pool == pool

    monkeypatch.setattr(training, "fit", fit)
    for seed, before in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(before)
        fields = {"batchnorm": False} if protocol == "linear" else {}
        config = settings_for(protocol, tmp_path, cache=False, seed=seed, head="linear", **fields)
        run_protocol(protocol, subject_of(vit(dim=128, pool="cls")), config)
    assert float(started[0].std()) == pytest.approx(std, rel=0.15)
    assert torch.equal(started[0], started[1]) and not torch.equal(started[0], started[2])


def test_every_augmentation_takes_the_strength_of_the_settings(tmp_path, monkeypatch):
    """What a moved image uncovers is the mean colour; erasing is noise of the data's mean and deviation."""
    fields = {"erase": 0.3, "mixup": 0.7, "cutmix": 0.9, "randaugment": 5.0, "smoothing": 0.25}
    encoder = vit(depth=3, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    config = settings_for("finetune", tmp_path, **fields)
    method, called = Classifier("finetune", encoder, LinearHeads(16, 3), 3, config), []
    monkeypatch.setattr(training, "rand_augment", lambda x, *given: called.append(given) or x + 1)
    monkeypatch.setattr(training, "random_erase", lambda x, *given: called.append(given) or 2 * x)
    monkeypatch.setattr(training, "mix_labels", lambda x, targets, *given: (x / 4, called.append(given) or 1 - targets))
    method, images, labels = method.eval(), rand(3, 3, 8, 8), torch.arange(3)
    (mean, magnitude), (share, *noise), alphas = (method.augment(images, torch.eye(3)), called)[1]
    assert (magnitude, share, alphas) == (5.0, 0.3, (0.7, 0.9))
    assert torch.equal(mean, encoder.mean) and torch.equal(torch.stack(noise), torch.stack([encoder.mean, encoder.std]))
    targets = 1 - (0.75 * torch.eye(3) + 0.25 / 3)  # smoothed, then mixed
    logits = method.head(method.encoder((images + 1) / 2))[0]
    expected = -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(method(images, labels)["loss"], expected)


def test_pictures_are_the_image_and_four_augmentations_of_it(tmp_path, monkeypatch):
    fields = {"erase": 0.0, "mixup": 0.0, "cutmix": 0.0}
    method = Classifier("finetune", vit(depth=3), LinearHeads(16, 3), 3, settings_for("finetune", tmp_path, **fields))
    numbers = iter(range(9))
    monkeypatch.setattr(training, "rand_augment", lambda images, *_: images * next(numbers))
    images = 0.2 + 0.7 * rand(2, 3, 8, 8)
    rows = method.pictures(images)
    assert rows.shape == (2, 5, 3, 8, 8) and len(method.captions) == 5
    for column, factor in enumerate((1, 0, 1, 2, 3)):
        torch.testing.assert_close(rows[:, column], (images * factor).clamp(0, 1))


def test_the_accuracy_is_that_of_the_test_images(tmp_path):
    torch.manual_seed(0)
    config, subject = settings_for("finetune", tmp_path), subject_of(vit(depth=3))
    method = Classifier("finetune", subject.encoder, LinearHeads(16, 3, std=1.0), 3, config).eval()
    logits = method.head.layers[0](subject.encoder(subject.test.images / 255))
    right = sum(int(row.argmax()) == label for row, label in zip(logits, subject.test.labels.tolist(), strict=True))
    found = method.probe(
        None, dataclasses.replace(subject.train, labels=subject.train.labels + 9), subject.test, config
    )
    assert found == {"accuracy": pytest.approx(100 * right / 48)}


@pytest.mark.parametrize(("decay", "lowest"), [(0.5, 0.5**4), (1.0, 1.0)])
def test_finetuning_slows_lower_layers_by_the_decay_of_the_settings(decay, lowest, tmp_path):
    """MAE, Table 9."""
    config = settings_for("finetune", tmp_path, layer_decay=decay, weight_decay=0.2)
    method = Classifier("finetune", vit(depth=3), LinearHeads(16, 3), 3, config)
    groups = method.optimizer(config).param_groups
    assert min(group["lr_scale"] for group in groups) == lowest and max(group["lr_scale"] for group in groups) == 1
    assert {group["weight_decay"] for group in groups} == {0.0, 0.2}


def test_finetuning_learns_and_logs_its_test_accuracy(tmp_path):
    fields = QUICK | {"epochs": 6, "randaugment": 0.0, "mixup": 0.0, "cutmix": 0.0, "probe_every": 2}
    found = run_protocol("finetune", subject_of(vit(depth=3)), settings_for("finetune", tmp_path, **fields))
    assert found["finetune"] > 80
    _, log = read_log(tmp_path / "finetune-stripes" / "log.jsonl")
    assert [line["epoch"] for line in log if "accuracy" in line] == [0, 2, 4, 6]
    assert log[-1]["accuracy"] == found["finetune"]
    encoder = load_encoder(tmp_path / "finetune-stripes" / "encoder.pt")  # can be evaluated in turn
    assert encoder.fields["pool"] == "mean"


def test_finetuning_learns_positions_from_where_they_are(tmp_path):
    """As MAE's code."""
    encoder, images = vit(depth=3, pool="cls"), rand(2, 3, 8, 8)
    assert torch.equal(learn_positions(encoder)(images), encoder(images))
    config = settings_for("finetune", tmp_path, positions="learned", **QUICK)
    assert run_protocol("finetune", subject_of(encoder), config)["finetune"] > 30
    found = load_encoder(tmp_path / "finetune-stripes" / "encoder.pt").positions
    assert 0 < (found - encoder.positions).abs().max() < 0.1
    with pytest.raises(UserError, match="--positions learned is for a ViT, this encoder is a MapEncoder; leave it out"):
        learn_positions(MapEncoder())


def test_fc_norm_takes_the_mean_before_a_new_norm(tmp_path):
    """As MAE's code: norm of the mean, where the default is the mean of norms."""
    encoder, images = vit(depth=3, pool="mean"), rand(2, 3, 8, 8)
    config = settings_for("finetune", tmp_path, fc_norm=True, **QUICK)
    method = Classifier("finetune", copy.deepcopy(encoder), LinearHeads(16, 3), 3, config)
    x = torch.cat([encoder.cls_token.expand(2, -1, -1), encoder.embed(images)], dim=1)
    for block in encoder.blocks:
        x = block(x)
    mean = x[:, 1:].mean(dim=1)
    expected = method.head.layers[0]((mean - mean.mean(dim=1, keepdim=True)) / (mean.var(1, False, True) + 1e-6).sqrt())
    torch.testing.assert_close(method.eval().logits(images)[0], expected, rtol=1e-4, atol=1e-6)
    method(images, torch.tensor([0, 1]))["loss"].backward()
    assert all((p.grad is None) == name.startswith("encoder.norm.") for name, p in method.named_parameters())
    rates = {id(p): g["lr_scale"] for g in method.optimizer(config).param_groups for p in g["params"]}
    assert rates[id(method.head.norm.weight)] == 1.0  # MAE's code: the norm's layer is the head's
    assert run_protocol("finetune", subject_of(encoder), config)["finetune"] > 30
    load_encoder(tmp_path / "finetune-stripes" / "encoder.pt")
    config = dataclasses.replace(config, drop_path=0.0)
    for other in (
        {"encoder": vit(depth=3, pool="cls")},
        {"encoder": MapEncoder()},
        {"head": TransformerHead(16, 8, 1, 3)},
    ):
        with pytest.raises(UserError, match="--fc-norm is for a ViT with --pool mean and --head linear; leave it out"):
            Classifier("finetune", **{"encoder": encoder, "head": LinearHeads(16, 3)} | other, classes=3, config=config)


def test_a_run_is_told_by_what_it_starts_from_and_goes_on_whatever_else_is_asked(tmp_path):
    encoder, config = vit(depth=3), settings_for("finetune", tmp_path)
    heads_of = [LinearHeads(16, 3) for _ in range(2)]
    for protocol, count in (("finetune", 2), ("linear", 1)):  # a probe's head is drawn by the seed, which is asked for
        assert len({Classifier(protocol, encoder, head, 3, config).origin for head in heads_of}) == count
    subjects = [subject_of(encoder, name) for name in ("trained", "untrained")]
    folders = [training.folder_of("finetune", subject, config) for subject in subjects]
    assert folders == [tmp_path / "finetune-stripes", tmp_path / "finetune-stripes-untrained"]
    config = settings_for("tran1", tmp_path, **QUICK)
    run_protocol("tran1", subject_of(encoder), config)
    others = {"k": 3, "metric": "cosine", "untrained": True, "pixels": True, "scratch": True, "tokens": True}
    run_protocol("tran1", subject_of(encoder), dataclasses.replace(config, resume=True, **others))


@pytest.mark.parametrize(("amp", "expected"), [("off", False), ("bf16", True)])
def test_the_accuracy_is_computed_in_the_precision_of_the_training(amp, expected, tmp_path):
    config, seen = settings_for("finetune", tmp_path, amp=amp), []
    method = Classifier("finetune", vit(depth=3), LinearHeads(16, 3), 3, config).eval()
    method.head.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    method.probe(None, subject_of(None).train, subject_of(None).test, config)
    assert set(seen) == {expected}


# --- FINOLA's decoder, probed and then fine-tuned --------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 2])
def test_finetuning_from_a_probed_decoder_starts_where_the_probe_ended(steps, tmp_path, monkeypatch, capsys):
    """FINOLA, Appendix C: the decoder weights are initialised from the tran-1 probing stage."""
    subject, started, fit = subject_of(vit(depth=3)), [], training.fit
    quick = QUICK | {"epoch_steps": steps}
    monkeypatch.setattr(training, "fit", lambda m, *a: started.append(copy.deepcopy(m.head.state_dict())) or fit(m, *a))
    run_protocol("finetune", subject, settings_for("finetune", tmp_path / "a", head="tran1", **quick))
    assert "holds no finished probe of this encoder; --protocol tran1 makes one" in capsys.readouterr().out
    run_protocol("tran1", subject, settings_for("tran1", tmp_path / "b", **quick))
    run_protocol("finetune", subject, settings_for("finetune", tmp_path / "b", head="tran1", **quick))
    assert len(started) == 3
    probed = load_checkpoint(tmp_path / "b" / "tran1-stripes" / "last.pt")["weights"]
    for name, value in started[2].items():
        assert torch.equal(value, probed["head." + name])
    assert not torch.equal(started[0]["classify.weight"], started[2]["classify.weight"])

    with torch.no_grad():
        subject.encoder.norm.bias += 1  # another encoder: neither its old decoder nor an old run of its own is taken
    config = settings_for("finetune", tmp_path / "b", head="tran1", **quick)
    capsys.readouterr()
    with pytest.raises(UserError, match=r"finetune-stripes was trained otherwise \(origin \w+ -> \w+\)"):
        run_protocol("finetune", subject, dataclasses.replace(config, resume=True))
    assert "holds no finished probe of this encoder" in capsys.readouterr().out


def test_finetuning_does_not_start_from_a_probe_that_is_not_finished(tmp_path, capsys):
    subject, path = subject_of(vit(depth=3)), tmp_path / "tran1-stripes" / "last.pt"
    run_protocol("tran1", subject, settings_for("tran1", tmp_path, **QUICK))
    state = load_checkpoint(path)
    torch.save(state | {"step": state["step"] - 1}, path)
    run_protocol("finetune", subject, settings_for("finetune", tmp_path, head="tran1", **QUICK))
    assert "holds no finished probe of this encoder" in capsys.readouterr().out
