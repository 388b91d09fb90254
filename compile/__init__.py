"""Turns Llama weights into artifacts that sf_local runs. Use `from compile import build, demo`."""

from compile.build import BuildOptions, build, build_once, demo

__all__ = ["BuildOptions", "build", "build_once", "demo"]
