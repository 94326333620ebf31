"""The public names: one list, a line on each in the package's docstring, and each with a docstring of its own."""

import inspect
import re

import numpy as np
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


MODEL, TOKENIZER = minilora.load("tiny")
TEXTS = minilora.read_records([{"text": "a b c"}])
SAMPLES = minilora.encode_records(TEXTS, TOKENIZER)


class Table(list):
    """Like a DataFrame: a loop finds the names of its columns."""

    columns = ("text",)


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


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda weights: minilora.AdamW(weights, betas=0.9), "betas must be two numbers, .* got 0.9"),
        (lambda weights: minilora.AdamW(weights, betas=(0.9, 0.9, 0.9)), "two numbers"),
        (lambda weights: minilora.AdamW(weights, betas=(0.9, 1.0)), r"below 1, got \(0.9, 1.0\)"),
        (lambda weights: minilora.AdamW(weights, betas=(-0.1, 0.9)), "at least 0"),
        (lambda weights: minilora.AdamW(weights, eps=-1), "must not be negative, got -1 and"),
        (lambda weights: minilora.AdamW(weights, weight_decay=-1), "must not be negative, got 1e-08 and -1"),
        (lambda weights: minilora.AdamW(weights, eps="1e-8"), "must be finite numbers .* got '1e-8' and"),
        (lambda weights: minilora.AdamW(weights, weight_decay=float("nan")), "finite numbers .* got 1e-08 and nan"),
        (lambda weights: minilora.AdamW(weights, lr=float("inf")), "finite number of at least 0, got inf"),
        (lambda weights: minilora.AdamW(weights, lr_scale=[2.0]), "factors by name, got a list"),
        (lambda weights: minilora.AdamW({"w": weights[0]}, lr_scale={"w": -1.0}), r"lr_scale\['w'\] must .* got -1.0"),
        (lambda weights: minilora.AdamW({"w": weights[0]}, lr_scale={"w": "2"}), r"lr_scale\['w'\] must .* got '2'"),
        (lambda weights: minilora.SGD(weights, 0.1, -0.1), "at least 0 and below 1, got -0.1"),
        (lambda weights: minilora.SGD(weights, 0.1, 1), "at least 0 and below 1, got 1"),
        (lambda weights: minilora.SGD(weights, 0.1, float("nan")), "at least 0 and below 1, got nan"),
        (lambda weights: minilora.SGD(weights, 0.1, "0.9"), "at least 0 and below 1, got '0.9'"),
        (lambda weights: minilora.clip_grad_norm(weights, "1"), "max_norm must be a number above 0, .* got '1'"),
        (lambda weights: minilora.keyword_recall("ab", [*TEXTS, *TEXTS]), "a list of answers, .* a single str: put it"),
        (lambda weights: minilora.keyword_recall([None], TEXTS), "a list of answers, each a text, got a NoneType"),
        (lambda weights: minilora.predict(MODEL, TOKENIZER, ["a"], handbook="a.md"), "read_handbook reads, got a str"),
        (lambda weights: minilora.predict(MODEL, TOKENIZER, ["a"], schema={}), "read_schema reads, got a dict"),
        (lambda weights: Own().set_submodule("", np.ones(1)), "derived from ml.Module, got a ndarray"),
        (lambda weights: minilora.load("tiny", quantized=4), "quantized must be one of true, false, nf4, .* got 4"),
        (lambda weights: minilora.encode_text("a b", TOKENIZER, 0), "max_length must be .* of at least 1, got 0"),
        (lambda weights: minilora.encode_text("a b", TOKENIZER, None), "max_length must be .* of at least 1, got None"),
        (lambda weights: minilora.encode_records(TEXTS, TOKENIZER, max_length=2.5), "at least 1, got 2.5"),
        (lambda weights: minilora.predict(MODEL, TOKENIZER, ["a"], None), "max_new_tokens must be .*, got None"),
        (lambda weights: minilora.predict(MODEL, TOKENIZER, {"text": "a"}), "expected a list of texts, got a dict"),
        (
            lambda weights: minilora.predict(MODEL, TOKENIZER, Table(["text"])),
            "expected a list of texts, got a Table",
        ),
        (lambda weights: minilora.answer_all(MODEL, TOKENIZER, [], 2.5), "max_new_tokens must be .*, got 2.5"),
        (lambda weights: minilora.fit(MODEL, SAMPLES, None), "steps must be a whole number of at least 1, got None"),
        (lambda weights: minilora.encode_records(TEXTS, TOKENIZER, max_length=0), "at least 1, got 0"),
        (lambda weights: minilora.mixed_batch(MODEL, "legal").__enter__(), "expected a list .* got 'legal' alone"),
        (lambda weights: minilora.mixed_batch(MODEL, {"legal": 0.5}).__enter__(), "expected a list .* alone"),
        (lambda weights: minilora.mixed_batch(MODEL, None).__enter__(), "expected a list .* got None alone"),
        (lambda weights: minilora.mean_loss(MODEL, SAMPLES, 0), "must be a whole number of at least 1, got 0"),
        (lambda weights: minilora.mean_loss(MODEL, SAMPLES, 2.5), "of at least 1, got 2.5"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_is_computed(call, said):
    with pytest.raises((TypeError, ValueError), match=said):
        call([minilora.Parameter([1.0])])


def test_a_signature_shows_no_address():
    shown = {name: str(inspect.signature(getattr(minilora, name))) for name in PUBLIC if not name.endswith("Error")}
    assert [name for name, signature in shown.items() if " at 0x" in signature] == []


def test_configs_and_options_show_what_differs_from_the_default_and_can_be_read_back():
    config = minilora.Config(11, 8, 6, 2, 2, 1, qk_norm=True)
    options = minilora.Options(data="medical", r=4, target_modules=["q_proj"], rank_pattern={"q_proj": 2})
    for value, names in ((config, ["head_dim", "qk_norm"]), (options, ["base", "data", "r", "target_modules"])):
        assert eval(repr(value), vars(minilora)) == value
        assert all(f"{name}=" in repr(value) for name in names) and len(repr(value)) < 200
    assert repr(minilora.Options()) == "Options(base='smollm2', data='legal')"


def test_each_public_name_says_what_it_does():
    for name in PUBLIC:
        text = inspect.getdoc(getattr(minilora, name)) or ""
        assert len(text.split()) >= 5, f"{name} has no docstring to speak of"
        assert not text.startswith(f"{name}("), f"{name} has the docstring that dataclasses make up"
