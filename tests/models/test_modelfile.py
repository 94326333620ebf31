"""Modelfiles for ollama: the template in Go's form gives the prompt that the model's own template gives."""

import re
from pathlib import Path

import pytest
from modelfiles import CHATML, new_tokenizer
from tokenizers.processors import TemplateProcessing

from minilora.data.labels import LabelTask
from minilora.models.modelfile import held_of, template_of, write_modelfile
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
    "a refused system message": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m['content'] }}]{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"
    ),
    "earlier answers in another form": (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}assistant: <think></think>{% endif %}"
    ),
}
WITHOUT_SYSTEM = ("no system message", "a refused system message")
SINGLE = ("the system message in the user's turn", "no system message")


def in_go(template, messages):
    """The part of Go's templates that is used here, with the values that ollama gives: if, else, range, eq, not."""
    words = re.split(r"\{\{ (.*?) \}\}", template)
    values = {"System": "\n\n".join(m["content"] for m in messages if m["role"] == "system"), "Messages": messages}

    def block(at, scope, runs):
        """The text from a place to the `else` or `end` of its block, and that place."""
        text = words[at] if runs else ""
        at += 1
        while at < len(words) and words[at] != "end" and not words[at].startswith("else"):
            word = words[at]
            if word.startswith("range"):
                inner = ""
                for i, each in enumerate(messages):
                    one, end = block(at + 1, {"Role": each["role"], "Content": each["content"], "i": i}, runs)
                    inner += one
            elif word.startswith("if "):
                inner, end = choice(at, scope, runs)
            elif word.startswith("$last"):
                inner, end = "", at
                scope["last"] = scope["i"] == len(messages) - 1
            else:
                inner, end = (scope | values)[word.removeprefix(".")], at
            text += inner + words[end + 1] if runs else ""
            at = end + 2
        return text, at

    def choice(at, scope, runs):
        condition = words[at].removeprefix("else ").removeprefix("if ")
        role = re.fullmatch('eq .Role "(.*)"', condition)
        found = {".System": bool(values["System"]), "$last": scope.get("last"), "not $last": not scope.get("last")}
        holds = scope["Role"] == role[1] if role else found[condition]
        text, end = block(at + 1, scope, runs and holds)
        if words[end].startswith("else"):
            part = choice if words[end] != "else" else block
            other, end = part(end if part is choice else end + 1, scope, runs and not holds)
            text += other
        return text, end

    return block(0, {}, True)[0]


def talk(turns, system):
    said = [{"role": role, "content": f"{role} {i}"} for i in range(turns) for role in ("user", "assistant")]
    return [{"role": "system", "content": system}] * bool(system) + said[:-1]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_the_template_in_gos_form_gives_the_models_own_prompt(name, system):
    """Once only with the token that begins a text, which ollama adds if the model's tokenizer does. A system message
    that the model's own template cannot show is left out.
    """
    tokenizer = new_tokenizer(template=TEMPLATES[name], bos="<|endoftext|>")
    for added in ("", "<|endoftext|>"):
        if added:
            tokenizer.core.post_processor = TemplateProcessing(f"{added} $A", None, [(added, 0)])
        for turns in range(1, 2 if name in SINGLE else 4):
            shown = talk(turns, "" if name in WITHOUT_SYSTEM else system)
            expected = tokenizer.render(shown, answer_next=True).removeprefix(added)
            assert in_go(template_of(tokenizer), talk(turns, system)) == expected
    assert (".System" in template_of(tokenizer)) == (name not in WITHOUT_SYSTEM)


@pytest.mark.parametrize("name", SINGLE)
def test_a_template_of_one_turn_is_repeated_after_the_token_that_ends_an_answer(name):
    tokenizer = new_tokenizer(template=TEMPLATES[name])
    one, two = (in_go(template_of(tokenizer), talk(turns, "")) for turns in (1, 2))
    assert two == f"{one}assistant 0<|im_end|>{one.replace('user 0', 'user 1')}"


def test_an_answer_ends_as_in_the_models_own_template():
    tokenizer = Tokenizer(new_tokenizer().core, "<|endoftext|>", CHATML)  # as Qwen2.5's base names it
    assert "assistant 0<|im_end|>\n" in in_go(template_of(tokenizer), talk(2, ""))


def test_a_turn_that_begins_with_the_beginning_token_keeps_it_and_an_answer_that_is_begun_is_continued():
    template = template_of(new_tokenizer(bos="<|im_start|>"))  # as SmolLM2's
    assert in_go(template, talk(1, "")).startswith("<|im_start|>user\nuser 0")
    begun = [*talk(1, ""), {"role": "assistant", "content": "So"}]
    assert in_go(template, begun) == in_go(template, talk(1, "")) + "So"


def test_a_text_is_asked_about_as_in_training(tmp_path):
    """With the words around it that name the labels, as minilora asks, unless Go would read them otherwise."""
    tokenizer, task = new_tokenizer(), LabelTask.of(["law", "{text}"])
    template = template_of(tokenizer, task.template)
    assert in_go(template, talk(1, "")) == tokenizer.render(task.asked(talk(1, "")), answer_next=True)
    assert f'TEMPLATE """{template}"""' in write_modelfile(tmp_path / "x.gguf", tokenizer, task.entry()).read_text()
    for bad in ("{{ x }} {text}", 'Say """ {text}', "no place"):
        assert held_of({"template": bad}) == {}
        assert template_of(tokenizer) in write_modelfile(tmp_path / "x.gguf", tokenizer, {"template": bad}).read_text()


def test_the_file_names_the_model_next_to_it_and_every_end_token(tmp_path):
    tokenizer = new_tokenizer()
    tokenizer.ends = ["<|im_end|>", "<|endoftext|>"]
    path = write_modelfile(tmp_path / "my model.gguf", tokenizer)
    assert path.name == "my model.Modelfile"
    text = path.read_text()
    first, *_, greedy, alike, one, other = text.splitlines()
    assert first == "FROM ./my model.gguf"
    assert (one, other) == ('PARAMETER stop "<|im_end|>"', 'PARAMETER stop "<|endoftext|>"')
    assert (greedy, alike) == ("PARAMETER temperature 0", "PARAMETER repeat_penalty 1")  # as minilora answers
    assert "SYSTEM" not in text.replace(".System", "") and "ADAPTER" not in text


def test_the_file_of_an_adapter_names_its_base_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = write_modelfile(tmp_path / "x.gguf", new_tokenizer(), base=Path("base.gguf")).read_text()
    assert text.splitlines()[:2] == [f"FROM {tmp_path.resolve() / 'base.gguf'}", "ADAPTER ./x.gguf"]


def test_the_file_has_the_system_prompt_that_the_adapter_was_trained_under_unless_it_would_end_too_early(tmp_path):
    for system in ("Be kind.", 'Say "yes".\nThen stop.', ""):
        text = write_modelfile(tmp_path / "x.gguf", new_tokenizer(), {"system": system}).read_text()
        assert re.findall(r'^SYSTEM """(.*?)"""$', text, re.DOTALL | re.MULTILINE) == [system]
    for data in ({"system": 'Use """ often.'}, {"system": 'Say "yes"'}, {}):
        assert held_of(data) == {}
        assert "\nSYSTEM" not in write_modelfile(tmp_path / "x.gguf", new_tokenizer(), data).read_text()
