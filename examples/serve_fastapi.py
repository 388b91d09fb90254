"""A web service around an engine: pip install "sf-local[fastapi]", then run this file.

    curl localhost:8000/chat -d '{"messages": [{"role": "user", "content": "Hi!"}]}' \
        -H 'content-type: application/json'
"""

import argparse
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict

from sf_local import AsyncStream, Engine, SamplingParams
from sf_local.errors import RequestError


class ChatRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")  # a field that is misspelt is told, not ignored

    messages: list[dict[str, Any]]
    max_tokens: int | None = None  # what is not given is as the model's makers recommend
    temperature: float | None = None
    stream: bool = False


def make_app(engine: Engine) -> FastAPI:
    app = FastAPI()

    @app.post("/chat")
    async def chat(request: ChatRequest) -> Any:
        try:
            params = SamplingParams(
                max_new_tokens=request.max_tokens, temperature=request.temperature
            )
            stream = await engine.asubmit_chat(request.messages, params)
        except RequestError as error:  # such as a prompt that is too long
            raise HTTPException(422, str(error)) from None
        if request.stream:
            return StreamingResponse(texts(stream), media_type="text/plain")
        output = await stream.result()
        return {"text": output.text, "finish_reason": output.finish_reason}

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(engine.metrics())

    return app


async def texts(stream: AsyncStream[Any]) -> AsyncIterator[str]:
    try:
        async for text in stream:
            yield str(text)
    finally:  # the client has gone
        stream.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--vmfb", default="demo", help="artifact, or what is compiled once")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    with Engine.from_source(args.vmfb, progress=True) as engine:
        uvicorn.run(make_app(engine), port=args.port)
