"""Paths that are neither an artifact nor weights that are read: errors say what, and what to do."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from compile.sources.open import locate, open_source
from sf_local import from_source
from sf_local.artifact.open import open_artifact
from sf_local.errors import ArtifactError, MissingFileError, SourceError
from tests.support.tiny import TinyModel
from tests.support.toy_sources import HF_CONFIG, write_folder, write_gguf


def vmfb_error(path: object) -> str:
    with pytest.raises(MissingFileError) as caught:
        open_artifact(path)  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"vmfb={str(path)!r}: ")
    return str(caught.value)


def source_error(path: Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(path)
    assert str(path) in str(caught.value) and "download it again" not in str(caught.value)
    return str(caught.value)


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def adapter(folder: Path) -> Path:
    """As peft writes one, beside a config.json, as trainers do."""
    write(folder / "adapter_model.safetensors")
    write(folder / "config.json", json.dumps(HF_CONFIG))
    base = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    return write(folder / "adapter_config.json", json.dumps(base)).parent


def without_safetensors(folder: Path, *files: str) -> Path:
    (write_folder(folder) / "model.safetensors").unlink()
    for name in files:
        write(folder / name)
    return folder


OTHERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "adapter": (adapter, r"a PEFT adapter of org/base, .*merge_and_unload\(\).*from_pretrained"
                         r"\('org/base'\).*sf-compile MERGED -o FOLDER"),
    "damaged adapter": (lambda at: write(at / "adapter_config.json").parent, "a PEFT adapter"),
    "folder of .gguf": (lambda at: write_gguf(write(at / "x").parent / "a.gguf").parent,
                        r"a folder of \.gguf files; give one: .*/a\.gguf"),
    ".gguf beside config": (lambda at: without_safetensors(at, "b.gguf"), r"give one: .*b\.gguf"),
    "above": (lambda at: write_folder(write(at / "m" / "x").parent).parent,
              "a folder of models; give one: .*/m$"),
    "pickled": (lambda at: without_safetensors(at, "pytorch_model.bin", "training_args.bin"),
                r"\(pytorch_model\.bin\).*AutoModelForCausalLM.from_pretrained\('.*save_pretrained"),
    "Meta's": (lambda at: write(at / "consolidated.00.pth").parent, "consolidated.*as safetensors"),
    "ONNX": (lambda at: without_safetensors(at, "model.onnx"), r"as ONNX \(model\.onnx\)"),
    "only ONNX": (lambda at: write(at / "model.onnx").parent, r"as ONNX \(model\.onnx\)"),
    "ONNX file": (lambda at: write(at / "model.onnx"), r"as ONNX \(model\.onnx\)"),
    "one safetensors": (lambda at: write(at / "x.safetensors"), "give a folder with"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_neither_one_nor_the_other(tmp_path: Path, name: str) -> None:
    make, words = OTHERS[name]
    path = make(tmp_path / "it")
    assert re.search(words, source_error(path))
    assert re.search(words, vmfb_error(path))


@pytest.mark.parametrize("name", ["weights.irpa", "config.json", "artifact.json", "tokenizer.json"])
def test_a_file_of_an_artifact(tiny: TinyModel, name: str) -> None:
    expected = f"a file of an artifact; give its folder, {tiny.artifact}"
    for error in vmfb_error, source_error:
        assert expected in error(tiny.artifact / name)
    with pytest.raises(SourceError, match="give its folder"):
        from_source(tiny.artifact / name)


def told_source(message: str) -> str:
    """The source in the command of sf-compile that a message tells."""
    command = re.search(r"sf-compile .* -o FOLDER", message)
    assert command, message
    words = shlex.split(command[0])
    assert [words[0], *words[2:]] == ["sf-compile", "-o", "FOLDER"]
    assert f"Engine.from_source({words[1]!r})" in message
    return words[1]


@pytest.mark.parametrize("inner", ["", "config.json", "model.safetensors", "tokenizer.json"])
def test_weights_as_vmfb(tmp_path: Path, inner: str) -> None:
    """With the command that compiles them, in a shell."""
    folder = write_folder(tmp_path / "it's a model")
    assert told_source(vmfb_error(folder / inner)) == str(folder)
    assert locate(folder).kind == "folder"
    if inner:
        assert f"give its folder, {folder}" in source_error(folder / inner)


def test_names_as_vmfb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "a b.gguf")
    assert told_source(vmfb_error(file)) == str(file)
    monkeypatch.chdir(tmp_path)
    for name, kind in (("demo", "demo"), ("org/name", "hub")):
        assert told_source(vmfb_error(name)) == name and locate(name).kind == kind
    for name in ("none.gguf", "none", "/a/b", "~nobody-of-this-name/x", "x" * 5000, "a\0b"):
        assert "no such file or folder; compile one with sf-compile SOURCE" in vmfb_error(name)


def test_any_other_file_as_vmfb(tmp_path: Path) -> None:
    assert "nor a .vmfb file" in vmfb_error(write(tmp_path / "notes.txt"))
    with pytest.raises(ArtifactError, match=r"config\.json: the file is missing"):
        open_artifact(write(tmp_path / "other.vmfb"))


def test_a_path_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = write_folder(tmp_path / "model")
    assert told_source(vmfb_error("~/model")) == str(folder)
    assert open_source("~/model").name == "model"


def test_shards_that_are_missing(tmp_path: Path) -> None:
    folder = without_safetensors(tmp_path / "it", "one.safetensors")
    shards = {"a": "one.safetensors", "b": "two.safetensors", "c": "three.safetensors"}
    write(folder / "model.safetensors.index.json", json.dumps({"weight_map": shards}))
    expected = r"index.json: 2 of 3 shards are missing \(three.safetensors, ...\): download them"
    assert re.search(expected, source_error(folder))


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "it")
    (folder / "tokenizer_config.json").unlink()
    assert f"{folder}/tokenizer_config.json is missing: download it too" in source_error(folder)


def test_models_beside_a_path_that_is_not_there(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there are" not in vmfb_error("mine")
    (tmp_path / "mine-cpu").symlink_to(tiny.artifact)
    write_folder(tmp_path / "hf")
    write_gguf(tmp_path / "a.gguf")
    told = "(there are compiled: mine-cpu; weights: a.gguf, hf)"
    assert told in vmfb_error("mine") and told in source_error(Path("mine"))
    with pytest.raises(SourceError, match=r"or a folder that sf-compile made \(there are comp"):
        from_source("mine")
    assert f"weights: {tmp_path}/a.gguf" in source_error(tmp_path / "mine")
