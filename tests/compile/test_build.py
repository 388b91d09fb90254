"""Building artifacts: options, refusals, determinism; folders appear whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest

from compile import BuildOptions, build
from compile.__main__ import main, model_name
from compile.emitters import find_emitter
from compile.folder import check_output, staging
from compile.sources.open import open_source
from compile.target import HIP_CHIPS
from compile.weights import write_weights
from sf_local import Engine, SamplingParams, cli
from sf_local.artifact.manifest import WEIGHTS, file_sha256
from sf_local.artifact.open import compiled_targets, open_artifact, verify
from sf_local.errors import OutputError, SourceError, UnsupportedError
from tests.support.tiny import ONE_PADDED, ONE_SIZE, TINY_OPTIONS, TinyModel
from tests.support.toy_sources import write_gguf, write_wide_gguf

SLOW = pytest.mark.slow
FILES = {
    "artifact.json", "config.json", "model.vmfb", "tokenizer.json", "tokenizer_config.json",
    "weights.irpa",
}  # fmt: skip


def test_the_folder_holds_these_files(tiny: TinyModel) -> None:
    assert {path.name for path in tiny.artifact.iterdir()} == FILES
    verify(open_artifact(tiny.artifact))


def test_config_is_exactly_shortfins(tiny: TinyModel) -> None:
    """The fields of paged_llm_v1, none more: shortfin's own reader refuses others."""
    config = json.loads((tiny.artifact / "config.json").read_text())
    assert set(config) == {
        "module_name", "module_abi_version", "max_seq_len", "attn_head_dim",
        "prefill_batch_sizes", "has_prefill_position", "decode_batch_sizes",
        "transformer_block_count", "logits_normalization", "top_k", "paged_kv_cache",
    }  # fmt: skip
    assert set(config["paged_kv_cache"]) == {
        "attention_head_count_kv", "block_seq_stride", "device_block_count", "kv_cache_dtype",
        "paged_kv_block_size_elements_per_device",
    }  # fmt: skip


def test_two_builds_are_equal(tiny: TinyModel, tmp_path: Path) -> None:
    folders = [
        build(tiny.source, tmp_path / name, TINY_OPTIONS, keep_mlir=True) for name in ("a", "b")
    ]
    for name in ("model.mlir", "weights.irpa", "config.json"):
        assert len({file_sha256(folder / name) for folder in folders}) == 1, name


CHIPS = [c if c in ("gfx942", "gfx1100") else pytest.param(c, marks=SLOW) for c in HIP_CHIPS]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_amd_chips_compile(make_tiny: Callable[..., TinyModel], chip: str, dtype: Any) -> None:
    model = make_tiny(target=chip, weight_dtype=dtype, kv_dtype=dtype, **ONE_PADDED)
    manifest = open_artifact(model.artifact).manifest
    assert manifest and (manifest.target, manifest.device) == (chip, "hip")
    assert manifest.weight_dtype == (dtype or "f16")


def test_an_existing_folder_is_kept(tiny: TinyModel, tmp_path: Path) -> None:
    output = build(tiny.source, tmp_path / "out", TINY_OPTIONS)
    before = file_sha256(output / "artifact.json")
    with pytest.raises(OutputError, match="--force"):
        build(tiny.source, output, TINY_OPTIONS)
    with pytest.raises(SourceError):
        build(tmp_path / "nothing", output, TINY_OPTIONS, force=True)
    assert file_sha256(output / "artifact.json") == before
    build(tiny.source, output, replace(TINY_OPTIONS, page_size=16, **ONE_SIZE), force=True)
    assert open_artifact(output).config.page_size == 16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


ARTIFACT = ("artifact.json", "model.vmfb", "weights.irpa", "config.json", "tokenizer.json")


def make_files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("precious")
    return folder


@pytest.mark.parametrize(
    ("names", "in_the_way"),
    [
        (["thesis.txt"], "thesis.txt"),
        (["config.json", "tokenizer.json"], "config.json, tokenizer.json"),
        ([*ARTIFACT, "thesis.txt"], "thesis.txt"),
        ([*ARTIFACT, "weights.irpa/thesis.txt"], "weights.irpa"),
        (["thesis.txt", *(f"cpu/{name}" for name in ARTIFACT)], "thesis.txt"),
        ([f"cpu/{name}" for name in (*ARTIFACT, "notes/thesis.txt")], "cpu"),
        ([f"{model}/{name}" for model in "ab" for name in ARTIFACT], "a, b"),
        ([*(f"cpu/{name}" for name in ARTIFACT), "gfx942/thesis.txt"], "gfx942"),
        ([f"{n}.txt" for n in range(9)], "0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 4 more"),
    ],
)
def test_force_replaces_only_artifacts(
    tiny: TinyModel, tmp_path: Path, names: list[str], in_the_way: str
) -> None:
    names = [name for name in names if not any(n.startswith(f"{name}/") for n in names)]
    output = make_files(tmp_path / "out", *names)
    with pytest.raises(OutputError, match=re.escape(f"out holds {in_the_way}, which --force")):
        build(tiny.source, output, TINY_OPTIONS, force=True)
    assert all((output / name).read_text() == "precious" for name in names)


