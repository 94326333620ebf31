"""A Modelfile next to a merged GGUF file: what `ollama create NAME -f FILE` needs to run it.

Ollama's templates are Go's, not Jinja's. One turn is rendered with the model's own template, with and without a system
message, and Go's variables take the places of the texts.
Source: ollama's docs/modelfile.md and docs/template.md.
"""

from __future__ import annotations

from os.path import basename
from pathlib import Path

from ..files.disk import write_bytes
from .tokenizer import Tokenizer

_SYSTEM, _PROMPT = "{{ .System }}", "{{ .Prompt }}"


def write_modelfile(gguf: Path, tokenizer: Tokenizer, system: str | None = None) -> Path:
    """Write `NAME.Modelfile` next to `NAME.gguf` and return its path. system: the system prompt, if it has one."""
    lines = [f"FROM ./{basename(gguf)}", f'TEMPLATE """{template_of(tokenizer)}"""']
    if can_be_written(system):
        lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{end}"' for end in tokenizer.ends]
    path = gguf.with_suffix(".Modelfile")
    write_bytes(path, "\n".join([*lines, ""]).encode())
    return path


def can_be_written(system: str | None) -> bool:
    """True if there is a system prompt, and a Modelfile can hold it: three quotation marks end a text there."""
    return system is not None and '"""' not in system and not system.endswith('"')


def template_of(tokenizer: Tokenizer) -> str:
    """One turn of the model's chat template in Go's form. Ollama itself adds the token that begins a text."""
    user = {"role": "user", "content": _PROMPT}
    bare = tokenizer.render([user], answer_next=True)
    full = tokenizer.render([{"role": "system", "content": _SYSTEM}, user], answer_next=True)
    if tokenizer.bos and "bos_token" in tokenizer.template:
        bare, full = (text.removeprefix(tokenizer.bos) for text in (bare, full))
    before, system, after = full.partition(_SYSTEM)
    end = "{{ .Response }}" + tokenizer.core.id_to_token(tokenizer.answer_end)
    if not system:  # a template without system messages
        return bare + end
    shared = 0  # letters at the end of both
    while shared < min(len(after), len(bare)) and after[-1 - shared] == bare[-1 - shared]:
        shared += 1
    rest = len(after) - shared
    otherwise = bare[: len(bare) - shared]
    alone = f"{{{{ else }}}}{otherwise}" if otherwise else ""
    return f"{{{{ if .System }}}}{before}{_SYSTEM}{after[:rest]}{alone}{{{{ end }}}}{after[rest:]}{end}"
