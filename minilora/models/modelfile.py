"""A Modelfile next to a GGUF file, merged or an adapter: what `ollama create NAME -f FILE` needs to run it.

Ollama's templates are Go's, not Jinja's. Conversations are rendered with the model's own template, with Go's variables
in the places of the texts, and cut there. The parameters are those of `minilora chat`: greedy, without penalties.
Source: ollama's docs/modelfile.md and docs/template.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from os.path import basename
from pathlib import Path
from typing import Any

from ..files.disk import ModelFileError, write_bytes
from .tokenizer import Tokenizer

_SYSTEM, _CONTENT, _TEXT = "{{ .System }}", "{{ .Content }}", "{text}"
_PARAMETERS = ("temperature 0", "repeat_penalty 1")


def write_modelfile(
    gguf: Path, tokenizer: Tokenizer, data: Mapping[str, Any] | None = None, base: Path | None = None
) -> Path:
    """Write `NAME.Modelfile` next to `NAME.gguf` and return its path.

    data: what the adapter was trained on: its system prompt, and how its labels or fields are asked for.
    base: the base's file, if `gguf` holds an adapter.
    """
    data, own = data or {}, f"./{basename(gguf)}"
    lines = [f"FROM {own}"] if base is None else [f"FROM {base.resolve()}", f"ADAPTER {own}"]
    held = held_of(data)
    lines.append(f'TEMPLATE """{template_of(tokenizer, held.get("template", _TEXT))}"""')
    lines += [f'SYSTEM """{held["system"]}"""'] if "system" in held else []
    lines += [f"PARAMETER {each}" for each in (*_PARAMETERS, *(f'stop "{end}"' for end in tokenizer.ends))]
    path = gguf.with_suffix(".Modelfile")
    write_bytes(path, "\n".join([*lines, ""]).encode())
    return path


def held_of(data: Mapping[str, Any]) -> dict[str, str]:
    """Of the entries "system" and "template", those that a Modelfile can hold: three quotation marks end a text there,
    and two braces begin one of Go's variables.
    """
    held = {key: data[key] for key in ("system", "template") if key in data and '"""' not in data[key]}
    if held.get("system", "").endswith('"'):
        held.pop("system")
    if "{{" in (asked := held.get("template", "")) or _TEXT not in asked:
        held.pop("template", None)
    return held


def template_of(tokenizer: Tokenizer, asked: str = _TEXT) -> str:
    """The model's chat template in Go's form. Ollama itself adds the token that begins a text, if the file says so.

    asked: the user's message, in which {text} is what the user writes.
    """
    before, _, after = asked.rpartition(_TEXT)
    user, answer = ({"role": role, "content": _CONTENT} for role in ("user", "assistant"))
    system = {"role": "system", "content": _SYSTEM}
    begin, ask = (_around(tokenizer, [user]) or ["", ""])[:2]
    turns = _around(tokenizer, [user, answer, user])
    # A template that does not show earlier turns, or refuses them, is repeated.
    later, again = turns[1:3] if len(turns) == 4 else (ask, tokenizer.core.id_to_token(tokenizer.answer_end) + begin)
    full = (_around(tokenizer, [system, user]) or [""])[0]
    begin = f"{{{{ if .System }}}}{full}{{{{ else }}}}{begin}{{{{ end }}}}" if _SYSTEM in full else begin
    ask = ask if ask == later else f"{{{{ if $last }}}}{ask}{{{{ else }}}}{later}{{{{ end }}}}"
    return (
        f"{begin}{{{{ range $i, $_ := .Messages }}}}{{{{ $last := eq (len (slice $.Messages $i)) 1 }}}}"
        f'{{{{ if eq .Role "user" }}}}{before}{_CONTENT}{after}{ask}'
        f'{{{{ else if eq .Role "assistant" }}}}{_CONTENT}{{{{ if not $last }}}}{again}{{{{ end }}}}'
        "{{ end }}{{ end }}"
    )


def _around(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[str]:
    """What the template writes before, between and after the texts of user and assistant; empty if it refuses them."""
    try:
        text = tokenizer.render(messages, answer_next=True)
    except ModelFileError:  # many refuse a system message
        return []
    return (text.removeprefix(tokenizer.bos) if tokenizer.begun([]) else text).split(_CONTENT)
