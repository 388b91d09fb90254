"""The machine's memory: GB/s that all cores together read, the best of some passes.

By numpy's sum of int64 over 256 MB a core, far more than any cache. Sums, maxima and dot products
are equally fast here: it is memory that limits them (libc's memcmp reaches 10% less).
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from worker import seconds, serve

NUM_BYTES = 256 << 20
cores = len(os.sched_getaffinity(0))
buffers = [np.ones(NUM_BYTES // 8, np.int64) for _ in range(cores)]
pool = ThreadPoolExecutor(cores)


def warm(prompt: list[int]) -> None:
    list(pool.map(np.sum, buffers))


def decode(prompt: list[int], count: int) -> float:
    """The bound of decoding, measured where the others decode."""
    best = min(seconds(lambda: list(pool.map(np.sum, buffers))) for _ in range(5))
    return cores * NUM_BYTES / best / 1e9


serve({f.__name__: f for f in (warm, decode)})