@pytest.mark.parametrize(
    "names",
    [[], [*ARTIFACT, "model.mlir"], [f"{t}/{n}" for t in ("cpu", "gfx942") for n in ARTIFACT]],
)
def test_force_replaces_artifacts(tmp_path: Path, names: list[str]) -> None:
    output = make_files(tmp_path, *names)
    check_output(output, force=True)
    with pytest.raises(OutputError, match="exists already"):
        check_output(output, force=False)


def test_what_appears_during_a_build_is_kept(tmp_path: Path) -> None:
    for force in (False, True):
        output = tmp_path / f"out-{force}"
        with pytest.raises(OutputError, match="--force"), staging(output, force):
            make_files(output, "thesis.txt")
        assert (output / "thesis.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-False", "out-True"]


def test_what_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the two renames, after which the old artifact was removed as temporary."""
    output, replace_file = make_files(tmp_path / "out", *ARTIFACT), os.replace

    def interrupted(source: Path, target: Path) -> None:
        replace_file(source, target)
        if target.name == "old":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), staging(output, force=True):
        pass
    assert all((output / name).read_text() == "precious" for name in ARTIFACT)
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_terminated_run_leaves_nothing(tiny: TinyModel, tmp_path: Path, number: int) -> None:
    """Neither what is temporary nor the compiler, which gets the signal on its own."""
    program = f"""
import signal
signal.signal({int(number)}, signal.default_int_handler)  # which a background job inherits ignored
from compile.__main__ import main
raise SystemExit(main([{str(tiny.source)!r}, "-o", {str(tmp_path / "out")!r}]))
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not (found := list(tmp_path.glob(".sf-compile.*/new/model.mlir"))):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(60) == 130
    assert found and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "write", "dtype", "level"),
    [
        ("cpu", write_wide_gguf, "int8", "INFO"), ("cpu", write_gguf, "f32", "WARNING"),
        ("gfx942,gfx1100", write_wide_gguf, "int8", "INFO"),
    ],
)  # fmt: skip
def test_types_and_sizes_are_told_before_work_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    target: str, write: Callable[..., Path], dtype: str, level: str,
) -> None:  # fmt: skip
    """A disk without room is refused then; targets that share weights need room for them once.
    Heads of `write_gguf` are too narrow for quantized weights on CPUs, whatever these are."""
    source = write(tmp_path / "toy.gguf", gguf.GGMLQuantizationType.Q8_0)
    weights = tmp_path / "weights"
    opened, options = open_source(source), BuildOptions(target, cpu="generic")
    emitter = find_emitter(opened, options, options.targets[0])
    write_weights(weights, opened, list(emitter.parameters.values()), lambda done, total: None)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage._replace(free=weights.stat().st_size // 2)
    )
    caplog.set_level("INFO")
    with pytest.raises(OutputError, match=r"needs [\d.]+ kB, and [\d.]+ kB are free") as caught:
        build(source, tmp_path / "out", options)
    *_, needed, _ = re.findall(r"[\d.]+(?= kB)", str(caught.value))
    assert float(needed) * 1000 == pytest.approx(weights.stat().st_size, rel=0.1)
    lines = [r for r in caplog.records if "Q8_0 weights become" in r.message]
    assert sorted(tmp_path.iterdir()) == [source, weights]
    assert len(lines) == len(target.split(","))
    for line, name in zip(lines, target.split(","), strict=True):
        assert f"become {dtype} for {name}: {needed} kB on disk and in memory" in line.message
        assert line.levelname == level and ("whole 32s" in line.message) == (level != "INFO")


@pytest.mark.parametrize("limit", [1000, 100_000])
def test_a_full_disk(tiny: TinyModel, tmp_path: Path, limit: int) -> None:
    """A file-size limit stands for it: the weights or the VMFB do not fit; nothing stays behind."""
    program = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from compile.__main__ import model_name, main
