"""examples/bench_peers.py without any peer: a script that answers jobs stands in for them."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sf_local import from_source
from tests.support.tiny import TinyModel

EXAMPLES = Path(__file__).parents[2] / "examples"
WORKER = """
import json, sys
speed, broken = float(sys.argv[1]), sys.argv[2:]
for line in sys.stdin:
    name, *arguments = json.loads(line)
    if "exit" in broken:
        sys.exit("out of luck")
    value = "2 threads" if name == "settings" else speed
    reply = {"error": "no such thing"} if name in broken else {"value": value}
    print(json.dumps(reply), flush=True)
"""


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("bench_peers", EXAMPLES / "bench_peers.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_peers"] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


def test_table(peers: ModuleType) -> None:
    def fake(*arguments: str) -> object:
        return peers.Worker([sys.executable, "-c", WORKER, *arguments], is_model=False)

    workers = {
        "ours": fake("30"), "theirs": fake("20"), "broken": fake("1", "decode"),
        "gone": fake("1", "exit"), "absent": "not installed in /peers",
    }  # fmt: skip
    table = [
        peers.Row("decode", peers.DECODE, "ours", "theirs", 1.3),
        peers.Row("wait", peers.CACHED, "ours", "theirs", 1.0, "s"),
        peers.Row("half", peers.DECODE, "ours", "theirs", 0.8, "GB/s", 0.5),
        peers.Row("start", peers.START, "ours", "theirs", None, "s"),
        peers.Row("memory", peers.MEMORY, "ours", "", 1.25, "x"),
        *(peers.Row(name, peers.DECODE, "ours", name) for name in ("broken", "gone", "absent")),
    ]
    try:
        measured = peers.measure(table, workers, 2, lambda line: None)
    finally:
        for worker in workers.values():
            if not isinstance(worker, str):
                worker.close()
    another_model = peers.Worker(fake("1").command)
    with pytest.raises(RuntimeError, match="its first token is"):
        another_model.measure(peers.DECODE, [])
    decode, wait, half, start, memory, broken, gone, absent = peers.results(table, measured)
    assert decode["ours"]["values"] == [30, 30] and decode["ratio"]["values"] == [1.5, 1.5]
    assert wait["ratio"]["median"] == pytest.approx(2 / 3)  # lower is better
    assert half["ours"]["median"] == 15 and half["ratio"]["median"] == 0.75
    assert len(start["ratio"]["values"]) == 2 and start["ours"]["min"] > 0
    assert memory["ratio"]["median"] == 30 and "missing" not in memory["theirs"]
    assert broken["theirs"]["missing"] == "no such thing" and "ratio" not in broken
    assert gone["theirs"]["missing"] == "it ended: out of luck"
    assert absent["theirs"]["missing"] == "not installed in /peers"
    lines = peers.text([decode, wait, memory, absent]).splitlines()
    assert lines[1].split("  ")[-1] == ">= 1.3" and "1.5 [1.5..1.5]" in lines[1]
    assert lines[3].endswith("<= 1.25") and "not installed in /peers" in lines[4]


def test_settings_are_told_by_what_knows_the_capital_of_france(peers: ModuleType) -> None:
    def fake(speed: int) -> object:
        return peers.Worker([sys.executable, "-c", WORKER, str(speed)])

    workers = {"right": fake(peers.PARIS), "wrong": fake(1), "absent": "not installed in /peers"}
    try:
        table = [peers.Row("decode", peers.DECODE, "right", "wrong")]
        peers.measure(table, workers, 1, lambda line: None)
    finally:
        workers["right"].close()
    assert peers.settings_of(workers) == {"right": "2 threads"}


def test_no_prompt_begins_with_another(peers: ModuleType) -> None:
    """As a peer's prefix cache would have computed it before."""
    program = WORKER.replace("else speed", "else arguments[0][0] * 1e6 + arguments[0][1]")
    worker = peers.Worker([sys.executable, "-c", program, "0"], is_model=False)
    jobs = [*peers.PREFILL.values(), peers.CACHED]
    table = [peers.Row("first tokens", job, "ours", "") for job in jobs]
    try:
        measured = peers.measure(table, {"ours": worker}, 2, lambda line: None)
    finally:
        worker.close()
    found = [value for values in measured.values() for value in values]
    assert len(set(found)) == len(found) == 8


