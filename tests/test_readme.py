"""What README and docstrings say of the code: snippets run, names exist, commands parse, copied parts stand alone."""

import ast
import builtins
import contextlib
import dataclasses
import fnmatch
import functools
import importlib
import inspect
import itertools
import re
import runpy
import shlex
import symtable
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import common
import evaluate
import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()
PAPERS = {"MAGMA": "magma", "MixedAE": "mixedae", "FINOLA": "finola", "MLO-MAE": "mlo_mae"}
PAPERS |= {"Energy-inspired pretraining": "ebm_pretrain"}


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def source(name):
    return (ROOT / f"{name}.py").read_text()


def names_of_tests(*files):
    """The names of the tests in some files of tests/, all of them without any."""
    paths = [ROOT / "tests" / f"test_{name}.py" for name in files] or (ROOT / "tests").glob("test_*.py")
    return {name for path in paths for name in re.findall(r"^def (test_\w+)", path.read_text(), flags=re.MULTILINE)}


def assert_test_exists(name, *files):
    """`name` is a test of the files; with "..." at its end, the beginning of exactly one."""
    start = name.removesuffix("...")
    found = [test for test in names_of_tests(*files) if test == name or (start != name and test.startswith(start))]
    assert len(found) == 1, f"{name} names {len(found)} tests of {' '.join(files) or 'tests'}"


# --- what is for copying stands alone --------------------------------------------------------------------------------

EXCEPTIONS = {
    ("mixedae", "top_keys"): {"numpy"},  # which selects on CPUs five to ten times as fast as torch
}


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
    end = next(i for i, line in enumerate(lines) if re.match(r"# (Settings|Modules|Backbones)\b", line))
    body = [node for node in ast.parse(source(name)).body[1:] if node.lineno < end]
    return [node for node in body if not isinstance(node, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize("name", train.METHODS)
def test_pure_functions_need_torch_einops_and_the_standard_library_alone(name):
    """And each other: what one copies must not pull in the rest of the project. Their small modules must not either."""
    nodes, imports = mathematics(name), imports_of(ast.parse(source(name)))
    assert sum(isinstance(node, ast.FunctionDef) for node in nodes) >= 5
    own = {defined for node in nodes for defined in named(node)}
    packages = {"torch", "einops"} | sys.stdlib_module_names
    foreign = {}
    for node in nodes:
        outside = {imports.get(x, "the rest of the file") for x in used(node) - own} - packages
        if outside:
            foreign[name, "".join(named(node)[:1])] = outside
    assert foreign == {key: value for key, value in EXCEPTIONS.items() if key[0] == name}


# --- lift out a piece ------------------------------------------------------------------------------------------------

BLOCKS = re.findall(r"(.*?)```python\n(.*?)```", section("Lift out a piece"), flags=re.DOTALL)
SNIPPETS = [(" ".join(text.split()), code) for text, code in BLOCKS]  # with the text before, which says what to copy
COPIED = re.compile(r"copy `(\w+)\.py` from `(\w+)` to `(\w+)`[^;]*; needs ([\w ,]+)\)")


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


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


def around_magma(folder):
    """The loss of the loop has no gradient here, so all of it is the regulariser's."""
    names = {"model": Transformer(), "criterion": lambda output, labels: 0 * output.sum()}
    return names | {"loader": [(rand(6, 3, 2, 2), None)] * 2, "optimizer": sgd(names["model"])}


def around_mixedae(folder):
    cut = functools.partial(common.patchify, patch=2)
    names = {"embed": nn.Sequential(Apply(cut), nn.Linear(12, 8)), "encoder": nn.Linear(8, 8)}
    names |= {"decoder": nn.Linear(8, 12), "mask_token": nn.Parameter(rand(8))}
    return names | {"patchify": cut, "loader": [rand(8, 3, 8, 8)] * 2, "optimizer": sgd(*names.values())}


def around_attention(folder):
    return {name: rand(2, 3, 64, 4, seed=i).requires_grad_() for i, name in enumerate("qkv")}


def around_energy(folder):
    names = {"cnn": nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU()), "head": nn.Linear(8, 1, bias=False)}
    names |= {"alpha": nn.Parameter(torch.tensor(30.0))}
    return names | {"loader": [rand(4, 3, 8, 8)] * 2, "optimizer": sgd(*names.values())}


def around_finola(folder):
    encoder = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(48, 256))
    names = {"encoder": encoder, "decoder": nn.Conv2d(256, 3, 1)}
    return names | {"loader": [rand(2, 3, 16, 16)] * 2, "optimizer": sgd(*names.values())}


