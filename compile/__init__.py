"""Compiles the weights of Llamas to artifacts, the folders that sf_local runs.

Use `from compile import build, demo`. Importing it needs no compiler; calling it needs the extra
`compile`, and says so.
"""

from compile.build import build, build_once, demo
from compile.options import BuildOptions

__all__ = ["BuildOptions", "build", "build_once", "demo"]