def test_rows(peers: ModuleType) -> None:
    """Every peer has every row of each width that it has, for each of our artifacts."""
    table = peers.rows(dict.fromkeys(["f16", "int8", "int4", "int4, int8 activations"]))
    assert {(row.ours, row.theirs) for row in table} == {
        ("ours f16", "llama.cpp F16"), ("ours f16", "OpenVINO GenAI fp16"),
        ("ours int8", "llama.cpp Q8_0"), ("ours int8", "OpenVINO GenAI int8"),
        ("ours int8", "ONNX Runtime GenAI int8"), ("ours int8", "CTranslate2 int8"),
        ("ours int4", "llama.cpp Q4_1"), ("ours int4", "OpenVINO GenAI int4"),
        ("ours int4", "ONNX Runtime GenAI int4"),
        ("ours int4, int8 activations", "llama.cpp Q4_1"),
        ("ours int4, int8 activations", "OpenVINO GenAI int4"),
        ("ours int4, int8 activations", "ONNX Runtime GenAI int4"),
    }  # fmt: skip
    openvino = {row.work: row for row in table if row.theirs == "OpenVINO GenAI int8"}
    assert {work: row.target for work, row in openvino.items()} == {
        "decode, 1 row": 1.5, "prefill 128": 1.0, "prefill 512": 1.0, "prefill 2048": 1.0,
        "8 requests together": 1.25, "16 requests together": 1.25, "first token, 1,000 cached": 2.0,
    }  # fmt: skip
    assert openvino["first token, 1,000 cached"].unit == "s"
    assert len(table) == 12 * len(openvino)
    prompts, count = peers.TOGETHER[16].arguments(random.Random(0))
    assert len(prompts) == 16 and count == 64


@pytest.mark.parametrize(
    ("name", "kind", "converter"),
    [
        ("OpenVINO GenAI", "int4", "optimum-cli"),
        ("ONNX Runtime GenAI", "int4", "python"),
        ("CTranslate2", "int8", "ct2-transformers-converter"),
    ],
)
def test_conversions(
    peers: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kind: str,
    converter: str,
) -> None:
    """A model is made once, in whole; one that cannot be made leaves its peer out."""
    monkeypatch.setenv("SF_LOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(peers.conversions, "demo_as_folder", lambda dtype: tmp_path / dtype)
    bin_folder = tmp_path / peers.ENVIRONMENTS[name] / "bin"
    bin_folder.mkdir(parents=True)

    def install(program: str, script: str) -> None:
        (bin_folder / program).write_text(f"#!/bin/sh\n{script}\n")
        (bin_folder / program).chmod(0o755)

    install("python", "exit 1")
    install(converter, "echo first >&2; echo no memory >&2; exit 3")
    assert peers.peer_of_kind(tmp_path, name, kind).endswith("failed: no memory")
    install(converter, 'for last; do :; done; mkdir "$last"; echo "$@" > "$last/made"')
    model = Path(peers.peer_of_kind(tmp_path, name, kind).command[2])
    made = (model / "made").read_text()
    assert f" {kind} " in made and f" {tmp_path / 'f32'} " in made
    install(converter, "exit 1")
    assert peers.peer_of_kind(tmp_path, name, kind).command[2] == model


def test_install_script_names_what_there_is(peers: ModuleType, tmp_path: Path) -> None:
    script, folder = EXAMPLES / "install_peers.sh", tmp_path / "peers"
    for arguments in ((), (folder, "openvino", "vllm")):
        done = subprocess.run([script, *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and set(peers.ENVIRONMENTS.values()) <= set(done.stderr.split())
    assert not folder.exists()


def test_missing_peers(peers: ModuleType, tmp_path: Path) -> None:
    worker = peers.peer_worker(tmp_path, "llama.cpp", "llama_cpp_python.py", Path)
    assert worker == f"not installed in {tmp_path}"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "give at least one of --f16, --bf16, --int8 and --int4"),
        (["--bf16", "{tiny}"], "in f32, but the peers have SmolLM2"),
        (["--int8", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes(
    peers: ModuleType,
    tiny: TinyModel,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    error: str,
) -> None:
    with pytest.raises(SystemExit):
        peers.main([argument.format(tiny=tiny.artifact) for argument in arguments])
    assert error in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.model
def test_alone(peers: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours is measured where no peer is installed."""
    artifact, file = from_source("demo", weight_dtype="bf16"), tmp_path / "peers.json"
    peers.main(
        ["--bf16", str(artifact), "--peers", str(tmp_path), "--rounds", "1", "--json", str(file)]
    )
    assert "not installed" in capsys.readouterr().out
    found = json.loads(file.read_text())["results"]
    assert all(result["ours"]["median"] > 0 for result in found)
    assert {r["work"] for r in found if "ratio" in r} == {
        "bytes read / memory bandwidth", "peak memory / (weights + KV)",
    }  # fmt: skip
