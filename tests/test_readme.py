"""The front page runs: its commands and its Python, in order, print what it says they print.

What it installs is installed by `.ci/run`, whose second command is these tests. A comment that
readers do not see marks a block that runs on something else than what readers have.
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from codeop import compile_command
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hip.driver import Driver
from tests.support.pages import CHECKOUT, PAGES
from tests.support.tiny import GPU_SIZES, TinyModel

TEXT = (CHECKOUT / "README.md").read_text()
BIN = Path(sys.executable).parent
# Behind each block of Python, so that its output can be told from the next one's
SEPARATOR = "\x1e"


@dataclass
class Block:
    """Code of the front page. mark: of the comment before it. output: the text behind it."""

    mark: str
    language: str
    text: str
    output: str = ""


def blocks() -> list[Block]:
    """All of them, with what they print."""
    found: list[Block] = []
    for parts in re.findall(r"(?:<!-- ([^\n]*) -->\n)?```(\w+)\n(.*?)```", TEXT, re.S):
        block = Block(*parts)
        if block.language == "text":
            found[-1].output = block.text
        else:
            found.append(block)
    return found


INSTALL, *REST = blocks()
PLAIN = [block for block in REST if not block.mark]
ON_A_MODEL, ON_A_CARD = (block for block in REST if block.mark)


def check(block: Block, printed: str) -> None:
    """What was printed is the block's output, in which "..." stands for anything, and speeds are
    any."""
    wanted, got = (re.sub(r"\d+ (ms|tokens/s)", r"N \1", t) for t in (block.output, printed))
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.OutputChecker().check_output(wanted, got, options), printed


def test_its_size() -> None:
    assert len(TEXT.split()) < 900
    assert [block.language for block in PLAIN] == ["python"] * 3
    first_lines = TEXT.partition("```text")[0].lower()
    assert not re.search("artifact|vmfb|rows|seams|preempt", first_lines)


@pytest.mark.parametrize("block", PLAIN, ids=["app", "many", "sglang"])
def test_pasting_its_python(block: Block) -> None:
    """Into the prompt of Python up to 3.12, for which an empty line ends a compound statement, and
    which waits for one at the end."""
    lines: list[str] = []
    for line in block.text.splitlines():
        lines.append(line)
        if compile_command("\n".join(lines)) is not None:
            lines.clear()
    assert not lines


@pytest.mark.model
def test_the_first_command() -> None:
    """Its last part; the rest installs."""
    commands = INSTALL.text.splitlines()
    assert len(commands) == 2
    command = commands[0].rpartition("&& ")[2].replace(".venv/bin", str(BIN))
    done = subprocess.run(
        command, shell=True, cwd=CHECKOUT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    check(INSTALL, done.stdout)


@pytest.mark.model
def test_its_python(tmp_path: Path) -> None:
    """As if pasted into one `python`, in an empty folder."""
    code = f"print({SEPARATOR!r})\n".join(block.text for block in PLAIN)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for block, printed in zip(PLAIN, done.stdout.split(SEPARATOR), strict=True):
        assert block.output
        check(block, printed)


def test_a_model_of_ones_own(make_tiny: Callable[..., TinyModel], tmp_path: Path) -> None:
    (tmp_path / "my-model").symlink_to(make_tiny(has_code=False).source)
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e", "-c", ON_A_MODEL.text], cwd=tmp_path, env=os.environ | {"PATH": path},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "my-model-avx2 is ready" in done.stdout and "tokens/s" in done.stderr


def test_a_card(
    hip_driver: Driver, make_tiny: Callable[..., TinyModel], twins_of: Callable[[Path], Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    model = make_tiny(target="gfx942", keep_mlir=True, **GPU_SIZES)
    (tmp_path / "my-model-gfx942").symlink_to(model.artifact)
    code = "import os, sys\nos.chdir(sys.argv[1])\nfrom sf_local import Engine\n"
    outcome = hip_driver.run(
        code + ON_A_CARD.text, tmp_path, devices="gfx942:1GiB", twins=twins_of(model.artifact)
    )
    assert outcome.exit_code == 0, outcome.stderr
    assert int(outcome.stdout) <= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_links(page: Path) -> None:
    """Those to files of this repository, and to headings of its pages."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match("https?:", target):
            continue
        name, _, heading = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not heading or heading in headings(path.read_text()), target


def headings(text: str) -> set[str]:
    """Of a page, as GitHub names them in links."""
    lines = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}
