"""What tests of the jobs share: options of a quick one, a question as a conversation."""

from unittest.mock import Mock

import numpy as np
import pytest

from minilora.commands.eval import EvalOptions, evaluate_adapters
from minilora.measure.scores import Source, read_sets
from minilora.nn.optim import AdamW
from minilora.train import loop, metrics
from minilora.train.job import finetune
from minilora.train.loop import Trainer
from minilora.train.material import prepare
from minilora.train.options import Options, Training


def asked(question):
    return [{"role": "user", "content": question}]


def trainer(model, samples, steps, lr=1e-3, batch_size=8):
    optimizer = AdamW(model.trainable_parameters(), lr=lr, weight_decay=0.0)
    return Trainer(model, samples, Training(steps=steps, batch_size=batch_size), optimizer)


def material_of(options, tokenizer):
    """The data of a job with these options."""
    names = ("field", "mix", "max_length", "eval_records")
    return prepare(options.data, tokenizer, **{name: getattr(options, name) for name in names})


def same(left, right):
    """Are these arrays by name the same to the last bit?"""
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def foresee(losses, monkeypatch):
    """Let these be the validation losses of a job after the first, the second, ... step."""

    def validate(trainer, sets):
        trainer.history.validation.append((trainer.done, losses[trainer.done - 1]))

    monkeypatch.setattr(loop, "validate", validate)


def trained(chosen, **more):
    """The metrics of a job that only trains and validates, and audits nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "audit", lambda *given, **named: Mock(checks={"base": "unchanged"}))
        return finetune(chosen, measure=False, answers=False, **more)


def measured(home, data, adapter=(), **change):
    """What `eval` finds out about adapters of the base in the folder `home`; data and adapter: one or several."""
    data, adapter = ([str(one) for one in (x if isinstance(x, (list, tuple)) else [x])] for x in (data, adapter))
    return evaluate_adapters(EvalOptions(**{"base": str(home / "base"), "data": data, "adapter": adapter} | change))


def read_data(data, tokenizer, max_length, trained=(), field=None, **more):
    """What `read_sets` makes of data. trained: those that an adapter learned. field: the columns of all."""
    return read_sets([Source(name, field, name in trained) for name in data], tokenizer, max_length, **more)


def options(home, out, **change):
    """Options of a job on the base and data of the folder `home`."""
    values = dict(base=str(home / "base"), data=str(home / "data.jsonl"), out=str(out), r=2, steps=6, batch_size=4)
    values |= {"strength": 1.0} if change.get("method", "lora") == "lora" else {}  # what is kept is what was trained
    values |= {"lr": Options(**{name: change[name] for name in ("method", "loss") if name in change}).learning_rate}
    return Options(**(values | change))
