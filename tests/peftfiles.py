"""PEFT folders to write, to change and to be refused."""

import json

import pytest

from minilora.files.disk import ModelFileError
from minilora.files.tensors import read_tensors, write_tensors
from minilora.lora.adapters import add_adapter
from minilora.lora.config import LoraConfig
from minilora.lora.peft import load_adapter
from minilora.nn.module import sha256_of

CONFIG, WEIGHTS, NOTES = "adapter_config.json", "adapter_model.safetensors", "minilora.json"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def adapted(model, name="default", **settings):
    """The model with an adapter that changes its output."""
    add_adapter(model, LoraConfig(**({"r": 4, "lora_alpha": 8, "init_lora_weights": False} | settings)), name=name)
    return model


def record_of(folder):
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def provenance_of(folder):
    return json.loads((folder / NOTES).read_text(encoding="utf-8"))


def rewrite(folder, change):
    (folder / CONFIG).write_text(json.dumps(record_of(folder) | change))


def link(path, target):
    """A symbolic link, where the system lets this user make one."""
    try:
        path.symlink_to(target, target_is_directory=target.is_dir())
    except OSError as error:
        pytest.skip(f"no symbolic links here: {error}")


def refused_with(model, folder, change, *words):
    rewrite(folder, change)
    refused(model, folder, CONFIG, *words)


def refused(model, folder, *words, error=ModelFileError):
    """Load the folder, expect an error in one line with the words, and find the model unchanged."""

    def state():
        modules = [(path, type(module)) for path, module in model.named_modules()]
        parameters = {name: (id(p.data), p.requires_grad) for name, p in model.named_parameters()}
        return modules, parameters, repr(model.adapters), sha256_of(model.state_dict())

    before = state()
    with pytest.raises(error) as caught:
        load_adapter(model, folder)
    message = str(caught.value)
    assert "\n" not in message and not [word for word in words if word not in message], message
    assert state() == before


def change_tensors(folder, **changes):
    """Replace tensors, by the end of their names; None leaves one out, a new name adds one."""
    tensors = read_tensors(folder / WEIGHTS)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    write_tensors(folder / WEIGHTS, tensors)
