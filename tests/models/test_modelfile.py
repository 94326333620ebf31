"""Modelfiles for ollama: the template in Go's form gives the prompt that the model's own template gives."""

import re

import pytest
from modelfiles import CHATML, new_tokenizer

from minilora.models.modelfile import can_be_written, template_of, write_modelfile
from minilora.models.tokenizer import Tokenizer

DEFAULT = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
TEMPLATES = {
    "chatml": CHATML,
    "a default system message": DEFAULT + CHATML,
    "a beginning": "{{ bos_token }}" + CHATML,
    "the system message in the user's turn": (
        "{% set s = messages[0]['content'] + '\n' if messages[0]['role'] == 'system' else '' %}"
        "<|im_start|>user\n{{ s }}{{ messages[-1]['content'] }}<|im_end|>\n<|im_start|>assistant\n"
    ),
    "no system message": "[{{ messages[-1]['content'] }}]",
}


def in_go(template, **values):
    """The part of Go's templates that is used here: variables, if, else."""
    choice = r"\{\{ if \.(\w+) \}\}(.*?)(?:\{\{ else \}\}(.*?))?\{\{ end \}\}"
    text = re.sub(choice, lambda m: m[2] if values.get(m[1]) else m[3] or "", template, flags=re.DOTALL)
    return re.sub(r"\{\{ \.(\w+) \}\}", lambda m: values.get(m[1], ""), text)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_in_gos_form_gives_the_models_own_prompt(name):
    tokenizer = new_tokenizer(template=TEMPLATES[name], bos="<|endoftext|>")
    for system in ("", "Be brief."):
        messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": "Why?"}]
        expected = tokenizer.render(messages, answer_next=True).removeprefix("<|endoftext|>")
        got = in_go(template_of(tokenizer), System=system, Prompt="Why?", Response="So.")
        assert got == expected + "So.<|im_end|>"


def test_an_answer_ends_as_in_the_models_own_template():
    tokenizer = Tokenizer(new_tokenizer().core, "<|endoftext|>", CHATML)  # as Qwen2.5's base names it
    assert template_of(tokenizer).endswith("{{ .Response }}<|im_end|>")


def test_a_turn_that_begins_with_the_beginning_token_itself_keeps_it():
    template = template_of(new_tokenizer(bos="<|im_start|>"))  # as SmolLM2's
    assert in_go(template, Prompt="Why?").startswith("<|im_start|>user\nWhy?")


def test_the_file_names_the_model_next_to_it_and_every_end_token(tmp_path):
    tokenizer = new_tokenizer()
    tokenizer.ends = ["<|im_end|>", "<|endoftext|>"]
    path = write_modelfile(tmp_path / "my model.gguf", tokenizer)
    assert path.name == "my model.Modelfile"
    text = path.read_text()
    first, *_, one, other = text.splitlines()
    assert first == "FROM ./my model.gguf"
    assert (one, other) == ('PARAMETER stop "<|im_end|>"', 'PARAMETER stop "<|endoftext|>"')
    assert "SYSTEM" not in text.replace(".System", "")


@pytest.mark.parametrize("system", ["Be kind.", 'Say "yes".\nThen stop.', ""])
def test_the_file_has_the_system_prompt_that_the_adapter_was_trained_under(system, tmp_path):
    text = write_modelfile(tmp_path / "x.gguf", new_tokenizer(), system).read_text()
    assert re.findall(r'^SYSTEM """(.*?)"""$', text, re.DOTALL | re.MULTILINE) == [system]


@pytest.mark.parametrize("system", ['Use """ often.', 'Say "yes"', None])
def test_a_system_prompt_that_would_end_too_early_is_not_written(system, tmp_path):
    assert not can_be_written(system)
    assert "\nSYSTEM" not in write_modelfile(tmp_path / "x.gguf", new_tokenizer(), system).read_text()
