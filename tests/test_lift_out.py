"""What is for copying stands alone, and the pieces that README and docs show run in someone else's loop."""

import ast
import builtins
import contextlib
import functools
import itertools
import re
import runpy
import symtable
import sys
from pathlib import Path

import pytest
import torch
from make import rand, settings_for, subject_of, vit
from texts import PAGES, blocks, section, source
from torch import nn

import common
from plumbing.datasets import STATISTICS
from plumbing.encoders import save_encoder
from protocols.export import loading_lines
from protocols.features import write_features

# --- pure functions --------------------------------------------------------------------------------------------------


def imports_of(tree):
    """The names that a file imports: {name: package}."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: node.module.split(".")[0] for alias in node.names}
    return found


def named(node):
    """What a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = getattr(node, "targets", None) or [getattr(node, "target", node)]
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def used(node):
    """The global names that a top-level statement uses, within its functions too, without builtins."""

    def inside(table):
        return {x.get_name() for x in table.get_symbols() if x.is_global()}.union(*map(inside, table.get_children()))

    table = symtable.symtable(ast.unparse(node), "", "exec")
    here = {x.get_name() for x in table.get_symbols() if x.is_referenced()}
    return here.union(*map(inside, table.get_children())) - set(dir(builtins))


def mathematics(name):
    """The statements between the imports and the first of the sections that hold networks or settings."""
    lines = source(name).splitlines()
    end = next(i for i, line in enumerate(lines) if re.match(r"# (Settings|Modules)\b", line))
    body = [node for node in ast.parse(source(name)).body[1:] if node.lineno < end]
    return [node for node in body if not isinstance(node, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize("name", common.METHODS)
def test_pure_functions_need_torch_einops_and_the_standard_library_alone(name):
    """And each other: what one copies must not pull in the rest of the project. Their small modules must not either."""
    nodes, imports = mathematics(name), imports_of(ast.parse(source(name)))
    assert sum(isinstance(node, ast.FunctionDef) for node in nodes) >= 5
    own = {defined for node in nodes for defined in named(node)}
    packages = {"torch", "einops"} | sys.stdlib_module_names
    outside = {(named(node)[0], imports.get(x, x)) for node in nodes for x in used(node) - own}
    assert {(function, package) for function, package in outside if package not in packages} == set()


# --- pieces in someone else's loop -----------------------------------------------------------------------------------

PIECE = re.compile(
    r"Copy\s+`(\w+)\.py`\s+from\s+`(\w+)`\s+to\s+`(\w+)`,\s+under\s+these\s+lines:\s+"
    r"```python\n(.*?)```(?:(?!```).)*```python\n(.*?)```",
    flags=re.DOTALL,
)
PIECES = [found for text in PAGES.values() for found in PIECE.findall(text)]  # file, first, last, imports, loop
NAMES = ["-".join(piece[:3]) for piece in PIECES]


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Transformer(nn.Module):
    """Someone's network with `blocks` on tokens (B, 1 + N, D)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)])

    def forward(self, images):
        return self.blocks(self.embed(images.flatten(2).transpose(1, 2))).mean(dim=1)


def sgd(*learning):
    """An optimiser of modules and tensors."""
    groups = [x.parameters() if isinstance(x, nn.Module) else [x] for x in learning]
    return torch.optim.SGD(itertools.chain(*groups), lr=0.1)


def around_magma():
    """The loss of the loop has no gradient here, so all of it is the regulariser's."""
    names = {"model": Transformer(), "criterion": lambda output, labels: 0 * output.sum()}
    return names | {"loader": [(rand(6, 3, 2, 2), None)] * 2, "optimizer": sgd(names["model"])}


def around_mixedae():
    cut = functools.partial(common.patchify, patch=2)
    names = {"embed": nn.Sequential(Apply(cut), nn.Linear(12, 8)), "encoder": nn.Linear(8, 8)}
    names |= {"decoder": nn.Linear(8, 12), "mask_token": nn.Parameter(rand(8))}
    return names | {"patchify": cut, "loader": [rand(8, 3, 8, 8)] * 2, "optimizer": sgd(*names.values())}


def around_attention():
    return {name: rand(2, 3, 64, 4, seed=i).requires_grad_() for i, name in enumerate("qkv")}


def around_energy():
    names = {"cnn": nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU()), "head": nn.Linear(8, 1, bias=False)}
    names |= {"alpha": nn.Parameter(torch.tensor(30.0))}
    return names | {"loader": [rand(4, 3, 8, 8)] * 2, "optimizer": sgd(*names.values())}


def around_finola():
    encoder = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(48, 256))
    names = {"encoder": encoder, "decoder": nn.Conv2d(256, 3, 1)}
    return names | {"loader": [rand(2, 3, 16, 16)] * 2, "optimizer": sgd(*names.values())}


