"""Compiles the weights of Llamas to artifacts, the folders that sf_local runs.

Use `from compile import BuildOptions, build`, or `sf_local.from_source`, which keeps what it
compiles. Importing it needs no compiler; calling it needs the extra `compile`, and says so.
"""

from compile.build import build
from compile.options import BuildOptions

__all__ = ["BuildOptions", "build"]
