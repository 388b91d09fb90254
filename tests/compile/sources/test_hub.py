"""Why a repo cannot be downloaded: huggingface_hub itself against a server that refuses."""

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from compile.sources.open import open_source
from sf_local.errors import SourceError
from tests.support.toy_sources import refused, write_folder

LICENCE = "https://huggingface.co/org/name"


@contextmanager
def hub(status: int, code: str) -> Iterator[str]:
    """Yields the URL of a hub that answers every request so."""

    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def use(monkeypatch: pytest.MonkeyPatch, cache: Path, url: str) -> None:
    """Let downloads go from the hub at `url` to a cache of their own."""
    real = partial(huggingface_hub.snapshot_download, endpoint=url, cache_dir=cache)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", real)


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, "GatedRepo", ["gated", f"accept its licence at {LICENCE}", "HF_TOKEN"]),
        (403, "GatedRepo", ["gated", f"accept its licence at {LICENCE}", "hf auth login"]),
        (404, "RepoNotFound", ["no repo that you may read", LICENCE, "HF_TOKEN"]),
        (401, "", ["401", "a token that is valid", "hf auth login"]),  # an old token
        (403, "", ["403", "may read gated repos", "hf auth login"]),  # one without the permission
        (429, "", ["Too Many Requests", "wait some minutes"]),
        (410, "", ["410", "hf download org/name", "pass the folder"]),
    ],
)
def test_what_the_hub_refuses(
    status: int, code: str, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub(status, code) as url:
        use(monkeypatch, tmp_path, url)
        refused("org/name", SourceError, "'org/name'", *said)


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, tmp_path, "http://localhost")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    offline = "unset HF_HUB_OFFLINE; without a network give a folder, a .gguf file, or a repo"
    refused("org/name", SourceError, offline, "cache, which is empty", "hf download org/name")
    cached = tmp_path / "models--org--other"
    (cached / "snapshots").mkdir(parents=True)
    write_folder(cached / "snapshots" / "1")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    refused("org/name", SourceError, "cache (org/other); or download it")


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    refused("org/name", SourceError, "free some space", "HF_HOME")


def test_the_cause_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = ConnectionError("no network")

    def download(*args: object, **options: object) -> str:
        raise failed

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(SourceError) as caught:
        open_source("org/name")
    assert caught.value.__cause__ is failed
