"""The examples in docstrings run and give what they show."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import minilora

EXTRAS = {"starlette": "serve", "uvicorn": "serve"}  # packages, and what installs them


def modules_with_examples():
    for found in pkgutil.walk_packages(minilora.__path__, "minilora."):
        if not found.name.endswith("__main__"):
            try:
                module = importlib.import_module(found.name)
            except ModuleNotFoundError as error:
                if error.name not in EXTRAS:
                    raise
                left_out = pytest.mark.skip(reason=f"needs {error.name}: pip install '.[{EXTRAS[error.name]}]'")
                yield pytest.param(None, 0, id=found.name, marks=left_out)
                continue
            if (shown := inspect.getsource(module).count(">>> ")) > 0:
                yield pytest.param(module, shown, id=found.name)


MODULES = list(modules_with_examples())


def test_there_are_examples():
    assert len(MODULES) > 5


@pytest.mark.parametrize(("module", "shown"), MODULES)
def test_every_example_of_a_module_gives_what_it_shows(module, shown):
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted == shown
