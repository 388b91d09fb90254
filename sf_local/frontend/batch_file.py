"""Batches of requests from a file into a file, which can be stopped at any moment and continued.

The input is read once for its ids and beginnings, and requests with a common beginning are sent
together, as SGLang's longest-prefix-match schedulers do it. Answers are appended as they complete.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from tqdm import tqdm

from sf_local.artifact.manifest import file_sha256
from sf_local.engine.engine import Engine
from sf_local.engine.handle import Handle
from sf_local.engine.interrupts import take
from sf_local.errors import RequestError, SfLocalError
from sf_local.frontend.batch_input import LINE_ID, InputLine, read_input
from sf_local.frontend.openai_lines import (
    CHAT,
    BatchRequest,
    answer_line,
    error_line,
    parse_json,
    parse_line,
)
from sf_local.request.checks import check_int
from sf_local.request.output import Output

# What some readers take for the end of a line, and JSON leaves as it is
_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


@dataclass(frozen=True)
class Summary:
    """What a batch has come to: ids in the output that were answered, and that failed; how many
    this call has added; and what one of those that failed says, which is empty without one."""

    answered: int
    failed: int
    new: int
    first_error: str = field(default="", repr=False)


def run_batch(
    engine: Engine,
    source: str | Path,
    output: str | Path,
    *,
    force: bool = False,
    retry_errors: bool = False,
    max_in_flight: int = 256,
    progress: bool = True,
) -> Summary:
    """Answer all requests of a JSON Lines file, and append the answers to another one.

    A file that has answers already is continued. What an answer was computed from is kept in a file
    beside it, `<output>.state`.

    Args:
        source: lines of OpenAI's batches, for /v1/chat/completions and /v1/completions, or
            {"prompt": ...} or {"messages": ...} with fields of SamplingParams.
        output: lines with "id", "custom_id", "response" and "error", in any order.
        force: continue although the model or lines that were answered have changed.
        retry_errors: answer those again that failed.
        max_in_flight: requests that run or wait at a time.
        progress: show a bar on a terminal.

    Raises RequestError for files that cannot be used, such as an output for which there is no more
    room, or if another process writes the output; what is wrong with a line is that line's error.
    Raises EngineError or DeviceError if the engine ends. Call it again to continue.
    """
    max_in_flight = check_int("max_in_flight", max_in_flight, 1)
    lines = read_input(Path(source))
    with ExitStack() as stack:
        file = stack.enter_context(_opened(Path(output)))
        if retry_errors:
            file = stack.enter_context(_without_errors(file, Path(output)))
        done = _read_output(file, Path(output))
        state = Path(f"{output}.state")
        _check_state(state, engine, lines, done, force)
        left = sorted(line for line in lines if line.key not in done)
        with tqdm(total=len(lines), initial=len(lines) - len(left), unit=" requests",
                  disable=None if progress else True) as bar:  # fmt: skip
            _answer(engine, Path(source), left, max_in_flight,
                    _Writer(file, Path(output), done, bar))  # fmt: skip
        failed = sum(done.values())
        first_error = _first_error(file, Path(output)) if failed else ""
        return Summary(len(done) - failed, failed, len(left), first_error)


class _Writer:
    """Appends lines to the output, and notes in `done` which have failed."""

    def __init__(self, file: IO[bytes], output: Path, done: dict[str, bool], bar: Any) -> None:
        self._file, self._output, self._done, self._bar = file, output, done, bar
        self._tokens = 0

    def write(self, key: str, line: dict[str, Any]) -> None:
        """One line, as a whole; raises RequestError if there is no room for it."""
        written = json.dumps(line, ensure_ascii=False).translate(_LINE_ENDS)
        left = written.encode(errors="replace") + b"\n"
        with _writing(self._output, "; make room, and run it again to continue"):
            while left:  # not in the file's buffer, which would be written again when it is closed
                left = left[os.write(self._file.fileno(), left) :]
        self._done[key] = line["error"] is not None
        usage = line["response"]["body"].get("usage") or {}
        self._tokens += usage.get("completion_tokens", 0)
        speed = self._tokens / max(1e-9, self._bar.format_dict["elapsed"])
        self._bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
        self._bar.update()


@dataclass
class _Pending:
    """A request under way: its choices, and how many have not ended."""

    line: InputLine
    request: BatchRequest
    handles: list[Handle[Any]]
    left: int


def _answer(
    engine: Engine, source: Path, lines: list[InputLine], max_in_flight: int, writer: _Writer
) -> None:
    """Answer lines, at most `max_in_flight` at a time."""
    ended: SimpleQueue[_Pending] = SimpleQueue()
    running: set[int] = set()
    waiting = iter(lines)
    pending: dict[int, _Pending] = {}
    with source.open("rb") as file:
        try:
            while True:
                while len(running) < max_in_flight and (line := next(waiting, None)) is not None:
                    started = _started(engine, file, line, ended, writer)
                    if started is not None:
                        running.add(line.number)
                        pending[line.number] = started
                if not running:
                    return
                one = take(ended)
                one.left -= 1
                if one.left == 0:
                    running.discard(one.line.number)
                    del pending[one.line.number]
                    _write(engine, one, writer)
        finally:
            for one in pending.values():
                for handle in one.handles:
                    handle.cancel()


def _started(
    engine: Engine, file: IO[bytes], line: InputLine, ended: SimpleQueue[_Pending], writer: _Writer
) -> _Pending | None:
    """A line's request, under way; None if it was refused, which is written."""
    file.seek(line.offset)
    handles: list[Handle[Any]] = []
    try:
        if line.error:
            raise RequestError(line.error)
        request = parse_line(file.readline().decode(), engine.max_tokens)
        for params in request.params.samples():
            if request.url == CHAT:
                handles.append(engine.submit_chat(request.given, params, **request.options))
            else:
                handles.append(engine.submit(request.given, params))
    except (RequestError, TypeError, UnicodeDecodeError) as error:
        for handle in handles:
            handle.cancel()
        writer.write(line.key, error_line(_line_id(line), _custom_id(line), error, 400))
        return None
    pending = _Pending(line, request, handles, len(handles))
    for handle in handles:
        handle.add_done_callback(lambda _: ended.put(pending))
    return pending


