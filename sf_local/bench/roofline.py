"""The two sides of a roofline: what this machine can do at most, and what a model asks of it.

The probes share no code with what is measured: libc and numpy read memory, and a loop of
multiply-add instructions works on registers alone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Thread

import numpy as np

from sf_local.artifact import irpa
from sf_local.artifact.open import Artifact, host_cpu_features
from sf_local.device.device import allow_tiles

BUFFER_BYTES = 256 << 20  # far more than a cache holds
PASSES = 5
REPEATS = 1_000_000  # of a loop, which take about 10 ms
CHAINS = 12  # independent sums in a loop, enough to hide an instruction's latency
# By type of weights, the instruction that multiplies them fastest: its CPU flag, its opcode (EVEX
# prefix bits, byte), and the multiplications and additions it does on 512 bits
INSTRUCTIONS = {
    "f32": ("avx512f", (1, 0xB8), 32),  # vfmadd231ps
    "bf16": ("avx512_bf16", (2, 0x52), 64),  # vdpbf16ps
    "int8": ("avx512_vnni", (1, 0x50), 128),  # vpdpbusd
}
TILE_CHAINS, TILE_OPERATIONS = 4, 2 * 16 * 16 * 32  # of tdpbf16ps, on AMX's tiles
# Types of weights that are computed as another type
KINDS = {"f16": "f32"} | dict.fromkeys(("int4", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k"), "int8")
TOWER = ("v.", "mm.")  # what names of weights begin with in a vision tower
# Bytes a weight; groups of 32 weights, or super-blocks of 256, have scales (and minima) besides
WEIGHT_BYTES = {
    "f32": 4, "f16": 2, "bf16": 2, "int8": 34 / 32, "int4": 20 / 32, "q5_0": 22 / 32,
    "q5_1": 24 / 32, "q4_k": 148 / 256, "q5_k": 180 / 256, "q6_k": 210 / 256,
}  # fmt: skip


@dataclass(frozen=True)
class Peak:
    """Operations a second that all CPUs do together, and the name of the instruction."""

    name: str
    flops: float


def read_bandwidth() -> float:
    """Bytes a second that all CPUs read together: the best pass of libc's memcmp or numpy's sum.

    memcmp reads two streams a CPU and loses less to other load on the machine; without such load
    a sum is up to 15% faster.
    """
    compare = ctypes.CDLL(None).memcmp
    compare.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    half = BUFFER_BYTES // _num_cpus() // 2 // 64 * 64
    parts = np.ones((_num_cpus(), 2 * half), np.uint8)
    starts = [part.ctypes.data for part in parts]
    compares = [lambda start=start: compare(start, start + half, half) for start in starts]
    sums = [part.view(np.int64).sum for part in parts]
    return parts.nbytes / min(_seconds(work) for _ in range(PASSES) for work in (compares, sums))


def peak_flops(weight_dtype: str) -> Peak:
    """The most operations a second on weights of this type, measured on all CPUs.

    It is an upper bound for any kernel: the fastest multiply-add instruction for the type, whose
    operands never leave the registers. CPUs without AVX-512 are measured by numpy's f32 product.
    """
    kind = KINDS.get(weight_dtype, weight_dtype)
    flag, opcode, operations = INSTRUCTIONS[kind]
    features = host_cpu_features()
    if flag not in features or platform.machine() != "x86_64":
        return Peak("numpy f32 matmul", _matmul_flops())
    loop, chains = _vector_loop(*opcode), CHAINS
    if kind == "bf16" and "amx_bf16" in features and allow_tiles():
        flag, loop, chains, operations = "amx_bf16", _tile_loop(), TILE_CHAINS, TILE_OPERATIONS
    calls = [lambda: loop(REPEATS)] * _num_cpus()
    work = operations * chains * REPEATS * len(calls)
    return Peak(flag, work / min(_seconds(calls) for _ in range(PASSES)))


def decode_bytes(artifact: Artifact, context: float) -> float:
    """Bytes that one row's step must read: every weight once, and K and V of `context` tokens."""
    config = artifact.config
    weights = sum(entry.num_bytes for entry in _weights(artifact).values())
    return weights + context * config.page_bytes / config.page_size


