"""How fast the compiled model is: prefill, decode, decode with grammars, the start of a process."""

from __future__ import annotations

from sf_local.bench import fresh_process
from sf_local.bench.harness import ROWS, SHORT, Bench
from sf_local.bench.report import Figure
from sf_local.bench.roofline import decode_bytes, peak_flops, prefill_flops, read_bandwidth

ALL_ROWS = (1, 2, 4, 8, 16)
FREE_TEXT = r"[a-z ]*"  # a grammar that forces no token and never ends


def prefill(bench: Bench) -> list[Figure]:
    """Prompts of several lengths of which nothing is cached, up to their first token."""
    lengths = bench.fitting(bench.sizes.prefill, 1)
    seconds = {n: bench.run([bench.prompt(n)], 1)[0][0].time_to_first_token for n in lengths}
    base, long = lengths[:2][-1], lengths[-1]
    growth = (seconds[long] / long) / (seconds[base] / base)
    return [
        *(Figure(f"prefill, {n} tokens", n / seconds[n], "tokens/s") for n in lengths),
        Figure(f"prefill time a token, {long} tokens / {base}", growth, "ratio", "<= 1.5"),
        *_prefill_roofline(bench, {n: seconds[n] for n in lengths[-2:]}),
    ]


def _prefill_roofline(bench: Bench, seconds: dict[int, float]) -> list[Figure]:
    """The share of the CPU's peak that prefill reaches; `seconds` are by length of the prompt."""
    artifact = bench.engine.artifact
    if not (artifact.manifest and artifact.manifest.device == "cpu"):
        return []
    peak = peak_flops(artifact.manifest.weight_dtype)
    name = f"peak of {peak.name}"
    shares = {n: prefill_flops(artifact, n) / t / peak.flops for n, t in seconds.items()}
    return [
        Figure(name, peak.flops / 1e9, "GFLOP/s"),
        *(Figure(f"prefill, {n} tokens: share of {name}", 100 * shares[n], "%") for n in shares),
    ]


def decode(bench: Bench) -> list[Figure]:
    """Decode steps of several numbers of rows, all with about the same short context."""
    groups = [([bench.prompt(SHORT) for _ in range(rows)], None) for rows in ALL_ROWS]
    rates = dict(zip(ALL_ROWS, bench.decode_rates(groups), strict=True))
    most = ALL_ROWS[-1]
    return [
        *(Figure(f"decode, {n} row{'s' * (n > 1)}", rates[n], "tokens/s") for n in ALL_ROWS),
        Figure(f"decode, {ROWS} rows / 1", rates[ROWS] / rates[1], "ratio", ">= 4"),
        Figure(f"decode step, {most} rows / 1", most * rates[1] / rates[most], "ratio", "<= 2.2"),
        *_decode_roofline(bench, rates[1]),
    ]


def _decode_roofline(bench: Bench, rate: float) -> list[Figure]:
    """The share of the memory bandwidth that one row's decode reaches, at `rate` tokens/s."""
    artifact = bench.engine.artifact
    if not (artifact.manifest and artifact.manifest.device == "cpu"):
        return []
    bandwidth = read_bandwidth()
    share = decode_bytes(artifact, SHORT + bench.sizes.decode / 2) * rate / bandwidth
    wanted = ">= 80" if artifact.manifest.weight_dtype == "bf16" else ""
    return [
        Figure("memory bandwidth, reading", bandwidth / 1e9, "GB/s"),
        Figure("decode, 1 row: share of bandwidth", 100 * share, "%", wanted),
    ]


def context(bench: Bench) -> list[Figure]:
    """Decode of one row after contexts of several lengths."""
    lengths = bench.fitting(bench.sizes.contexts, bench.sizes.decode)
    groups = [([bench.prompt(n)], None) for n in lengths]
    rates = dict(zip(lengths, bench.decode_rates(groups), strict=True))
    short, long = lengths[0], lengths[-1]
    growth = rates[short] / rates[long]
    return [
        *(Figure(f"decode, context {n}", rates[n], "tokens/s") for n in lengths),
        Figure(f"decode time, context {long} / {short}", growth, "ratio", "<= 1.6"),
    ]


def first_token(bench: Bench) -> list[Figure]:
    """A prompt of which nothing is cached, then another that begins with the same tokens."""
    shared = bench.prompt(bench.sizes.first)
    prompts = [shared + bench.prompt(bench.sizes.own) for _ in range(2)]
    cold, cached = (bench.run([prompt], 1)[0][0].time_to_first_token for prompt in prompts)
    name = f"first token, {bench.sizes.first} + {bench.sizes.own} tokens"
    return [
        Figure(f"{name}, cold", 1e3 * cold, "ms"),
        Figure(f"{name}, {bench.sizes.first} cached", 1e3 * cached, "ms"),
    ]


def constrained(bench: Bench) -> list[Figure]:
    """Decode without a grammar, and with one that allows many tokens and forces none."""
    prompts = [bench.prompt(SHORT) for _ in range(ROWS)]
    free, bound = bench.decode_rates([(prompts, None), (prompts, FREE_TEXT)])
    return [
        Figure(f"decode, {ROWS} rows with a grammar", bound, "tokens/s"),
        Figure(f"decode time, {ROWS} rows, with a grammar / without", free / bound, "ratio"),
    ]


def fresh(bench: Bench) -> list[Figure]:
    """Start and memory of a new process; its files are in the page cache already."""
    found = fresh_process.run(
        bench.engine.artifact,
        bench.device,
        num_threads=bench.num_threads,
        prompt=bench.sizes.fresh,
        answer=bench.sizes.decode,
        idle_seconds=bench.sizes.idle,
    )
    return [
        Figure("engine, open to ready", 1e3 * found.load_seconds, "ms"),
        Figure("process start to ready", 1e3 * found.ready_seconds, "ms"),
        Figure("process start to first token", 1e3 * found.first_token_seconds, "ms"),
        Figure("peak memory", found.peak_bytes / 1e6, "MB"),
        Figure("peak memory / (weights + KV pages)", found.memory_ratio, "ratio", "<= 1.25"),
        Figure("idle engine, of one core", 100 * found.idle_share, "%", "< 1"),
    ]
