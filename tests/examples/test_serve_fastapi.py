"""The web service, asked by a real client on loopback."""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from sf_local import Engine
from tests.support.tiny import TinyModel

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from serve_fastapi import make_app

HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def engine(tiny: TinyModel) -> Iterator[Engine]:
    with Engine(tiny.artifact) as engine:
        yield engine


@pytest.fixture(scope="module")
def port(engine: Engine) -> Iterator[int]:
    server = uvicorn.Server(uvicorn.Config(make_app(engine), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def ask(port: int, **body: Any) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"content-type": "application/json"}
    connection.request("POST", "/chat", json.dumps({"messages": HELLO} | body), headers)
    return connection.getresponse()


def test_answers(port: int) -> None:
    answer = ask(port, max_tokens=5, temperature=0)
    assert answer.status == 200
    whole = json.loads(answer.read())
    stream = ask(port, max_tokens=5, temperature=0, stream=True)
    assert stream.read().decode() == whole["text"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": [{"role": "user", "content": "x" * 400}]}, "leave no room for an answer"),
        ({"messages": []}, "is no conversation"),
        ({"temperature": -1}, "temperature=-1"),
        ({"max_new_tokens": 5}, "max_new_tokens"),
        ({"messages": 3}, "list"),
        ({"messages": [{"role": "user", "content": "x" * 400}], "stream": True}, "no room"),
    ],
)
def test_mistakes_are_422(port: int, body: dict[str, Any], message: str) -> None:
    answer = ask(port, **body)
    assert answer.status == 422 and message in answer.read().decode()


def test_a_client_that_goes_cancels(engine: Engine, port: int) -> None:
    long = {"max_tokens": 200, "stream": True, "temperature": 1.0}
    before = engine.stats()["steps"]
    for _ in range(3):
        answer = ask(port, **long)
        answer.read(1)
        answer.close()
    deadline = time.monotonic() + 60
    while engine.stats()["running"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats()["running"] == 0 and engine.stats()["pages_used"] == 0
    assert engine.stats()["steps"] > before


def test_metrics(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    assert "sf_local_requests_total" in connection.getresponse().read().decode()
