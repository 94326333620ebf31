"""A hub on the loopback, for HF_ENDPOINT: it answers what `huggingface_hub` asks for in order to download."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def serving(repositories, sha):
    """The address of a hub. repositories: the files of each name, {"models": {"org/name": {"file": b"..."}}}.

    Each has the revision `sha`, called main. `org/gated` wants its terms accepted.
    """

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, status, content=b"", **headers):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), "X-Repo-Commit": sha, **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_GET(self):
            path = self.path.partition("?")[0].removeprefix("/api").strip("/")
            kind = path.partition("/")[0] if path.startswith(("models/", "datasets/")) else "models"
            path = path.removeprefix(f"{kind}/")
            name = "/".join(path.split("/")[:2])
            if name == "org/gated":
                return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="gated")
            if name not in repositories.get(kind, {}):
                return self.answer(401, X_Error_Code="RepoNotFound")
            files = repositories[kind][name]
            if "/resolve/" in path:
                content = files[path.split("/", 4)[4]]
                return self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
            if "/revision/" in path and path.split("/revision/")[1] not in ("main", sha):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            if "/tree/" in path:
                tree = [
                    {"type": "file", "path": file, "size": len(content), "oid": "0" * 40}
                    for file, content in files.items()
                ]
                return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            about = {"id": name, "sha": sha, "siblings": [{"rfilename": file} for file in files]}
            return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def answer_of(script, endpoint, home, *words, before=None):
    """The JSON that a script prints last, in its own process, which asks this hub: the library reads HF_* at import.

    home: its folder, with its cache. before: called in the process first.
    """
    own = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    own |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "cache"), "HF_HUB_DISABLE_XET": "1"}
    if before:  # where no file may be large, a compiled module would be cut off, which stops every later import
        own["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        cwd=home,
        env=own,
        preexec_fn=before,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
