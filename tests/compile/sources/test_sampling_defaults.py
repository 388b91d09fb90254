"""What models recommend, as transformers reads it, and values that nobody can mean."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from compile import build
from compile.sources.open import open_source
from compile.sources.sampling_defaults import of_generation_config, of_gguf
from sf_local.artifact.open import open_artifact
from tests.support.tiny import TINY_OPTIONS, TinyModel
from tests.support.toy_sources import write_folder, write_gguf

NAMES = "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"
LLAMA = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1]}
MIN_P = {"do_sample": True, "min_p": 0.1}
QWEN = {
    "do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
    "pad_token_id": 0, "max_new_tokens": 2048,
}  # fmt: skip


@pytest.mark.parametrize("config", [LLAMA, QWEN, {}, MIN_P, {"max_length": 20}], ids=str)
def test_what_transformers_reads(tmp_path: Path, config: dict[str, Any]) -> None:
    GenerationConfig(**config).save_pretrained(tmp_path)
    read = GenerationConfig.from_pretrained(tmp_path)
    given = {name: getattr(read, name, None) for name in NAMES if name in config}
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert of_generation_config("there", saved) == given


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"do_sample": False}, {"temperature": 0.0}),
        (
            {"do_sample": False, "temperature": 0.6, "min_p": 0.1},
            {"temperature": 0.0, "min_p": 0.1},
        ),
        ({"temperature": 0.6}, {"temperature": 0.6}),
        ({"do_sample": None, "temperature": None}, {}),
        ({"top_k": 0}, {"top_k": -1}),
        ({"top_k": 0.0}, {"top_k": -1}),
        ({"top_k": -1}, {"top_k": -1}),
    ],
)
def test_what_switches_off(config: dict[str, Any], expected: dict[str, float]) -> None:
    assert of_generation_config("there", config) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", float("nan")), ("temperature", "0.6"), ("temperature", -1),
        ("temperature", True), ("top_p", 0), ("top_p", 1.5), ("top_p", [0.9]), ("top_k", -2),
        ("top_k", 2.5), ("top_k", False), ("min_p", -0.1), ("repetition_penalty", 0),
        ("repetition_penalty", 3.0), ("max_new_tokens", 0), ("max_new_tokens", "many"),
        ("do_sample", "false"),
    ],
)  # fmt: skip
def test_what_nobody_can_mean_is_left_out_and_told(
    name: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert of_generation_config("x/generation_config.json", LLAMA | {name: value}) == {
        key: LLAMA[key] for key in ("temperature", "top_p") if key != name
    }
    [message] = caplog.messages
    assert "x/generation_config.json: " in message and f"{name}={value!r}" in message


def test_folder_and_artifact(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny.source, tmp_path / "source"))
    (folder / "generation_config.json").write_text(json.dumps(QWEN))
    expected = {name: QWEN[name] for name in NAMES if name in QWEN}
    source = open_source(folder)
    assert source.sampling_defaults == expected
    module = import_module("compile.build")  # the package's `build` is the function
    monkeypatch.setattr(module, "iree_compile", lambda mlir, vmfb, target: vmfb.touch())
    manifest = open_artifact(build(source, tmp_path / "artifact", TINY_OPTIONS)).manifest
    assert manifest is not None and manifest.sampling_defaults == expected


def test_no_recommendations(tmp_path: Path) -> None:
    assert open_source(write_folder(tmp_path / "toy")).sampling_defaults == {}
    assert open_source(write_gguf(tmp_path / "toy.gguf")).sampling_defaults == {}


def test_gguf(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As it is written, and not what 32 bits make of it."""
    keys = {"temp": 0.6, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "penalty_repeat": 1.1}
    fields = {f"general__sampling__{key}": value for key, value in keys.items()}
    assert open_source(write_gguf(tmp_path / "toy.gguf", **fields)).sampling_defaults == {
        "temperature": 0.6, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1,
    }  # fmt: skip
    odd = {"general.sampling.temp": 1e300, "general.sampling.top_k": 0}
    assert of_gguf("there", odd) == {"top_k": -1}
    assert "temperature=inf must be" in caplog.text
