"""The `sf-local` command: chat, generate, batch, inspect, devices, bench, trace."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sf_local import __version__
from sf_local.arguments import Parser
from sf_local.artifact.open import compiled_targets, open_artifact, verify
from sf_local.device.info import devices, find_device
from sf_local.engine.sources import from_source
from sf_local.errors import ChatTemplateError, RequestError, SfLocalError
from sf_local.frontend.description import describe

if TYPE_CHECKING:
    from sf_local.engine.engine import Engine
    from sf_local.engine.handle import Handle
    from sf_local.request.params import SamplingParams

GIB = 1 << 30
ARTIFACT = (
    "folder made by sf-compile, or a .vmfb file; or what is compiled on first use: demo, a .gguf "
    "file, a Hugging Face folder, or a repo id such as org/name"
)
KV_MEMORY = "of the KV cache: 2GiB, 2GB, 50%%, or bytes"
THREADS = "on the CPU (default: one for each core)"
DEVICES = "cpu, hip, hip:N, hip:GPU-<uuid>, or auto: what the artifact is for (default)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `arguments` are by default those of the process. Returns its exit code."""
    args = _parser().parse_args(arguments)
    try:
        commands = {
            "chat": _chat, "generate": _generate, "inspect": _inspect, "devices": _devices,
            "batch": _batch, "bench": _bench, "trace": _trace,
        }  # fmt: skip
        return commands[args.command](args) or 0
    except SfLocalError as error:
        print(f"sf-local: {_told(args, error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        is_batch = args.command == "batch"
        again = "stopped; the same command continues, and starts answers that had not ended again"
        print(f"\n{again}" if is_batch else "", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `| head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _told(args: argparse.Namespace, error: Exception) -> str:
    """The text of an error, in which parameters that are options of this command are called so."""
    text = str(error)
    for name in vars(args):
        option = f"--{name.replace('_', '-')}"
        text = re.sub(rf"(?<![\w.('\"]){name}=", f"{option} ", text)
        if "_" in name:  # the others are words as well
            text = re.sub(rf"(?<![\w.('\"]){name}\b(?!=)", option, text)
    return text


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="sf-local", description="Run compiled Llama models in this process.")
    parser.add_argument("--version", action="version", version=f"sf-local {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    chat = commands.add_parser("chat", help="talk to a model; /help there lists commands")
    chat.add_argument("--system", help="system message (default: the model's own)")
    chat.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja text in place of the model's own"
    )
    generate = commands.add_parser("generate", help="answer a prompt")
    generate.add_argument("--prompt", help="default: standard input")
    generate.add_argument(
        "--raw", action="store_true",
        help="continue the prompt as it stands, without the model's chat template",
    )  # fmt: skip
    generate.add_argument("--stop", action="append", help="may be repeated")
    generate.add_argument("--regex", help="that the whole answer matches")
    generate.add_argument("--json-schema", help="JSON text that the answer is valid under")
    generate.add_argument("--ebnf", help="grammar of the answer, in Lark's syntax or GBNF")
    for command, length in ((chat, "to the end of the context"), (generate, "128")):
        command.add_argument("artifact", help=ARTIFACT)
        command.add_argument("--device", default="auto", help=DEVICES)
        command.add_argument("--kv-memory", type=_size, metavar="SIZE", help=KV_MEMORY)
        command.add_argument("--num-threads", type=int, metavar="N", help=THREADS)
        _add_sampling(command, length)
    batch = commands.add_parser(
        "batch", help="answer a file of requests; run again, it continues",
        description="Exit code 2 if requests failed, which stand in the output.",
    )  # fmt: skip
    batch.add_argument("artifact", help=ARTIFACT)
    batch.add_argument("input", help='JSON Lines: OpenAI\'s batch requests, or {"prompt": ...}')
    batch.add_argument("-o", "--output", required=True, help="where answers are appended")
    batch.add_argument("--device", default="auto", help=DEVICES)
    batch.add_argument("--kv-memory", type=_size, metavar="SIZE", help=KV_MEMORY)
    batch.add_argument("--num-threads", type=int, metavar="N", help=THREADS)
    batch.add_argument("--max-in-flight", type=int, default=256, help="requests at a time: 256")
    batch.add_argument("--retry-errors", action="store_true", help="answer again what failed")
    batch.add_argument(
        "--force", action="store_true", help="continue though model or lines have changed"
    )
    inspect = commands.add_parser("inspect", help="show what an artifact holds")
    inspect.add_argument("artifact", help=ARTIFACT)
    inspect.add_argument("--verify", action="store_true", help="hash every file as well")
    commands.add_parser("devices", help="list what models can run on here")
    bench = commands.add_parser(
        "bench", help="measure speed and how well the cache shares, in minutes"
    )
    which = bench.add_mutually_exclusive_group(required=True)
    which.add_argument("artifact", nargs="?", default=argparse.SUPPRESS, help=ARTIFACT)
    which.add_argument("--vmfb", dest="artifact", metavar="ARTIFACT", help="the same")
    bench.add_argument("--device", default="auto", help=DEVICES)
    bench.add_argument("--num-threads", type=int, metavar="N", help=THREADS)
    bench.add_argument("--rounds", type=int, default=3, help="default: 3")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    bench.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them there as well")
    bench.add_argument("--quick", action="store_true", help="one round with small sizes")
    trace = commands.add_parser(
        "trace", help="run a small batch and write where its time went, for ui.perfetto.dev"
    )
    trace.add_argument("artifact", help=ARTIFACT)
    trace.add_argument("output", metavar="OUT.json", help="an earlier trace is overwritten")
    trace.add_argument(
        "--prompt", action="append", dest="prompts", metavar="PROMPT",
        help="may be repeated (default: a mix of short and long ones)",
    )  # fmt: skip
    trace.add_argument("--max-new-tokens", type=int, default=32, help="of each answer: 32")
    trace.add_argument("--device", default="auto", help=DEVICES)
    trace.add_argument("--kv-memory", type=_size, metavar="SIZE", help=KV_MEMORY)
    trace.add_argument("--num-threads", type=int, metavar="N", help=THREADS)
    return parser


def _size(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _add_sampling(command: argparse.ArgumentParser, length: str) -> None:
    """Options that are named like fields of SamplingParams; None where they are not given.

    length: what the most tokens of an answer are by default.
    """
    group = command.add_argument_group(
        "sampling", "What is not given is as the model's makers recommend (generation_config.json, "
        "shown by `sf-local inspect`), else as in brackets."
    )  # fmt: skip
    group.add_argument("--max-new-tokens", type=int, help=f"length of the answer ({length})")
    group.add_argument("--temperature", type=float, help="0 is greedy (1)")
    group.add_argument("--top-p", type=float, help="draw from tokens of this probability (1)")
    group.add_argument("--top-k", type=int, help="draw from so many tokens; -1 is all (-1)")
    group.add_argument("--min-p", type=float, help="least share of the best's probability (0)")
    group.add_argument("--repetition-penalty", type=float, help="1 is none (1)")
    group.add_argument("--seed", type=int, help="makes the answer repeatable")


def _artifact(args: argparse.Namespace) -> Path:
    """The artifact that is meant, compiled if it must be."""
    return from_source(args.artifact, getattr(args, "device", "auto"), progress=True)


def _params(args: argparse.Namespace) -> SamplingParams:
    """SamplingParams of all options that are named like one of its fields."""
    from sf_local.request.params import SamplingParams

    names = {field.name for field in fields(SamplingParams)}
    values = {name: value for name, value in vars(args).items() if name in names}
    return SamplingParams(**values)


def _engine(
    args: argparse.Namespace, chat_template: str | None = None, trace: str | None = None
) -> Engine:
    from sf_local.engine.engine import Engine

    path = _artifact(args)
    return Engine(
        path, args.device, kv_memory=args.kv_memory, num_threads=args.num_threads,
        chat_template=chat_template, trace=trace,
    )  # fmt: skip


def _generate(args: argparse.Namespace) -> None:
    from sf_local.frontend.conversation import speed
    from sf_local.frontend.terminal_chat import read_prompt

    params = _params(args)
    prompt = read_prompt() if args.prompt is None else args.prompt
    with _engine(args) as engine:
        if args.raw or not engine.tokenizer.chat_templates:
            handle: Handle[Any] = engine.submit(prompt, params)
        else:
            handle = engine.submit_chat([{"role": "user", "content": prompt}], params)
        for text in handle:
            print(text, end="", flush=True)
        print()
        print(speed(handle.result()), file=sys.stderr)


def _chat(args: argparse.Namespace) -> None:
    from sf_local.frontend.terminal_chat import chat

    params, template = _params(args), _chat_template(args.chat_template)
    with _engine(args, template) as engine:
        if args.max_new_tokens is None:
            params = replace(params, max_new_tokens=engine.max_tokens)
        chat(engine, params, args.system, partial(_told, args))


def _chat_template(file: Path | None) -> str | None:
    """The text in a file, if one is given; raises ChatTemplateError."""
    try:
        return None if file is None else file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ChatTemplateError(f"chat_template={str(file)!r} cannot be read: {error}") from error


def _batch(args: argparse.Namespace) -> int:
    from sf_local.frontend.batch_file import run_batch

    with _engine(args) as engine:
        started_at = time.perf_counter()
        summary = run_batch(
            engine, args.input, args.output, force=args.force, retry_errors=args.retry_errors,
            max_in_flight=args.max_in_flight,
        )  # fmt: skip
        rate = engine.stats()["completion_tokens"] / (time.perf_counter() - started_at)
    new = f"{summary.new} new, {rate:.0f} tokens/s; in all"
    counts = f"{summary.answered} answered, {summary.failed} failed"
    nothing = "nothing left to do:" if summary.answered + summary.failed else "no requests:"
    print(new if summary.new else nothing, counts, file=sys.stderr)
    if summary.failed:
        print(
            f"{summary.first_error}; sf-local batch --retry-errors tries it again", file=sys.stderr
        )
    return 2 if summary.failed else 0


def _inspect(args: argparse.Namespace) -> None:
    path = _artifact(args)
    for target in compiled_targets(path) or [""]:
        artifact = open_artifact(path, targets=[target])
        for name, value in describe(artifact):
            print(f"{name:16} {value}")
        if args.verify:
            verify(artifact)
            print("every file has the hash it was made with")


def _devices(_: argparse.Namespace) -> None:
    from importlib.metadata import PackageNotFoundError, version

    found = devices()
    for device in found:
        free = device.free_bytes()
        memory = f"{device.total_bytes / GIB:.1f} GiB"
        if free is not None:
            memory += f", {free / GIB:.1f} free"
        line = f"{device.name:8} {device.chip:8} {memory:26} {device.description} {device.id}"
        print(line.rstrip())
    if len(found) == 1:
        try:
            find_device("hip")
        except SfLocalError as error:
            why = str(error).removeprefix("device='hip': ")
            print(f"no AMD GPU: {why}")
    try:
        print(f"shortfin {version('shortfin')}")
    except PackageNotFoundError:
        print("shortfin is not installed; run: pip install sf-local")


def _bench(args: argparse.Namespace) -> None:
    from sf_local.bench.measurements import run
    from sf_local.bench.report import check_plot, plot, table

    def progress(text: str) -> None:
        print(text, file=sys.stderr)

    if args.plot:
        check_plot(args.plot)
    if args.json and not args.json.absolute().parent.is_dir():
        raise RequestError(f"json={str(args.json)!r} must be a file in a folder that exists")
    report = run(
        _artifact(args), args.device, args.rounds, num_threads=args.num_threads, quick=args.quick,
        progress=progress,
    )  # fmt: skip
    print(table(report))
    if any(figure["met"] is False for figure in report["figures"].values()):
        print("MISSED: slower than we aim for on an idle machine; nothing is broken")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.plot:
        plot(report, args.plot)


def _trace(args: argparse.Namespace) -> None:
    from sf_local.bench.traced_batch import run, summary

    with _engine(args, trace=args.output) as engine:
        number = run(engine, args.prompts, args.max_new_tokens)
        steps = engine.stats()["steps"]
    print(
        f"{args.output}: {number} requests in {steps:.0f} steps\n\n{summary(Path(args.output))}\n\n"
        "To see each step and each request, open https://ui.perfetto.dev and drop the file on it; "
        "the page reads it in the browser and sends it nowhere. chrome://tracing shows it as well."
    )


if __name__ == "__main__":
    sys.exit(main())
