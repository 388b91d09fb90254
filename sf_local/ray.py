"""Batch inference on many machines, as Ray Data does it: `ds.map_batches(sf_local.ray.Generator)`.

Ray starts the actors, places them, hands them batches, and starts those anew that were lost. So
there is no scheduler here: only an engine in an actor, and the columns of a batch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sf_local.device.cpu_threads import claim_cpus
from sf_local.engine.engine import Engine
from sf_local.engine.many_requests import beginning
from sf_local.errors import RequestError, SfLocalError
from sf_local.request.checks import shown
from sf_local.request.output import Output
from sf_local.request.params import SamplingParams

KEY = "__sf_local_beginning"  # the column that rows are sorted by
KEY_LENGTH = 8192  # characters


class Generator:
    """Answers the rows of batches; a callable class for `map_batches` of Ray Data.

        ds.map_batches(
            sf_local.ray.Generator,
            fn_constructor_kwargs={"vmfb": "demo", "params": {"temperature": 0}},
            concurrency=2, num_cpus=8, batch_size=256, batch_format="pyarrow",
        )

    concurrency: the number of actors, each with an engine; newer Rays say
        `compute=ray.data.ActorPoolStrategy(size=2)`.
    num_gpus: 1 gives each a GPU of its own, 0.5 half of one; without it they run on the CPU.
    num_cpus: CPUs that an engine on the CPU has to itself, by Ray's default one. Leave some to the
        other steps of the dataset, which would wait for ever.
    batch_size: rows that are in flight at once; a few times what the model decodes together.
    batch_format: any. "pyarrow" keeps the types of other columns; "numpy" makes null integers NaN.

    Args:
        vmfb: what `from_source` takes, as it is found on the actor's machine: the path of an
            artifact, or what is compiled there on first use.
        params: SamplingParams of all rows, or a dict of its fields.
        chat_template_kwargs: variables of the chat template, such as {"enable_thinking": False}.
        engine_options: further arguments of `Engine.from_source`. Where actors share a GPU, give
            each its part: {"kv_memory": "8GiB"}.

    Raises RequestError for arguments that cannot work, and what `Engine.from_source` raises.
    """

    def __init__(
        self,
        vmfb: str | Path,
        params: SamplingParams | Mapping[str, Any] | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        engine_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._params = _params(params)
        self._chat_options: Any = (
            {"chat_template_kwargs": chat_template_kwargs} if chat_template_kwargs else {}
        )
        context = _actor()
        options = {"device": assigned_device(context), **(engine_options or {})}
        if context and options["device"] == "cpu" and "num_threads" not in options:
            self._claims = claim_cpus(int(context.get_assigned_resources().get("CPU", 1)))
        self._engine = Engine.from_source(vmfb, **options)

    def __call__(self, batch: Any) -> Any:
        """The batch with the columns `text`, `finish_reason` and `error` of strings. They replace
        those of the same names.

        batch: columns as a dict of arrays, a pyarrow.Table or a pandas.DataFrame: any of Ray's
            batch formats. One of them is `prompt`, of texts or lists of token ids, or `messages`,
            of lists of dicts as `Engine.chat` takes them. Others are kept.

        What is wrong with a row is its `error`, and its `text` and `finish_reason` are None; else
        `error` is None. Raises RequestError if there is not exactly one column to answer. If the
        engine is lost, an actor's process ends, so that Ray starts another and gives it the batch;
        elsewhere EngineError or DeviceError is raised.
        """
        results = self._answers(rows_of(batch))
        columns = {
            "text": [r.text if isinstance(r, Output) else None for r in results],
            "finish_reason": [r.finish_reason if isinstance(r, Output) else None for r in results],
            "error": [None if isinstance(r, Output) else str(r) for r in results],
        }
        return with_columns(batch, columns)

    def _answers(self, rows: list[Any]) -> list[Output | Exception]:
        """What each row ends with."""
        try:
            results = list(self._engine.map(
                rows, self._params, ordered=True, progress=False, max_in_flight=len(rows) or 1,
                return_exceptions=True, **self._chat_options,
            ))  # fmt: skip
            self._engine.check_usable()
        except SfLocalError as error:
            if _actor() is not None:
                print(f"sf_local: {error}; this actor ends", file=sys.stderr, flush=True)
                os._exit(1)  # Ray would give an actor that raises its batch again
            raise
        return results


def sort_by_prefix(ds: Any) -> Any:
    """The rows of a ray.data.Dataset in an order that has those together whose `prompt` or
    `messages` begin alike, so that engines compute common beginnings once.

    That is one sort of the whole dataset, by the first 8192 characters. Within a batch `Generator`
    does it by itself. Raises RequestError, when the dataset is run, as `Generator` does.
    """
    return ds.map_batches(_with_keys, batch_format="pyarrow").sort(KEY).drop_columns([KEY])


def _with_keys(batch: Any) -> Any:
    return with_columns(batch, {KEY: [_key(row) for row in rows_of(batch)]})


def _key(row: object) -> str:
    """Equal at the beginning if the rows are."""
    _, start = beginning(row)
    return (start if isinstance(start, str) else " ".join(map(str, start)))[:KEY_LENGTH]


def rows_of(batch: Any) -> list[Any]:
    """The prompts or messages of a batch in any of Ray's formats, as Python's own types."""
    names = batch.column_names if hasattr(batch, "column_names") else list(batch)
    match [name for name in ("prompt", "messages") if name in names]:
        case ["prompt"]:
            return [_plain(value) for value in _values(batch["prompt"])]
        case ["messages"]:
            rows = [_plain(value) for value in _values(batch["messages"])]
            # What is no list of messages is refused as a message
            return [row if row and isinstance(row, list) else [row] for row in rows]
    raise RequestError(
        f"columns={shown(list(names))} must hold either prompt or messages; rename one with "
        "ds.rename_columns, or leave one out with ds.drop_columns"
    )


def _values(column: Any) -> list[Any]:
    return list(column.to_pylist() if hasattr(column, "to_pylist") else column)


def _plain(value: Any) -> Any:
    """A value without numpy's types, and without None in dicts: Arrow adds it for each key that
    other rows have."""
    match value:
        case np.ndarray():
            return _plain(value.tolist())
        case np.generic():
            return value.item()
        case list():
            return [_plain(item) for item in value]
        case dict():
            return {key: _plain(item) for key, item in value.items() if item is not None}
    return value


def with_columns(batch: Any, columns: Mapping[str, Sequence[str | None]]) -> Any:
    """A batch in any of Ray's formats with columns of strings, which replace those of these
    names."""
    if isinstance(batch, Mapping):
        return {**batch, **{name: np.array(column, object) for name, column in columns.items()}}
    if not hasattr(batch, "append_column"):
        return batch.assign(**columns)
    import pyarrow

    for name, column in columns.items():
        if name in batch.column_names:
            batch = batch.drop_columns([name])
        batch = batch.append_column(name, pyarrow.array(column, pyarrow.string()))
    return batch


def assigned_device(context: Any) -> str | list[str]:
    """The devices that Ray has assigned to an actor, as `Engine` takes them.

    context: of the actor, by `ray.get_runtime_context()`; None outside of Ray. A process knows GPUs
    by their place in HIP_VISIBLE_DEVICES, which Ray sets unless it is told not to.
    """
    ids = [] if context is None else context.get_accelerator_ids().get("GPU", [])
    visible = os.environ.get("HIP_VISIBLE_DEVICES", "").split(",")
    return [f"hip:{visible.index(i) if i in visible else i}" for i in map(str, ids)] or "cpu"


def _actor() -> Any:
    """Ray's context of the actor that this runs in; None elsewhere."""
    ray = sys.modules.get("ray")
    context = ray.get_runtime_context() if ray is not None and ray.is_initialized() else None
    return context if context is not None and context.get_actor_id() else None


def _params(params: object) -> SamplingParams:
    if params is None or isinstance(params, SamplingParams):
        return params or SamplingParams()
    if not isinstance(params, Mapping):
        raise RequestError(f"params={shown(params)} must be SamplingParams, or a dict of fields")
    return SamplingParams.from_dict(params)
