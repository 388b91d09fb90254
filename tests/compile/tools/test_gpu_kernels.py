"""What is read of IREE's texts, of kernels that are written by hand and counted on paper."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compile.models.spec import VisionConfig
from compile.options import BuildOptions
from compile.tools import gpu_kernels, gpu_report
from compile.tools.gpu_cards import CARDS, LAUNCH_SECONDS
from compile.tools.gpu_dispatch import Dispatch
from compile.tools.gpu_kernels import Report, compile_shape
from compile.tools.gpu_report import SHAPES, TOWERS, table
from tests.support.assembly import assembly, loop

CONFIG = replace(SHAPES["smollm2-135m"], num_layers=1, max_seq_len=64)
WMMA = "\tv_wmma_f32_16x16x16_f16 v[0:7], v[8:15], v[16:23], v[0:7]\n"
FMA = "\tv_fma_f32 v9, v9, v9, v9\n"
LOAD = "\tbuffer_load_b128 v[0:3], v4, s[4:7], 0 offen\n"
# Kernel: what it picks with, how the compiler counts its workgroups, and its instructions
KERNELS = {
    "f_dispatch_0_insert_Dx64xf16": (
        "tensor.insert_slice ",
        "%0 = affine.apply #map()[%arg1]", "%0",
        # As often as a number in memory says
        "\ts_load_b64 s[4:5], s[0:1], 0x0\n\ts_load_b32 s9, s[4:5], 0x0\n"
        + loop(LOAD + 20 * FMA, 9).replace("s_cmp_lt_u32 s2, 9", "s_cmp_lt_u32 s2, s9"),
    ),
    "f_dispatch_1_embed_Dx64xf16": (
        "func.func @embedding_",
        "%0 = affine.min #map1()[%arg1, %arg2]", "%0",
        # As often as its second number says
        "\ts_load_b32 s9, s[0:1], 0x1c\n"
        + loop(LOAD + FMA, 9).replace("s_cmp_lt_u32 s2, 9", "s_cmp_lt_u32 s2, s9"),
    ),
    "f_dispatch_2_attention_Dx64xf16": (
        "iree_linalg_ext.online_attention ", "%0 = affine.apply #map2()[%arg1]", "%0",
        # The second wave of a workgroup goes round it
        "\tv_cmpx_gt_u32_e32 32, v0\n\ts_cbranch_execz .LBB0_3\n" + loop(LOAD, 5) + ".LBB0_3:",
    ),
    "f_dispatch_3_matvec_like_512x64_f16xf16xf32": (
        "linalg.generic ", "%c8 = arith.constant 8 : index", "%c8",
        loop(WMMA, 1) + loop(LOAD, 4).replace("LBB0_1", "LBB0_2"),  # the first is no loop
    ),
    "f_dispatch_4_elementwise": (
        "linalg.generic ", "%c1_0 = arith.constant 1 : index", "%c1_0", FMA
    ),
}  # fmt: skip
MAPS = """
#map = affine_map<()[s0] -> (s0 ceildiv 32)>
#map1 = affine_map<()[s0, s1] -> ((s0 + s1 * 2) ceildiv 8, 65535)>
#map2 = affine_map<()[s0] -> (s0 floordiv 16 + s0 mod 5)>
"""
EXPORT = """
      hal.executable.export public @{name} ordinal(0) layout(#pipeline_layout) \
count(%arg0: !hal.device, %arg1: index, %arg2: index) -> (index, index, index) {{
        %c1 = arith.constant 1 : index
        {count}
        hal.return {result}, %c1, %c1 : index, index, index
      }} attributes {{subgroup_size = 32 : index, \
workgroup_size = [{threads} : index, 2 : index, 1 : index]}}
"""
SOURCE = """
      func.func @{name}(%arg0: index) {{
        %0 = {picks}(%arg0)
        return
      }}
"""
NUMBERS = """
    %c16 = arith.constant 16 : index
    %c64 = arith.constant 64 : index
    %context = arith.muli %pages, %c16 overflow<nsw> : index
    %bytes = util.align %context, %c64 : index
    %offset = arith.addi %bytes, %where : index
    %29 = arith.index_castui %context : index to i32
"""
DISPATCHES = """
    %1 = flow.dispatch @e::@f_dispatch_0_insert_Dx64xf16[%context](%ids, %new, %cache, %context) \
: (tensor<?xi32>{%pages}, tensor<?x64xf16>{%pages}, tensor<?x64xf16>{%pool}, index) -> \
%cache{%pool}
    %2 = flow.dispatch @e::@f_dispatch_1_embed_Dx64xf16[%pool, %context](%cache, %ids, %pool, \
%context) : (tensor<?x64xf16>{%pool}, tensor<?xi32>{%pages}, index, index) -> \
tensor<?x64xf16>{%pages}
    %3 = flow.dispatch @e::@f_dispatch_2_attention_Dx64xf16[%context](%2, %q) : \
(tensor<?x64xf16>{%pages}, tensor<64xf16>) -> tensor<64xf16>
    %4 = flow.dispatch @e::@f_dispatch_3_matvec_like_512x64_f16xf16xf32(%3, %w) : \
(tensor<64xf16>, tensor<512x64xf16>) -> tensor<512xf32>
    %5 = flow.dispatch @e::@f_dispatch_3_matvec_like_512x64_f16xf16xf32(%3, %w) : \
(tensor<64xf16>, tensor<512x64xf16>) -> tensor<512xf32>
    %6:2 = flow.dispatch @e::@f_dispatch_4_elementwise(%t) : (tensor<f32>) -> \
(tensor<i32>, tensor<i64>)
"""
SUBMITTED = """
      stream.cmd.dispatch @e::@{name}{numbers} {{
        ro %arg7[%c0 for %6] : !stream.resource<external>{{%6}},
        ro %arg8[%c0 for %6] : !stream.resource<constant>{{%6}},
        wo %arg9[%c0 for %6] : !stream.resource<transient>{{%6}}
      }}
"""


def sizes_of(function: str) -> list[str]:
    """The numbers that a function reads of its arguments' shapes."""
    of_tokens = function.startswith("prefill") + ("_embeds" in function)
    names = [*("length", "num_embeds")[:of_tokens], "pages", "pool"]
    if function.startswith("encode"):  # all are known
        return [f"    %{name} = arith.constant 4 : index" for name in names]
    read = "    %{0}_0 = hal.buffer_view.dim<%arg3 : !hal.buffer_view>[1] : index\n"
    assumed = "    %{0} = util.assume.int %{0}_0<umin = 1, umax = 4194304> : index"
    return [(read + assumed).format(name) for name in names]


def function(name: str, body: str) -> str:
    numbers = "\n".join(sizes_of(name)) + NUMBERS
    return (
        f"  util.func public @{name}$async(%arg0: i32) {{\n{numbers}{body}    util.return\n  }}\n"
    )


def write_texts(mlir: Path, vmfb: Path, *_: Any) -> None:
    """In place of iree-compile: what it leaves behind of a module with these functions."""
    names = re.findall(r'util\.func public @"(\w+)\$async"', mlir.read_text())
    submitted = [
        SUBMITTED.format(name=kernel, numbers=f"[%context]({n} : i32, i32)" if n else "")
        for kernel, n in [
            *((kernel, "%offset, %29") for kernel in list(KERNELS)[:2]),
            *((list(KERNELS)[k], "") for k in (2, 3, 3, 4)),
        ]
    ]
    exports, sources, codes = "", "", ""
    for name, (picks, count, result, body) in KERNELS.items():
        exports += EXPORT.format(name=name, count=count, result=result, threads=32)
        sources += SOURCE.format(name=name, picks=picks)
        codes += assembly(name, body, spilled=16 if "attention" in name else 0)
    texts = {
        "flow.mlir": sources + "".join(function(name, DISPATCHES) for name in names),
        "stream.mlir": "".join(function(name, "".join(submitted)) for name in names),
        "executable-targets.mlir": MAPS + exports,
        "rocmasm": codes,
    }
    for suffix, text in texts.items():
        (vmfb.parent / f"module.{suffix}").write_text(text)
    vmfb.write_bytes(b"code")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Report:
    monkeypatch.setattr(gpu_kernels, "iree_compile", write_texts)
    options = BuildOptions("gfx1100", prefill_batch_sizes=(1,), decode_batch_sizes=(1, 2))
    return compile_shape(CONFIG, options)


def check(found: list[Dispatch], pages: int, pool: int, attention: int) -> None:
    """pages, pool: so many rows of 64 numbers are picked, of so many."""
    ids, rows, product = 4 * pages, 128 * pages, 128 + 2 * 512 * 64 + 4 * 512
    assert [d.num_bytes for d in found] == [
        2 * (ids + rows),  # what is read is written into the cache
        min(128 * pool, rows) + ids + rows,
        rows + 128 + 128,
        product, product,
        4 + 4 + 8,
    ]  # fmt: skip
    assert [d.operations for d in found] == [0, 0, attention, *2 * [2 * 512 * 64], 0]
    assert [d.weights for d in found] == [0, 0, 0, 512 * 64, 512 * 64, 0]
    context = 16 * pages
    assert [d.workgroups for d in found] == [
        -(-context // 32), -(-(pool + 2 * context) // 8), context // 16 + context % 5, 8, 8, 1,
    ]  # fmt: skip
    # Three addresses, of which nothing is known, two numbers, and the grid
    assert found[1].arguments == {
        28: context, 32: found[1].workgroups, 36: 1, 40: 1, 44: 32 | 2 << 16, 48: 1
    }  # fmt: skip


def test_a_decode_step(report: Report) -> None:
    """Of two rows that see 40 tokens each, in three pages of 16."""
    heads = CONFIG.num_heads * CONFIG.head_dim
    check(report.dispatches("decode_next_bs2", 2, 1, 40), 3, 7, 4 * 2 * heads * 40)


def test_a_prefill(report: Report) -> None:
    heads = CONFIG.num_heads * CONFIG.head_dim
    check(report.dispatches("prefill_next_bs1", 1, 64, 64), 4, 5, 4 * 64 * heads * 64)


def test_a_table(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is dispatched once, and takes no more than a cycle, is left out."""
    monkeypatch.setattr(gpu_report, "NEGLIGIBLE", 0.002)
    step, card = report.dispatches("decode_next_bs1", 1, 1, 48), CARDS["gfx1100"]
    [head, *lines] = table(step, report.kernels, card)
    assert head.split() == [
        "workgroups", "MB", "memory", "lds", "issue", "bound", "all", "launched"
    ]  # fmt: skip
    text = "\n".join(lines)
    assert re.findall(r"^ *(\d+) x +(\d+ x \d+) .* (\w+): \w+$", text, re.MULTILINE) == [
        ("1", "2 x 64", "0_insert_Dx64xf16"), ("1", "13 x 64", "1_embed_Dx64xf16"),
        ("1", "6 x 64", "2_attention_Dx64xf16"),
        ("2", "8 x 64", "3_matvec_like_512x64_f16xf16xf32"),
    ]  # fmt: skip
    assert re.findall(r"times a wave: (\w+); each: loads (\S+ x \d+ B)", text) == [
        ("unknown", "1 x 16 B"), ("48", "1 x 16 B"), ("5", "1 x 16 B"), ("4", "1 x 16 B")
    ]  # fmt: skip
    assert text.count("*") == 1  # beside the loop that is not counted
    assert text.count("33 VGPRs, 0 AGPRs, 20 SGPRs, 0 bytes of LDS") == 4
    assert text.count("spills 16 bytes a thread") == 1
    assert "1 wmma_f32_16x16x16_f16" in text and "   1 others, once each" in text
    memory = 1e6 * sum(d.num_bytes for d in step) / card.bandwidth
    found = re.search(r"6 dispatches: at least (\d+) us \(by memory alone (\d+), ", text)
    launched = re.search(r"; (\d+) us with launches of 5 us each", text)
    assert found and launched and int(found[2]) == round(memory) <= int(found[1])
    assert int(launched[1]) == pytest.approx(int(found[1]) + 6e6 * LAUNCH_SECONDS, abs=1)


def test_a_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model that sees: decode, prefill, and each number of tiles."""
    name = "smolvlm-256m"
    tower: VisionConfig = TOWERS[name]
    monkeypatch.setattr(gpu_kernels, "iree_compile", write_texts)
    monkeypatch.setitem(SHAPES, name, replace(SHAPES[name], num_layers=1))
    monkeypatch.setitem(TOWERS, name, replace(tower, num_layers=1))
    monkeypatch.setattr("sys.argv", [
        "gpu_report", name, "--target", "gfx1100", "--rows", "1", "8", "--context", "100",
        "--prompt", "32", "--max-seq-len", "256",
    ])  # fmt: skip
    gpu_report.main()
    out = capsys.readouterr().out
    # A token has 2 x 3 heads of 64 numbers in a layer
    assert f"{name} in f16 for gfx1100, on RX 7900 XTX" in out and "KV 0.8 KiB a token" in out
    assert re.findall(r"^(?:decode|prefill|\d).*", out, re.MULTILINE) == [
        "decode, 1 rows that see 100 tokens each", "decode, 8 rows that see 100 tokens each",
        "prefill of 32 tokens", "1 tiles of images", "4 tiles of images",
    ]  # fmt: skip
    assert out.count("6 dispatches: at least") == 5
