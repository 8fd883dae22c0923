"""Models from a hub: the real client against a small hub of our own on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from tests.tiny_sd import make_tiny_sd

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "someone/tiny-sd"
SCRIPT = """
import json, sys
from pathlib import Path
from sdcompress.errors import SdcompressError
from sdcompress.models.sources import resolve
try:
    found = resolve(sys.argv[1], cache=Path(sys.argv[2]), variant=sys.argv[3] or None)
except SdcompressError as e:
    sys.exit(f"{type(e).__name__}: {e}")
print(json.dumps([str(found.directory), found.source.model_dump(mode="json")]))
"""


@dataclass
class Hub:
    """What the hub has, and what was asked of it."""

    files: dict[str, bytes]
    address: str = ""
    fetched: list[str] = field(default_factory=list)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    model = make_tiny_sd(tmp_path / "model")
    half = make_tiny_sd(tmp_path / "half", dtype=torch.float16)
    weights = half / "unet/diffusion_pytorch_model.safetensors"
    (model / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(weights.read_bytes())
    (model / "unet/diffusion_pytorch_model.bin").write_bytes(b"pickled")
    (model / "whole-model.safetensors").write_bytes(b"large")
    (model / "picture.png").write_bytes(b"png")
    files = {
        f.relative_to(model).as_posix(): f.read_bytes() for f in model.rglob("*") if f.is_file()
    }
    state = Hub(files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            revisions = ("main", "v1", COMMIT)
            if path in {f"/api/models/{REPOSITORY}"} | {
                f"/api/models/{REPOSITORY}/revision/{r}" for r in revisions
            }:
                siblings = [{"rfilename": name} for name in state.files]
                info = {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}
                return self._send(json.dumps(info).encode(), body, {})
            prefix = f"/{REPOSITORY}/resolve/{COMMIT}/"
            name = path.removeprefix(prefix)
            if path.startswith(prefix) and name in state.files:
                data = state.files[name]
                if body:
                    state.fetched.append(name)
                tag = hashlib.sha256(data).hexdigest()
                return self._send(data, body, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})
            missing = "RevisionNotFound" if f"/{REPOSITORY}/" in path else "RepoNotFound"
            return self._send(b"{}", body, {"X-Error-Code": missing}, status=404)

        def _send(
            self, data: bytes, body: bool, headers: dict[str, str], status: int = 200
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def resolve(
    model: str, tmp_path: Path, address: str, *, variant: str = "", offline: bool = False
) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the client reads its settings once, when it is imported."""
    settings = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": str(int(offline)),
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, model, str(tmp_path / "cache"), variant],
        env={**os.environ, **settings},
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
    )


def test_only_what_is_needed_is_fetched_once_and_found_again_offline(
    hub: Hub, tmp_path: Path
) -> None:
    done = resolve(f"{REPOSITORY}@v1", tmp_path, hub.address)
    assert done.returncode == 0, done.stderr
    directory, source = json.loads(done.stdout)
    assert source == {
        "id": REPOSITORY,
        "kind": "hub",
        "revision": COMMIT,
        "licence": "apache-2.0",
        "loras": [],
    }
    unwanted = {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "whole-model.safetensors",
        "picture.png",
    }
    assert set(hub.fetched) == set(hub.files) - unwanted
    assert len(hub.fetched) == len(set(hub.fetched))

    hub.fetched.clear()
    offline = resolve(f"{REPOSITORY}@{COMMIT}", tmp_path, hub.address, offline=True)
    assert offline.returncode == 0, offline.stderr
    assert json.loads(offline.stdout) == [directory, source]
    assert hub.fetched == []

    # another variant of the same commit lies in the same snapshot, and must not be mixed up
    half = resolve(REPOSITORY, tmp_path, hub.address, variant="fp16")
    assert half.returncode == 0, half.stderr
    assert hub.fetched == ["unet/diffusion_pytorch_model.fp16.safetensors"]
    chosen = Path(json.loads(half.stdout)[0], "unet/diffusion_pytorch_model.safetensors")
    assert chosen.read_bytes() == hub.files["unet/diffusion_pytorch_model.fp16.safetensors"]
    plain = resolve(REPOSITORY, tmp_path, hub.address)
    assert plain.returncode == 0, plain.stderr
    files = sorted(p.name for p in Path(json.loads(plain.stdout)[0], "unet").iterdir())
    assert "diffusion_pytorch_model.safetensors" in files


@pytest.mark.parametrize(
    ("model", "offline", "message"),
    [
        ("someone/else", False, "no such path here and no such model on the hub"),
        (f"{REPOSITORY}@v9", False, "the hub has this model, but no such revision"),
        (REPOSITORY, True, "not in the hub's local cache, and offline mode is on"),
    ],
)
def test_what_the_hub_does_not_have(
    hub: Hub, tmp_path: Path, model: str, offline: bool, message: str
) -> None:
    done = resolve(model, tmp_path, hub.address, offline=offline)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"InputError: {model}")
    assert message in done.stderr


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    done = resolve(REPOSITORY, tmp_path, "http://127.0.0.1:9")  # discard: nobody listens there
    assert done.returncode == 1
    assert "the hub cannot be reached" in done.stderr.splitlines()[-1]
