"""Generator and sort_by_prefix: the columns of batches without Ray, and Ray Data itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sf_local import Engine, SamplingParams, ray
from sf_local.errors import EngineError, RequestError
from sf_local.ray import Generator, assigned_device, rows_of
from tests.support.tiny import TinyModel

PARAMS = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
PROMPTS = ["abc", "xyz", "hello"]
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "abc"}]}]


@pytest.fixture(scope="module")
def generator(tiny: TinyModel) -> Generator:
    return Generator(str(tiny.artifact), PARAMS)


@pytest.fixture(scope="module")
def expected(tiny: TinyModel) -> dict[str, list[str]]:
    with Engine(tiny.artifact) as engine:
        params = SamplingParams(**PARAMS)
        return {
            "prompt": [output.text for output in engine.generate(PROMPTS, params)],
            "messages": [output.text for output in engine.chat(CHATS, params)],
        }


def arrays(name: str, values: list[Any], **others: list[Any]) -> dict[str, Any]:
    """A batch in Ray's format "numpy", in which lists are arrays, too."""
    column = np.empty(len(values), object)
    column[:] = [nested(value) for value in values]
    return {name: column} | {key: np.array(other) for key, other in others.items()}


def nested(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: nested(item) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    array = np.empty(len(value), object)
    array[:] = [nested(item) for item in value]
    return array


def in_format(form: str, name: str, values: list[Any], **others: list[Any]) -> Any:
    if form == "numpy":
        return arrays(name, values, **others)
    module = pytest.importorskip(form)
    columns = {name: values, **others}
    return module.table(columns) if form == "pyarrow" else module.DataFrame(columns)


def as_lists(batch: Any) -> dict[str, list[Any]]:
    if hasattr(batch, "to_pydict"):
        return dict(batch.to_pydict())
    if hasattr(batch, "notna"):  # pandas has NaN for None
        batch = batch.astype(object).where(batch.notna(), None)
    return {name: list(batch[name]) for name in batch}


@pytest.mark.parametrize("form", ["numpy", "pandas", "pyarrow"])
@pytest.mark.parametrize(("name", "values"), [("prompt", PROMPTS), ("messages", CHATS)])
def test_columns(
    generator: Generator, expected: dict[str, list[str]], form: str, name: str, values: list[Any]
) -> None:
    """The same type returns, with its other columns."""
    batch = in_format(form, name, values, number=[5, 6, 7], text=["old"] * 3)
    result = generator(batch)
    assert type(result) is type(batch)
    columns = as_lists(result)
    assert list(columns["number"]) == [5, 6, 7] and len(columns[name]) == 3
    assert columns["text"] == expected[name]
    assert columns["finish_reason"] == ["length"] * 3
    assert [error is None for error in columns["error"]] == [True] * 3
    assert sorted(columns) == sorted([name, "number", "text", "finish_reason", "error"])


@pytest.mark.parametrize("form", ["numpy", "pandas", "pyarrow"])
def test_a_wrong_row_is_its_own_error(
    generator: Generator, expected: dict[str, list[str]], form: str
) -> None:
    columns = as_lists(generator(in_format(form, "prompt", ["abc", None, "x" * 999, "hello"])))
    texts, errors = columns["text"], columns["error"]
    assert (texts[0], texts[3]) == (expected["prompt"][0], expected["prompt"][2])
    assert texts[1:3] == columns["finish_reason"][1:3] == [None, None]
    assert "prompt=" in errors[1] and "context" in errors[2]
    assert errors[0] is None and errors[3] is None
    chats = [None, [], CHATS[0], [{"role": "user", "content": None}], [{"role": None}]]
    columns = as_lists(generator(in_format(form, "messages", chats)))
    assert columns["text"][2] == expected["messages"][0]
    for row in (0, 1, 4):
        assert "must be" in columns["error"][row] and "messages[0]" in columns["error"][row]


def test_prompts_of_token_ids(generator: Generator, tiny: TinyModel) -> None:
    with Engine(tiny.artifact) as engine:
        ids = [engine.encode(prompt) for prompt in ("abc", "xyz")]
        expected = [output.text for output in engine.generate(ids, SamplingParams(**PARAMS))]
    assert list(generator({"prompt": np.array(ids)})["text"]) == expected
    assert list(generator(arrays("prompt", ids))["text"]) == expected
    scalars = generator({"prompt": np.array([5, 6])})  # which are no prompt of two tokens
    assert all("prompt=" in error for error in scalars["error"])


@pytest.mark.parametrize("form", ["numpy", "pandas", "pyarrow"])
def test_an_empty_batch(generator: Generator, form: str) -> None:
    columns = as_lists(generator(in_format(form, "prompt", [])))
    assert columns == {"prompt": [], "text": [], "finish_reason": [], "error": []}


def test_what_arrow_adds_to_dicts_is_left_out() -> None:
    """Each dict of a column has the keys of all of them; transformers and templates ask whether
    there is one."""
    pyarrow = pytest.importorskip("pyarrow")
    calls = [{"function": {"name": "f", "arguments": {"a": 1}}}]
    parts = [{"type": "image"}, {"type": "text", "text": "b"}]
    chats = [[{"role": "assistant", "tool_calls": calls}], [{"role": "user", "content": parts}]]
    table = pyarrow.table({"messages": chats})
    assert table["messages"].to_pylist() != chats
    assert rows_of(table) == chats
    frame = table.to_pandas()
    assert rows_of(frame) == chats
    assert rows_of({"messages": frame["messages"].to_numpy()}) == chats


@pytest.mark.parametrize(
    "batch", [{"question": PROMPTS}, {"prompt": PROMPTS, "messages": CHATS}, {}]
)
def test_columns_that_cannot_be_answered(generator: Generator, batch: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"must hold either prompt or messages; rename one"):
        generator(batch)


@pytest.mark.parametrize(
    ("params", "message"),
    [(3, "params=3 must be SamplingParams"), ({"best_of": 2}, "best_of=2: there is no such"),
     ({"top_p": 3}, "top_p=3")],
)  # fmt: skip
def test_wrong_params(tiny: TinyModel, params: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Generator(tiny.artifact, params)


def test_options(tiny: TinyModel) -> None:
    """Those of the engine, and the variables of the chat template."""
    template = "{{ messages[0]['content'] }}{{ tone }}"
    options = {"chat_template": template, "kv_pages": 9}
    generator = Generator(
        tiny.artifact, SamplingParams(**PARAMS), engine_options=options,
        chat_template_kwargs={"tone": "xyz"},
    )  # fmt: skip
    with Engine(tiny.artifact) as engine:
        expected = engine.generate("abcxyz", SamplingParams(**PARAMS)).text
    assert generator({"messages": [CHATS[0], PARTS]})["text"][0] == expected
    with pytest.raises(RequestError, match="kv_pages=0"):
        Generator(tiny.artifact, engine_options={"kv_pages": 0})


def test_a_lost_engine_raises(tiny: TinyModel) -> None:
    """Its error is none of the rows'."""
    generator = Generator(tiny.artifact, PARAMS)
    generator._engine.shutdown()
    with pytest.raises(EngineError):
        generator({"prompt": PROMPTS})


def test_a_lost_engine_ends_its_actor(
    tiny: TinyModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray gives a batch to an actor again that raised, but starts one anew that died."""
    generator = Generator(tiny.artifact, PARAMS)
    generator._engine.shutdown()
    ended = threading.Event()
    monkeypatch.setitem(sys.modules, "ray", fake_ray(actor="01"))
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    with pytest.raises(EngineError):
        generator({"prompt": PROMPTS})
    assert ended.is_set() and "this actor ends" in capsys.readouterr().err


def fake_ray(actor: str | None, gpus: list[str] | None = None) -> Any:
    context = SimpleNamespace(
        get_actor_id=lambda: actor,
        get_accelerator_ids=lambda: {"GPU": gpus or []},
        get_assigned_resources=lambda: {"CPU": 1.0},
    )
    return SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: context)


@pytest.mark.parametrize(
    ("visible", "ids", "device"),
    [
        ("", [], "cpu"),
        ("0", ["0"], ["hip:0"]),
        ("2", ["2"], ["hip:0"]),  # Ray shows only that one
        ("2,5", ["2", "5"], ["hip:0", "hip:1"]),
        ("2,5", [5], ["hip:1"]),  # RAY_EXPERIMENTAL_NOSET_HIP_VISIBLE_DEVICES
        ("", ["3"], ["hip:3"]),
        ("GPU-ab,GPU-cd", ["GPU-cd"], ["hip:1"]),
    ],
)
def test_devices_that_ray_assigns(
    monkeypatch: pytest.MonkeyPatch, visible: str, ids: list[str], device: Any
) -> None:
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", visible)
    assert assigned_device(fake_ray("01", ids).get_runtime_context()) == device


def test_outside_of_an_actor_all_cores_are_used() -> None:
    assert assigned_device(None) == "cpu"


class FakeDataset:
    """What `sort_by_prefix` uses of ray.data.Dataset, on one batch."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def map_batches(self, function: Any, batch_format: str) -> FakeDataset:
        assert batch_format == "pyarrow"
        return FakeDataset(function(self.batch))

    def sort(self, key: str) -> FakeDataset:
        return FakeDataset(self.batch.sort_by(key))

    def drop_columns(self, names: list[str]) -> FakeDataset:
        return FakeDataset(self.batch.drop_columns(names))


def test_sort_by_prefix() -> None:
    pyarrow = pytest.importorskip("pyarrow")

    def sorted_by_prefix(**columns: list[Any]) -> dict[str, list[Any]]:
        ds = ray.sort_by_prefix(FakeDataset(pyarrow.table(columns)))
        return as_lists(ds.batch)

    assert sorted_by_prefix(prompt=["b 1", "a 2", None, "b 0", "a 1"], id=[0, 1, 2, 3, 4]) == {
        "prompt": [None, "a 1", "a 2", "b 0", "b 1"], "id": [2, 4, 1, 3, 0]
    }  # fmt: skip
    chats = [[{"role": "system", "content": s}, {"role": "user", "content": u}]
             for s, u in (("b", "1"), ("a", "1"), ("b", "0"), ("a", "0"))]  # fmt: skip
    assert sorted_by_prefix(messages=chats, id=[0, 1, 2, 3])["id"] == [3, 1, 2, 0]
    ids = [[12, 1], [1, 2], [12, 0], [1, 2, 3]]
    assert sorted_by_prefix(prompt=ids)["prompt"] == [[1, 2], [1, 2, 3], [12, 0], [12, 1]]
    with pytest.raises(RequestError, match="either prompt or messages"):
        sorted_by_prefix(question=PROMPTS)


KILLED = """
import json, os, signal, sys
import ray
from sf_local.ray import Generator, sort_by_prefix

artifact, marker = sys.argv[1:]


class Fragile(Generator):
    def __call__(self, batch):
        result = super().__call__(batch)
        if 20 in batch["number"].to_pylist():
            try:
                file = open(marker, "x")
            except FileExistsError:
                pass
            else:
                file.write(str(os.getpid()))
                file.close()
                os.kill(os.getpid(), signal.SIGKILL)
        return result.append_column("process", [[os.getpid()] * len(batch)])


ray.init(num_cpus=3)
rows = [
    {"number": n, "prompt": None if n % 7 == 3 else f"{n % 5} abc", "half": n if n % 2 else None}
    for n in range(40)
]
ds = sort_by_prefix(ray.data.from_items(rows)).map_batches(
    Fragile, concurrency=2, batch_size=4, batch_format="pyarrow", fn_constructor_kwargs={
        "vmfb": artifact, "params": {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}},
)
print(json.dumps(ds.take_all()))
"""


@pytest.mark.slow
def test_a_killed_actor_loses_no_row(
    tiny: TinyModel, tmp_path: Path, ray_environment: dict[str, str]
) -> None:
    marker = tmp_path / "killed"
    (tmp_path / "program.py").write_text(KILLED)
    command = [sys.executable, tmp_path / "program.py", tiny.artifact, marker]
    env = os.environ | ray_environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    rows = sorted(json.loads(done.stdout.splitlines()[-1]), key=lambda row: row["number"])
    assert [row["number"] for row in rows] == list(range(40))
    prompts = [None if n % 7 == 3 else f"{n % 5} abc" for n in range(40)]
    assert [row["prompt"] for row in rows] == prompts
    assert [row["half"] for row in rows] == [n if n % 2 else None for n in range(40)]
    with Engine(tiny.artifact) as engine:
        params = SamplingParams(**PARAMS)
        expected = {p: engine.generate(p, params).text for p in set(prompts) if p is not None}
    for prompt, row in zip(prompts, rows, strict=True):
        assert row["text"] == expected.get(prompt)
        assert row["finish_reason"] == (None if prompt is None else "length")
        assert (row["error"] is None) == (prompt is not None)
    assert rows[20]["process"] != int(marker.read_text())
