"""LLMs inside your own process: an engine for IREE-compiled Llama models and an SGLang backend.

    Engine            loads a compiled model and generates text
    SamplingParams    how one request samples, stops and is scheduled
    Output            a finished generation
    ToolCall          a call of a tool that an answer asks for
    Handle            a generation under way: read it as a stream or wait for its Output
    Stream            the text of a generation, as it grows
    AsyncStream       a generation for asyncio
    Score             log probabilities of a text that could continue a prompt
    ShortfinLocal     the engine as a backend for programs of SGLang's frontend language
    DeviceInfo        a CPU or GPU that models can run on
    devices           lists them
    from_source       the path of a model's artifact, compiled on first use
    run_batch         answers a file of requests into another file, and continues
    SfLocalError      the base class of all errors that are raised on purpose
    errors            the module with its subclasses

Each loads when it is first used. `import sf_local` itself loads nothing heavy; it attaches
`sglang.ShortfinLocal`, now or as soon as sglang is imported.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

import wrapt

from sf_local import errors
from sf_local.errors import SfLocalError

if TYPE_CHECKING:
    from sf_local.device.info import DeviceInfo, devices
    from sf_local.engine.engine import Engine
    from sf_local.engine.handle import AsyncStream, Handle, Stream
    from sf_local.engine.sources import from_source
    from sf_local.frontend.backend import ShortfinLocal
    from sf_local.frontend.batch_file import run_batch
    from sf_local.request.output import Output, Score, ToolCall
    from sf_local.request.params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "AsyncStream",
    "DeviceInfo",
    "Engine",
    "Handle",
    "Output",
    "SamplingParams",
    "Score",
    "SfLocalError",
    "ShortfinLocal",
    "Stream",
    "ToolCall",
    "devices",
    "errors",
    "from_source",
    "run_batch",
]

_BACKEND = "sf_local.frontend.backend"
_HOMES = {
    "AsyncStream": "sf_local.engine.handle",
    "DeviceInfo": "sf_local.device.info",
    "Engine": "sf_local.engine.engine",
    "Handle": "sf_local.engine.handle",
    "Output": "sf_local.request.output",
    "SamplingParams": "sf_local.request.params",
    "Score": "sf_local.request.output",
    "ShortfinLocal": _BACKEND,
    "Stream": "sf_local.engine.handle",
    "ToolCall": "sf_local.request.output",
    "devices": "sf_local.device.info",
    "from_source": "sf_local.engine.sources",
    "run_batch": "sf_local.frontend.batch_file",
}

# Silent until a user adds a handler; without this one Python would print warnings to stderr
logging.getLogger("sf_local").addHandler(logging.NullHandler())

if sys.platform != "linux" or os.uname().machine != "x86_64":
    import platform

    raise ImportError(
        f"sf_local runs on Linux x86-64 only, because shortfin does; this is {sys.platform} "
        f"{platform.machine()}"
    )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sf_local' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ImportError as error:
        if name != "ShortfinLocal":
            raise
        return _without_sglang(error)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _without_sglang(cause: ImportError) -> type:
    """Stands for ShortfinLocal if that cannot be imported, and says so when it is called.

    So `help(sf_local)` and `from sf_local import *` work without sglang.
    """

    def fail(*_: object, **__: object) -> None:
        raise ImportError(
            f"ShortfinLocal cannot be imported: {cause}. It needs sglang: install it, or use "
            "sf_local.Engine, which runs without."
        ) from cause

    doc = "The SGLang backend; it needs sglang, which cannot be imported here."
    return type("ShortfinLocal", (), {"__init__": fail, "__doc__": doc, "__module__": __name__})


@wrapt.when_imported("sglang")
def _attach(_: Any) -> None:
    if _BACKEND not in sys.modules:  # else it is importing sglang, and attaches at its own end
        importlib.import_module(_BACKEND)
