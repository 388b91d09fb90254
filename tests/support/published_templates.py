"""Chat templates of many models, out of the sources of llama-cpp-python, which has llama.cpp's."""

from __future__ import annotations

import functools
import os
import tarfile
import urllib.request
from pathlib import Path

SOURCES = (  # 77 MB
    "https://files.pythonhosted.org/packages/"
    "ec/e9/e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca773a59fe7cf3/"
    "llama_cpp_python-0.3.36.tar.gz"
)
FOLDER = "/models/templates/"


@functools.cache
def published_templates() -> dict[str, str]:
    """Their texts by name; downloaded once, and kept between runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache, "sf-local", "chat-templates")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partly = folder.with_name(f"{folder.name}.{os.getpid()}")
        partly.mkdir()
        with (
            urllib.request.urlopen(SOURCES, timeout=60) as answer,
            tarfile.open(fileobj=answer, mode="r|gz") as archive,
        ):
            for member in archive:
                if FOLDER in member.name and member.name.endswith(".jinja"):
                    content = archive.extractfile(member)
                    assert content is not None
                    (partly / Path(member.name).name).write_bytes(content.read())
        if not folder.is_dir():
            partly.rename(folder)
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}
