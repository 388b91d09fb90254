"""What the archive holds: the source's matrices in the target's layout, and rope tables."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest

from compile import BuildOptions
from compile.emitters import find_emitter
from compile.models.rope import rope_frequencies, rope_table
from compile.models.spec import RopeScaling
from compile.sources.open import open_source
from compile.target import resolve_target
from compile.weights import write_weights
from sf_local.artifact.irpa import read_table
from sf_local.errors import SourceError
from tests.support.reference import rope_frequencies as reference_frequencies
from tests.support.tiny import TINY, TinyModel
from tests.support.toy_sources import wide_weights, write_folder, write_wide_gguf

DTYPES = {"f32": np.float32, "bf16": ml_dtypes.bfloat16}


def read(path: Path, name: str) -> np.ndarray:
    entry = read_table(path)[name]
    *shape, dtype = entry.type.split("x")
    data = path.read_bytes()[entry.offset : entry.offset + entry.num_bytes]
    return np.frombuffer(data, DTYPES[dtype]).reshape([int(d) for d in shape])


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_packed_matrices(make_tiny: Callable[..., TinyModel], dtype: str) -> None:
    """Tiles [N/n, K/k, n, k] of q, k and v together; what is padded is zero."""
    model = make_tiny(weight_dtype=dtype, kv_dtype=dtype)
    tiles = read(model.artifact / "weights.irpa", "blk.1.attn_qkv.weight")
    matrix = tiles.transpose(0, 2, 1, 3).reshape(tiles.shape[0] * tiles.shape[2], -1)
    parts = [model.weights[f"blk.1.attn_{x}.weight"] for x in "qkv"]
    expected = np.concatenate(parts).astype(DTYPES[dtype])
    np.testing.assert_array_equal(matrix[: len(expected), : expected.shape[1]], expected)
    assert not matrix[len(expected) :].any() and not matrix[:, expected.shape[1] :].any()


def test_gate_and_up_alternate(make_tiny: Callable[..., TinyModel]) -> None:
    """Each block is half gates, half ups; 71 features of both are padded with zeros."""
    model = make_tiny(intermediate_size=71, has_code=False)
    tiles = read(model.artifact / "weights.irpa", "blk.0.ffn_gate_up.weight")
    blocks = tiles.transpose(0, 2, 1, 3).reshape(len(tiles), 2, tiles.shape[2] // 2, -1)
    for found, name in zip(blocks.swapaxes(0, 1), ("gate", "up"), strict=True):
        matrix = found.reshape(-1, found.shape[-1])
        np.testing.assert_array_equal(matrix[:71, :48], model.weights[f"blk.0.ffn_{name}.weight"])
        assert not matrix[71:].any() and not matrix[:, 48:].any()


def test_row_major_matrices(make_tiny: Callable[..., TinyModel]) -> None:
    model = make_tiny(row_major=True)
    found = read(model.artifact / "weights.irpa", "blk.0.ffn_down.weight")
    np.testing.assert_array_equal(found, model.weights["blk.0.ffn_down.weight"])


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RopeScaling("linear", 4.0),
        RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
        RopeScaling("factors", 1.0, factors=(1.0, 2.0, 3.0, 4.0)),
    ],
)
def test_rope(scaling: RopeScaling | None) -> None:
    config = replace(TINY, rope_scaling=scaling)
    np.testing.assert_allclose(rope_frequencies(config), reference_frequencies(config), rtol=1e-12)
    table = rope_table(config, 0, 16)
    assert table.shape == (16, 2, 4) and table.dtype == np.float32
    np.testing.assert_array_equal(rope_table(config, 9, 11), table[9:11])
    np.testing.assert_allclose(table[9, 1], np.sin(9 * rope_frequencies(config)), atol=1e-7)


@pytest.mark.slow
def test_conversion_streams(tmp_path: Path) -> None:
    """1.3 GB of weights in four matrices convert within 300 MB of anonymous memory."""
    program = f"""
import json, re, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from dataclasses import replace
from pathlib import Path
import numpy as np
from tests.support.tiny import TINY
from tests.support.reference import random_weights, write_hf_folder
from compile.cpu.emitter import CpuLlamaEmitter
from compile.options import ModelOptions
from compile.target import Vectors
from compile.sources.open import open_source
from compile.weights import write_weights

def anonymous() -> int:
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

