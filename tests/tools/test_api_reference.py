"""The API reference is built by its one command, and has all that is public."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

import compile
import sf_local
from tests.support.pages import CHECKOUT


def test_it_has_all_that_is_public(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    command = [sys.executable, "-m", "tests.tools.api_reference", tmp_path]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_file()
    page = (tmp_path / "sf_local.html").read_text()
    sections = set(re.findall(r'<section id="([^"]+)"', page))
    assert sections == {*sf_local.__all__} - {"errors"}
    # What Engine inherits is there in full
    methods = [name for name in dir(sf_local.Engine) if not name.startswith("_")]
    assert not [name for name in methods if f'<div id="Engine.{name}"' not in page]
    text = " ".join(html.unescape(re.sub("<[^>]*>", "", page)).replace("\u200b", "").split())
    assert "A last message of the assistant is continued." in text and "hip:GPU-<uuid>" in text
    assert "PromptTooLongError" in (tmp_path / "sf_local" / "errors.html").read_text()
    assert "Generator" in (tmp_path / "sf_local" / "ray.html").read_text()
    built = set(re.findall(r'<section id="([^"]+)"', (tmp_path / "compile.html").read_text()))
    assert built == {*compile.__all__}
