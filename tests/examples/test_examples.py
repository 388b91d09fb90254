"""Every example runs: with no arguments, on the real demo model; or on random weights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from sf_local import Engine
from tests.support.tiny import SeeingModel, TinyModel

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    env = os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.model
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("multi_turn.py", r"Paris[\s\S]*first token after \d+ ms, then \d+ tokens/s"),
        ("streaming.py", r"(?i)\bsea\b"),
        ("fork.py", r"Tip 1: \s*\w[\s\S]*Tip 2: \s*\w[\s\S]*In summary,"),
        ("batch.py", r"France: .*Paris"),
        ("constrained.py", r"Europe (True|False) name='.*' country='.*' continent='\w+'\n Asia"),
        ("offline_batch.py", r"The largest ocean is.*Pacific[\s\S]*France: .*Paris"),
        ("tools.py", r"\{'country': 'France'\}\) is '68 million'\n.*68 million"),
        ("chat.py", r"Paris[\s\S]*Paris[\s\S]*city='.*Paris.*' country='.*'"),
    ],
)
def test_example(smollm2: Path, name: str, expected: str) -> None:
    assert re.search(expected, run(name))
    if name == "batch.py":  # of those that read these options, in examples/common.py
        assert re.search(expected, run(name, "--vmfb", str(smollm2), "--device", "cpu"))


@pytest.mark.model
def test_many_prompts(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": "The sun is", "max_new_tokens": 3}) for _ in range(3)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    for new in (3, 0):
        out = run("many_prompts.py", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"))
        assert out == f"Summary(answered=3, failed=0, {new=})\n"
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 3


def test_bench_batch(tiny: TinyModel) -> None:
    sizes = ["--preambles", "6", "--prompts", "8", "--words", "30", "--kv-memory", "120KiB"]
    out = run("bench_batch.py", "--vmfb", str(tiny.artifact), *sizes)
    in_order, shuffled, _ = map(int, re.findall(r"(\d+) prompt tokens", out))
    assert 0 < shuffled <= 1.1 * in_order


def test_bench_artifacts(tiny: TinyModel) -> None:
    sizes = ["--prompts", "8", "20", "--rows", "2", "--answer", "4", "--rounds", "1"]
    out = run("bench_artifacts.py", str(tiny.artifact), str(tiny.artifact), *sizes)
    names = [line.split(" | ")[0] for line in out.splitlines()[1:]]
    assert names == ["prefill 8", "prefill 20", "decode 2"]
    assert all(line.count(", 1.00 | ") == 1 for line in out.splitlines()[1:])


def test_describe_image(tmp_path: Path) -> None:
    """The second question does not compute the picture again. The random model is made anew, with
    a cache of its own: the user's would hide what changed since."""
    path = tmp_path / "blue.png"
    Image.new("RGB", (70, 300), "blue").save(path)
    for arguments in ([], [str(path)]):
        out = run("describe_image.py", "--random", *arguments, SF_LOCAL_CACHE=str(tmp_path))
        first, second = re.findall(r"\[(\d+) tokens, (\d+) of them cached; first token after", out)
        assert int(first[1]) == 0 and int(second[1]) >= int(first[0])
        assert re.search(r"A: (photo|drawing)\n[^\n]*\nA: \d\d?\n$", out)


def test_describe_image_without_weights() -> None:
    command = [sys.executable, EXAMPLES / "describe_image.py", "--model", "/no/such/folder"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    for part in ("'/no/such/folder': not found", "hf download HuggingFaceTB/", "--random"):
        assert part in done.stderr


@pytest.mark.parametrize(("family", "cases"), [("idefics3", {"1", "10"}), ("llava", {"1"})])
def test_bench_images(
    make_seeing: Callable[..., SeeingModel], tmp_path: Path, family: str, cases: set[str]
) -> None:
    file = tmp_path / "images.json"
    out = run("bench_images.py", str(make_seeing(family).artifact),
              "--rounds", "1", "--json", str(file))  # fmt: skip
    figures = json.loads(file.read_text())["figures"]
    assert {name.split(" tile")[0] for name in figures if " tile" in name} == cases
    assert all(name in out and figure["median"] > 0 for name, figure in figures.items())
    for case in cases:
        assert any(re.match(f"{case} tiles?: encode: share of peak", name) for name in figures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--peers", "/nowhere"), "run install_peers.sh /nowhere torch"),
        (("some", "--peers", "/nowhere"), "leave out ARTIFACT"),
        (("--rounds", "0"), "--rounds 0: must be at least 1"),
    ],
)
def test_bench_images_refuses(arguments: tuple[str, ...], message: str) -> None:
    command = [sys.executable, EXAMPLES / "bench_images.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and message in done.stderr


def test_metrics(tiny: TinyModel) -> None:
    command = [sys.executable, EXAMPLES / "metrics.py", "--vmfb", tiny.artifact, "--port", "0"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        url = process.stdout.readline().strip()
        process.stdin.write("a line\n")
        process.stdin.flush()
        assert process.stdout.readline()
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            families = {f.name: f for f in text_string_to_metric_families(answer.read().decode())}
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(url.replace("metrics", "other"), timeout=60)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert sum(sample.value for sample in families["sf_local_requests"].samples) == 1


@pytest.mark.parametrize("is_closed", [True, False])
def test_draw_trace(tiny: TinyModel, tmp_path: Path, is_closed: bool) -> None:
    pytest.importorskip("matplotlib")
    trace, picture = tmp_path / "out.json", tmp_path / "out.png"
    with Engine(tiny.artifact, trace=trace) as engine:
        engine.generate("abc", max_new_tokens=4)
    if not is_closed:
        trace.write_text(trace.read_text().removesuffix("\n]\n"))
    run("draw_trace.py", str(trace), str(picture))
    with Image.open(picture) as drawn:
        assert drawn.width > 1000


@pytest.mark.slow
def test_ray_batch(tiny: TinyModel, ray_environment: dict[str, str]) -> None:
    out = run("ray_batch.py", "--vmfb", str(tiny.artifact), **ray_environment)
    places = re.findall(r"^(\w+): '", out, re.MULTILINE)
    assert sorted(places) == sorted(["France", "Italy", "Egypt", "Japan"] * 2)


def test_there_is_no_other_example() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "common.py", "multi_turn.py", "streaming.py", "fork.py", "batch.py", "constrained.py",
        "offline_batch.py", "describe_image.py", "random_smolvlm.py", "bench_peers.py",
        "bench_shape.py", "bench_images.py", "first_run_on_gpu.py", "metrics.py",
        "chat.py", "many_prompts.py", "serve_fastapi.py", "bench_batch.py",
        "bench_artifacts.py", "ray_batch.py", "tools.py", "draw_trace.py",
    }  # fmt: skip