config = replace(TINY, num_layers=1, hidden_size=2048, intermediate_size=32768, vocab_size=40000)
folder = Path({str(tmp_path)!r})
if sys.argv[1] == "write":
    write_hf_folder(folder / "source", config, random_weights(config, 0))
else:
    options = ModelOptions("bf16", "bf16", 16, (1,), (1,), 64)
    source = open_source(folder / "source")
    before, peak = anonymous(), 0
    def watch(done, total):
        global peak
        peak = max(peak, anonymous())
    parameters = list(CpuLlamaEmitter(config, options, Vectors(16, 8)).parameters.values())
    write_weights(folder / "weights.irpa", source, parameters, watch)
    print(peak - before)
"""
    subprocess.run([sys.executable, "-c", program, "write"], check=True, timeout=300)
    done = subprocess.run(
        [sys.executable, "-c", program, "convert"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 300


def convert(source: Path, weight_dtype: str | None, out: Path) -> None:
    opened = open_source(source)
    target = resolve_target("cpu", "host")
    emitter = find_emitter(opened, BuildOptions(weight_dtype=weight_dtype), target)
    write_weights(out, opened, list(emitter.parameters.values()), lambda done, total: None)


Q_PROJ, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "int8", "int4"])
@pytest.mark.parametrize(("name", "ours"), [(Q_PROJ, "blk.1.attn_q"), (NORM, "output_norm")])
def test_weights_that_are_no_numbers(tmp_path: Path, dtype: str, name: str, ours: str) -> None:
    for value in (np.nan, np.inf, -np.inf):
        weights = wide_weights()
        weights[name].reshape(-1)[[3, 5]] = value
        folder = write_folder(tmp_path / "toy", weights, head_dim=32)
        with pytest.raises(SourceError, match=rf"toy: {ours}.weight has 2 weights that are NaN or"):
            convert(folder, dtype, tmp_path / "out")


WEIGHTS, SHIFTED = (7, 9), (slice(5, 7), slice(0, 32))  # one; all of two groups


@pytest.mark.parametrize(
    ("dtype", "where", "value", "refused"),
    [
        ("f16", WEIGHTS, 65504, ""), ("f16", WEIGHTS, -65536, "1 weights"),
        ("bf16", WEIGHTS, 1e30, ""), ("bf16", WEIGHTS, 3.4e38, "1 weights"),
        ("f32", WEIGHTS, 3.4e38, ""), ("f16", SHIFTED, 1e5, "64 weights"),
        ("int8", WEIGHTS, 1e6, ""), ("int8", WEIGHTS, -1e8, "1 groups"),
        ("int4", WEIGHTS, 1e4, ""), ("int4", WEIGHTS, 9e5, ""), ("int4", WEIGHTS, 1e8, "1 groups"),
        ("int4", WEIGHTS, -1e5, "1 groups"), ("int4", SHIFTED, 1e5, "2 groups"),
        ("int4", SHIFTED, -1e5, "2 groups"), ("int8", SHIFTED, 1e5, ""),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_weights_that_are_too_large(
    tmp_path: Path, dtype: str, where: tuple[int | slice, ...], value: float, refused: str
) -> None:
    weights = wide_weights()
    weights[Q_PROJ][where] = value
    folder = write_folder(tmp_path / "toy", weights, head_dim=32)
    if not refused:
        convert(folder, dtype, tmp_path / "out")
        return
    with pytest.raises(SourceError, match=f"{refused}.* too large for {dtype}: up to") as caught:
        convert(folder, dtype, tmp_path / "out")
    assert str(caught.value).endswith("--weights f32" if dtype == "bf16" else "bf16 or f32")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_0", "Q5_0", "Q5_1"])
def test_blocks_whose_scale_is_no_number(tmp_path: Path, kind: str) -> None:
    """They are carried over as they are, so that nothing else would look at them."""
    quant = gguf.GGMLQuantizationType[kind]
    path = write_wide_gguf(tmp_path / "toy.gguf", quant)
    data = path.read_bytes()
    at = data.index(gguf.quantize(wide_weights()[Q_PROJ], quant).tobytes())
    path.write_bytes(data[:at] + np.float16(np.inf).tobytes() + data[at + 2 :])
    with pytest.raises(SourceError, match=r"attn_q.weight has \d+ weights that are NaN or inf"):
        convert(path, None, tmp_path / "out")
