"""Whether README, docs and docstrings are true: commands parse, names and links exist, tables agree with each other."""

import contextlib
import functools
import importlib
import inspect
import itertools
import re
import shlex

import mutants
import pytest
from texts import PAGES, ROOT, blocks, code_in, commands, prose, section, source, tables

import common
import evaluate
from plumbing.asked import beside_settings
from plumbing.datasets import DATASETS
from plumbing.errors import UserError
from plumbing.settings import TrainConfig, choices_of, field_types, given_flags, read_flags
from plumbing.tables import ROWS, format_table
from protocols.settings import PROTOCOLS, RECIPES, settings_of
from protocols.settings import Config as Evaluation

README, RESULTS = PAGES["README.md"], PAGES["docs/results.md"]
METHODS = {name: importlib.import_module(name) for name in common.METHODS}


def assert_test_exists(name, *files):
    """`name` is a test of the files, of all without any; with "..." at its end, the beginning of exactly one."""
    paths = [ROOT / "tests" / f"test_{file}.py" for file in files] or (ROOT / "tests").glob("test_*.py")
    tests = {test for path in paths for test in re.findall(r"^def (test_\w+)", path.read_text(), flags=re.MULTILINE)}
    start = name.removesuffix("...")
    found = [test for test in tests if test == name or (start != name and test.startswith(start))]
    assert len(found) == 1, f"{name} names {len(found)} tests of {' '.join(files) or 'tests'}"


# --- the pages -------------------------------------------------------------------------------------------------------


def test_readme_fits_one_sitting():
    """At most 200 lines; a page of docs for each method, and README leads to every page."""
    assert README.count("\n") <= 200
    assert {f"docs/{name}.md" for name in METHODS} <= PAGES.keys()
    assert [page for page in PAGES if page != "README.md" and f"]({page})" not in README] == []


def slug(heading):
    """What a link calls a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    """To a file of the repository, and to a heading of it where one is named."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[page])):
        if re.match(r"https?://", link):
            continue
        file, _, heading = link.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.resolve().is_relative_to(ROOT) and path.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
            assert heading in map(slug, headings), link


def test_every_picture_is_shown():
    shown = {path for text in PAGES.values() for path in re.findall(r"!\[[^\]]+\]\((?:docs/)?([^)]+)\)", text)}
    assert {path.name for path in (ROOT / "docs").glob("*.png")} == shown


@pytest.mark.parametrize("page", PAGES)
def test_no_count_of_lines_stands_in_a_text(page):
    """It would be wrong after the next change."""
    assert not re.search(r"\d\s+lines\b", PAGES[page])


def test_the_house_has_the_rooms_that_the_readme_lists():
    (listed,) = [block for block in blocks(README, "") if "plumbing/" in block]
    rooms, inside = set(), set()
    for line in listed.splitlines():
        names, what = re.split(r" {3,}", line, maxsplit=1)
        rooms |= set(names.split())
        inside |= {names + file for file in re.findall(r"\w+\.py", what) if names.startswith("tests")}
    files = {f"{name}.py" for name in (*METHODS, "common", "train", "evaluate")}
    folders = {"plumbing/", "protocols/", "tests/", "docs/", "findings/"}
    assert rooms == files | folders and all((ROOT / x).exists() for x in rooms)
    assert inside and all((ROOT / file).exists() for file in inside)


# --- commands and flags ----------------------------------------------------------------------------------------------


def docstring_commands():
    """What stands in the docstrings on top of the files that start a command."""
    docs = [module.__doc__ for module in (*METHODS.values(), importlib.import_module("train"), evaluate)]
    return re.findall(r"^.*?(python (?:train|evaluate)\.py .*?)(?=  |$)", "\n".join(docs), flags=re.MULTILINE)


COMMANDS = list(dict.fromkeys([line for text in PAGES.values() for line in commands(text)] + docstring_commands()))


