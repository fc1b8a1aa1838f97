"""Is docs/readings.md true? Its form, and the figures that it says were measured on a gradient. And are the lists of
tables and figures complete?

`python tests/test_readings.py` prints these figures.
"""

import functools
import importlib
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # `python tests/test_readings.py` prints the figures

import make
import pytest
import torch
import torch.nn.functional as F
from texts import PAGES, code_in, prose, section, tables

import common
from plumbing.settings import read_flags

PAGE = PAGES["docs/readings.md"]
TITLES = ["what", "text", "code", "here", "flag", "effect"]
METHODS = {  # a heading of the page: its method, and the loss that it is about
    "MAGMA and its baselines": ("magma", "manifold"),
    "MLO-MAE": ("mlo_mae", ""),
    "MixedAE": ("mixedae", "loss"),
    "Energy-inspired pretraining": ("ebm_pretrain", "loss"),
    "FINOLA": ("finola", "loss"),
    "Evaluation": (None, ""),
}
ROWS = {title: [row for table in tables(section(PAGE, title)) for row in table] for title in METHODS}
MEASURED = [  # (heading, flags, cosine, length)
    (title, *found)
    for title, rows in ROWS.items()
    for row in rows
    for found in re.findall(r"`(--[^`]+)`: cosine (-?\d\.\d\d), length (\d+\.\d\d)", row["effect"])
]


@functools.cache
def gradient(title, flags=""):
    """Of a loss by the encoder's weights, without positions: 16 pictures, the laptop recipe untrained, seed 0, float32.

    Of two views the second is the mirror image.
    """
    name, loss = METHODS[title]
    module = importlib.import_module(name)
    config = read_flags(module.Config, module.RECIPES, flags.split())
    torch.manual_seed(0)
    method = getattr(module, common.METHODS[name])(config, make.shapes(320, config.image_size))
    method.start_epoch(getattr(config, "e_st", 0))
    images = make.shapes(16, config.image_size).images.float() / 255
    torch.manual_seed(1)
    out = method(images if method.views == 1 else torch.stack([images, images.flip(-1)], dim=1))
    weights = [p for name, p in method.encoder.named_parameters() if p.requires_grad and name != "positions"]
    found = torch.autograd.grad(out[loss] if loss else out, weights, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def beside_the_default(title, flags):
    """(cosine with the gradient of the default, of the same --ssl and --task; how many times as long)."""
    ours, other = gradient(title, " ".join(re.findall(r"--(?:ssl|task) \w+", flags))), gradient(title, flags)
    assert not torch.equal(ours, other)  # a cosine of 1.00 is no flag without effect
    return float(F.cosine_similarity(ours, other, dim=0)), float(other.norm() / ours.norm())


@pytest.mark.parametrize(("title", "flags", "cosine", "length"), MEASURED)
def test_the_gradient_turns_as_the_page_says(title, flags, cosine, length):
    turned = beside_the_default(title, flags)
    assert turned[0] == pytest.approx(float(cosine), abs=0.015)
    assert turned[1] == pytest.approx(float(length), rel=0.03)


def test_every_reading_has_its_six_cells():
    """And what it does, or "not measured"; nothing else stands for a figure that nobody has."""
    assert set(re.findall(r"^## (.*)$", PAGE, flags=re.MULTILINE)) == {*METHODS, "What the figures are"}
    for title, rows in ROWS.items():
        assert len(rows) >= 12, title
        for row in rows:
            assert list(row) == TITLES and all(row.values()), row
            assert row["flag"] == "-" or code_in(row["flag"]), row
            has_source = re.search(r"\]\(|`test_|cosine|by formula|not measured", row["effect"])
            assert has_source, row


def test_no_sentence_of_the_page_is_long():
    for sentence in re.split(r"[.:;|](?:\s|$)|\n\n|\n\* ", prose(PAGE)):
        assert len(sentence.split()) <= 25, sentence


def test_there_are_measured_figures_of_every_kind_of_loss():
    assert {title for title, *_ in MEASURED} == set(METHODS) - {"Evaluation", "FINOLA"}


LISTED = {  # what the papers number: tables, figures
    "magma": (range(1, 9), range(1, 7)),
    "mlo_mae": (range(1, 19), range(1, 7)),
    "mixedae": (("A1", "A2", "A3", "A4", 3), ("A1", 3, 6)),  # of the supplement, and what it tells of the main paper
    "ebm_pretrain": ((1, 2, 3, "A", "B", "C"), (1, 2, 3, 4, "A")),
    "finola": (range(1, 20), range(1, 17)),
}


@pytest.mark.parametrize("name", LISTED)
def test_every_table_and_figure_of_a_paper_is_on_its_page(name):
    """Once, with its command or why there is none."""
    (rows,) = [rows for rows in tables(PAGES[f"docs/{name}.md"]) if "table or figure" in rows[0]]
    found = {"Table": [], "Fig.": []}
    for row in rows:
        what, why = row.values()
        assert why
        for kind, numbers in re.findall(r"^(Table|Fig\.) ((?:[A-Z]?\d*, )*[A-Z]?\d*)", what):
            found[kind] += [number for number in numbers.split(", ") if number]
    assert [sorted(numbers) for numbers in found.values()] == [sorted(map(str, x)) for x in LISTED[name]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for title, flags, *_ in MEASURED:
        cosine, length = beside_the_default(title, flags)
        print(f"{title:<28} {flags:<32} cosine {cosine:5.2f}, length {length:.2f}")
