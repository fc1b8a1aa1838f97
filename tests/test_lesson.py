"""The lesson, docs/lesson.ipynb: its cells run here without a notebook server, and what each section claims is true.

They run once, in order, among one set of names, with fewer steps (LESSON_FAST). The outputs in the file are those of
the whole run, as Jupyter wrote them.
"""

import base64
import contextlib
import io
import json
import re
import struct
import sys

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from texts import ROOT

import magma

TEXT = (ROOT / "docs" / "lesson.ipynb").read_text(encoding="utf-8")
BOOK = json.loads(TEXT)
CELLS = [cell for cell in BOOK["cells"] if cell["cell_type"] == "code"]
IDS = [cell["id"] for cell in CELLS]


def size_of(png):
    """Width and height of a PNG file in pixels."""
    return struct.unpack(">II", png[16:24])


@pytest.fixture(scope="module")
def lesson():
    """All names after the last cell, and for each cell (what it printed, its figures as PNG)."""
    made, names, backend = {}, {"__name__": "lesson"}, matplotlib.get_backend()
    with pytest.MonkeyPatch.context() as patched, matplotlib.rc_context(), torch.random.fork_rng():
        patched.setenv("LESSON_FAST", "1")
        patched.chdir(ROOT / "docs")
        patched.setattr("sys.path", list(sys.path))
        plt.switch_backend("agg")
        plt.close("all")
        for cell in CELLS:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile("".join(cell["source"]), f"cell {cell['id']}", "exec"), names)  # noqa: S102
            figures = []
            for number in plt.get_fignums():
                plt.figure(number).savefig(file := io.BytesIO(), format="png", bbox_inches="tight")  # as Jupyter does
                figures.append(file.getvalue())
            plt.close("all")
            made[cell["id"]] = printed.getvalue(), figures
        plt.switch_backend(backend)
    return names, made


def falls(losses, part=10, to=0.8):
    return sum(losses[-part:]) < to * sum(losses[:part])


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_file_is_a_notebook_that_any_jupyter_reads():
    assert (BOOK["nbformat"], BOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in BOOK["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    assert all(isinstance(cell["source"], list) and not cell["metadata"] for cell in BOOK["cells"])
    assert len(TEXT.encode()) < 1_500_000


def test_the_file_says_nothing_of_the_machine():
    assert BOOK["metadata"].keys() == {"kernelspec", "language_info"}
    assert BOOK["metadata"]["language_info"] == {"name": "python"}
    text = "".join(line for cell in BOOK["cells"] for line in cell["source"])
    text += "".join(str(output.get("text", "")) for cell in CELLS for output in cell["outputs"])
    assert not re.search(r"/(?:home|tmp|root|Users|work)\b|site-packages|Warning|\d\d:\d\d:\d\d", text)


def test_each_section_has_something_to_look_for_and_a_question():
    texts = ["".join(cell["source"]) for cell in BOOK["cells"] if cell["cell_type"] == "markdown"]
    sections = [text for text in texts if re.match(r"## \d", text)]
    assert len(sections) == 7 and all("**Look for**" in text and "**Question.**" in text for text in sections)


# --- the outputs are those of the code -------------------------------------------------------------------------------


def test_the_cells_were_run_in_order():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, 1 + len(CELLS)))


@pytest.mark.parametrize("cell", CELLS, ids=IDS)
def test_kept_outputs_are_those_of_the_code(cell, lesson):
    """As many figures, of the same size in pixels but for the width of some digits; the same print, but for numbers
    with a decimal point, which depend on the processor and on the number of steps.
    """
    printed, figures = lesson[1][cell["id"]]
    texts = [output for output in cell["outputs"] if output["output_type"] == "stream"]
    kept = [output["data"]["image/png"] for output in cell["outputs"] if output["output_type"] == "display_data"]
    assert len(texts) + len(kept) == len(cell["outputs"]) and len(figures) == len(kept)
    for figure, other in zip(figures, kept, strict=True):
        for side, as_kept in zip(size_of(figure), size_of(base64.b64decode(other)), strict=True):
            assert side == pytest.approx(as_kept, rel=0.03)
    kept = "".join(line for output in texts for line in output["text"])
    assert re.sub(r"-?\d+\.\d+", "#", printed) == re.sub(r"-?\d+\.\d+", "#", kept)
    assert "False" not in printed


