"""The pages that people read: all Markdown files of the project."""

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
PAGES = [CHECKOUT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += [
    path for folder in ("sf_local", "compile", "examples", "tests")
    for path in sorted((CHECKOUT / folder).rglob("*.md"))
]  # fmt: skip