def prefill_flops(artifact: Artifact, length: int) -> float:
    """Operations of a prompt of `length` tokens: matrices, causal attention, the last logits."""
    sizes = {name: _num_elements(entry) for name, entry in _weights(artifact).items()}
    layers = sum(size for name, size in sizes.items() if "norm" not in name and "blk." in name)
    head = sizes.get("output.weight") or sizes["token_embd.weight"]
    query_size = sizes["blk.0.attn_output.weight"] / sizes["output_norm.weight"]
    attention = query_size * length**2  # of a layer: Q @ K and P @ V, half of which is masked
    return 2 * (length * layers + head + artifact.config.transformer_block_count * attention)


def encode_flops(artifact: Artifact) -> float:
    """Operations of one image tile: patches, matrices, full attention, and the connector."""
    assert artifact.manifest and artifact.manifest.images
    entries = _entries(artifact)
    positions, hidden = map(int, entries["v.position_embd.weight"].type.split("x")[:2])
    patches = positions - ("mm.1.weight" in entries)  # LLaVA's has a class token
    tokens = int(artifact.manifest.images["tokens_per_tile"])
    rows = {"v.blk.": positions, "v.patch_embd.": patches, "mm.": tokens}
    matrices = sum(
        count * _num_elements(entry)
        for name, entry in entries.items()
        for part, count in rows.items()
        if name.startswith(part) and ".ln" not in name
    )
    num_layers = sum(name.startswith("v.") and "attn_qkv" in name for name in entries)
    return 2 * (matrices + num_layers * 2 * positions**2 * hidden)  # Q @ K and P @ V


def _weights(artifact: Artifact) -> dict[str, irpa.Entry]:
    """All weights that a step reads whole: the embedding only if it is the output head too."""
    entries = {n: e for n, e in _entries(artifact).items() if not n.startswith(TOWER)}
    if "output.weight" in entries:
        del entries["token_embd.weight"]
    return entries


def _entries(artifact: Artifact) -> dict[str, irpa.Entry]:
    tables = [irpa.read_table(path) for path in artifact.weights]
    return {n: e for table in tables for n, e in table.items() if n.endswith(".weight")}


def _num_elements(entry: irpa.Entry) -> float:
    return entry.num_bytes / WEIGHT_BYTES[entry.type.rsplit("x", 1)[1]]


def _seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds until all calls are done, each in a thread; what they call releases the GIL."""
    threads = [Thread(target=call) for call in calls]
    started_at = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started_at


def _vector_loop(prefix: int, opcode: int) -> Callable[[int], None]:
    """A function that repeats `zmm[i] += zmm12 * zmm13` for each i below CHAINS."""
    body = b"".join(
        bytes([0x62, 0x52 | (i < 8) << 7, 0x1C | prefix, 0x48, opcode, 0xC5 | (i & 7) << 3])
        for i in range(CHAINS)
    )  # fmt: skip
    return _loop(b"\xc5\xfc\x77", body, b"\xc5\xf8\x77")  # vzeroall, vzeroupper


def _tile_loop() -> Callable[[int], None]:
    """A function that repeats `tdpbf16ps tmm[i], tmm4, tmm5` for each i below TILE_CHAINS."""
    config = bytes([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8])
    data = ctypes.create_string_buffer(config, 64)
    load = b"\x48\xbe" + ctypes.addressof(data).to_bytes(8, "little") + b"\xc4\xe2\x78\x49\x06"
    body = b"".join(bytes([0xC4, 0xE2, 0x52, 0x5C, 0xC4 | i << 3]) for i in range(TILE_CHAINS))
    loop = _loop(load, body, b"\xc4\xe2\x78\x49\xc0")  # ldtilecfg [rsi], tilerelease

    def run(repeats: int, data: object = data) -> None:  # `data` must outlive the calls
        loop(repeats)

    return run


def _loop(before: bytes, body: bytes, after: bytes) -> Callable[[int], None]:
    """A function of machine code that runs `body` as often as its argument says."""
    body += b"\x48\xff\xcf"  # dec rdi
    jump = b"\x0f\x85" + (-len(body) - 6).to_bytes(4, "little", signed=True)  # jnz to the body
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(before + body + jump + after + b"\xc3")  # ret
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    function = ctypes.CFUNCTYPE(None, ctypes.c_long)(address)

    def run(repeats: int, page: mmap.mmap = page) -> None:  # `page` must outlive the calls
        function(repeats)

    return run


def _matmul_flops() -> float:
    """numpy's own threads use all CPUs."""
    matrix = np.ones((1024, 1024), np.float32)
    return 2 * 1024**3 / min(_seconds([lambda: matrix @ matrix]) for _ in range(PASSES))


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0))
