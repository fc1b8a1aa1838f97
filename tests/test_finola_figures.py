"""FINOLA's own analysis: what is measured of a run, and what its sheets and charts show."""

import dataclasses
import json
import types

import pytest
import torch
from make import images_of, narrow_networks, tiny_finola, write_folders

import evaluate
import finola
import train
from plumbing.images import MemoryImages
from plumbing.run_files import read_log
from protocols import finola_figures
from protocols.figures import Album, heat
from protocols.finola_figures import draw_embeddings, draw_finola, look_into_finola, ranked
from protocols.rows import Subject
from protocols.settings import Config

RESIDUALS = ("dz/dx", "dz/dy", "laplacian", "orders")
APPENDIX_E = {"contrast_of_mean", "mirror", "mixture", "roughness_of_samples", "sixteenth"}
APPENDIX_E = {f"embedding_{name}" for name in APPENDIX_E}
BENT = ("curvature", "encoder curvature", "seam", "encoder seam")


def look(method, count=6):
    """What is found in a method, the training and the test images, the subject and its settings."""
    size = method.config.image_size
    stored = [(images_of(n, size, seed) * 255).to(torch.uint8) for n, seed in ((5, 1), (count, 2))]
    data = [MemoryImages(x, torch.arange(len(x)) % 2, ["a", "b"], (0.5,) * 3, (0.25,) * 3) for x in stored]
    subject = Subject("trained", method.encoder, *data, torch.device("cpu"))
    config = Config(image_size=size, amp="off")
    found = look_into_finola(method.eval(), subject, config)
    return found, *(x / 255 for x in stored), subject, config


@pytest.mark.parametrize("variant", ["finola", "masked_e", "masked_b"])
@torch.no_grad()
def test_what_the_analysis_measures(variant):
    """PSNR, the residuals of Eq. 2, 4 and 5, and Fig. 5's peak curvatures by Eq. 9."""
    method = tiny_finola(variant=variant, image_size=96)
    found, train_images, images, _, _ = look(method)
    corner = None if variant == "finola" else torch.ones(6, 2, dtype=torch.long)
    z = method.feature_map(images, corner)
    mask = method.scored(images, corner)
    torch.testing.assert_close(found["psnr"], finola.psnr(images, method.decode(z), mask))
    mean = train_images.mean(dim=0).expand_as(images)
    torch.testing.assert_close(found["psnr of mean"], finola.psnr(images, mean, mask))
    assert not torch.allclose(finola.psnr(images, mean), finola.psnr(images, mean, mask)) or corner is None
    for name, x in (("curvature", z), ("encoder curvature", method.encoder(images))):  # of the whole image, both
        torch.testing.assert_close(found[name], finola.peak_curvature(x).sort(dim=1).values.flip(1))
    seam, border = torch.zeros(6, 6, dtype=torch.bool), torch.ones(6, 6, dtype=torch.bool)
    if variant == "finola":
        seam[2:5, 2:5] = True  # around q
    elif variant == "masked_e":
        seam[1:4, 1:4] = True
    else:
        seam[:5, :5] = True  # a block of 3 x 3 cells and what surrounds it
        seam[2, 2] = False
    border[2:4, 2:4] = False
    for name, x, there in (("seam", z, seam), ("encoder seam", method.encoder(images), border)):
        for i, curvature in enumerate(finola.gaussian_curvature(x).abs()):
            hits = [bool((k == k.max())[there].any()) for k in curvature]
            assert float(found[name][i]) == pytest.approx(sum(hits) / len(hits))
    if variant == "masked_b":
        assert set(found) == {"psnr", "psnr of mean", *BENT}
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
    expected = finola.orders_residual(quadrant, method.finola.right, method.finola.down)
    torch.testing.assert_close(found["orders"], expected)


def test_residuals_are_those_of_the_channel_norm():
    """Eq. 2 has the channel norm; with moving averages of its statistics there is nothing to measure."""
    found, *_ = look(tiny_finola(norm="running"))
    assert set(found) == {"psnr", "psnr of mean", *BENT, "q"}


