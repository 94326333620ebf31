"""The house rules that can be read from the source: who imports whom, what is never called, what is documented."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import minilora

ROOT = Path(minilora.__file__).parent
TOUR = Path(__file__).parents[1] / "minilora/README.md"  # of the clone: an installed package has none


@cache
def trees():
    """The syntax trees of the package's files, by their path within it."""
    paths = {path.relative_to(ROOT).as_posix(): path for path in ROOT.rglob("*.py")}
    return {file: ast.parse(path.read_text(encoding="utf-8")) for file, path in paths.items()}


@cache
def walked(tree):
    """What the rules below are about, of all that a tree holds."""
    return [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom, ast.Call, ast.keyword))]


# A folder imports from itself and from the floors below it.
FLOORS = (
    "reference",
    "version", "terminal", "progress", "options", "toml", "engine", "files", "nn", "lora", "models", "data", "generate",
    "measure", "pages", "train", "experiments", "claims", "serve", "course", "site", "commands", "cli", "__main__",
)  # fmt: skip
STOREY = {name: floor for floor, name in enumerate(FLOORS)}


def imported_names(file, tree):
    """The absolute names of all that a file imports, anywhere in it: modules, and what it takes from modules."""
    package = ["minilora", *file.split("/")[:-1]]
    for node in walked(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def part_of(file):
    return file.split("/")[0].removesuffix(".py")


def parts_used(file):
    names = (name.split(".") for name in imported_names(file, trees()[file]))
    return {name[1] for name in names if name[0] == "minilora" and len(name) > 1 and name[1] in STOREY}


def test_every_part_has_a_storey():
    assert {part_of(file) for file in trees()} - set(STOREY) == {"__init__"}, "a new folder needs its place in FLOORS"


def test_the_tour_has_the_folders_in_this_order():
    rows = re.findall(r"^\| (\w+)/ \|", TOUR.read_text("utf-8"), re.MULTILINE)
    assert rows == [part for part in FLOORS if (ROOT / part).is_dir()]


def test_the_tour_names_the_files_of_every_folder_but_those_of_many_alike():
    rows = re.findall(r"^\| (\w+)/ \|(.*)", TOUR.read_text("utf-8"), re.MULTILINE)
    files = {part: {path.stem for path in (ROOT / part).glob("[!_]*.py")} for part, _ in rows}
    unnamed = [f"{part}/{name}" for part, row in rows for name in files[part] - set(re.findall(r"\w+", row))]
    assert [file for file in unnamed if file.split("/")[0] not in ("claims", "course", "commands")] == []


def test_imports_go_one_way():
    own = {file: STOREY.get(part_of(file), max(STOREY.values())) for file in trees()}
    upwards = [f"{file} uses {part}/" for file in trees() for part in parts_used(file) if STOREY[part] > own[file]]
    assert upwards == [], "a file imports only from its own folder and those above it in minilora/README.md"


@cache
def modules():
    """The files by the names of their modules."""
    names = {file: ".".join(["minilora", *file.removesuffix(".py").split("/")]) for file in trees()}
    return {name.removesuffix(".__init__"): file for file, name in names.items()}


def files_used(file):
    """The files that a file imports from, also where only its types need them."""
    names = {name for name in imported_names(file, trees()[file]) if name.startswith("minilora")}
    known = modules()
    absent = {name for name in names if name not in known and name.rpartition(".")[0] not in known}
    assert absent == set(), f"{file} imports what is not there"
    return {known.get(name) or known[name.rpartition(".")[0]] for name in names}


def circle(uses):
    """Files each of which imports the next, and the last one the first; None where there are no such files."""
    try:
        TopologicalSorter(uses).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_no_file_is_imported_by_what_it_imports():
    assert circle({file: files_used(file) for file in trees()}) is None


def test_a_circle_is_noticed():
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


def test_the_reader_of_imports_sees_every_form():
    source = (
        "import minilora.cli\nfrom .. import nn\ndef f():\n    from ..nn.llama import Llama\n    from . import ops\n"
    )
    found = set(imported_names("engine/x.py", ast.parse(source)))
    assert {"minilora.cli", "minilora.nn", "minilora.nn.llama.Llama", "minilora.engine.ops"} == found


# -- import minilora ---------------------------------------------------------------------------------------------------

LOADED = """
import sys
before = set(sys.modules)
import minilora.cli
minilora.cli.build_parser()  # all commands
new = {name.partition(".")[0] for name in set(sys.modules) - before} - {"minilora"}
print(*sorted(name for name in new if "-packages" in str(getattr(sys.modules.get(name), "__file__", ""))))
import minilora.engine.ops, minilora.nn.llama
"""


def test_importing_minilora_and_its_commands_loads_numpy_and_no_other_third_party_package():
    done = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, check=True, cwd=ROOT.parent, timeout=60
    )
    assert done.stdout.split() == ["numpy"]


PUBLIC = [
    *("load", "pull", "Config", "Llama", "Module", "Parameter", "Tensor", "no_grad", "op", "SGD", "AdamW"),
    *("LoraConfig", "add_adapter", "set_adapter", "merge_adapter", "unmerge_adapter", "remove_adapter"),
    *("save_adapter", "load_adapter", "audit", "AuditError", "gradcheck", "GradientError"),
    *("count_parameters", "generate"),
]


def test_promised_names_are_public_and_every_public_name_exists():
    assert set(PUBLIC) <= set(minilora.__all__)
    assert [name for name in minilora.__all__ if not hasattr(minilora, name)] == []


# -- what is never called ----------------------------------------------------------------------------------------------

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def dangers(file, tree):
    """What could run code from a file: unpicklers imported, eval and the like called, NumPy told to unpickle."""
    yield from (name for name in imported_names(file, tree) if name.split(".")[0] in UNPICKLERS)
    for node in walked(tree):
        match node:
            case ast.Call(func=ast.Name(id="eval" | "exec" | "__import__" as name)):
                yield f"{name}, line {node.lineno}"
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=False)):
                pass
            case ast.keyword(arg="allow_pickle"):
                yield f"allow_pickle, line {node.value.lineno}"


def test_no_file_unpickles_or_evaluates():
    assert [(file, danger) for file in trees() for danger in dangers(file, trees()[file])] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec('')",
        "np.load(f, allow_pickle=True)",
        "import dill as d",
    ],
)
def test_what_could_run_code_from_a_file_is_noticed(source):
    assert list(dangers("io/x.py", ast.parse(source)))


def test_switching_a_model_to_eval_is_not_mistaken_for_it():
    assert not list(dangers("io/x.py", ast.parse("model.eval(); np.load(f, allow_pickle=False)")))


# -- what is documented ------------------------------------------------------------------------------------------------


def undocumented(tree, owner=""):
    """Public functions, classes and methods without docstring; properties and overloads may let their name speak."""
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
        if not decorators & {"property", "setter", "overload"} and not ast.get_docstring(node):
            yield f"{owner}{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node, f"{node.name}.")


def test_every_file_function_class_and_method_says_what_it_is():
    assert [file for file, tree in trees().items() if not ast.get_docstring(tree)] == [], "files without docstring"
    missing = [f"{name} in {file}" for file, tree in trees().items() for name in undocumented(tree)]
    assert missing == [], "public functions, classes and methods without docstring"


def test_a_missing_docstring_is_noticed():
    source = "class A:\n    'a'\n    def f(self): pass\n    def _g(self): pass\ndef h(): pass\n"
    assert list(undocumented(ast.parse(source))) == ["A.f", "h"]