def _write(engine: Engine, one: _Pending, writer: _Writer) -> None:
    """Write the answer of a request that has ended; raises what ended the engine, if that did."""
    try:
        outputs: list[Output] = [handle.result() for handle in one.handles]
    except SfLocalError as error:
        if not isinstance(error, RequestError):
            engine.check_usable()
        status = 400 if isinstance(error, RequestError) else 500
        made = error_line(_line_id(one.line), _custom_id(one.line), error, status)
    else:
        made = answer_line(_line_id(one.line), one.request, outputs, engine.artifact.name)
    writer.write(one.line.key, made)


def _line_id(line: InputLine) -> str:
    return line.key if line.key.startswith(LINE_ID) else f"batch_req_{line.number:08}"


def _custom_id(line: InputLine) -> str | None:
    return None if line.key.startswith(LINE_ID) else line.key


@contextmanager
def _opened(output: Path) -> Iterator[IO[bytes]]:
    """The output, to append to; no other process may write it meanwhile."""
    with _writing(output):
        file = output.open("a+b")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RequestError(
                f"{output} is being written by another process; wait for it, or give another file"
            ) from None
        yield file


@contextmanager
def _writing(file: Path, remedy: str = "") -> Iterator[None]:
    """What the system refuses meanwhile is a RequestError."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{file} cannot be written: {error.strerror}{remedy}") from None


def _read_output(file: IO[bytes], output: Path) -> dict[str, bool]:
    """Ids that have been answered, each with whether it failed. A last line without an end, which a
    process that was killed has left, is cut off."""
    done: dict[str, bool] = {}
    end = 0
    for raw, line in _output_lines(file, output):
        done[line["custom_id"] or line["id"]] = line["error"] is not None
        end += len(raw)
    file.truncate(end)
    return done


@contextmanager
def _without_errors(file: IO[bytes], output: Path) -> Iterator[IO[bytes]]:
    """The output without the lines of errors, in the place of `file`."""
    partly = output.with_name(f"{output.name}.{os.getpid()}")
    try:
        with _opened(partly) as kept:
            with _writing(partly):
                for raw, line in _output_lines(file, output):
                    if line["error"] is None:
                        kept.write(raw)
                kept.flush()
                partly.replace(output)
            yield kept
    finally:
        partly.unlink(missing_ok=True)


def _output_lines(file: IO[bytes], output: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines of an output."""
    file.seek(0)
    for number, raw in enumerate(file, 1):
        if raw.endswith(b"\n"):
            yield raw, _output_line(raw, f"{output}:{number}")


def _first_error(file: IO[bytes], output: Path) -> str:
    """The id and the message of the first line that failed; empty without one."""
    for _, line in _output_lines(file, output):
        if line["error"] is not None:
            return f"{line['custom_id'] or line['id']}: {line['error'].get('message')}"
    return ""


def _output_line(raw: bytes, where: str) -> dict[str, Any]:
    try:
        line = parse_json(raw.decode())
        if {"id", "custom_id", "response", "error"} <= line.keys():
            return line
    except (RequestError, UnicodeDecodeError):
        pass
    raise RequestError(f"{where} is no answer of a batch; give another output file")


def _check_state(
    file: Path, engine: Engine, lines: list[InputLine], done: dict[str, bool], force: bool
) -> None:
    """Compare what the answers were computed from with what is there, and note that."""
    model, now = _model(engine), {line.key: line.sha256 for line in lines}
    if done and not force:
        before = _read_state(file)
        if before["model"] != model:
            raise RequestError(
                f"{file.with_suffix('')} has answers of another model; use the same one, give "
                "another output, or continue nevertheless with force (sf-local batch --force)"
            )
        hashes = before["lines"]
        changed = [key for key in done if key in now and hashes.get(key, now[key]) != now[key]]
        if changed:
            raise RequestError(
                f"{len(changed)} lines have changed since they were answered, such as "
                f"{changed[0]!r}; give another output, or continue nevertheless with force "
                "(sf-local batch --force)"
            )
    partly = file.with_name(f"{file.name}.{os.getpid()}")
    with _writing(file):
        partly.write_text(json.dumps({"model": model, "lines": now}))
        partly.replace(file)


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text())
        if isinstance(state["lines"], dict) and isinstance(state["model"], str):
            return dict(state)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise RequestError(
        f"{file} is missing or damaged, so that nobody knows what the answers were computed from; "
        "give another output, or continue nevertheless with force (sf-local batch --force)"
    )


def _model(engine: Engine) -> str:
    """What answers depend on."""
    manifest = engine.artifact.manifest
    if manifest is None:
        return file_sha256(engine.artifact.vmfb)
    of = [manifest.source["sha256"], manifest.target, manifest.weight_dtype, manifest.kv_dtype]
    return " ".join(map(str, of))
