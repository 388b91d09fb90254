"""shortfin's own LLM server with our artifact: `shortfin_http.py ARTIFACT`.

Its process is a child of this one; requests go to /generate, the prefix cache is on.
"""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer
from worker import seconds, serve

START_SECONDS = 120


def start(artifact: Path, port: int) -> subprocess.Popen[bytes]:
    options = {
        "device": "local-task", "host": "127.0.0.1", "port": port,
        "vmfb": artifact / "model.vmfb", "parameters": artifact / "weights.irpa",
        "model_config": artifact / "config.json", "tokenizer_json": artifact / "tokenizer.json",
        "prefix_sharing_algorithm": "trie",
    }  # fmt: skip
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    server = subprocess.Popen([sys.executable, "-m", "shortfin_apps.llm.server", *arguments])
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return server
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"shortfin's server is not there after at most {START_SECONDS} s")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def generate(ids: list[int], count: int) -> str:
    sampling = {"max_completion_tokens": count, "temperature": 1.0, "top_k": 1}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/generate",
        json.dumps({"input_ids": ids, "sampling_params": sampling}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return str(json.load(response)["responses"][0]["responses"][0]["text"])


def first(prompt: list[int]) -> int:
    """Its token ids (`return_input_ids`) never arrive; the text does."""
    return tokenizer.encode(generate(prompt, 1)).ids[0]


def warm(prompt: list[int]) -> None:
    generate(prompt, 8)


def cached(shared: list[int], one: list[int], other: list[int]) -> float:
    generate(shared + one, 1)
    return seconds(lambda: generate(shared + other, 1))


def settings() -> str:
    return f"shortfin {version('shortfin')}, its prefix cache"


artifact, port = Path(sys.argv[1]), free_port()
tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
server = start(artifact, port)
serve({f.__name__: f for f in (first, generate, warm, cached, settings)})
server.terminate()
