"""Writes the API reference, HTML from docstrings: `python -m tests.tools.api_reference [FOLDER]`.

pdoc makes it (`pip install -e ".[docs]"`), of what `from sf_local import ...` and
`from compile import ...` give. FOLDER is build/api by default; open index.html there.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pdoc

import compile
import sf_local

HERE = Path(__file__).parent
# With sf_local.errors, which is in __all__; compile.build is a function there, not its module
MODULES = ("sf_local", "sf_local.ray", "compile", "!compile.build")


def main(folder: Path) -> None:
    """Write the pages; a public name that cannot be documented raises."""
    warnings.filterwarnings("error", module="pdoc")
    for package in (sf_local, compile):
        for name in package.__all__:  # pdoc does not see what loads when it is first used
            setattr(package, name, getattr(package, name))
    pdoc.render.configure(
        docformat="google", template_directory=HERE / "templates", show_source=False
    )
    pdoc.pdoc(*MODULES, output_directory=folder)
    print(folder / "index.html")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parents[2] / "build" / "api")