def assert_flags(config_class, flags):
    """Flags with values that the fields can take, or one flag alone."""
    if len(flags) == 1:
        name = flags[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        assert name in field_types(config_class), flags[0]
        return
    for name, value in given_flags(config_class, flags).items():
        choices = choices_of(field_types(config_class)[name])
        assert not choices or value in choices, f"--{name} {value}"


@pytest.mark.parametrize("command", [line for line in COMMANDS if re.match(r"python (train|evaluate)\.py ", line)])
def test_commands_parse(command):
    """Method, flags, the type of values, recipes; DIR and RUN are folders, and a single capital is any value."""
    _, script, first, *flags = shlex.split(command)
    if "--help" in (first, *flags):
        return
    assert script == "evaluate.py" or first in METHODS
    config_class = Evaluation if script == "evaluate.py" else METHODS[first].Config
    for i, word in reversed(list(enumerate(flags))):
        if re.fullmatch("[A-Z]", word):
            assert_flags(config_class, [flags[i - 1]])
            del flags[i - 1 : i + 1]
    if script == "evaluate.py":
        given = given_flags(Evaluation, [*itertools.dropwhile(lambda word: not word.startswith("-"), flags)])
        protocols = evaluate.protocols_of(given)  # raises UserError for one or for a recipe that does not exist
        for protocol in protocols:
            settings_of(protocol, {"image_size": 32} | given, "magma", dim=96, images=4096)  # and for other nonsense
        return
    _, flags = beside_settings().parse_known_args(flags)
    config = read_flags(config_class, METHODS[first].RECIPES, flags)
    assert config.data in (*DATASETS, "DIR")


@pytest.mark.parametrize("command", [line for line in COMMANDS if "tests" in line])
def test_commands_on_the_tests_name_what_exists(command):
    for word in shlex.split(command)[1:]:
        assert not word.endswith((".py", "tests")) or (ROOT / word).exists()


def test_there_are_commands_for_every_method():
    """Those of its paper's tables stand on its page."""
    for name in METHODS:
        page = [line for line in commands(PAGES[f"docs/{name}.md"]) if line.startswith(f"python train.py {name} ")]
        assert len(page) >= 7, name


CONFIGS = {"evaluate": Evaluation, "all": TrainConfig} | {name: module.Config for name, module in METHODS.items()}
NOT_OURS = ("--help", "--list", "--threads")  # of Python's scripts in tests/
NOT_OURS += tuple(beside_settings()._option_string_actions)  # no fields


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist_and_take_these_values(page):
    """On the page of a method those of its Config or of evaluate.py, elsewhere those of anything."""
    method = page.removeprefix("docs/").removesuffix(".md")
    classes = [CONFIGS[method], Evaluation] if method in CONFIGS else CONFIGS.values()
    for code in code_in(PAGES[page]):
        if not code.startswith("--") or code.split()[0] in NOT_OURS:
            continue
        problems = []
        for config_class in classes:
            with contextlib.suppress(AssertionError, UserError):
                assert_flags(config_class, [word for word in code.split() if not re.fullmatch("[A-Z]", word)])
                break
            problems.append(config_class)
        else:
            raise AssertionError(f"no such flag: {code}")


def test_the_table_of_protocols_names_all_of_them_and_their_recipes():
    (table,) = [rows for rows in tables(PAGES["docs/evaluating.md"]) if "`--protocol`" in rows[0]]
    listed = {}
    for row in table:
        _, _, recipes = row.values()
        listed |= {name: set(re.findall(r"`(\w+)`", recipes)) for name in re.findall(r"`(\w+)`", row["`--protocol`"])}
    assert listed == {name: set(RECIPES.get(name, ())) for name in PROTOCOLS}


def test_the_table_of_data_names_every_set():
    table = tables(PAGES["docs/data.md"])[0]
    assert set(re.findall(r"`(\w+)`", " ".join(row["`--data`"] for row in table))) == set(DATASETS)


# --- names -----------------------------------------------------------------------------------------------------------


def look_up(module, dotted):
    """`function` or `Class.method` of a method file, `common.X`, `plumbing.room.X` or `protocols.room.X`."""
    first, *rest = dotted.split(".")
    if first in ("plumbing", "protocols"):
        module, rest = importlib.import_module(f"{first}.{rest[0]}"), rest[1:]
    elif first in ("common", "evaluate", "train", *METHODS):
        module = importlib.import_module(first)
    else:
        rest = [first, *rest]
    return functools.reduce(getattr, rest, module)


def assert_exists(module, entry):
    """A function, perhaps with arguments, a class, a method, or flags."""
    if entry.startswith("--"):
        assert_flags(module.Config, entry.split())
        return
    dotted, arguments = re.fullmatch(r"([\w.]+)(?:\((.*)\))?", entry).groups()
    function = look_up(module, dotted)
    for name in re.findall(r"(\w+)=", arguments or ""):
        assert name in inspect.signature(function).parameters, entry


WRITTEN = ("names.txt", "classes.txt")  # by --protocol features


@pytest.mark.parametrize("page", PAGES)
def test_tests_and_files_that_a_page_names_exist(page):
    for entry in code_in(PAGES[page]):
        if re.fullmatch(r"test_\w+(\.\.\.)?", entry):
            assert_test_exists(entry)
        elif re.fullmatch(r"(\w+/)*\w+\.(py|md|txt)", entry) and entry not in WRITTEN:
            assert (ROOT / entry).exists(), entry


def test_every_fault_of_the_table_has_a_test():
    table = tables(section(PAGES["docs/runs.md"], "What happens when"))[0]
    assert len(table) >= 18
    for row in table:
        *_, tests = row.values()
        assert "`test_" in tests, row


@pytest.mark.parametrize("name", METHODS)
def test_what_the_table_of_faithfulness_names_exists(name):
    """Functions, their tests in the method's own files, and the flags behind a deviation."""
    rows = [row for table in tables(PAGES[f"docs/{name}.md"]) for row in table if "equation" in row]
    assert len(rows) >= 7
    for row in rows:
        _, functions, tests, *deviation = row.values()
        for entry in code_in(functions):
            assert_exists(METHODS[name], entry)
        assert code_in(tests), row
        for test in code_in(tests):
            assert_test_exists(test, name, *(["mobile_former"] if name == "finola" else []))
        for entry in code_in(" ".join(deviation)):
            if entry.startswith("--"):
                assert_exists(METHODS[name], entry)


@pytest.mark.parametrize("name", METHODS)
def test_the_map_from_equations_to_functions_names_what_exists(name):
    """The second column of the table on top of each file. An entry of several words is an explanation."""
    module = METHODS[name]
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
            elif part.startswith("--"):
                assert_flags(module.Config, [part])
            elif owner:  # parts of a module
                assert re.search(rf"\b{part}\b", inspect.getsource(look_up(module, owner)))
            else:
                look_up(module, part)
        assert checked, row


@pytest.mark.parametrize("name", METHODS)
def test_exercises_name_tests_and_lines_that_exist(name):
    """Each change that is asked for is one to a line of the file, and a test of the method notices it."""
    bullets = re.split(r"^(?:\*|\d\.) ", section(PAGES[f"docs/{name}.md"], "Exercises"), flags=re.MULTILINE)[1:]
    assert len(bullets) >= 2
    for bullet in bullets:
        bullet = bullet.split("\n\n")[0]
        assert "`test_" in bullet, bullet
        for entry in code_in(bullet):
            if entry.startswith("test_"):
                assert_test_exists(entry, name)
            elif not entry.startswith("python "):
                assert entry in source(name), entry


def test_the_mutant_that_is_explained_is_there():
    line = "(rank + shift) % images_per_group"
    assert f"`{line}`" in RESULTS and line in source("mixedae")
    assert any(line in mutant.old for mutant in mutants.read_mutants())


# --- numbers ---------------------------------------------------------------------------------------------------------


def results(text):
    """{command: row} of the tables whose rows are commands that train."""
    rows = [row for table in tables(text) for row in table if "command" in row and "linear" in row]
    return {code_in(row["command"])[0]: row for row in rows}


def test_the_results_of_readme_are_those_of_the_page_of_results():
    here, there = results(README), results(RESULTS)
    assert len(here) >= 6
    for command, row in here.items():
        for title in row.keys() - {"command"}:
            assert row[title] == there[command][title], (command, title)


def test_the_table_of_methods_has_their_files_pages_and_results():
    (table,) = [rows for rows in tables(README) if "idea" in rows[0]]
    names = {code_in(row["file"])[0].removesuffix(".py"): row for row in table}
    assert names.keys() == METHODS.keys()
    for name, row in names.items():
        result = results(RESULTS)[f"python train.py {name}"]
        assert row["linear on `shapes` (untrained)"] == f"{result['linear']} ({result['untrained']})"
        assert row["more"] == f"[{name}](docs/{name}.md)" and row["command"] == f"`python train.py {name}`"


@pytest.mark.parametrize("name", METHODS)
def test_the_page_of_a_method_has_the_results_of_its_recipe(name):
    """Or leads to the page that has them."""
    row, page = results(RESULTS)[f"python train.py {name}"], PAGES[f"docs/{name}.md"]
    assert "(results.md)" in page or all(row[title] in page for title in ("linear", "untrained"))


def test_the_table_that_training_prints_is_that_of_its_results():
    row = results(RESULTS)["python train.py magma"]
    columns = {"trained": ("linear", "kNN"), "untrained": ("untrained", "kNN untrained")}
    columns |= {"pixels": ("pixels", "kNN pixels")}
    values = {who: {"linear": float(row[a]), "knn": float(row[b])} for who, (a, b) in columns.items()}
    printed = next(block for block in blocks(README, "") if block.startswith("accuracy"))
    *table, after = printed.splitlines()
    assert table == format_table(values, "accuracy (%)").splitlines()
    assert after.removeprefix("see runs/magma-shapes/report.html; next: ") in COMMANDS


def test_the_table_that_evaluating_prints_has_its_form():
    """Read back and printed again, it is the same; the rows without training are those of the other table."""
    (printed,) = [block for block in blocks(PAGES["docs/evaluating.md"], "") if "trained encoder" in block]
    rows = {line[:20].strip(): line[20:].split() for line in printed.splitlines() if line[:3] in ("tra", "unt", "raw")}
    names = ("knn", "linear", "davies_bouldin", "cosine_ratio", "cosine_gap")
    titles = {title: name for name, title in ROWS.items()}
    values = {titles[row]: dict(zip(names, map(float, cells), strict=True)) for row, cells in rows.items()}
    assert printed.startswith(format_table(values) + "\n")
    row = results(RESULTS)["python train.py magma"]
    assert [f"{values[who]['knn']}" for who in values] == [row[x] for x in ("kNN", "kNN untrained", "kNN pixels")]
