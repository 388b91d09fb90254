"""The input of a batch: read once, for the ids of its lines and for what they begin with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sf_local.errors import RequestError
from sf_local.frontend.openai_lines import parse_json

BLOCK, MAX_BLOCKS, DIGEST = 256, 32, 8  # characters; blocks of a beginning; bytes of a block's hash
LINE_ID = "batch_req_line_"  # begins the ids of lines that have no id of their own


@dataclass(frozen=True, order=True, slots=True)
class InputLine:
    """A line of the input. beginning: hashes of its first blocks, each with all before it."""

    beginning: bytes
    number: int
    offset: int = field(compare=False)
    key: str = field(compare=False)  # its custom_id, or an id made of its number
    sha256: str = field(compare=False)
    error: str = field(compare=False)  # what is wrong with its id


def read_input(source: Path) -> list[InputLine]:
    """All lines of the input but blank ones; raises RequestError if it cannot be read."""
    lines: list[InputLine] = []
    seen: set[str] = set()
    offset = 0
    try:
        with source.open("rb") as file:
            if not file.seekable():
                raise RequestError(f"{source} is read twice, so it must be a file, and no pipe")
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    lines.append(_indexed(number, offset, raw, seen))
                offset += len(raw)
    except OSError as error:
        raise RequestError(f"{source} cannot be read: {error.strerror}") from None
    return lines


def _indexed(number: int, offset: int, raw: bytes, seen: set[str]) -> InputLine:
    sha256 = hashlib.sha256(raw.strip()).hexdigest()
    key, error, beginning = f"{LINE_ID}{number}", "", b""
    try:
        line = parse_json(raw.decode())
        body = line["body"] if isinstance(line.get("body"), dict) else line
        beginning = _beginning(body)
        if isinstance(name := line.get("custom_id"), str) and name:
            error = f"custom_id={name!r}: another line has it as well" if name in seen else ""
            key = name if not error and not name.startswith(LINE_ID) else key
            seen.add(name)
    except (RequestError, UnicodeDecodeError):
        pass  # told when the line is answered
    return InputLine(beginning, number, offset, key, sha256, error)


def _beginning(body: dict[str, Any]) -> bytes:
    """By which requests are sorted: those with a common beginning come together."""
    given = body.get("messages", body.get("prompt"))
    text = given if isinstance(given, str) else json.dumps([body.get("tools"), given])
    running, hashes = hashlib.blake2b(digest_size=DIGEST), []
    for start in range(0, min(len(text), BLOCK * MAX_BLOCKS), BLOCK):
        running.update(text[start : start + BLOCK].encode(errors="surrogatepass"))
        hashes.append(running.digest())
    return b"".join(hashes)
