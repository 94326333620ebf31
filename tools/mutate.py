"""Mutants: small mistakes made one at a time in a copy of the code, and whether the tests of their lines notice them.

    python tools/mutate.py minilora/lora --each 12 > before      # needs `coverage`; --tests: folders of tests, --jobs
    python tools/mutate.py minilora/lora --like before > after   # the same mutants, where their code is still there
    python tools/mutate.py --compare before after                # status 1 if one was noticed before and is not after

A mutant is named by its file, function and change, not by its line. `--each` takes those whose hash comes first, so an
edit elsewhere in the file does not change which ones are drawn. Only tests that pass are asked.
"""

import argparse
import ast
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).parents[1]
NAMES = "Lt LtE, Gt GtE, Eq NotEq, In NotIn, Is IsNot, Add Sub, Mult Div, FloorDiv Mult, And Or"
PAIRS = [[getattr(ast, name) for name in pair.split()] for pair in NAMES.split(", ")]
OTHER = dict(PAIRS) | {b: a for a, b in PAIRS}
UNSEEN = ("annotation", "returns", "exc", "cause")  # types, and the words of errors


@dataclass
class Mutant:
    name: str
    path: str
    lines: range  # of its statement, without the body
    text: str  # of the whole file


def copied(node, **fields):
    """The source of a node with other fields."""
    return ast.unparse(type(node)(**{**vars(node), **fields}))


