"""Turns Llama weights into artifacts that sf_local runs. Use `from compile import build, demo`."""

from compile.build import build, build_once, demo
from compile.options import BuildOptions

__all__ = ["BuildOptions", "build", "build_once", "demo"]
