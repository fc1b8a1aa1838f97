"""FINOLA's own analysis: what protocols/finola_figures.py measures, and what its sheets show."""

# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """A folder of pictures in two classes, of one colour each."""
    from PIL import Image

    root = tmp_path_factory.mktemp("stripes")
    for split, count in (("train", 12), ("val", 6)):
        for label, colour in enumerate(((200, 40, 40), (40, 40, 200))):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (64, 64), tuple(c + 3 * i for c in colour)).save(folder / f"{i}.png")
    return root


FLAGS = ["--width", "micro", "--channels", "16", "--upsampler-width", "16", "--upsampler-blocks", "1"]
FLAGS += ["--image-size", "64", "--batch-size", "8", "--epochs", "2", "--warmup-epochs", "0", "--base-lr", "0.03"]


@pytest.mark.parametrize("variant", finola.VARIANTS)
def test_a_run_is_trained_resumed_and_looked_into(variant, stripes, tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["finola", "--data", str(stripes), "--out", str(out), "--variant", variant, "--workers", "0", *FLAGS]
    assert train.main(argv) == 0
    log = evaluate.read_log(out / "log.jsonl")
    assert log[-1]["loss"] < log[1]["loss"]
    assert {"knn", "linear", "psnr"} <= set(log[-1])
    command = [str(out), "--protocol", "knn", "finola", "pictures", "--untrained", "--workers", "0"]
    assert evaluate.main(command) == 0, capsys.readouterr().err
    files = {path.stem for path in (out / "finola").iterdir()}
    embeddings = {"mean", "interpolations", "samples", "components", "residuals"} if variant != "masked_b" else set()
    assert files == embeddings | {"curvature", "surfaces"}
    lines = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
    found = next(line["results"]["trained"] for line in lines if line["protocol"] == "finola")
    assert set(found) - {"dz/dx", "dz/dy", "laplacian"} == {"psnr", "psnr_of_mean", "curvature"}
    assert "untrained" in lines[0]["results"]
    shown = capsys.readouterr().out
    assert "PSNR" in shown
    assert "mean image" in shown


def look(method, count=6):
    """What evaluate.py finds in a method: of the test images, and the images themselves."""
    size = method.config.image_size
    train_images, test_images = images_of(5, size, seed=1), images_of(count, size, seed=2)
    data = [
        common.MemoryImages((x * 255).to(torch.uint8), torch.arange(len(x)) % 2, ["a", "b"], (0.5,) * 3, (0.25,) * 3)
        for x in (train_images, test_images)
    ]
    row = evaluate.Row("trained", method.encoder, *data, torch.device("cpu"))
    config = evaluate.Config(image_size=size, amp="off", workers=0)
    exact = [(x * 255).to(torch.uint8) / 255 for x in (train_images, test_images)]
    return evaluate.look_into_finola(method.eval(), row, config), *exact, row, config


@pytest.mark.parametrize("variant", finola.VARIANTS)
@torch.no_grad()
def test_what_the_analysis_measures(variant):
    method = tiny(variant=variant, image_size=96)
    found, train_images, images, _, _ = look(method)
    corner = None if variant == "finola" else torch.ones(6, 2, dtype=torch.long)
    z = method.feature_map(images, corner)
    mask = method.scored(images, corner)
    torch.testing.assert_close(found["psnr"], finola.psnr(images, method.decode(z), mask))
    mean = train_images.mean(dim=0).expand_as(images)
    torch.testing.assert_close(found["psnr of mean"], finola.psnr(images, mean, mask))
    assert not torch.allclose(finola.psnr(images, mean), finola.psnr(images, mean, mask)) or corner is None
    curvature = finola.peak_curvature(z).sort(dim=1).values.flip(1)
    torch.testing.assert_close(found["curvature"], curvature)
    if variant == "masked_b":
        assert set(found) == {"psnr", "psnr of mean", "curvature"}
        return
    start = 3 if variant == "finola" else 2  # of six cells; in the middle of a block of three that starts at cell 1
    q = method.embed(images, corner)
    torch.testing.assert_close(found["q"], q)
    torch.testing.assert_close(z[:, :, start, start], q)
    residuals = finola.pde_residuals(z, method.finola, (start, start))
    torch.testing.assert_close(torch.stack([found["dz/dx"], found["dz/dy"]]), torch.stack(residuals))
    quadrant = z[:, :, start:, start:]
    expected = finola.laplacian_residual(quadrant, method.finola.right, method.finola.down)
    torch.testing.assert_close(found["laplacian"], expected)


@torch.no_grad()
def test_the_sheets_of_appendix_e_show_what_their_captions_say(tmp_path, monkeypatch):
    method = tiny()
    found, _, images, _, _ = look(method)
    sheets = {}
    monkeypatch.setattr(
        evaluate, "write_sheet", lambda path, title, columns, rows: sheets.update({path.stem: (columns, rows)})
    )
    q = found["q"]
    evaluate.draw_embeddings(method, q, q[:3], images[:3], "title", tmp_path)

    def decode(vectors):
        return method.decode(method.unroll(vectors)).clamp(0, 1)

    def column(name, caption):
        columns, rows = sheets[name]
        assert len(columns) == rows.shape[1]
        return rows[:, columns.index(caption)]

    for name in ("mean", "samples", "components"):
        torch.testing.assert_close(column(name, "image"), images[:3])
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(column("mean", "q"), decode(q[:3]), **close)
    torch.testing.assert_close(column("mean", "mean"), decode(q.mean(dim=0).expand(3, -1)), **close)
    torch.testing.assert_close(column("mean", "mirror"), decode(2 * q.mean(dim=0) - q[:3]), **close)
    torch.testing.assert_close(column("components", "K = 16"), decode(q[:3]), **close)
    torch.testing.assert_close(column("interpolations", "second"), images[:3].roll(-1, dims=0))
    torch.testing.assert_close(sheets["interpolations"][1][:, 1], decode(q[:3]), **close)
    torch.testing.assert_close(sheets["interpolations"][1][:, 5], decode(q[:3].roll(-1, dims=0)), **close)


def test_the_probe_measures_psnr_of_test_images():
    method = tiny(variant="masked_b", probe_images=4, amp="off", image_size=32).eval()
    _, _, _, row, _ = look(method)
    values = []
    for _ in range(2):
        torch.manual_seed(len(values))
        values.append(
            method.probe(lambda x: x.mean(dim=(2, 3)), row.train, row.test, method.config, device=row.device, workers=0)
        )
    assert values[0] == values[1]  # the same blocks each time
    chosen = common.labelled(row.test, 4)
    torch.manual_seed(method.config.seed)
    expected = method(row.test.images[chosen] / 255)["psnr"]
    assert values[0]["psnr"] == pytest.approx(float(expected), rel=1e-4)


def test_the_analysis_wants_a_run_of_finola(stripes, tmp_path, capsys):
    vit = ["--model", "vit_micro", "--image-size", "16", "--patch", "8", "--decoder-dim", "16", "--decoder-depth", "1"]
    flags = ["--batch-size", "8", "--epochs", "1", "--workers", "0", "--data", str(stripes), "--decoder-heads", "2"]
    assert train.main(["magma", "--out", str(tmp_path / "run"), *vit, *flags]) == 0
    assert evaluate.main([str(tmp_path / "run"), "--protocol", "finola"]) == 2
    assert "looks into a run of finola" in capsys.readouterr().err
