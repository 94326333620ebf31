"""Models by their names on a hub, here a server on the loopback: what is downloaded, and each error in one line."""

import numpy as np
import pytest
from loopback_hub import answer_of, serving
from modelfiles import CONFIG, new_tokenizer

from minilora.models.folder import save_folder
from minilora.models.repository import is_repository
from minilora.nn.llama import Llama

pytest.importorskip("huggingface_hub", reason="pip install 'minilora[hub]'")
SHA = "a" * 40
SCRIPT = """
import json, sys
import minilora as ml
from minilora.files.disk import ModelFileError
from minilora.models.repository import download
found = {}
for name in sys.argv[1:]:
    try:
        folder = download(name)
        found[name] = [folder.name, sorted(path.name for path in folder.iterdir())]
    except ModelFileError as error:
        found[name] = str(error)
if "org/good" in sys.argv:
    model, tokenizer = ml.load("org/good")
    ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"), name="default")
    ml.save_adapter(model, "adapter")
    found["record"] = json.load(open("adapter/minilora.json"))["base"]
    from minilora.models.with_adapters import load_with_adapters
    from pathlib import Path
    again = load_with_adapters({"one": Path("adapter")})[0]
    found["again"] = [*again.adapters, again.source]
    model, _ = ml.load("org/good@main")
    ml.add_adapter(model, ml.LoraConfig(r=2, lora_alpha=4))
    ml.save_adapter(model, "main")
    found["peft"] = json.load(open("main/adapter_config.json"))
    found["main"] = load_with_adapters({"one": Path("main")})[0].source
print(json.dumps(found))
"""


@pytest.fixture
def hub(tmp_path):
    """The address of a hub with a good model, one that is only pickled, and a gated one."""
    folder = save_folder(tmp_path / "good", CONFIG, Llama(CONFIG).state_dict(), new_tokenizer())
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    pickled = {"config.json": b"{}", "pytorch_model.bin": b"a pickle"}
    models = {"org/good": {path.name: path.read_bytes() for path in folder.iterdir()}, "org/pickled": pickled}

    with serving({"models": models}, SHA) as address:
        yield address


def ask(endpoint, home, *names):
    return answer_of(SCRIPT, endpoint, home, *names)


@pytest.mark.long
def test_safetensors_and_texts_alone_are_downloaded_and_the_revision_is_recorded(hub, tmp_path):
    found = ask(hub, tmp_path, "org/good", "org/pickled", "org/gated", "org/absent", "org/good@v9")
    revision, files = found["org/good"]
    texts = ["chat_template.jinja", "config.json", "tokenizer.json", "tokenizer_config.json"]
    assert revision == SHA and files == sorted([*texts, "model.safetensors"])
    assert (found["record"]["name"], found["record"]["revision"]) == ("org/good", SHA)
    assert found["again"] == ["one", f"org/good@{SHA}"] and found["main"] == "org/good@main"
    assert (found["peft"]["base_model_name_or_path"], found["peft"]["revision"]) == ("org/good", SHA)  # as PEFT has it
    for name, words in {"org/pickled": "no safetensors", "org/gated": "accept its terms", "org/absent": "no such model",
                        "org/good@v9": "no revision 'v9'"}.items():  # fmt: skip
        assert found[name].startswith(f"{name}: ") and words in found[name] and "\n" not in found[name]


def test_without_a_network_the_error_is_one_line_without_the_password_of_a_mirror(tmp_path):
    (line,) = ask("http://me:secret@127.0.0.1:9", tmp_path, "org/good@main").values()
    assert "http://127.0.0.1:9" in line and "secret" not in line
    assert "cannot be" in line and "\n" not in line and np.char.count(line, "org/good@main") == 1


def test_a_path_is_no_name_of_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_repository("org/name") and is_repository("org/name@v1.0")
    for other in ("tiny", "./org/name", "/org/name", "a/b/c", "org/m.gguf", "org/", "../name"):
        assert not is_repository(other)
    (tmp_path / "org").mkdir()
    assert not is_repository("org/name")  # a folder of that name is meant
