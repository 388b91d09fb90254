"""`from_source`: compiled once, found again, and refused by name. Most compile no code."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import pytest

import sf_local
from sf_local import Engine, SamplingParams
from sf_local.artifact.cache import cache_dir
from sf_local.artifact.open import compiled_targets, open_artifact
from sf_local.device.info import DeviceInfo
from sf_local.engine import sources
from sf_local.errors import CompileError, DeviceError, OutputError, SourceError, UnsupportedError
from tests.support.tiny import ONE_SIZE, TinyModel
from tests.support.toy_sources import write_gguf

from_source = partial(sf_local.from_source, **ONE_SIZE)  # the fewest functions
OPTIONS: dict[str, Any] = {"weight_dtype": "f32", "kv_dtype": "f32", "page_size": 8, **ONE_SIZE}
# In a process of its own, whose compiler writes nothing, and notes that it was called
CALL = """
import importlib, pathlib, sys, time
from sf_local import from_source

source, log, seconds = sys.argv[1:]

def compiler(mlir, vmfb, target):
    with open(log, "a") as file:
        file.write("compiled ")
    print("compiling", flush=True)
    time.sleep(float(seconds))
    vmfb.touch()

importlib.import_module("compile.build").iree_compile = compiler
sizes = {"prefill_batch_sizes": (1,), "decode_batch_sizes": (1,)}
print(from_source(source, **sizes), flush=True)
"""


@pytest.fixture(autouse=True)
def artifacts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SF_LOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache" / "artifacts"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The targets that were compiled for; the compiler writes an empty file."""
    made: list[str] = []

    def compiler(mlir: Path, vmfb: Path, target: Any) -> None:
        made.append(target.name)
        vmfb.touch()

    monkeypatch.setattr(import_module("compile.build"), "iree_compile", compiler)
    return made


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CALL, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_an_engine(tiny: TinyModel, artifacts: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Compiled at first, opened then; an artifact is used as it is."""
    caplog.set_level("INFO", "sf_local.compile")
    params = SamplingParams(max_new_tokens=8, temperature=0)
    texts = []
    for source in (tiny.source, str(tiny.source), tiny.artifact):
        with Engine.from_source(source, build_options=OPTIONS, kv_pages=40) as engine:
            texts.append(engine.generate("hello", params).text)
            assert engine.stats()["pages_total"] == 40
    assert len(set(texts)) == 1
    assert len([r for r in caplog.records if "weights become" in r.message]) == 1
    assert len(list(artifacts.iterdir())) == 1


def test_a_changed_source_is_compiled_again(
    tmp_path: Path, artifacts: Path, compilations: list[str]
) -> None:
    file = write_gguf(tmp_path / "toy.gguf")
    first = from_source(file)
    assert first == from_source(str(file)) and first.parent == artifacts
    assert open_artifact(first).manifest and compilations == ["cpu"]
    assert from_source(file, page_size=32, decode_batch_sizes=[1, 2]) != first
    write_gguf(file, llama__rope__freq_base=600.0)
    assert from_source(file) != first
    write_gguf(file)
    assert from_source(file) == first and len(compilations) == 3


def test_a_changed_folder_is_compiled_again(
    tiny: TinyModel, tmp_path: Path, compilations: list[str]
) -> None:
    folder = shutil.copytree(tiny.source, tmp_path / "model")
    first = from_source(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "other"}))
    assert from_source(folder) != first
    assert from_source(shutil.copytree(folder, tmp_path / "copy" / "model")) == from_source(folder)
    assert compilations == ["cpu", "cpu"]


@pytest.mark.parametrize("lost", ["artifact.json", "model.vmfb", "weights.irpa", "tokenizer.json"])
def test_a_damaged_artifact_is_compiled_again(
    tmp_path: Path, artifacts: Path, compilations: list[str], lost: str
) -> None:
    """Cleaners of caches remove files that were not used for long."""
    file = write_gguf(tmp_path / "toy.gguf")
    folder = from_source(file)
    (folder / lost).unlink()
    assert from_source(file) == folder and open_artifact(folder)
    assert len(compilations) == 2 and list(artifacts.iterdir()) == [folder]


def test_a_name_of_any_length(tmp_path: Path, compilations: list[str]) -> None:
    file = write_gguf(tmp_path / f"{'ä b/'[:3] * 40}.gguf")
    assert len(from_source(file).name.encode()) < 200


def test_the_target_is_that_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str]
) -> None:
    gpus = {"hip:0": "gfx1100", "hip:1": "gfx942", "hip:2": "gfx1030", "cpu": "cpu"}

    def find(name: str, targets: Any) -> DeviceInfo:
        assert "cpu" in targets and "gfx942" in targets and "gfx1030" not in targets
        return DeviceInfo(name, gpus[name], "", 1)

    monkeypatch.setattr(sources, "find_device", find)
    file = write_gguf(tmp_path / "toy.gguf")

    def targets(device: Any, **options: Any) -> list[str]:
        return compiled_targets(from_source(file, device, **options))

    assert targets("cpu") == ["cpu"]
    assert targets(["hip:0", "hip:0"]) == ["gfx1100"]
    assert targets(["hip:0", "hip:1"]) == ["gfx1100", "gfx942"]
    assert targets("hip:0", target="gfx942") == ["gfx942"]
    with pytest.raises(UnsupportedError, match="gfx1030"):
        targets("hip:2")


def test_auto_is_what_can_be_compiled_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str]
) -> None:
    """The small GPU inside of a processor is none of it."""
    info = import_module("sf_local.device.info")
    inside = DeviceInfo("hip:0", "gfx1036", "", 1)
    monkeypatch.setattr(info, "_gpus", lambda: [inside])
    assert compiled_targets(from_source(write_gguf(tmp_path / "toy.gguf"), "auto")) == ["cpu"]


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("nothing.gguf", {}, SourceError, "'nothing.gguf': not found.*\"demo\".*org/name"),
        ("", {}, SourceError, "allowed are"),
        ("x" * 5000, {}, SourceError, "too long.*allowed are"),
        ("a\0b.gguf", {}, SourceError, "allowed are"),
        ("~nobody-of-this-name/x", {}, SourceError, "allowed are"),
        (None, {}, SourceError, "source=None"),
        (".", {}, SourceError, "without config.json"),
        ("demo", {"weights": "int4"}, UnsupportedError, "weights='int4'.*weight_dtype"),
        ("demo", {"target": "gfx1030"}, UnsupportedError, "gfx1030"),
        ("demo", {"target": 7}, UnsupportedError, "target=7"),
        ("demo", {"decode_batch_sizes": 4}, UnsupportedError, "decode_batch_sizes=4"),
        ("demo", {"prefill_batch_sizes": ["1"]}, UnsupportedError, "prefill_batch_sizes"),
        ("demo", {"max_seq_len": "8"}, UnsupportedError, "max_seq_len='8'"),
        ("demo", {"device": "tpu"}, DeviceError, "device='tpu'"),
        ("demo", {"device": []}, DeviceError, "device=\\[\\]"),
    ],
)
def test_mistakes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    source: Any, options: dict[str, Any], error: type[Exception], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        from_source(source, **options)
    assert not list(tmp_path.glob("cache/artifacts/*"))


@pytest.mark.parametrize("place", ["/proc/nothing", "FILE"])
def test_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str], place: str
) -> None:
    file = write_gguf(tmp_path / "toy.gguf")
    monkeypatch.setenv("SF_LOCAL_CACHE", place.replace("FILE", str(file)))
    with pytest.raises(OutputError, match=r"cannot be written.*set SF_LOCAL_CACHE"):
        from_source(file)
    assert not compilations


def test_a_read_only_cache_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str]
) -> None:
    file = write_gguf(tmp_path / "toy.gguf")
    folder = from_source(file)
    before = sorted(cache_dir().rglob("*"))

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("mkdir", "write_text", "open"):
        monkeypatch.setattr(Path, name, refuse if name != "open" else reading(Path.open, refuse))
    assert from_source(file) == folder
    assert sorted(cache_dir().rglob("*")) == before


def reading(open_file: Any, refuse: Any) -> Any:
    """Opens files to read."""
    return lambda path, mode="r", *rest, **options: (
        refuse() if set(mode) & set("wax+") else open_file(path, mode, *rest, **options)
    )


def test_a_full_disk(tmp_path: Path, artifacts: Path) -> None:
    file = write_gguf(tmp_path / "toy.gguf")
    limit = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
"""
    done = subprocess.run(
        [sys.executable, "-c", limit + CALL, file, tmp_path / "log", "0"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert "OutputError" in done.stderr and "set SF_LOCAL_CACHE" in done.stderr
    assert list(artifacts.iterdir()) == []


def test_two_processes_compile_once(tmp_path: Path, artifacts: Path) -> None:
    file, log = write_gguf(tmp_path / "toy.gguf"), tmp_path / "log"
    both = [start(file, log, 1) for _ in range(2)]
    shown = [process.communicate(timeout=120) for process in both]
    assert all(not err for _, err in shown), shown
    assert len({out.split()[-1] for out, _ in shown}) == 1
    assert log.read_text() == "compiled " and len(list(artifacts.iterdir())) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_one_that_dies_harms_nobody(tmp_path: Path, artifacts: Path, number: int) -> None:
    """The one that waits compiles then. Ctrl-C leaves nothing behind."""
    file, log = write_gguf(tmp_path / "toy.gguf"), tmp_path / "log"
    with start(file, log, 100) as first:
        assert first.stdout and first.stdout.readline() == "compiling\n"
        second = start(file, log, 0)
        first.send_signal(number)
        first.wait(60)
    out, err = second.communicate(timeout=120)
    assert not err and [str(path) for path in artifacts.iterdir()] == [out.split()[-1]]
    assert log.read_text() == "compiled compiled "


def test_interrupted_alone(tmp_path: Path, artifacts: Path) -> None:
    file = write_gguf(tmp_path / "toy.gguf")
    with start(file, tmp_path / "log", 100) as process:
        assert process.stdout and process.stdout.readline() == "compiling\n"
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert list(artifacts.iterdir()) == []


class Hub:
    """Stands in for Hugging Face: what its cache holds, and whether the network is there."""

    def __init__(self, folder: Path) -> None:
        self.newest, self.cached, self.is_online, self.downloads = folder, False, True, 0

    def snapshot_download(
        self, repo_id: str, local_files_only: bool = False, **options: Any
    ) -> str:
        assert repo_id == "org/name"
        if not local_files_only:
            if not self.is_online:
                raise ConnectionError("no network")
            self.downloads += 1
            self.cached = True
        if not self.cached:
            raise FileNotFoundError("not in the cache")
        return str(self.newest)


def test_a_repo(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str]
) -> None:
    """The network is used for what is not in the cache alone."""
    hub = Hub(shutil.copytree(tiny.source, tmp_path / "snapshot"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    first = from_source("org/name")
    assert first.name.startswith("org_name-") and hub.downloads == 1
    hub.is_online = False
    assert from_source("org/name") == first, "Hugging Face's cache holds it"
    hub.cached = False
    assert from_source("org/name") == first, "it does not, but ours does"
    with pytest.raises(SourceError, match=r"cannot be downloaded.*no network"):
        from_source("org/name", page_size=32)
    path = hub.newest / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "other"}))
    assert from_source("org/name") == first
    hub.cached = hub.is_online = True
    second = from_source("org/name")
    assert second != first and len(compilations) == 2, "somebody has downloaded a newer revision"
    (hub.newest / "model.safetensors").unlink()
    assert from_source("org/name") == second, "a part of a revision is none"


def test_the_path_that_is_no_artifact_names_the_remedy(tmp_path: Path, tiny: TinyModel) -> None:
    file = write_gguf(tmp_path / "a b.gguf", gguf.GGMLQuantizationType.F32)
    for source, command in ((file, f"sf-compile '{file}' -o"), (tiny.source, "sf-compile /")):
        with pytest.raises(Exception, match="weights, no artifact") as caught:
            Engine(source)
        assert command in str(caught.value) and "Engine.from_source" in str(caught.value)
    with pytest.raises(Exception, match=r"no such file.*Engine\.from_source"):
        Engine("demo")
    assert not issubclass(type(caught.value), CompileError)


def test_a_repo_in_the_real_cache_needs_no_network(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As huggingface_hub itself lays it out, without a network."""
    repo = tmp_path / "hf" / "hub" / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    shutil.copytree(tiny.source, repo / "snapshots" / ("a" * 40))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    log, paths = tmp_path / "log", set()
    for is_cached in (True, True, False):
        if not is_cached:
            shutil.rmtree(repo)
        process = start("org/name", log, 0)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        paths.add(out.split()[-1])
    assert len(paths) == 1 and log.read_text() == "compiled "