def changes(node):
    """Pairs of a node and the source that takes its place."""
    match node:
        case ast.Compare(ops=[op, *others]) if type(op) in OTHER:
            yield node, copied(node, ops=[OTHER[type(op)](), *others])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in OTHER:
            yield node, copied(node, op=OTHER[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield node, ast.unparse(operand)
        case ast.Constant(value=bool(value)):
            yield node, str(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield from ((node, str(other)) for other in {value + 1, -value} - {value})
        case ast.IfExp(orelse=orelse):
            yield node, ast.unparse(orelse)
        case ast.If(test=test):
            yield test, "False"
        case ast.Call(args=args, keywords=keywords):
            if len(args) > 1 and not any(isinstance(one, ast.Starred) for one in args[:2]):
                yield node, copied(node, args=[args[1], args[0], *args[2:]])
            for one in keywords:
                yield node, copied(node, keywords=[other for other in keywords if other is not one])
        case ast.Return(value=ast.AST()):
            yield node, "return None"
        case ast.Raise() | ast.AugAssign() | ast.Expr(value=ast.Call()) | ast.Break() | ast.Continue():
            yield node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield node, "pass"


def mutants(path):
    """All mutants of a file."""
    source = (ROOT / path).read_bytes()
    begins = [0]
    for line in source.splitlines(keepends=True):
        begins.append(begins[-1] + len(line))
    seen = Counter()

    def visit(node, where, lines):
        if isinstance(node, ast.JoinedStr):  # its parts have no places in Python 3.11
            return
        if isinstance(node, ast.stmt):
            lines = range(node.lineno, node.body[0].lineno if hasattr(node, "body") else node.end_lineno + 1)
            where = f"{where}.{node.name}" if hasattr(node, "name") else where
        for old, new in changes(node):
            start, end = begins[old.lineno - 1] + old.col_offset, begins[old.end_lineno - 1] + old.end_col_offset
            new = f"({new})" if isinstance(old, ast.expr) else new
            name = " ".join(f"{path}{where}: {source[start:end].decode()} -> {new}".split())
            seen[name] += 1
            text = (source[:start] + new.encode() + source[end:]).decode()
            yield Mutant(f"{name} #{seen[name]}", path, lines or range(node.lineno, node.lineno + 1), text)
        for field, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and field not in UNSEEN:
                    yield from visit(child, where, lines)

    return list(visit(ast.parse(source), "", None))


PYTEST = ("-q", "-n", "0", "-p", "no:cacheprovider")


def cover(out, paths, tests):
    """Runs in the copy: write which tests run each line, and the seconds of each that passes, as JSON."""
    import coverage
    import pytest

    watch = coverage.Coverage(data_file=None, config_file=False, include=[str(ROOT / path) for path in paths])
    seconds, failed = Counter(), set()

    class Contexts:
        def pytest_runtest_logstart(self, nodeid):
            watch.switch_context(nodeid)

        def pytest_runtest_logreport(self, report):
            seconds[report.nodeid] += report.duration
            if not report.passed:
                failed.add(report.nodeid)

    watch.start()
    pytest.main([*PYTEST, *tests], plugins=[Contexts()])
    watch.stop()
    by_line = {path: watch.get_data().contexts_by_lineno(str(ROOT / path)) for path in paths}
    Path(out).write_text(json.dumps([by_line, {test: seconds[test] for test in seconds.keys() - failed}]), "utf-8")


def call(copy, command, limit=None):
    """The status of Python with a command in the copy; None if it takes longer than the limit, in seconds."""
    found = {"PYTHONPATH": os.pathsep.join(map(str, (copy, copy / "tools")))}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=copy, env=os.environ | found, start_new_session=True, **quiet
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what the tests started
        process.wait()


def copy_of_the_tree(folder):
    """A copy of what git knows, and of new files that it does not ignore."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def place(file, text):
    """Write a source file, and remove what is compiled: it may be as old and as long as the new one."""
    file.write_text(text, "utf-8")
    for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
        compiled.unlink()


def noticed(mutant, copy, tests, seconds):
    """Whether one of the tests fails, or does not end, with the mutant in the copy."""
    (copy / "asked").write_text("\n".join(sorted(tests, key=seconds.get)), "utf-8")
    place(copy / mutant.path, mutant.text)
    try:
        limit = 60 + 4 * sum(seconds[test] for test in tests)
        return bool(tests) and call(copy, ["-m", "pytest", *PYTEST, "-x", "@asked"], limit) != 0
    finally:
        place(copy / mutant.path, (ROOT / mutant.path).read_text("utf-8"))


def run(names, tests, each, wanted, seed, jobs):
    """Print each mutant with whether it is noticed; `wanted` are the names of those to try, if not the first `each`."""
    files = (ROOT / name for name in names)
    files = [one for file in files for one in (sorted(file.rglob("*.py")) if file.is_dir() else [file])]
    paths = [file.relative_to(ROOT).as_posix() for file in files]
    chosen = []
    for path in paths:
        order = sorted(mutants(path), key=lambda one: hashlib.sha256(f"{seed}{one.name}".encode()).digest())
        chosen += order[:each] if wanted is None else [one for one in order if one.name in wanted]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        copies = Queue()
        for i in range(jobs):
            copies.put(copy_of_the_tree(Path(folder) / str(i)))
        tests = tests or sorted({f"tests/{Path(path).parent.name}" for path in paths})
        call(Path(folder) / "0", ["-c", f"import mutate; mutate.cover('covered', {paths}, {tests})"])
        by_line, seconds = json.loads((Path(folder) / "0/covered").read_text("utf-8"))

        def line(mutant):
            lines, of = {int(n): set(tests) & seconds.keys() for n, tests in by_line[mutant.path].items()}, mutant.lines
            ran = set().union(*(lines.get(n, ()) for n in of)) or set().union(*lines.values())  # at the top of the file
            copy = copies.get()
            try:
                told = "noticed" if noticed(mutant, copy, ran, seconds) else "not noticed"
            finally:
                copies.put(copy)
            return f"{told:12} {mutant.name}"

        same = Mutant("", paths[0], range(0), (ROOT / paths[0]).read_text("utf-8"))
        if noticed(same, Path(folder) / "0", seconds, seconds):
            sys.exit("the tests, called one by one in another order, fail without a mutant")
        print(f"{len(seconds)} tests, {len(chosen)} mutants", file=sys.stderr)
        for said in pool.map(line, chosen):
            print(said, flush=True)


def read(file):
    """Whether each mutant of a printed list was noticed, by its name."""
    return {line[13:]: line.startswith("noticed") for line in Path(file).read_text("utf-8").splitlines()}


def compare(before, after):
    """The number of mutants that are no longer noticed; print them, those not tried again, and those newly noticed."""
    before, after = read(before), read(after)
    groups = {
        "no longer noticed": [name for name, was in before.items() if was and after.get(name) is False],
        "noticed before, and not tried again (code that is gone?)": [
            n for n, was in before.items() if was and n not in after
        ],
        "newly noticed": [name for name, now in after.items() if now and before.get(name) is False],
    }
    for title, names in groups.items():
        print(f"{title}: {len(names)}", *names, sep="\n  ")
    return len(groups["no longer noticed"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="FILE-OR-FOLDER")
    parser.add_argument(
        "--tests", nargs="+", metavar="FOLDER", help="default: the folders of tests named as the code's"
    )
    parser.add_argument("--each", type=int, default=12, help="mutants of a file")
    parser.add_argument("--like", metavar="FILE", help="those that an earlier run printed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--compare", nargs=2, metavar=("BEFORE", "AFTER"))
    options = parser.parse_args()
    if options.compare:
        sys.exit(compare(*options.compare) > 0)
    wanted = read(options.like) if options.like else None
    run(options.names, options.tests, options.each, wanted, options.seed, options.jobs)
