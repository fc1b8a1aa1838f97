"""report.html of a run: what it shows, that nothing in it is fetched or runs, and that it stays small."""

import base64
import html.parser
import io
import json
import re

import numpy as np
import pytest
from make import fit_magma, judged, log_of, write_run
from PIL import Image

from plumbing.report import ROOM, write_report
from plumbing.tables import format_table


class Page(html.parser.HTMLParser):
    """The tags, the text and the pictures of a page; an unknown or unclosed tag fails."""

    VOID = frozenset({"meta", "img"})
    KNOWN = frozenset(
        [
            "html",
            "title",
            "style",
            "h1",
            "h2",
            "p",
            "div",
            "table",
            "tr",
            "th",
            "td",
            "figure",
            "figcaption",
            "dl",
            "dt",
            "dd",
            "pre",
        ]
    )

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.images, self.rows = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert tag in self.KNOWN | self.VOID
        if tag == "img":
            self.images.append(dict(attributes))
        if tag == "tr":
            self.rows.append([])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1].append(data)


def picture_in(image):
    kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", image["src"]).groups()
    return Image.open(io.BytesIO(base64.b64decode(data)), formats=[kind.upper()])


def save(path, size, noise=False):
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256 if noise else 2, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_the_report_of_a_run_has_its_tables_curves_pictures_and_settings(tmp_path):
    _, results = fit_magma(tmp_path / "run")
    (tmp_path / "run" / "eval.jsonl").write_text(json.dumps(judged(value=56.78)) + "\n")
    save(tmp_path / "run" / "pictures" / "keys.png", (30, 20))
    save(tmp_path / "run" / "pictures" / "curves.png", (30, 20))  # those of the log are drawn anew
    save(tmp_path / "run" / "compare.png", (30, 20))  # of other runs
    path = write_report(tmp_path / "run")
    page = Page(path.read_text())
    assert path == tmp_path / "run" / "report.html"
    cells = [re.split(r"  +", line) for line in format_table(results).splitlines()]
    assert page.rows[1 : len(cells)] == cells[1:]
    assert page.rows[len(cells) :] == [["linear"], ["trained encoder", "56.8"], ["untrained encoder", "1.0"]]
    assert "linear on shapes, recipe magma" in page.text  # of an older line, that does not tell the epoch
    seconds = log_of(tmp_path / "run")[-1]["seconds"]
    assert f"4 of 4 epochs, {seconds / 60:.1f} minutes of training" in page.text
    assert [image["alt"] for image in page.images] == ["curves of the log", "pictures.png", "pictures/keys.png"]
    assert picture_in(page.images[0]).size[0] == 3 * 520  # three panels
    assert picture_in(page.images[2]).size == (30, 20)
    texts = iter(page.text)
    assert "mask_ratio" in texts and next(texts) == "0.5"
    assert "layers" in texts and next(texts) == "-2 -1"
    assert any(text.startswith("python ") for text in page.text)


def test_nothing_in_a_report_is_fetched_or_runs(tmp_path):
    """What stands in settings, logs and names of files is text there: no tag, no script, no address."""
    evil = '<script src="http://x.example/a.js">alert(1)</script>&amp;"\'\x1b[2J'
    lines = [judged(data=evil, recipe=evil)]
    lines[0]["results"]["trained"][evil] = 1.0
    folder = write_run(tmp_path / "a", data=evil, root=evil, **{evil: [evil]}, evaluations=lines)
    log = json.dumps({"command": evil, "versions": {evil: evil}})
    (folder / "log.jsonl").write_text(log + "\n" + (folder / "log.jsonl").read_text().split("\n", 1)[1])
    save(folder / "pictures" / "<script>.png", (8, 8))
    text = write_report(folder).read_text()
    page = Page(text)  # no tag but the known ones
    assert "\x1b" not in text
    assert [image["src"][:11] for image in page.images] == ["data:image/"] * 2
    assert "default-src 'none'" in text


@pytest.mark.parametrize("count", [1, 4])
def test_a_report_stays_below_two_megabytes(count, tmp_path):
    """Pictures that are large become smaller JPEGs, small ones stay as they are."""
    folder = write_run(tmp_path / "a")
    for number in range(count):
        save(folder / "pictures" / f"{number}.png", (900, 700), noise=True)
    save(folder / "pictures" / "small.png", (40, 30))
    path = write_report(folder)
    assert path.stat().st_size < 2e6
    page = Page(path.read_text())
    assert len(page.images) == count + 2
    for image in page.images[1:-1]:
        assert image["src"].startswith("data:image/jpeg") and len(image["src"]) < ROOM * 4 / 3 / (count + 2) + 100
        width, height = picture_in(image).size
        assert width / height == pytest.approx(9 / 7, rel=0.02) and width > 150
    assert page.images[-1]["src"].startswith("data:image/png")


def test_a_report_leaves_out_what_is_not_there_or_damaged(tmp_path, monkeypatch):
    (tmp_path / "bare").mkdir()
    page = Page(write_report(tmp_path / "bare").read_text())
    assert "No log of its training is here." in page.text and not page.images
    folder = write_run(tmp_path / "a")
    (folder / "pictures.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    monkeypatch.setattr("plumbing.report.learning_curves", lambda *_: None)
    assert not Page(write_report(folder).read_text()).images


def test_a_run_in_progress_shows_its_last_probe(tmp_path):
    folder = write_run(tmp_path / "a", linear=(10.0, 30.0))
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "loss": 1.0}\n')
    page = Page(write_report(folder).read_text())
    assert page.rows[:2] == [["linear", "kNN"], ["trained encoder", "30.0", "11.0"]]
    assert "after epoch 2; linear: ridge regression on frozen features" in page.text


def test_what_a_run_started_from_is_no_untrained_encoder(tmp_path):
    page = Page(write_report(write_run(tmp_path / "a", start="b/last.pt")).read_text())
    assert page.rows[2] == ["encoder at the start", "10.0", "9.0"]


def test_many_pictures_and_long_settings_are_cut(tmp_path):
    folder = write_run(tmp_path / "a", root="x" * 3_000_000)
    for number in range(70):
        save(folder / "energy" / f"{number}.png", (60, 40), noise=True)
    path = write_report(folder)
    assert path.stat().st_size < 2e6 and len(Page(path.read_text()).images) == 61


def test_without_labels_the_table_is_that_without(tmp_path):
    folder = write_run(tmp_path / "a")
    text = (folder / "log.jsonl").read_text()
    text = text.replace('"knn"', '"effective_rank"').replace('"linear"', '"held_out_loss"')
    (folder / "log.jsonl").write_text(text.replace(', "effective_rank": 20.0', ""))
    page = Page(write_report(folder).read_text())
    assert page.rows[0] == ["held-out loss", "effective rank"]
    assert page.rows[1] == ["trained encoder", "30.0000", "11.0"]
