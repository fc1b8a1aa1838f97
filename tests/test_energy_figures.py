"""What an energy learned: what protocols/energy_figures.py measures and draws."""

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Short runs on a folder of pictures."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    images, labels, _ = common.render_shapes(60, 32)
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


def test_a_run_is_trained_probed_and_looked_into(runs, capsys):
    run = runs["energy"]
    lines = [json.loads(text) for text in (run / "log.jsonl").read_text().splitlines()[1:]]
    assert {f"left_{task}" for task in MIXTURE} < lines[-1].keys() and lines[-1]["alpha"] > 0
    argv = [str(run), "--protocol", "energy", "knn", "--probe-images", "24"]
    assert evaluate.main(argv) == 0
    shown = capsys.readouterr().out
    names = {path.name for path in (run / "energy").iterdir()}
    assert names == {"chains.png", *[f"chain_{task}.png" for task in MIXTURE]}
    assert "left of noise" in shown and "energy below that of the corrupted image" in shown
    line = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    assert line["protocol"] == "energy" and line["test_images"] == 24
    assert {"left_gridded", "restored_lower_gridded", "clean_lower_gridded"} < line["results"]["trained"].keys()


def test_what_the_protocol_measures(runs):
    run = runs["energy"]
    settings = evaluate.read_settings(run)
    encoder = common.load_encoder(run / "encoder.pt")
    images, labels, _ = common.render_shapes(20, 32, seed=1)
    test = common.MemoryImages(images, labels, list("abcdefghij"), encoder.fields["mean"], encoder.fields["std"])
    row = evaluate.Row("trained", encoder, test, test, torch.device("cpu"))
    config = evaluate.Config(image_size=32, amp="off", workers=0, probe_images=12)
    method = evaluate.load_method(run, settings, test)
    found = evaluate.look_into_energy(method, row, config)["grayscale"]
    clean, corrupted = method.corrupt(test.images[common.labelled(test, 12)] / 255, "grayscale")
    alpha = method.log_alpha.exp().detach()
    chain = [corrupted, *ebm_pretrain.restore(method.energy, corrupted, evaluate.CHAIN, alpha)]
    for i, x in enumerate(chain):
        torch.testing.assert_close(found["error"][:, i], (x - clean).square().mean(dim=(1, 2, 3)).detach())
        torch.testing.assert_close(found["energy"][:, i], method.energy(x).detach())
    torch.testing.assert_close(found["clean"], method.energy(clean).detach())


def test_every_objective_logs_what_it_has(runs):
    tasks = {f"left_{task}" for task in MIXTURE}
    for name, expected in {"mae": set(), "autoencoder": tasks | {"left"}, "negatives": {"told_apart"}}.items():
        last = evaluate.read_log(runs[name] / "log.jsonl")[-1]
        assert {key for key in last if key.startswith(("left", "told", "alpha"))} == expected


def test_the_protocol_wants_an_energy(runs, capsys):
    for name in ("mae", "autoencoder", "negatives"):
        assert evaluate.main([str(runs[name]), "--protocol", "energy"]) == 2
        assert "needs --objective energy" in capsys.readouterr().err
    assert evaluate.main([str(runs["energy"]), "--protocol", "energy", "--image-size", "16"]) == 2
    assert "needs the run's own --image-size 32" in capsys.readouterr().err