def around_hypergradient(folder):
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


def around_load_encoder(folder):
    encoder, path = common.ViT(8, 4, 12, 1, 3), folder / "runs" / "magma-shapes" / "encoder.pt"
    path.parent.mkdir(parents=True)
    common.save_encoder(encoder, path)
    return {"known": encoder, "images": rand(2, 3, 8, 8)}


def around_timm(folder):
    return {"encoder": common.ViT(8, 4, 12, 1, 3), "torch": torch}


# By a name that the snippet imports.
SURROUNDINGS = {"manifold_loss": around_magma, "mix": around_mixedae, "topk_attention": around_attention}
SURROUNDINGS |= {"restore": around_energy, "Finola": around_finola, "hypergradient": around_hypergradient}
SURROUNDINGS |= {"load_encoder": around_load_encoder, "rearrange": around_timm}


def imported(code, what=lambda node: [alias.name for alias in node.names]):
    return {name for node in ast.parse(code).body if isinstance(node, ast.ImportFrom) for name in what(node)}


def modules_of(code):
    return imported(code, lambda node: [node.module])


@pytest.fixture
def one_thread():
    """For small tensors, which two threads make slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_snippet(code, folder):
    """Run a block of the README among made-up names -> all names afterwards."""
    torch.manual_seed(0)
    (surround,) = [function for name, function in SURROUNDINGS.items() if name in imported(code)]
    (folder / "loop.py").write_text(code)
    with contextlib.chdir(folder):
        names = runpy.run_path("loop.py", init_globals=surround(folder))
    if "out" in names:
        names["out"].square().sum().backward()
    for value in ("loss", "error", "restored", "z", "out", "gradient", "t"):
        value = names.get(value, [])
        for x in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
            assert x.isfinite().all()
    if "optimizer" in names or "out" in names:
        # All that can learn has a gradient, and the optimiser has all of it.
        learning = {p for x in names.values() if isinstance(x, nn.Module) for p in x.parameters()}
        learning |= {x for x in names.values() if torch.is_tensor(x) and x.is_leaf and x.requires_grad}
        assert learning and all(x.grad is not None for x in learning)
        assert all(x.grad.isfinite().all() and x.grad.any() for x in learning)
        groups = names["optimizer"].param_groups if "optimizer" in names else [{"params": learning}]
        assert learning == {x for group in groups for x in group["params"]}
    return names


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("code", [code for _, code in SNIPPETS], ids=lambda code: "_".join(sorted(imported(code))))
def test_snippets_run_in_someone_elses_loop(code, tmp_path):
    names = run_snippet(code, tmp_path)
    if "hypergradient" in names:
        assert names["gradient"].keys() == names["t"].keys()
        assert all(x.any() for x in names["gradient"].values()) and not (names["t"]["weight"] == 1).any()
    if "features" in names:
        torch.testing.assert_close(names["features"], names["known"](names["images"]))
    if "weights" in names:  # timm's layout: a convolution, and positions with one for the CLS token
        encoder, images, weights = names["encoder"], rand(2, 3, 8, 8), names["weights"]
        bias = weights["patch_embed.proj.bias"]
        tokens = nn.functional.conv2d(images, weights["patch_embed.proj.weight"], bias, encoder.patch)
        tokens = tokens.flatten(2).transpose(1, 2) + weights["pos_embed"][:, 1:]
        torch.testing.assert_close(tokens, encoder.embed(images))


COPIES = [(found, code) for text, code in SNIPPETS if (found := COPIED.search(text))]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("found", "code"), COPIES, ids=["-".join(found.groups()[:3]) for found, _ in COPIES])
def test_the_lines_to_copy_are_enough(found, code, tmp_path, monkeypatch):
    """The snippet runs with nothing but these lines and the imports that they are said to need, and needs all of it."""
    name, first, last, needs = found.groups()
    tree, needs = ast.parse(source(name)), set(re.split(", | and ", needs.lower()))
    places = {defined: node for node in tree.body for defined in named(node)}
    start = min(x.lineno for x in (places[first], *places[first].decorator_list))
    lines = "\n".join(source(name).splitlines()[start - 1 : places[last].end_lineno])
    uses, imports = set().union(*map(used, ast.parse(lines).body)), imports_of(tree)
    assert {imports[x] for x in uses if x in imports} == needs
    known = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    chosen = [ast.unparse(node) for node in known if set(imports_of(ast.Module([node], [])).values()) <= needs]
    (tmp_path / f"{name}.py").write_text("\n".join([*chosen, lines]) + "\n")
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    run_snippet(code, tmp_path)
    assert Path(sys.modules[name].__file__).parent == tmp_path


def test_every_method_has_a_snippet_and_none_is_long():
    for text, code in SNIPPETS:
        assert len([line for line in code.splitlines() if line.strip()]) <= 10, code
        assert bool(COPIED.search(text)) == bool(modules_of(code) & train.METHODS.keys()), "which lines to copy?" + code
    assert set().union(*[modules_of(code) for _, code in SNIPPETS]) >= train.METHODS.keys()


# --- names -----------------------------------------------------------------------------------------------------------


def look_up(module, dotted):
    """`function`, `Class.method` or `common.X`, from a method file. Raises AttributeError where it does not exist."""
    start = common if dotted.startswith("common.") else module
    return functools.reduce(getattr, dotted.removeprefix("common.").split("."), start)


def assert_exists(module, entry):
    """A function, perhaps with arguments, a class, a method, or flags."""
    if entry.startswith("--"):
        assert_flags(module.Config, entry.split())
        return
    dotted, arguments = re.fullmatch(r"([\w.]+)(?:\((.*)\))?", entry).groups()
    function = look_up(module, dotted)
    for name in re.findall(r"(\w+)=", arguments or ""):
        assert name in inspect.signature(function).parameters, entry


def assert_flags(config_class, flags):
    """Flags with values that the fields can take, or one flag alone."""
    if len(flags) == 1:
        name = flags[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        assert name in {field.name for field in dataclasses.fields(config_class)}, flags[0]
        return
    comments = common.field_comments(config_class)
    for name, value in common.given_flags(config_class, flags).items():
        if isinstance(value, str) and name not in ("data", "root", "out", "start", "device"):
            choices = re.findall(r"[\w*]+", comments[name])  # a field's comment lists what it can be
            assert any(fnmatch.fnmatch(value, choice) for choice in choices), f"--{name} {value}: {comments[name]}"


def code_in(text):
    return re.findall(r"`([^`]+)`", text)


def faithfulness_rows():
    """(method file, cells of a row) for every row of the tables."""
    paper = ""
    for part in section("Faithful to the papers").strip().split("\n\n"):
        if part.startswith("| equation "):
            for line in part.splitlines()[2:]:
                yield PAPERS[paper], [cell.strip() for cell in line.strip("|").split("|")]
        paper = part.split(",")[0]  # a table comes after the line that names its authors


def test_what_the_tables_of_faithfulness_name_exists():
    """Functions, tests, and the flags behind a deviation."""
    methods = []
    for name, (_, functions, tests, deviation) in faithfulness_rows():
        module = importlib.import_module(name)
        methods.append(name)
        for entry in code_in(functions):
            assert_exists(module, entry)
        assert code_in(tests)
        for test in code_in(tests):
            assert_test_exists(test, name, *(["mobile_former"] if name == "finola" else []))
        for entry in code_in(deviation):
            if entry.startswith("--"):
                assert_exists(module, entry)
    assert set(methods) == set(train.METHODS) and len(methods) > 40


@pytest.mark.parametrize("name", train.METHODS)
def test_the_map_from_equations_to_functions_names_what_exists(name):
    """The second column of the table on top of each file. An entry of several words is an explanation."""
    module = importlib.import_module(name)
    header, *rows = module.__doc__.split("\nEquation ")[1].split("\n\n")[0].splitlines()
    column = header.index("function") + len("Equation ")
    assert len(rows) >= 8
    for row in rows:
        assert row[column - 1] == " " and row[column] != " ", row
        entry, checked = row[column:], 0
        owner, _, listed = entry.rpartition(": ")
        if owner and owner != "tests":
            look_up(module, owner)
        if entry.startswith("--") or re.fullmatch(r"\w+\(.*\)", entry):
            assert_exists(module, entry)
            continue
        for part in re.split(r", (?:and )?| \((?:and )?|\)", listed):
            if " " in part or not part or part == "...":
                continue
            checked += 1
            if part.startswith("test_"):
                assert_test_exists(part, name)
            elif owner:  # parts of a module
                assert re.search(rf"\b{part}\b", inspect.getsource(look_up(module, owner)))
            else:
                look_up(module, part)
        assert checked, row


def test_exercises_name_tests_and_lines_that_exist():
    parts = re.split(r"\n\*\*`(\w+)\.py`\*\*\n", section("How to read a method file"))
    exercises = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert exercises.keys() == train.METHODS.keys()
    for name, text in exercises.items():
        bullets = text.split("\n\n")[0].removeprefix("* ").split("\n* ")
        assert 2 <= len(bullets) <= 3
        for bullet in bullets:
            assert "`test_" in bullet, bullet
            for entry in code_in(bullet):
                if entry.startswith("test_"):
                    assert_test_exists(entry, name)
                else:
                    assert entry in source(name), entry
    for entry in code_in(section("How to read a method file")):
        if entry.startswith("test_"):
            assert_test_exists(entry)
        elif re.fullmatch(r"[\w/]+\.py", entry):
            assert (ROOT / entry).exists(), entry
    assert "`(rank + shift) % images_per_group`" in README and "(rank + shift) % images_per_group" in source("mixedae")


# --- commands and numbers --------------------------------------------------------------------------------------------


def commands():
    """Every command line of the README, and of the docstrings on top of the files that they start."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [part.strip() for block in blocks for line in block.splitlines() for part in line.split("&&")]
    inline = code_in(re.sub(r"```.*?```", "", README, flags=re.DOTALL))
    lines += [" ".join(code.removeprefix("OMP_NUM_THREADS=1 ").split()) for code in inline]
    for name in (*train.METHODS, "train", "evaluate"):
        doc = importlib.import_module(name).__doc__
        lines += re.findall(r"python (?:train|evaluate)\.py .*?(?=  |$)", doc, flags=re.MULTILINE)
    return [line for line in dict.fromkeys(lines) if re.match(r"python (train|evaluate)\.py .", line)]


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    """Method, flags, the type of values, recipes; DIR and RUN are folders, and a single capital is any value."""
    _, script, first, *flags = shlex.split(command, comments=True)
    if "--help" in (first, *flags):
        return
    assert script == "evaluate.py" or first in train.METHODS
    module = evaluate if script == "evaluate.py" else importlib.import_module(first)
    for i, word in reversed(list(enumerate(flags))):
        if re.fullmatch("[A-Z]", word):
            assert_flags(module.Config, [flags[i - 1]])
            del flags[i - 1 : i + 1]
    if len(flags) > 1:
        assert_flags(module.Config, flags)
    if module is evaluate:
        given = common.given_flags(evaluate.Config, flags)
        assert set(given.get("protocol", ())) <= set(evaluate.PROTOCOLS)
        assert given.get("recipe", "") in {"", *[name for recipes in evaluate.RECIPES.values() for name in recipes]}
        return
    config = common.read_flags(module.Config, module.RECIPES, flags)
    common.check_config(config)
    assert config.data in (*common.DATASETS, "DIR")


def test_there_are_commands_for_every_method():
    for name in train.METHODS:
        assert sum(command.startswith(f"python train.py {name} ") for command in commands()) >= 8, name


def test_files_have_as_many_lines_as_the_readme_says():
    said = dict(re.findall(r"`(\w+\.py)`, (\d+) lines", README))
    true = {f"{name}.py": str(source(name).count("\n")) for name in train.METHODS}
    assert said == true, "true are " + ", ".join(f"`{name}`, {count} lines" for name, count in true.items())


def test_the_first_sections_of_common_are_about_as_long_as_the_readme_says():
    about = int(re.search(r"sections 1 to 4 of `common.py` first, about (\d+) lines", README)[1])
    lines = source("common").splitlines().index("# 5. Several processes") - 1
    assert abs(about - lines) <= 50, f"sections 1 to 4 of common.py have {lines} lines"


def test_every_test_of_the_table_of_faults_exists():
    names = re.findall(r"`(test_[a-z]\w+)`", section("Runs"))
    assert len(names) >= 20
    for name in names:
        assert_test_exists(name)
