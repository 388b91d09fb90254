"""The machine's memory: the GB/s that bound decoding, measured where the others decode."""

from worker import serve

from sf_local.bench.roofline import read_bandwidth


def warm(prompt: list[int]) -> None:
    pass


def decode(prompt: list[int], count: int) -> float:
    return read_bandwidth() / 1e9


serve({f.__name__: f for f in (warm, decode)})