def around_hypergradient():
    """Weights t of training images, judged by what a head c makes of the encoder e that they train."""
    encoder, head, call = nn.Linear(3, 4), nn.Linear(4, 2), torch.func.functional_call
    e, c = ({name: p.detach() for name, p in module.named_parameters()} for module in (encoder, head))
    x, y = rand(3, 5, 3), rand(3, 5, 2, seed=1)

    def level_1(e, t):
        return (t["weight"] * (call(encoder, e, x[0])[:, :2] - y[0]).square().mean(dim=1)).sum()

    def level(i, e, c):
        return (call(head, c, call(encoder, e, x[i])) - y[i]).square().mean()

    losses = [(level_1, functools.partial(level, 1), functools.partial(level, 2))] * 2
    return {"losses": losses, "e": e, "c": c, "t": {"weight": torch.ones(5)}, "lr": 0.1, "lr_t": 0.1}


# By a name that the snippet imports.
SURROUNDINGS = {"manifold_loss": around_magma, "mix": around_mixedae, "topk_attention": around_attention}
SURROUNDINGS |= {"restore": around_energy, "Finola": around_finola, "hypergradient": around_hypergradient}


@pytest.fixture(autouse=True)
def one_thread():
    """For small tensors, which two threads make slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(code, folder, **names):
    """Run a piece of code in a folder, among names -> all names afterwards."""
    torch.manual_seed(0)
    (folder / "loop.py").write_text(code)
    with contextlib.chdir(folder):
        return runpy.run_path("loop.py", init_globals=names)


def run_loop(code, folder):
    """Run a loop among made-up names; all that can learn must have a gradient, and what it makes must be finite."""
    imported = {alias.name for node in ast.parse(code).body if isinstance(node, ast.ImportFrom) for alias in node.names}
    torch.manual_seed(0)
    (surround,) = [function for name, function in SURROUNDINGS.items() if name in imported]
    names = run(code, folder, **surround())
    if "out" in names:
        names["out"].square().sum().backward()
    made = [names[name] for name in ("loss", "error", "restored", "z", "out", "gradient", "t") if name in names]
    assert made
    for value in made:
        for x in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
            assert x.isfinite().all()
    if "hypergradient" in names:
        assert names["gradient"].keys() == names["t"].keys()
        assert all(x.any() for x in names["gradient"].values()) and not (names["t"]["weight"] == 1).any()
        return
    # All that can learn has a gradient, and the optimiser has all of it.
    learning = {p for x in names.values() if isinstance(x, nn.Module) for p in x.parameters()}
    learning |= {x for x in names.values() if torch.is_tensor(x) and x.is_leaf and x.requires_grad}
    assert learning and all(x.grad is not None for x in learning)
    assert all(x.grad.isfinite().all() and x.grad.any() for x in learning)
    groups = names["optimizer"].param_groups if "optimizer" in names else [{"params": learning}]
    assert learning == {x for group in groups for x in group["params"]}


@pytest.mark.parametrize("piece", PIECES, ids=NAMES)
def test_a_piece_runs_in_someone_elses_loop(piece, tmp_path):
    *_, loop = piece
    assert len([line for line in loop.splitlines() if line.strip()]) <= 10, "a loop is short"
    run_loop(loop, tmp_path)


@pytest.mark.parametrize("piece", PIECES, ids=NAMES)
def test_the_lines_to_copy_are_enough(piece, tmp_path, monkeypatch):
    """The loop runs with nothing but the named lines under their imports, and all of these are needed."""
    name, first, last, imports, loop = piece
    tree = ast.parse(source(name))
    places = {defined: node for node in tree.body for defined in named(node)}
    start = min(x.lineno for x in (places[first], *getattr(places[first], "decorator_list", ())))
    lines = "\n".join(source(name).splitlines()[start - 1 : places[last].end_lineno])
    copied, known = ast.parse(lines).body, imports_of(ast.parse(imports))
    assert all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(imports).body)
    wanted = set().union(*map(used, copied)) - {defined for node in copied for defined in named(node)}
    assert wanted == known.keys(), "what the lines need, and what is imported above them"
    (tmp_path / f"{name}.py").write_text(f"{imports}\n\n{lines}\n")
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    run_loop(loop, tmp_path)
    assert Path(sys.modules[name].__file__).parent == tmp_path


def test_every_method_has_a_piece_to_lift_out():
    """README has MAGMA's, the page of each method its own."""
    assert {piece[0] for piece in PIECES} == common.METHODS.keys()
    assert [found[0] for found in PIECE.findall(PAGES["README.md"])] == ["magma"]
    for name in common.METHODS.keys() - {"magma"}:
        assert {found[0] for found in PIECE.findall(PAGES[f"docs/{name}.md"])} == {name}


