"""A hub's name fetched by HTTP, from a server on this machine that answers as the hub does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from parity_tests.checkpoints import write_huggingface_directory
from parity_tests.test_stored_forms import SMALL

COMMIT = "c" * 40
WEIGHTS = "model.safetensors"


class Hub(BaseHTTPRequestHandler):
    """Holds `someone/tiny`. `server.cut` is after how many bytes of the weights the connection drops, once."""

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def log_message(self, *args):
        pass

    def answer(self, with_body):
        server, path = self.server, self.path.partition("?")[0]
        if path.startswith("/api/models/someone/tiny"):
            sizes = {str(f.relative_to(server.folder)): f.stat().st_size for f in server.folder.rglob("*") if f.is_file()}
            info: object = {"id": "someone/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in sizes]}
            if "/tree/" in path:
                info = [{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in sizes.items()]
            return self.send(json.dumps(info).encode(), with_body)
        name = path.removeprefix(f"/someone/tiny/resolve/{COMMIT}/")
        file = server.folder / name
        if name == path or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if name == path else "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if with_body:
            server.fetched[name] += 1
        self.send(file.read_bytes(), with_body, name)

    def send(self, content, with_body, name=None):
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if with_body and first:
            self.server.taken_up.append((name, first))
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        if with_body:
            cut, self.server.cut = (self.server.cut, None) if name == WEIGHTS else (None, self.server.cut)
            self.wfile.write(content[first:cut])
            if cut is not None:
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder = write_huggingface_directory(tmp_path / "model", SMALL)
    (server.folder / "README.md").write_text("not needed")
    (server.folder / "pytorch_model.bin").write_bytes(b"the same weights again")
    (server.folder / "onnx").mkdir()
    (server.folder / "onnx" / "config.json").write_text("{}")
    server.fetched, server.taken_up, server.cut = Counter(), [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(hub, cache, name="someone/tiny"):
    """As the commands do, in a process with an environment of its own."""
    code = (
        "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 4096; "  # as if the file were a large one
        "from deepseek_jax.errors import run_command; from deepseek_jax.checkpoint.hub import local_directory; "
        f"run_command(lambda: print(local_directory({name!r})))"
    )
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    proxies = {name: "" for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")}
    environment = os.environ | proxies | {
        "HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(Path(__file__).parent.parent), "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cache.parent, env=environment)


def test_what_is_needed_is_fetched_and_taken_up_after_a_cut(hub, tmp_path):
    """And kept: without the server the cache serves, and what is not in it is told in one line."""
    cache, size = tmp_path / "cache", (hub.folder / WEIGHTS).stat().st_size
    hub.cut = size // 2
    done = fetch(hub, cache)
    if done.returncode:  # a cut that the library does not mend by itself: the user starts the command again
        assert done.stderr.splitlines()[-1].startswith("error: someone/tiny: ")
        done = fetch(hub, cache)
    directory = Path(done.stdout.strip())
    assert done.returncode == 0 and "Fetching" in done.stderr, done.stderr
    assert (directory / WEIGHTS).read_bytes() == (hub.folder / WEIGHTS).read_bytes()
    assert {str(file.relative_to(directory)) for file in directory.rglob("*")} == {
        "config.json", "generation_config.json", WEIGHTS
    }  # fmt: skip
    assert [name for name, first in hub.taken_up if first > 0] == [WEIGHTS], hub.taken_up
    hub.shutdown()
    hub.server_close()
    kept, nowhere = fetch(hub, cache), fetch(hub, cache, "someone/else")
    assert kept.returncode == 0 and Path(kept.stdout.strip()) == directory, kept.stderr
    assert nowhere.returncode == 1 and nowhere.stderr.splitlines()[-1].startswith("error: someone/else: there is no such")
    assert "not in the cache either" in nowhere.stderr and "Traceback" not in nowhere.stderr
