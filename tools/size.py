"""Size of the code, as tinygrad's sz.py counts it: lines that hold a token, tokens, and tokens a line.

    python tools/size.py [--files]      # by folder (and file), beside the budgets of pyproject.toml
    python tools/size.py BASE           # what changed since a git revision, by file, for a commit message
    python tools/size.py --lower        # budgets that are above today's counts go down to them, and none goes up

Docstrings, comments and blank lines do not count, so deleting them gains nothing; nor do shorter names or longer lines,
since tokens a line must not rise.
"""

import argparse
import io
import math
import re
import subprocess
import tarfile
import tokenize
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOP = ("minilora", "tests", "tools")
HEART = ("minilora/engine/", "minilora/nn/", "minilora/lora/", "minilora/train/loop.py")
COUNTED = (tokenize.OP, tokenize.NAME, tokenize.NUMBER, tokenize.STRING)
ROOM = 0.3  # tokens a line: deleting a file with shorter lines raises those of its folder, too


def count(text):
    """Lines that hold a token, and tokens; an f-string is one token, as it is to Python 3.11."""
    lines, tokens, depth = set(), 0, 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        docstring = token.string.startswith('"""') and token.line.strip().startswith('"""')
        if depth == 0 and (kind.endswith("STRING_START") or (token.type in COUNTED and not docstring)):
            tokens += 1
        if depth or kind.endswith("STRING_START") or (token.type in COUNTED and not docstring):
            lines.update(range(token.start[0], token.end[0] + 1))
        depth += kind.endswith("STRING_START") - kind.endswith("STRING_END")
    return len(lines), tokens


def here():
    """The text of every file by its path."""
    files = (file for top in TOP for file in sorted((ROOT / top).rglob("*.py")))
    return {file.relative_to(ROOT).as_posix(): file.read_text("utf-8") for file in files}


def at(revision):
    """The same in a revision."""
    packed = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        files = [one for one in tar if one.isfile() and one.name.endswith(".py") and one.name.split("/")[0] in TOP]
        return {one.name: tar.extractfile(one).read().decode() for one in files}


def folders_of(path):
    """The rows of the table in which a file counts."""
    top, *rest = path.split("/")
    rooms = [top] if top != "minilora" else [top, f"{top}/{rest[0]}" if len(rest) > 1 else "minilora/*.py"]
    return rooms + ["heart"] * path.startswith(HEART)


def by_folder(counts):
    """(files, lines, tokens) by row of the table, from (lines, tokens) by path."""
    rows = {}
    for path, (lines, tokens) in counts.items():
        for folder in folders_of(path):
            files, *sums = rows.get(folder, (0, 0, 0))
            rows[folder] = files + 1, sums[0] + lines, sums[1] + tokens
    return dict(sorted(rows.items()))


def budgets():
    """[tokens, tokens a line] by folder."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["minilora"]["size"]


def above(rows, allowed):
    """A sentence for each folder that is above its budget, has more tokens a line, or has no budget."""
    wrong = [f"{name} needs a budget in pyproject.toml: [tool.minilora.size]" for name in rows if name not in allowed]
    for name, (most, densest) in allowed.items():
        _, lines, tokens = rows.get(name, (0, 0, 0))
        if tokens > most:
            wrong.append(
                f"{name} has {tokens:,} tokens, and its budget is {most:,}: tools/size.py BASE says which files"
            )
        if tokens > densest * lines:
            wrong.append(f"{name} has {tokens / lines:.2f} tokens a line, and was to have at most {densest}: no golf")
    return wrong


def lower(rows):
    """Write today's counts, a little rounded up, over the budgets above them; a folder that is gone loses its row."""
    file = ROOT / "pyproject.toml"
    above, heading, text = file.read_text("utf-8").partition("[tool.minilora.size]")
    for name, (most, densest) in budgets().items():
        row = re.compile(rf'^"?{re.escape(name)}"? = \[.*?\]', re.MULTILINE)
        if name not in rows:
            text = re.sub(row.pattern + r".*\n", "", text, flags=re.MULTILINE)
            continue
        _, lines, tokens = rows[name]
        fewer = min(most, math.ceil(tokens / 100) * 100), min(densest, math.ceil((tokens / lines + ROOM) * 10) / 10)
        text = row.sub(lambda found, new=fewer: f"{found[0].partition('[')[0]}[{new[0]}, {new[1]}]", text)
    file.write_text(above + heading + text, "utf-8")


def page(rows):
    """The table as text."""
    allowed = budgets()
    lines = [f"{'':32}{'files':>6}{'lines':>9}{'tokens':>10}{'a line':>8}{'budget':>10}{'a line':>8}"]
    for name, (files, of_lines, tokens) in rows.items():
        most, densest = (f"{n:,}" for n in allowed.get(name, (0, 0)))
        lines.append(
            f"{name:32}{files:6,}{of_lines:9,}{tokens:10,}{tokens / max(of_lines, 1):8.2f}{most:>10}{densest:>8}"
        )
    return "\n".join(lines)


def difference(before, after):
    """Lines and tokens before and after, for each file that differs and each row of the table."""
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    old, new = ({name: count(files[name]) for name in files} for files in (before, after))
    old_rows, new_rows = ({k: v[1:] for k, v in by_folder(counts).items()} for counts in (old, new))
    lines = [f"{'':44}{'lines':>16}{'tokens':>24}"]
    for left, right, keys in ((old, new, names), (old_rows, new_rows, [*dict.fromkeys([*old_rows, *new_rows])])):
        for name in keys:
            was, now = left.get(name, (0, 0)), right.get(name, (0, 0))
            if was != now:
                pairs = (f"{a:,} -> {b:,} ({b - a:+,})" for a, b in zip(was, now, strict=True))
                lines.append(f"{name:44}" + "  ".join(f"{pair:>26}" for pair in pairs))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", metavar="BASE")
    parser.add_argument("--files", action="store_true")
    parser.add_argument("--lower", action="store_true")
    options = parser.parse_args()
    texts = here()
    if options.base:
        print(difference(at(options.base), texts))
    else:
        counts = {path: count(text) for path, text in texts.items()}
        if options.lower:
            lower(by_folder(counts))
        if options.files:
            print(page({path: (1, *pair) for path, pair in counts.items()}))
        print(page(by_folder(counts)))