def test_every_block_of_python_is_tried():
    """As a piece, its imports, one of the other tests below, or in tests/test_decoding.py."""
    tried = {code for piece in PIECES for code in piece[3:]} | {*USE, *LOAD, *BRIGHTEN, *FEATURES}
    assert {code for text in PAGES.values() for code in blocks(text, "python")} == tried


# --- the encoder and the data ---------------------------------------------------------------------------------------

USE = blocks(section(PAGES["README.md"], "Use the encoder"), "python")
LOAD = blocks(section(PAGES["docs/data.md"], "In Python"), "python")
BRIGHTEN = blocks(section(PAGES["docs/data.md"], "Your own pictures"), "python")
FEATURES = blocks(section(PAGES["docs/evaluating.md"], "Features of pictures"), "python")


def test_data_comes_as_the_page_says(tmp_path):
    names = run(LOAD[0], tmp_path)
    assert names["images"].shape == (8, 3, 32, 32) and names["labels"].shape == (8,)
    assert 0 <= names["images"].min() < names["images"].max() <= 1 and len(names["train"]) == 4096


def test_the_encoder_of_a_run_gives_features(tmp_path):
    encoder, path = common.ViT(32, 4, 12, 1, 3).eval(), tmp_path / "runs" / "magma-shapes" / "encoder.pt"
    path.parent.mkdir(parents=True)
    save_encoder(encoder, path)
    images = rand(2, 3, 32, 32)
    torch.testing.assert_close(run(USE[0], tmp_path, images=images)["features"], encoder(images))


def test_features_are_read_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_features(tmp_path, {}, subject_of(vit()), settings_for("features", "RUN", data="DIR"))
    names = run(FEATURES[0], tmp_path)
    assert names["features"].shape == (96, 16) and names["names"] == [str(i) for i in range(96)]


def test_the_page_shows_what_export_prints_for_a_run_of_magma():
    fields = common.ViT(32, 4, **common.VIT_SIZES["vit_micro"], **STATISTICS["shapes"]).fields
    (shown,) = blocks(section(PAGES["docs/evaluating.md"], "Weights for timm"), "")
    assert shown == loading_lines(fields, "runs/magma-shapes/timm.pth") + "\n"
