"""Every folder keeps to its budget of tokens, and nobody keeps to one by longer lines: [tool.minilora.size]."""

import size

TEXT = '''"""A docstring."""

# a comment
def f(x):
    """Another one,

    of several lines."""
    return f"{x} and {f'{x:.2f}'}", """text
over lines"""  # a comment
'''


def test_every_folder_is_within_its_budget():
    rows = size.by_folder({path: size.count(text) for path, text in size.here().items()})
    assert size.above(rows, size.budgets()) == []


def test_only_lines_that_hold_a_token_count():
    assert size.count(TEXT) == (3, 10)


def test_a_folder_fails_with_too_many_tokens_with_longer_lines_and_without_a_budget():
    rows = size.by_folder({"minilora/nn/a.py": (10, 100), "minilora/b.py": (1, 10), "tests/c.py": (10, 121)})
    assert rows["minilora"] == (2, 11, 110) and rows["heart"] == rows["minilora/nn"] == (1, 10, 100)
    allowed = {"minilora": [110, 10], "heart": [99, 10], "minilora/nn": [100, 10], "tests": [200, 12]}
    assert [line.split()[0] for line in size.above(rows, allowed)] == ["minilora/*.py", "heart", "tests"]


def test_budgets_are_lowered_and_never_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(size, "ROOT", tmp_path)
    table = 'a = ["b"]\n[tool.minilora.size]\n# why\na = [900, 11.0]  # because\n"b/c" = [100, 7.0]\ngone = [5, 1.0]\n'
    (tmp_path / "pyproject.toml").write_text(table)
    size.lower({"a": (1, 40, 401), "b/c": (1, 10, 120)})
    kept = table.replace("900, 11.0", "500, 10.4").replace("gone = [5, 1.0]\n", "")
    assert (tmp_path / "pyproject.toml").read_text() == kept
