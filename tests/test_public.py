"""The public names: one list, a line on each in the package's docstring, and each with a docstring of its own."""

import inspect
import re

import pytest

import minilora

DESCRIBED = dict(re.findall(r"^  (\w+)  +(\S.*)$", minilora.__doc__, re.MULTILINE))
PUBLIC = sorted(set(minilora.__all__) - {"__version__"})


def test_the_docstring_has_a_line_on_each_public_name_and_on_no_other():
    assert len(PUBLIC) > 25 and sorted(DESCRIBED) == PUBLIC


def test_what_is_imported_into_the_package_is_public():
    def is_ours(value):
        return not inspect.ismodule(value) and getattr(value, "__module__", "").startswith("minilora.")

    assert sorted(name for name, value in vars(minilora).items() if is_ours(value)) == PUBLIC


class Own(minilora.Module):
    """A module that is no language model."""


def test_a_function_of_a_model_refuses_what_is_none():
    found = set()
    for name in (name for name in PUBLIC if not name.endswith("Error")):
        function = getattr(minilora, name)
        arguments = [*inspect.signature(function).parameters.values()]
        if not arguments or arguments[0].name != "model":
            continue
        found.add(name)
        others = ["" for each in arguments[1:] if each.default is each.empty and each.kind != each.VAR_KEYWORD]
        of_language_models = "LanguageModel" in str(arguments[0].annotation)
        for model in (("model", "tokenizer"), None, "tiny", *([Own()] if of_language_models else [])):
            said = (
                "needs a language model, .* got a Own: .* loss.backward"
                if isinstance(model, Own)
                else "expected a minilora model, got a .* ml.load"
            )
            with pytest.raises(TypeError, match=said):
                function(model, *others).__enter__()  # of a context manager
    assert {"generate", "fit", "save_adapter", "mixed_batch", "Streams"} < found


@pytest.mark.parametrize(
    "function, said",
    [
        (lambda wrong: minilora.Llama(wrong), r"^expected a minilora\.Config or .*, got a dict$"),
        (lambda wrong: minilora.finetune(wrong), r"^expected minilora\.Options\(data=.*, got a dict$"),
        (lambda wrong: minilora.encode_text(wrong, minilora.load("tiny")[1], 8), "^expected a text, got a dict$"),
        (lambda wrong: minilora.Step.of(wrong, []), "^expected a minilora model, got a dict"),
    ],
)
def test_a_dict_is_no_config_no_options_no_text_and_no_model(function, said):
    with pytest.raises(TypeError, match=said):
        function({"data": "legal"})


def test_each_public_name_says_what_it_does():
    for name in PUBLIC:
        text = inspect.getdoc(getattr(minilora, name)) or ""
        assert len(text.split()) >= 5, f"{name} has no docstring to speak of"
        assert not text.startswith(f"{name}("), f"{name} has the docstring that dataclasses make up"