raise SystemExit(main([{str(tiny.source)!r}, "-o", {str(tmp_path / "out")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "cannot be written" in done.stderr or "iree-compile failed" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder(tiny: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "out", Path("/proc/sf_local/out"), tmp_path / ("x" * 300)):
        with pytest.raises(OutputError, match="cannot be written"):
            build(tiny.source, output, TINY_OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "gfx1030"}, "gfx1030.*cannot generate code"),
        ({"target": "gfx1151"}, "gfx1151.*cannot generate code"),
        ({"target": "cuda"}, "'cuda' is unknown"),
        ({"cpu": "pentium"}, "'pentium' is unknown"),
        ({"max_seq_len": 100_000}, "max_seq_len=100000"),
        ({"max_seq_len": 4}, "max_seq_len=4"),
        ({"max_seq_len": 0}, "max_seq_len=0"),
    ],
)
def test_refused_before_work_starts(
    tiny: TinyModel, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        build(tiny.source, tmp_path / "out", replace(TINY_OPTIONS, **options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_dtype": "q4"}, "weight_dtype='q4'"),
        ({"activation_dtype": "int4"}, "activation_dtype='int4'"),
        ({"kv_dtype": "int8"}, "kv_dtype='int8'"),
        ({"page_size": 7}, "page_size=7"),
        ({"prefill_batch_sizes": ()}, "prefill_batch_sizes"),
        ({"decode_batch_sizes": (4, 1)}, "decode_batch_sizes"),
        ({"decode_batch_sizes": (0,)}, "decode_batch_sizes"),
        ({"decode_batch_sizes": (1, 1000)}, "decode_batch_sizes"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        BuildOptions(**options)


def test_a_missing_tensor_and_a_left_over_one(tiny: TinyModel, tmp_path: Path) -> None:
    from tests.support.reference import write_hf_folder

    weights = dict(tiny.weights)
    weights["blk.7.ffn_up.weight"] = weights.pop("blk.1.ffn_up.weight")
    write_hf_folder(tmp_path / "source", tiny.config, weights)
    with pytest.raises(SourceError, match=r"missing: blk\.1\.ffn_up.*left over: blk\.7\.ffn_up"):
        build(tmp_path / "source", tmp_path / "out", TINY_OPTIONS)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template of type int"),
        ("tokenizer_config.json", {"bos_token": ""}, "bos_token ''.*Write null"),
        ("tokenizer_config.json", {"eos_token": {"content": ""}}, "eos_token ''.*Write null"),
        ("tokenizer.json", {"decoder": None}, "has the decoder"),
        ("config.json", {"eos_token_id": 1_000_000}, "1000000 is not in the vocabulary"),
        ("config.json", {"bos_token_id": -1}, "-1 is not in the vocabulary"),
    ],
)
def test_a_tokenizer_the_runtime_would_refuse(
    tiny: TinyModel, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    source = shutil.copytree(tiny.source, tmp_path / "source")
    data = json.loads((source / name).read_text()) | changes
    (source / name).write_text(json.dumps(data))
    with pytest.raises(SourceError, match=message) as caught:
        build(source, tmp_path / "out", TINY_OPTIONS)
    assert not (tmp_path / "out").exists()
    assert str(caught.value).startswith("source: ") and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "name"),
    [("meta-llama/Llama-3.2-1B", "Llama-3.2-1B"), ("a/b-v1.0.gguf", "b-v1.0"), ("demo", "demo")],
)
def test_the_default_folder_keeps_the_whole_name(source: str, name: str) -> None:
    assert model_name(source) == name


def test_command_line(tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    arguments = [str(tiny.source), "-o", str(output), "--weights", "f16", "--kv", "f32"]
    arguments += ["--prefill-batch-sizes", "1", "--decode-batch-sizes", "1,2", "--keep-mlir"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "is ready" in shown.out and shown.err.count("F32 weights become f16 for cpu: ") == 1
    for stage in ("converting weights ...\n", "compiling for cpu ...\n"):  # as there is no terminal
        assert shown.err.count(stage) == 1
    artifact = open_artifact(output)
    assert artifact.manifest and artifact.manifest.weight_dtype == "f16"
    assert artifact.config.decode_batch_sizes == [1, 2]
    assert (output / "model.mlir").exists()
    assert main(arguments) == 1
    assert "exists already; replace it with sf-compile --force" in capsys.readouterr().err
    sizes = [str(tiny.source), "-o", str(tmp_path / "no"), "--weights", "int8", "--max-seq-len"]
    for context, option in (("256", "--weights='int8': "), ("100000", "--max-seq-len=100000: ")):
        assert main([*sizes, context]) == 1
        assert f"sf-compile: {option}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--decode-batch-sizes", "one", "demo"])


def test_several_targets(
    tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder each; GPUs share their weights. Compiled with the options of the tests above."""
    output = tmp_path / "out"
    sizes = ["--page-size", "8", "--prefill-batch-sizes", "3", "--decode-batch-sizes", "4"]
    arguments = [str(tiny.source), "-o", str(output), "--target", "gfx942,cpu,gfx1100", *sizes]
    assert main(arguments) == 0
    assert compiled_targets(output) == ["cpu", "gfx1100", "gfx942"]
    assert (output / "gfx1100" / WEIGHTS).readlink() == Path("..", "gfx942", WEIGHTS)
    assert not (output / "cpu" / WEIGHTS).is_symlink()
    for target in ("cpu", "gfx1100", "gfx942"):
        verify(open_artifact(output, targets=[target]))
    assert cli.main(["inspect", "--verify", str(output)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("every file has the hash") == 3 and "gfx942" in shown
    with Engine(output) as engine:
        assert engine.artifact.vmfb.parent == output / "cpu"
        assert engine.generate([5, 6], SamplingParams(max_new_tokens=2)).completion_tokens == 2
    with pytest.raises(UnsupportedError, match="names one twice"):
        build(tiny.source, output, BuildOptions(target="cpu,cpu"))
