"""LLMs inside your own process: an SGLang backend and an engine for IREE-compiled Llamas.

Importing this attaches `sgl.ShortfinLocal`, now or when sglang is imported; nothing heavy loads
until it is used.
"""

from __future__ import annotations

import importlib
import platform
import sys
from typing import TYPE_CHECKING, Any

import wrapt

from sf_local import errors
from sf_local.errors import SfLocalError

if TYPE_CHECKING:
    from sf_local.device.info import DeviceInfo, devices
    from sf_local.engine.engine import Engine
    from sf_local.frontend.backend import ShortfinLocal
    from sf_local.request.output import Output
    from sf_local.request.params import SamplingParams

__all__ = [
    "DeviceInfo",
    "Engine",
    "Output",
    "SamplingParams",
    "SfLocalError",
    "ShortfinLocal",
    "devices",
    "errors",
]

_HOMES = {
    "ShortfinLocal": "sf_local.frontend.backend",
    "Engine": "sf_local.engine.engine",
    "Output": "sf_local.engine.generation",
    "SamplingParams": "sf_local.request.request",
    "DeviceInfo": "sf_local.device.info",
    "devices": "sf_local.device.info",
}

if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    raise ImportError(
        f"sf_local runs on Linux x86-64 only, because shortfin does; this is {sys.platform} "
        f"{platform.machine()}"
    )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sf_local' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


@wrapt.when_imported("sglang")
def _attach(sglang: Any) -> None:
    if (
        "sf_local.frontend.backend" not in sys.modules
    ):  # else it imports sglang, and attaches at its end
        importlib.import_module("sf_local.frontend.backend")
