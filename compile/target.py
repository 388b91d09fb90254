"""Targets: the devices that can be compiled for, with their features and iree-compile's flags."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sf_local.artifact.open import host_cpu_features
from sf_local.errors import UnsupportedError

VECTORS_PER_BLOCK = 2  # of output features, in a block of a matrix


@dataclass(frozen=True)
class Tuning:
    """Numbers by which CPU kernels are written; `compile.tools.tune_cpu` finds the best ones."""

    ahead: int = 1024  # bytes that a product of a single row prefetches, for it waits for memory
    blocks: int = 1  # of outputs that such a product computes at once, in independent sums
    task_bytes: int = 1 << 17  # weights that one task of a thread multiplies
    min_tasks: int = 16  # of a matrix, so that no thread waits long for the others
    row_chunk: int = 128  # rows that one task multiplies


@dataclass(frozen=True)
class Vectors:
    """The vector instructions of a CPU."""

    lanes: int  # f32 numbers of a vector
    max_rows: int  # that one product computes together, as far as registers go
    has_dot: bool = False  # dot products of bf16
    has_int8_dot: bool = False  # of four bytes; else there are those of two i16
    has_tiles: bool = False  # AMX in bf16
    has_slow_dot: bool = False  # that takes longer than two multiply-adds of f32
    tuning: Tuning = Tuning()

    @property
    def block(self) -> int:
        """Rows of a matrix, which are output features, in a block as it is stored."""
        return VECTORS_PER_BLOCK * self.lanes


# What iree-compile 3.9.0 can generate code for.
HIP_CHIPS = ("gfx908", "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1101", "gfx1200", "gfx1201")
CPU_LEVELS = ("host", "generic", "x86-64-v3", "x86-64-v4")

# /proc/cpuinfo flag -> LLVM feature; the features that code generation makes use of.
_CPU_FEATURES = {
    "ssse3": "ssse3", "sse4_1": "sse4.1", "sse4_2": "sse4.2", "popcnt": "popcnt", "cx16": "cx16",
    "movbe": "movbe", "avx": "avx", "f16c": "f16c", "fma": "fma", "avx2": "avx2", "bmi1": "bmi",
    "bmi2": "bmi2", "abm": "lzcnt", "avx512f": "avx512f", "avx512bw": "avx512bw",
    "avx512cd": "avx512cd", "avx512dq": "avx512dq", "avx512vl": "avx512vl",
    "avx512_vnni": "avx512vnni", "avx512_bf16": "avx512bf16", "avx512_fp16": "avx512fp16",
    "avx512vbmi": "avx512vbmi", "amx_tile": "amx-tile", "amx_bf16": "amx-bf16",
    "avx_vnni": "avxvnni",
}  # fmt: skip
_V3 = ("ssse3", "sse4_1", "sse4_2", "popcnt", "cx16", "movbe", "avx", "f16c", "fma", "avx2", "bmi1",
       "bmi2", "abm")  # fmt: skip
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
# What a level can be given beyond its own features
_ADDABLE = {
    "x86-64-v3": ("avx_vnni",),
    "x86-64-v4": (
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "avx512vbmi",
        "amx_tile",
        "amx_bf16",
    ),
}

# By `python -m compile.tools.tune_cpu` on two cores of a Xeon (Emerald Rapids): a single row is
# 1.2 times as fast as with the default, 512 rows 1.14 times; 256 rows a task instead of 64 bring
# another 1.07 times at 512 rows, 1.1 at 2,048. On a Zen 4 the default won.
TILED = Tuning(ahead=2048, blocks=2, task_bytes=1 << 18, row_chunk=256)


@dataclass(frozen=True)
class Target:
    """A device to compile for; `cpu_features` are named as in /proc/cpuinfo."""

    name: str  # "cpu" or a chip
    cpu_level: str = "host"
    cpu_features: tuple[str, ...] = ()
    tuning: Tuning | None = None  # instead of what is known for such a CPU

    @property
    def device(self) -> str:
        """What the runtime calls the device: "cpu" or "hip"."""
        return "cpu" if self.name == "cpu" else "hip"

    @property
    def weight_dtype(self) -> str:
        """What floats become by default: 16 bits that the target multiplies, or else converts."""
        if self.device == "hip":
            return "f16"
        if "avx512_bf16" in self.cpu_features:
            return "bf16"
        return "f16" if "f16c" in self.cpu_features else "f32"

    @property
    def image_batch_sizes(self) -> tuple[int, ...]:
        """The default: several tiles on a GPU; on a CPU, where that gains little, one, so that
        other requests decode between two tiles."""
        return (1, 4) if self.device == "hip" else (1,)

    @property
    def tile(self) -> int:
        """Tokens that a GPU's prefill computes together, as many as fit the chip's local memory."""
        return 128 if self.name.startswith("gfx9") else 64

    @property
    def subgroup(self) -> int | None:
        """Threads of a GPU that run in step; None for a CPU."""
        if self.device == "cpu":
            return None
        return 64 if self.name.startswith("gfx9") else 32

    @property
    def vectors(self) -> Vectors | None:
        """The vectors that CPU kernels are written for; None for a GPU."""
        if self.device == "hip":
            return None
        features = self.cpu_features
        has_tiles = {"avx512_bf16", "amx_tile", "amx_bf16"} <= set(features)
        tuning = self.tuning or (TILED if has_tiles else Tuning())
        if not {"avx512f", "avx512bw", "avx512dq"} <= set(features):
            has_int8_dot = {"avx2", "avx_vnni"} <= set(features)
            lanes = 8 if "avx2" in features else 4
            return Vectors(lanes, 4, has_int8_dot=has_int8_dot, tuning=tuning)
        has_dots = "avx512_bf16" in features, "avx512_vnni" in features
        # Intel's, which compute in f16, too; Zen 4 and 5, whose dots are fast, do not
        has_slow_dot = not has_tiles and {"avx512_bf16", "avx512_fp16"} <= set(features)
        return Vectors(16, 8, *has_dots, has_tiles, has_slow_dot, tuning)

    @property
    def flags(self) -> tuple[str, ...]:
        """Arguments of iree-compile."""
        if self.device == "hip":
            return ("--iree-hal-target-device=hip", f"--iree-hip-target={self.name}")
        features = ",".join(f"+{_CPU_FEATURES[f]}" for f in self.cpu_features)
        return (
            "--iree-hal-target-device=local",
            "--iree-hal-local-target-device-backends=llvm-cpu",
            "--iree-llvmcpu-target-triple=x86_64-unknown-linux-gnu",
            "--iree-llvmcpu-target-cpu=x86-64",
            "--iree-llvmcpu-stack-allocation-limit=1048576",  # of threads' 2 MB or more
            *([f"--iree-llvmcpu-target-cpu-features={features}"] if features else []),
        )


def resolve_target(name: str, cpu: str = "host") -> Target:
    """The target called `name`; `cpu` is its level if it is "cpu". Raises UnsupportedError."""
    features = _level_features(cpu)
    if name == "cpu":
        return Target("cpu", cpu, features)
    if name in HIP_CHIPS:
        return Target(name)
    if re.fullmatch(r"gfx\w+", name):
        raise UnsupportedError(
            f"target={name!r}: iree-compile 3.9.0 cannot generate code for this chip; "
            f"it knows {', '.join(HIP_CHIPS)}"
        )
    raise UnsupportedError(f"target={name!r} is unknown; use cpu, or one of {', '.join(HIP_CHIPS)}")


def _level_features(cpu: str) -> tuple[str, ...]:
    """The features of a level, e.g. "x86-64-v3", and of those after it, e.g. "+avxvnni"."""
    levels = {"generic": (), "x86-64-v3": _V3, "x86-64-v4": _V4}
    if cpu == "host":
        host = host_cpu_features()
        # With AVX-512 its own instruction is used, which AMD's CPUs of this kind have, too.
        unused = {"avx_vnni"} if "avx512_vnni" in host else set()
        return tuple(f for f in _CPU_FEATURES if f in host - unused)
    level, *added = cpu.split("+")
    if level not in levels:
        raise UnsupportedError(f"cpu={cpu!r} is unknown; use one of {', '.join(CPU_LEVELS)}")
    names = {name: f for f in _ADDABLE.get(level, ()) for name in (f, _CPU_FEATURES[f])}
    if unknown := [name for name in added if name not in names]:
        addable = "; ".join(f"{level} +{', +'.join(names)}" for level, names in _ADDABLE.items())
        raise UnsupportedError(
            f"cpu={cpu!r}: {level} does not take {', '.join(unknown)}; what can be added: {addable}"
        )
    return (*levels[level], *(f for f in _CPU_FEATURES if f in {names[name] for name in added}))