@torch.no_grad()
def test_the_sheets_of_appendix_e_show_what_their_captions_say():
    method, sheets = tiny_finola(), {}
    found, _, images, _, _ = look(method)
    album = types.SimpleNamespace(sheet=lambda name, heading, captions, rows: sheets.update({name: (captions, rows)}))
    q = found["q"]
    draw_embeddings(method, q, q[:3], images[:3], album)
    assert list(sheets) == ["mean", "interpolations", "samples", "components"]

    def decode(vectors):
        return method.decode(method.unroll(vectors)).clamp(0, 1)

    def column(name, caption):
        captions, rows = sheets[name]
        assert len(captions) == rows.shape[1]
        return rows[:, captions.index(caption)]

    for name in ("mean", "samples", "components"):
        torch.testing.assert_close(column(name, "image"), images[:3])
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(column("mean", "q"), decode(q[:3]), **close)
    torch.testing.assert_close(column("mean", "mean"), decode(q.mean(dim=0).expand(3, -1)), **close)
    torch.testing.assert_close(column("mean", "mirror"), decode(2 * q.mean(dim=0) - q[:3]), **close)
    torch.testing.assert_close(column("components", "K = 16"), decode(q[:3]), **close)
    torch.testing.assert_close(column("interpolations", "first"), images[:3])
    torch.testing.assert_close(column("interpolations", "second"), images[:3].roll(-1, dims=0))
    torch.testing.assert_close(column("interpolations", "q of the first"), decode(q[:3]), **close)
    torch.testing.assert_close(column("interpolations", "q of the second"), decode(q[:3].roll(-1, dims=0)), **close)
    middle = (q[:3] + q[:3].roll(-1, dims=0)) / 2
    torch.testing.assert_close(column("interpolations", "half way"), decode(middle), **close)


@pytest.mark.parametrize("variant", ["finola", "masked_e"])
@torch.no_grad()
def test_appendix_e_in_figures_is_what_its_pictures_show(variant):
    """Fig. 12 to 15, picture by picture; 70 embeddings are more than are decoded at once."""
    method = tiny_finola(variant=variant, channels=32)
    q = torch.randn(70, 32, generator=torch.Generator().manual_seed(3))
    places = method.middle(images_of(2, method.config.image_size, 1))
    found = finola_figures.look_at_embeddings(method, q, places)

    def decode(vector):
        picture = method.decode(method.unroll(vector[None], None if places is None else places[:1]))
        return picture[0].clamp(0, 1).double()

    def roughness(picture):
        steps = (picture[:, 1:] - picture[:, :-1]).square().mean() + (
            picture[..., 1:] - picture[..., :-1]
        ).square().mean()
        return steps / torch.stack([channel.var() for channel in picture]).mean()

    def distance(first, second):
        return sum((x - y).square().mean() for x, y in zip(first, second, strict=True))

    mean, plain = q.mean(dim=0), [decode(x) for x in q]
    grey, others = decode(mean), [*plain[1:], plain[0]]
    wanted = {"contrast_of_mean": grey.std() / torch.stack([x.std() for x in plain]).mean()}
    here = torch.cat([(x - grey).flatten() for x in plain])
    there = torch.cat([(decode(2 * mean - x) - grey).flatten() for x in q])
    centred = [x - x.mean() for x in (here, there)]
    wanted["mirror"] = (centred[0] * centred[1]).sum() / (centred[0].norm() * centred[1].norm())
    half = [decode((x + y) / 2) for x, y in zip(q, [*q[1:], q[0]], strict=True)]
    halves = [(x + y) / 2 for x, y in zip(plain, others, strict=True)]
    wanted["mixture"] = distance(half, halves) / distance(plain, halves)
    noise = torch.randn(70, 70, generator=torch.Generator().manual_seed(0))
    samples = [decode(x) for x in mean + noise @ (q - mean) / 69**0.5]
    wanted["roughness_of_samples"] = sum(map(roughness, samples)) / sum(map(roughness, plain))
    first, second = torch.linalg.svd((q - mean).double(), full_matrices=False).Vh[:2].float()  # 2 of 32 components
    few = [decode(mean + ((x - mean) @ first) * first + ((x - mean) @ second) * second) for x in q]
    wanted["sixteenth"] = 1 - distance(few, plain) / distance([grey] * 70, plain)
    assert found == pytest.approx({name: float(value) for name, value in wanted.items()}, rel=2e-3)
    noise = torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    assert float(finola_figures.roughness(noise)) == pytest.approx(4, rel=0.03)


@torch.no_grad()
def test_of_many_channels_256_bend_most_and_some_components_are_shown():
    """Fig. 15 has K = 192."""
    method, shown = tiny_finola(channels=264), {}
    found, _, images, _, _ = look(method, count=2)
    peaks = finola.peak_curvature(method.feature_map(images)).sort(dim=1, descending=True).values
    torch.testing.assert_close(found["curvature"], peaks[:, :256])
    album = types.SimpleNamespace(sheet=lambda name, heading, captions, rows: shown.update({name: captions}))
    draw_embeddings(method, found["q"], found["q"], images, album)
    assert shown["components"] == ["image", *[f"K = {k}" for k in (1, 4, 16, 64, 192, 264)]]


