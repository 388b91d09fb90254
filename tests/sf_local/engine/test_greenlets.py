"""gevent and eventlet, which put greenlets in the place of threads."""

from __future__ import annotations

import importlib.util

import pytest

from tests.support.child import run_program
from tests.support.tiny import TinyModel

PATCHES = {
    "gevent": "from gevent.monkey import patch_all as patch",
    "eventlet": "from eventlet import monkey_patch as patch",
}
USE = """
import sys
from sf_local.errors import EngineError
def use():
    from sf_local import Engine, SamplingParams
    params = SamplingParams(max_new_tokens=5, temperature=0, ignore_eos=True)
    with Engine(sys.argv[1]) as engine:
        return len(engine.generate([5, 6], params).token_ids)
"""


def run(name: str, tiny: TinyModel, program: str) -> str:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return run_program(f"{PATCHES[name]}\n{USE}\n{program}", tiny.artifact, timeout=60)


@pytest.mark.parametrize(
    ("name", "when"),
    [
        *((name, when) for name in PATCHES for when in ("before", "after the import")),
        ("gevent", "after the start"),  # eventlet breaks threads that run when it is called
    ],
)
def test_greenlets_are_refused(name: str, when: str, tiny: TinyModel) -> None:
    """With the remedy, instead of waiting for ever."""
    begin = {
        "before": "patch()\nfrom sf_local import Engine",
        "after the import": "from sf_local import Engine\npatch()",
        # gevent makes Python's threads that run already print an error when they end
        "after the start": "from sf_local import Engine\nengine = Engine(sys.argv[1])\npatch()\n"
        "import atexit, os\natexit.register(os._exit, 0)\natexit.register(sys.stdout.flush)",
    }[when]
    try_it = """
try:
    engine.generate([5, 6]) if "engine" in globals() else Engine(sys.argv[1])
except EngineError as error:
    print(error)
"""
    shown = run(name, tiny, begin + try_it)
    assert f"threads are replaced by {name}" in shown and "patch_all(thread=False" in shown


@pytest.mark.parametrize("name", PATCHES)
def test_the_remedy_works(name: str, tiny: TinyModel) -> None:
    """Others go on while an answer is waited for."""
    program = {
        "gevent": """
patch(thread=False, queue=False)
import gevent
seen = []
other = gevent.spawn(lambda: seen.append("other"))
print(gevent.get_hub().threadpool.apply(use), *seen)
""",
        "eventlet": """
patch(thread=False)
import eventlet, eventlet.tpool
seen = []
other = eventlet.spawn(lambda: seen.append("other"))
print(eventlet.tpool.execute(use), *seen)
""",
    }[name]
    assert run(name, tiny, program).split() == ["5", "other"]
