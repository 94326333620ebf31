"""Models by their names on a hub, here a server on the loopback: what is downloaded, and each error in one line."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
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
    found["again"] = sorted(load_with_adapters({"one": Path("adapter")})[0].adapters)
print(json.dumps(found))
"""


@pytest.fixture
def hub(tmp_path):
    """The address of a hub with a good model, one that is only pickled, and a gated one."""
    folder = save_folder(tmp_path / "good", CONFIG, Llama(CONFIG).state_dict(), new_tokenizer())
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    pickled = {"config.json": b"{}", "pytorch_model.bin": b"a pickle"}
    models = {"org/good": {path.name: path.read_bytes() for path in folder.iterdir()}, "org/pickled": pickled}

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, status, content=b"", **headers):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), "X-Repo-Commit": SHA, **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_GET(self):
            path = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
            name = "/".join(path.split("/")[:2])
            if name == "org/gated":
                return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="gated")
            if name not in models:
                return self.answer(401, X_Error_Code="RepoNotFound")
            files = models[name]
            if "/resolve/" in path:
                content = files[path.split("/", 4)[4]]
                return self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
            if "/revision/" in path and path.split("/revision/")[1] not in ("main", SHA):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            if "/tree/" in path:
                kind, oid = {"type": "file"}, "0" * 40
                tree = [kind | {"path": file, "size": len(content), "oid": oid} for file, content in files.items()]
                return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            about = {"id": name, "sha": SHA, "siblings": [{"rfilename": file} for file in files]}
            return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(endpoint, home, *names):
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "cache"), "HF_HUB_DISABLE_XET": "1"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True, cwd=home, env=kept | settings
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_safetensors_and_texts_alone_are_downloaded_and_the_revision_is_recorded(hub, tmp_path):
    found = ask(hub, tmp_path, "org/good", "org/pickled", "org/gated", "org/absent", "org/good@v9")
    revision, files = found["org/good"]
    assert revision == SHA and files == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert (found["record"]["name"], found["record"]["revision"]) == ("org/good", SHA) and found["again"] == ["one"]
    for name, words in {"org/pickled": "no safetensors", "org/gated": "accept its terms", "org/absent": "no such model",
                        "org/good@v9": "no revision 'v9'"}.items():  # fmt: skip
        assert found[name].startswith(f"{name}: ") and words in found[name] and "\n" not in found[name]


def test_without_a_network_the_error_is_one_line(tmp_path):
    (line,) = ask("http://127.0.0.1:9", tmp_path, "org/good@main").values()
    assert "cannot be" in line and "\n" not in line and np.char.count(line, "org/good@main") == 1


def test_a_path_is_no_name_of_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_repository("org/name") and is_repository("org/name@v1.0")
    for other in ("tiny", "./org/name", "/org/name", "a/b/c", "org/m.gguf", "org/", "../name"):
        assert not is_repository(other)
    (tmp_path / "org").mkdir()
    assert not is_repository("org/name")  # a folder of that name is meant