@pytest.mark.parametrize(("low", "scale"), [(0.0, "linear"), (0.001, "log")])
def test_charts_show_values_over_their_places(low, scale):
    values = torch.tensor([low, 0.25, 0.5])
    (axes,) = ranked("title", {"one": values, "two": values + 1}, xlabel="images", ylabel="value").axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines["one"] == [[1, pytest.approx(low)], [2, 0.25], [3, 0.5]]
    assert lines["two"] == [[1, pytest.approx(1 + low)], [2, 1.25], [3, 1.5]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("images", "value", scale)
    assert axes.get_ylim()[0] == 0 or scale == "log"


def test_the_table_has_means_of_psnr_and_medians_of_the_rest(tmp_path, monkeypatch, capsys):
    """And appendix E, by embeddings from all over the test images: here every second."""
    monkeypatch.setattr(finola_figures, "SOME", 3)
    method = tiny_finola(image_size=96)
    found, _, _, subject, config = look(method)
    torch.save({"weights": method.state_dict()}, tmp_path / "last.pt")
    known = dataclasses.asdict(method.config) | {"method": "finola"}
    written, figures = draw_finola(tmp_path, known, subject, dataclasses.replace(config, out=str(tmp_path), data="x"))
    names = ["mean", "interpolations", "samples", "components", "residuals", "curvature", "surfaces"]
    names += ["encoder_curvature", "encoder_surfaces"]
    assert written == [tmp_path / "finola" / f"{name}.png" for name in names]
    expected = {"psnr": found["psnr"].mean(), "psnr_of_mean": found["psnr of mean"].mean()}
    expected |= {name: found[name].median() for name in RESIDUALS}
    embedded = finola_figures.look_at_embeddings(method, found["q"][::2])
    expected |= {f"embedding_{name}": value for name, value in embedded.items()}
    assert f"appendix E: contrast of mean {embedded['contrast_of_mean']:.2f}, mirror " in capsys.readouterr().out
    expected["curvature"] = found["curvature"].amax(dim=1).median()
    expected["encoder_curvature"] = found["encoder curvature"].amax(dim=1).median()
    expected |= {name.replace(" ", "_"): 100 * found[name].mean() for name in ("seam", "encoder seam")}
    assert figures == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-4)


@pytest.fixture(scope="module", params=["finola", "masked_e"])
def drawn(request, tmp_path_factory):
    """What `draw_finola` puts on paper, sheets and charts, with the two images that it shows, their vectors q and maps,
    what was found in all six, and what makes pictures of vectors.
    """
    method, sheets, charts = tiny_finola(variant=request.param, image_size=96), {}, {}
    found, _, images, subject, config = look(method)
    for name in RESIDUALS:  # far apart, and not in order
        found[name] = found[name] * torch.tensor([1.0, 5, 2, 40, 3, 4])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finola_figures, "method_for", lambda *_: method)
        patched.setattr(finola_figures, "look_into_finola", lambda *_: found)
        patched.setattr(Album, "sheet", lambda self, name, _, captions, rows: sheets.update({name: (captions, rows)}))
        patched.setattr(Album, "chart", lambda self, name, figure: charts.update({name: figure}))
        out = str(tmp_path_factory.mktemp("drawn"))
        draw_finola(None, {}, subject, dataclasses.replace(config, out=out, data="x"))
    corner = None if request.param == "finola" else torch.ones(2, 2, dtype=torch.long)  # a block in the middle

    @torch.no_grad()
    def decode(q):
        return method.decode(method.unroll(q, corner)).clamp(0, 1)

    with torch.no_grad():
        own = method.embed(images[:2], corner)  # one of each class is shown
        z, whole = method.feature_map(images[:2], corner), method.encoder(images[:2])
    maps = {"": z, "encoder_": whole}
    return types.SimpleNamespace(
        images=images[:2], found=found, own=own, maps=maps, sheets=sheets, charts=charts, decode=decode
    )


