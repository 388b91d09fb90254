"""Results of a call: which are fetched from the device, and the ModelOutput they become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sf_local.artifact.manifest import LOGITS_BLOCK
from sf_local.artifact.open import Artifact
from sf_local.device.device import Device
from sf_local.model.arrays import Array, Download, buffer_bytes, read
from sf_local.request.batch import Row
from sf_local.sampling.logits import Floats, ModelOutput, spread, summarize, unpack

MAX_VOCAB = 1 << 24  # no vocabulary has as many tokens, so ids beyond it are wrong


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class OutputSpec:
    """What a call returns, and what the host does beside it.

    Attributes:
        inv_temperatures: 1 / temperature of each row, for the sums of ModelOutput [n]; None for
            ones.
        num_logits: fetch logits of the first `num_logits` rows only; None for all rows.
        copy: False lets arrays alias device memory: they are valid until the next call.
        meanwhile: called once, while the device runs. It handles its own errors: what it
            raises fails the call for all rows.
    """

    inv_temperatures: Sequence[float] | None = None
    num_logits: int | None = None
    copy: bool = True
    meanwhile: Callable[[], None] = _nothing

    def inv_temperatures_of(self, num_rows: int) -> Floats:
        """The inverse temperatures f32 [num_rows], or ones."""
        return np.array(self.inv_temperatures or [1.0] * num_rows, np.float32)


DEFAULT_OUTPUTS = OutputSpec()


class OutputReader:
    """Brings results of calls to the host, and makes a ModelOutput of them."""

    def __init__(self, artifact: Artifact, device: Device) -> None:
        self._config = artifact.config
        self._download: Download | None = None
        if not device.shares_memory:
            self._download = Download(device, _download_bytes(artifact))

    def close(self) -> None:
        """Free the device's memory."""
        self._download = None

    def fetch(self, results: Sequence[Any], num_rows: int, num_logits: int | None) -> list[Any]:
        """Queue copies of results to the host, for `read` to return when the device is done.

        Of each result, the first `num_rows` rows, as the others are padding; of the first one, the
        logits, `num_logits` rows if that is not None. Without rows it becomes None.
        """
        used = slice(0, num_rows)
        needed = [array.view(used) for array in results]
        if num_logits is not None:
            needed[0] = results[0].view(slice(0, num_logits)) if num_logits else None
        return needed if self._download is None else self._download.fetch(needed)

    def read(self, fetched: Sequence[Any], copy: bool) -> list[Array]:
        """Fetched results as arrays of f32 or int64; with `copy` they outlive the next call."""
        values = [read(array) for array in fetched] if self._download is None else fetched
        return [
            array.astype(np.int64 if array.dtype == np.int64 else np.float32, copy=copy)
            for array in values
        ]

    def following(
        self, results: Sequence[Array], rows: Sequence[Row], spec: OutputSpec
    ) -> ModelOutput:
        """The output after the last token of rows, from results after every token.

        These are logits [n, S, V], or the k largest logits and their tokens' ids, [n, S, k] each.
        An id that cannot be a token becomes the row's `best`, so that `find_wrong` reports it.
        """
        last = [len(row.tokens) - 1 for row in rows]
        results = [values[np.arange(len(rows)), last] for values in results]
        logits = self.logits(results[0])
        inv_temperatures = spec.inv_temperatures_of(len(logits))
        if self._config.top_k is None:
            return summarize(logits, inv_temperatures)
        ids = results[1]
        are_tokens = (ids >= 0) & (ids < MAX_VOCAB)
        output = summarize(spread(logits, np.where(are_tokens, ids, 0)), inv_temperatures)
        for i in np.flatnonzero(~are_tokens.all(axis=1)):
            output.best[i] = ids[i, ~are_tokens[i]][0]
        return output

    def logits(self, values: Array) -> Floats:
        """Logits, up to a constant a row, of what the model's last layer returns [..., V]."""
        if self._config.logits_normalization != "softmax":
            return values
        with np.errstate(divide="ignore", invalid="ignore"):  # what was rounded to 0 is impossible
            return np.log(values)


def summed_up(results: Sequence[Array]) -> ModelOutput:
    """The output from the results of a function that sums its logits up.

    These are logits [n, 1, V], or an empty array, and then best, maxima and sums, or one array of
    all three, see `unpack`.
    """
    logits, *sums = results
    logits = logits[:, 0] if len(logits) else logits
    return unpack(logits, *sums) if len(sums) == 1 else ModelOutput(logits, *sums)


def _download_bytes(artifact: Artifact) -> int:
    """Size of the results of the largest call that sums its logits up, or encodes images."""
    manifest, config = artifact.manifest, artifact.config
    vocab_size = manifest.vocab_size if manifest else 1
    num_rows = max(*config.prefill_batch_sizes, *config.decode_batch_sizes)
    row = vocab_size + 1 + 2 * -(-vocab_size // LOGITS_BLOCK)
    embeds = 0
    if manifest and manifest.images:
        embeds = manifest.max_tiles * manifest.images["tokens_per_tile"] * manifest.hidden_size
    return buffer_bytes(max(num_rows * row, embeds))
