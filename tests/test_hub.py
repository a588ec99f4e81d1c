"""Hub ids, against a local stand-in that speaks the hub's API: fetched, reused offline, gated, missing."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import is_one_sentence

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """owner/model with the files of a folder, and more that nobody needs; owner/gated; nothing else."""

    protocol_version = "HTTP/1.1"

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        if "owner/gated" in path:
            return self.answer(403, X_Error_Code="GatedRepo")
        if "owner/model" not in path:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if path.startswith("/api/models/owner/model/tree/"):
            tree = [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in self.server.files.items()]
            return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        if path.startswith("/api/models/owner/model"):
            if path.rpartition("/revision/")[2] not in (path, "main", "v1", COMMIT):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            siblings = [{"rfilename": name} for name in self.server.files]
            info = {"id": "owner/model", "sha": COMMIT, "siblings": siblings}
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        name = path.split("/", 5)[-1]
        data = self.server.files[name]
        self.server.fetched.add(name)
        self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tiny):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    server.files |= {"generation_config.json": b'{"eos_token_id": [2, 0]}'}
    server.files |= {"pytorch_model.bin": b"no pickle", "original/model.safetensors": b"a copy", "a.png": b"",
                     "consolidated.safetensors": b"a copy"}                         # as Mistral's have it
    server.fetched = set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def sample(name, hub, cache, **more):
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(cache),
                                "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"} | more
    command = [sys.executable, ROOT / "sample.py", "hello", "--model", name, "--max-new-tokens", "4"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("name", ["owner/model", "owner/model@v1"])
def test_fetched_once_and_reused_offline(name, hub, tmp_path):
    first = sample(name, hub, tmp_path)
    assert first.returncode == 0, first.stderr
    assert hub.fetched >= {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
    assert not hub.fetched & {"pytorch_model.bin", "original/model.safetensors", "a.png",
                              "consolidated.safetensors"}
    hub.fetched.clear()
    tokens = first.stdout.split("tokens in")[0]
    for offline in {}, {"HF_HUB_OFFLINE": "1"}:
        again = sample(name, hub, tmp_path, **offline)
        assert again.returncode == 0 and again.stdout.split("tokens in")[0] == tokens, again.stderr
    assert not hub.fetched & {"model.safetensors"}


@pytest.mark.parametrize("name, words", [
    ("owner/gated", ["accept the terms"]), ("owner/none", ["no such model on the hub"]),
    ("owner/model@v9", ["no revision v9"]),
])
def test_refused(name, words, hub, tmp_path):
    done = sample(name, hub, tmp_path)
    assert done.returncode == 1 and is_one_sentence(done.stderr), done.stderr
    assert name in done.stderr and all(word in done.stderr for word in words)


def test_a_repository_of_gguf_files_alone(hub, tmp_path):
    hub.files = {"model-Q4_0.gguf": b"GGUF", "README.md": b""}
    done = sample("owner/model", hub, tmp_path)
    said = done.stderr.splitlines()[-1]                     # after the package's own warning
    assert done.returncode == 1 and "sample.py: owner/model: has no config.json on the hub" in said
    assert not hub.fetched and "Traceback" not in done.stderr


def test_a_damaged_copy_names_the_folder_to_delete(hub, tmp_path):
    assert sample("owner/model", hub, tmp_path).returncode == 0
    copy = next(tmp_path.rglob("model.safetensors")).resolve()
    copy.write_bytes(copy.read_bytes()[:-1000])
    done = sample("owner/model", hub, tmp_path)
    folder = tmp_path / "hub" / "models--owner--model"
    assert done.returncode == 1 and is_one_sentence(done.stderr) and f"delete {folder}," in done.stderr
    shutil.rmtree(folder)
    assert sample("owner/model", hub, tmp_path).returncode == 0


def test_an_adapter_on_the_hub_is_named(hub, tmp_path):
    hub.files = {"adapter_config.json": b"{}", "adapter_model.safetensors": hub.files["model.safetensors"]}
    done = sample("owner/model", hub, tmp_path)
    assert done.returncode == 1 and is_one_sentence(done.stderr) and "adapter" in done.stderr


def test_offline_without_a_copy(hub, tmp_path):
    done = sample("owner/model", hub, tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and is_one_sentence(done.stderr) and "could not be fetched" in done.stderr


def test_without_the_package(monkeypatch):
    from weights import InputError, open_checkpoint

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        open_checkpoint("owner/model")