def test_the_images_on_the_sheets_are_pulled_along_the_embeddings_of_all_test_images(drawn):
    """Appendix E: Fig. 12's Gaussian, Fig. 13's mean and Fig. 15's components are those of all, here six, not of the
    two that are shown; Fig. 15 by a singular value decomposition instead.
    """
    q, close = drawn.found["q"], {"rtol": 1e-3, "atol": 1e-3}
    sheets = ["mean", "interpolations", "samples", "components", "surfaces", "encoder_surfaces"]
    assert len(q) == 6 and list(drawn.sheets) == sheets
    for captions, rows in drawn.sheets.values():
        assert len(captions) == rows.shape[1]
        torch.testing.assert_close(rows[:, 0], drawn.images)
    rows = drawn.sheets["mean"][1]
    torch.testing.assert_close(rows[:, 1], drawn.decode(drawn.own), **close)
    torch.testing.assert_close(rows[:, 3], drawn.decode(q.mean(dim=0).expand(2, -1)), **close)
    captions, rows = drawn.sheets["samples"]
    noise = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))  # six sums of centred embeddings for each
    samples = (q.mean(dim=0) + noise @ (q - q.mean(dim=0)) / 5**0.5).view(6, 2, -1)
    for k in range(6):
        torch.testing.assert_close(rows[:, 1 + k], drawn.decode(samples[k]), **close)
    captions, rows = drawn.sheets["components"]
    assert captions == ["image", "K = 1", "K = 4", "K = 16"]
    mean = q.double().mean(dim=0)
    vectors = torch.linalg.svd(q.double() - mean, full_matrices=False).Vh  # (6, C), the largest first
    for column, k in ((1, 1), (2, 4)):
        expected = mean + (drawn.own - mean) @ vectors[:k].T @ vectors[:k]
        torch.testing.assert_close(rows[:, column], drawn.decode(expected.float()), **close)


@pytest.mark.parametrize("prefix", ["", "encoder_"])
def test_the_surfaces_are_the_channels_that_bend_most_each_in_its_own_range(drawn, prefix):
    """Fig. 5: in the order of the peaks of Eq. 9, on the map of the upsampler and on the encoder's."""
    captions, rows = drawn.sheets[f"{prefix}surfaces"]
    assert captions == ["image", *[f"rank {i}" for i in range(1, 7)]]
    for i, z in enumerate(drawn.maps[prefix]):
        peaks = [float(finola.peak_curvature(channel)) for channel in z]
        order = sorted(range(len(peaks)), key=lambda c: -peaks[c])
        for rank in range(6):
            surface = z[order[rank]]
            expected = heat((surface - surface.min()) / (surface.max() - surface.min()))
            torch.testing.assert_close(rows[i, 1 + rank, :, 8::16, 8::16], expected, rtol=0, atol=0.02)


def test_the_charts_show_sorted_residuals_and_quartiles_of_the_curvature(drawn):
    """Eq. 2, 4, 5 and Fig. 5: image by image and channel by channel, in order, with the median beside the name."""
    found, labels = drawn.found, {}

    def lines(name):
        (axes,) = drawn.charts[name].axes
        labels[name] = (axes.get_xlabel(), axes.get_ylabel(), drawn.charts[name].get_suptitle().partition(": ")[2])
        return {line.get_label(): line.get_ydata() for line in axes.get_lines()}

    shown = lines("residuals")
    names = list(RESIDUALS)
    assert list(shown) == [f"{name}: median {sorted(found[name].tolist())[2]:.2f}" for name in names]
    for name, values in zip(names, shown.values(), strict=True):
        assert list(values) == pytest.approx(sorted(found[name].tolist()))
    for chart in ("curvature", "encoder_curvature"):
        shown = lines(chart)
        ranks = found[chart.replace("_", " ")].sort(dim=0).values.double()  # of six images, channel by channel
        expected = {  # between the second and the third of six, the third and the fourth, the fourth and the fifth
            "lower quartile": 0.75 * ranks[1] + 0.25 * ranks[2],
            "median of the images": (ranks[2] + ranks[3]) / 2,
            "upper quartile": 0.25 * ranks[3] + 0.75 * ranks[4],
        }
        assert list(shown) == list(expected)
        for name, values in expected.items():
            assert list(shown[name]) == pytest.approx(values.tolist(), rel=1e-4)
    axes = ("channels, sorted", "peak curvature")
    assert labels == {
        "residuals": ("test images, sorted", "relative residual", "residuals of Eq. 2, 4 and 5"),
        "curvature": (*axes, "curvature of the map that the upsampler is given"),
        "encoder_curvature": (*axes, "curvature of the encoder's map of the whole image"),
    }


FEW = "A and B unroll fewer than three cells a side, so Eq. 4 is not measured; a finer map has more"


