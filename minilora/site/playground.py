"""What the page of `minilora site` asks of minilora. It runs in the browser, in a worker: see worker.js.

    playground = Playground()
    playground.begin([["What is the shop called?", "Fernwhistle"]], r=8, lr=1e-2, steps=60)
    while playground.trainer:
        playground.step()
    playground.answers(["What is the shop called?"], adapter=True)        # ["Fernwhistle"]

What comes from the page and goes to it are numbers, strings, lists and bytes. A ValueError says in one line what was
wrong with what the page gave.
"""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from ..data.records import Record, read_records
from ..data.rows import DataError
from ..data.samples import encode_records
from ..files.disk import ModelFileError
from ..generate.answers import generate_batch
from ..lora.adapters import add_adapter, base_state, disable_adapter, remove_adapter
from ..lora.config import LoraConfig
from ..lora.peft import load_adapter, save_adapter
from ..measure.counts import count_parameters
from ..models.load import load
from ..nn.module import sha256_of
from ..nn.optim import AdamW
from ..train.loop import Trainer
from ..train.options import Training

NAMES, BATCH, MOST_ROWS, MOST_CHARACTERS = ("mine", "loaded"), 5, 30, 400
LONGEST, MORE = 32, 8  # tokens of an answer: if nothing was taught, and beyond the longest one that was
FEW = 5  # rows of a domain: its answers are long


class Playground:
    """The tiny base, one adapter, and the training in progress."""

    def __init__(self) -> None:
        self.model, self.tokenizer = load("tiny")
        self.trainer: Trainer | None = None
        self.training = ExitStack()  # closed when the training ends: the model is then in `eval` again
        self.before, self.longest = self.fingerprint(), LONGEST

    def fingerprint(self) -> str:
        """The SHA-256 of the base's weights."""
        return sha256_of(base_state(self.model))

    def about(self) -> dict[str, Any]:
        """Numbers for the page: parameters and bytes of the base and the adapter, and whether the base is unchanged."""
        counts = count_parameters(self.model)
        adapter = counts.trainable if self.model.adapters else 0
        base = counts.total - adapter
        return {"base": base, "adapter": adapter, "unchanged": self.fingerprint() == self.before}

    def answers(self, questions: Sequence[str], adapter: bool) -> list[str]:
        """The answers of the base, or of the base with the adapter, to each question by itself."""
        off = nullcontext() if adapter or not self.model.adapters else disable_adapter(self.model)
        with off:
            talks = [[{"role": "user", "content": question}] for question in questions]
            return [text.strip() for text in generate_batch(self.model, self.tokenizer, talks, self.longest)]

    def begin(self, rows: Sequence[Sequence[str]], r: int, lr: float, steps: int) -> None:
        """Forget the adapter, and prepare the training of a new one on rows of (question, answer)."""
        samples = encode_records([_record(i, *row) for i, row in enumerate(rows, 1)], self.tokenizer)
        if not samples:
            raise ValueError("the table is empty: write at least one question with its answer")
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear")
        self.forget()
        self.longest = MORE + max(sum(label >= 0 for label in sample.labels) for sample in samples)
        add_adapter(self.model, config, NAMES[0])
        optimizer = AdamW(self.model.trainable_parameters(), lr=lr)
        trainer = Trainer(self.model, samples, Training(steps=steps, batch_size=BATCH), optimizer)
        self.trainer = self.training.enter_context(trainer)

    def step(self) -> float:
        """Take one training step, and return its loss. After the last one, `trainer` is None."""
        if self.trainer is None:
            raise ValueError("no training is in progress")
        try:
            loss = self.trainer.step()
        except BaseException:
            self.stop()
            raise
        if self.trainer.done == self.trainer.steps:
            self.stop()
        return loss

    def stop(self) -> None:
        """End the training; the adapter keeps its weights."""
        self.training.close()
        self.trainer = None

    def forget(self, but: str = "") -> None:
        """Remove the adapter, but not one of this name."""
        self.stop()
        for name in {*self.model.adapters} - {but}:
            remove_adapter(self.model, name)

    def rows_of(self, name: str, data: bytes | None = None) -> list[list[str]]:
        """The first questions and answers of a domain, or of a file's bytes, whose name tells the format."""
        with tempfile.TemporaryDirectory() as folder:
            source = name
            if data is not None:
                path = Path(folder, Path(name).name)
                path.write_bytes(data)
                source = str(path)
            try:
                records = [record for record in read_records(source) if len(record.messages) > 1]
            except DataError as error:
                raise ValueError(str(error).replace(f"{folder}/", "")) from None
        if not records:
            raise ValueError(f"{name} has no questions with answers")
        first = records[: MOST_ROWS if data is not None else FEW]
        return [[record.messages[-2]["content"], record.messages[-1]["content"]] for record in first]

    def save(self) -> bytes:
        """The adapter as a zip file of the folder that PEFT loads."""
        if not self.model.adapters:
            raise ValueError("there is no adapter yet: teach one first")
        target = io.BytesIO()
        with tempfile.TemporaryDirectory() as folder:
            adapter = save_adapter(self.model, Path(folder, "adapter"), next(iter(self.model.adapters)))
            with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
                for path in sorted(adapter.iterdir()):
                    archive.write(path, path.name)
        return target.getvalue()

    def load(self, data: bytes) -> None:
        """Replace the adapter by that of such a zip file; if the file is no such, the adapter stays."""
        new = next(name for name in NAMES if name not in self.model.adapters)
        with tempfile.TemporaryDirectory() as folder:
            try:
                with zipfile.ZipFile(io.BytesIO(data)) as archive:
                    for member in archive.infolist():
                        name = Path(member.filename).name
                        if name in ("adapter_config.json", "adapter_model.safetensors"):
                            Path(folder, name).write_bytes(archive.read(member))
            except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
                raise ValueError(f"this is not a zip file of an adapter: {error}") from None
            try:
                load_adapter(self.model, folder, new)
            except ModelFileError as error:
                raise ValueError(str(error).replace(f"{folder}/", "")) from None
        self.forget(but=new)


def _record(i: int, question: str, answer: str) -> Record:
    for what, text in (("question", question), ("answer", answer)):
        if not text.strip():
            raise ValueError(f"row {i} has no {what}")
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"row {i}: the {what} has {len(text)} characters, at most {MOST_CHARACTERS} fit here")
    messages = ({"role": "user", "content": question.strip()}, {"role": "assistant", "content": answer.strip()})
    return Record(str(i), messages)
