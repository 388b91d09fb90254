"""The machine's memory as a peer: "decoding" measures the bandwidth that bounds it, in GB/s."""

from worker import serve

from sf_local.bench.roofline import read_bandwidth


def warm(prompt: list[int]) -> None:
    pass


def decode(prompt: list[int], count: int) -> float:
    return read_bandwidth() / 1e9


serve({f.__name__: f for f in (warm, decode)})