# --- what the sections claim -----------------------------------------------------------------------------------------


def test_ten_lines_are_the_masked_autoencoder_and_learn(lesson):
    names, _ = lesson
    losses = []
    for function in (names["masked_loss"], names["library_loss"]):
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(1)
            losses.append(function(names["images"]))
    torch.testing.assert_close(*losses)
    assert falls(names["mae_losses"]) and not torch.equal(names["before"][:, 2], names["after"][:, 2])
    assert torch.equal(names["before"][:, :2], names["after"][:, :2])  # the same pictures under the same masks


def test_the_graph_is_symmetric_and_its_springs_pull(lesson):
    names, _ = lesson
    weights, steps = names["weights"], names["moves"]
    torch.testing.assert_close(weights, weights.T)
    assert ((weights >= 0) & (weights <= 1)).all() and not weights.diagonal().any()
    y, pull, *_ = steps[0]
    by_hand = (weights[:, :, None] * (y[None] - y[:, None])).sum(dim=1) * 2 / 20**2  # each edge pulls at both ends
    torch.testing.assert_close(pull, by_hand, rtol=1e-4, atol=1e-5)
    assert sorted(names["pull_losses"], reverse=True) == names["pull_losses"]
    assert steps[-1][2] < 0.2 * steps[0][2] and steps[-1][3] < 0.8 * steps[0][3]  # all shrinks, neighbours more so
    laplacian = magma.laplacian(weights, normalized=False)
    torch.testing.assert_close((y * (laplacian @ y)).sum() / 20**2, torch.tensor(names["pull_losses"][0]))


def test_the_energy_falls_at_each_step(lesson):
    names, _ = lesson
    assert falls(names["energy_losses"]) and names["energies"].shape == (9, 6)
    assert (names["energies"].diff(dim=0) < 0).all()
    assert (names["errors"][2] < names["errors"][0]).all()  # two steps restore


def test_the_map_follows_from_its_vector(lesson):
    """In the row and in the column of q each cell z has the neighbour z + A z_n, z_n of zero mean and unit variance."""

    def step(z, matrix):
        centred = z - z.mean(dim=-1, keepdim=True)
        return z + centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() @ matrix.T

    names, _ = lesson
    z, unroll = names["z"].movedim(1, -1), names["unroll"]  # (6, 8, 8, 64)
    torch.testing.assert_close(z[:, 4, 4], names["vectors"].detach())
    for line, after, before in ((z[:, 4], unroll.right, unroll.left), (z[:, :, 4], unroll.down, unroll.up)):
        torch.testing.assert_close(step(line[:, 4:-1], after), line[:, 5:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(step(line[:, 1:5], before), line[:, :4], rtol=1e-4, atol=1e-4)
    assert falls(names["finola_losses"])


def test_the_mixture_is_made_of_four_pictures(lesson):
    names, _ = lesson
    assert names["assignment"].flatten().bincount().tolist() == [16] * 4
    for weights in (names["untrained"], names["attention"]):
        assert (weights.sum(dim=-1) <= 1.0001).all()  # the rest goes to the CLS token
    assert falls(names["mixed_losses"], 3, to=0.9)


def test_the_mask_is_learned_from_the_task(lesson):
    names, _ = lesson
    probability = names["probability"]
    assert (probability[0] - 0.5).abs().max() < (probability[-1] - 0.5).abs().max() and probability[-1].std() > 0.02
    assert names["agreement"] > 0.3 and names["soon"][0] < names["soon"][1]
    assert (names["where"] > 0.5).sum() >= 8