@pytest.mark.parametrize(
    ("fields", "notes"),
    [
        ({"variant": "masked_b"}, ["masked_b has no vector q, so no embeddings and no residuals"]),
        ({"norm": "none"}, ["residuals are those of Eq. 2, which has the channel norm, so there are none"]),
        ({"image_size": 32}, [FEW, "a map of 2 x 2 is too small for curvature; give a larger --image-size"]),
        ({}, [FEW]),  # four cells a side, two in the quadrant right of and below q
        ({"image_size": 96}, []),
    ],
)
def test_what_cannot_be_measured_is_said(fields, notes, tmp_path, monkeypatch, capsys):
    method, charts = tiny_finola(**fields), {}
    found, _, _, subject, config = look(method)
    monkeypatch.setattr(finola_figures, "method_for", lambda *_: method)
    monkeypatch.setattr(Album, "sheet", lambda *_: None)
    monkeypatch.setattr(Album, "chart", lambda self, name, figure: charts.update({name: figure.get_suptitle()}))
    _, figures = draw_finola(None, {}, subject, dataclasses.replace(config, out=str(tmp_path), data="x"))
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if not line.startswith("appendix E: ")] == [f"note: {note}" for note in notes]
    assert set(figures) == {name.replace(" ", "_") for name in found} - {"q"} | (APPENDIX_E if "q" in found else set())
    assert ("residuals" in charts) == ("dz/dx" in found) and ("curvature" in charts) == ("curvature" in found)
    assert charts.get("residuals", "Eq. 2").endswith("Eq. 2, 4 and 5" if not notes else "Eq. 2")  # Eq. 4 takes three


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of pictures in two classes, of one colour each."""
    return write_folders(tmp_path_factory.mktemp("folders"), train=12, val=6, size=(64, 64))


FLAGS = (
    "--width micro --channels 16 --upsampler-width 16 --upsampler-blocks 1 --image-size 64 --batch-size 8 --epochs 2"
)
FLAGS += " --warmup-epochs 0 --base-lr 0.03 --workers 0"


@pytest.mark.parametrize("variant", ["finola", "masked_e", "masked_b"])
def test_a_run_is_trained_and_looked_into(variant, folders, tmp_path, capsys, monkeypatch):
    """Without reports, whose curves take as long to draw as the analysis; test_report.py has them."""
    for command in (train, evaluate):
        monkeypatch.setattr(command, "write_report", lambda folder: None)
    out = tmp_path / "run"
    argv = ["finola", "--data", str(folders), "--out", str(out), "--variant", variant, *FLAGS.split()]
    pictures = ["pictures"] if variant == "finola" else []
    beside = ["--untrained"] if variant == "finola" else []
    command = [str(out), "--protocol", "knn", "finola", *pictures, *beside, "--workers", "0"]
    with narrow_networks():
        assert train.main(argv) == 0
        assert evaluate.main(command) == 0, capsys.readouterr().err
    _, log = read_log(out / "log.jsonl")
    assert log[-1]["loss"] < log[1]["loss"]
    assert {"knn", "linear", "psnr"} <= set(log[-1])
    files = {path.stem for path in (out / "finola").iterdir()}
    embeddings = {"mean", "interpolations", "samples", "components", "residuals"} if variant != "masked_b" else set()
    assert files == embeddings | {"curvature", "surfaces", "encoder_curvature", "encoder_surfaces"}
    lines = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
    found = next(line["results"]["trained"] for line in lines if line["protocol"] == "finola")
    names = {"psnr", "psnr_of_mean", *(name.replace(" ", "_") for name in BENT)}
    assert set(found) - set(RESIDUALS) == names | (APPENDIX_E if variant != "masked_b" else set())
    assert ("untrained" in lines[0]["results"]) == (variant == "finola")
    shown = capsys.readouterr().out
    assert "PSNR" in shown
    assert "mean image" in shown


def test_the_analysis_wants_a_run_of_finola(folders, tmp_path, capsys):
    flags = "--model vit_micro --image-size 16 --patch 8 --decoder-dim 16 --decoder-depth 1 --decoder-heads 2"
    flags += f" --batch-size 8 --epochs 1 --workers 0 --data {folders} --out {tmp_path / 'run'}"
    assert train.main(["magma", *flags.split()]) == 0
    assert evaluate.main([str(tmp_path / "run"), "--protocol", "finola"]) == 2
    assert "looks into a run of finola" in capsys.readouterr().err
