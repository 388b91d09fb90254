"""Chat templates of many models, out of the sources of llama-cpp-python, which has llama.cpp's.

llama.cpp keeps some as files, and others in the texts of a test.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

SOURCES = (  # 77 MB
    "https://files.pythonhosted.org/packages/"
    "ec/e9/e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca773a59fe7cf3/"
    "llama_cpp_python-0.3.36.tar.gz"
)
FOLDER, TEST = "/models/templates/", "/tests/test-chat-template.cpp"
LITERAL = r'("(?:[^"\\]|\\.)*")'  # of C++, and of Python
CASE = re.compile(rf"/\* \.name= \*/ {LITERAL},\s*(?://.*\s*)?/\* \.template_str= \*/ {LITERAL},")


@functools.cache
def published_templates() -> dict[str, str]:
    """Their texts by name; downloaded once, and kept between runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache, "sf-local", Path(SOURCES).name.removesuffix(".tar.gz"))
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partly = folder.with_name(f"{folder.name}.{os.getpid()}")
        partly.mkdir()
        with urllib.request.urlopen(SOURCES, timeout=60) as answer:
            for name, text in _templates(answer):
                (partly / f"{name}.jinja").write_text(text)
        if not folder.is_dir():
            partly.rename(folder)
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}


def _templates(sources: IO[bytes]) -> Iterator[tuple[str, str]]:
    """Names and texts of all templates in an archive."""
    with tarfile.open(fileobj=sources, mode="r|gz") as archive:
        for member in archive:
            is_template = FOLDER in member.name and member.name.endswith(".jinja")
            if not (is_template or member.name.endswith(TEST)):
                continue
            content = archive.extractfile(member)
            assert content is not None
            text = content.read().decode()
            if is_template:
                yield Path(member.name).stem, text
                continue
            for name, literal in CASE.findall(text):  # of two with one name the later is kept
                yield re.sub(r" \(.*|.*/", "", ast.literal_eval(name)), ast.literal_eval(literal)
