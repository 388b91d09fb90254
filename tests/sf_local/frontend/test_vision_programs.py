"""`sgl.image` in SGLang programs, on tiny models that see."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import sglang as sgl

from sf_local.frontend.backend import ShortfinLocal
from sf_local.frontend.sgl_chat_template import resolve_chat_template
from tests.support.pictures import picture, png
from tests.support.sglang_state import error_of
from tests.support.tiny import SeeingModel, TinyModel

SMOLVLM = (
    "<s>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@sgl.function
def ask(s: Any, image: Any, question: str) -> None:
    s += sgl.user(sgl.image(image) + question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=6, temperature=0, ignore_eos=True))


@pytest.fixture(scope="module")
def backend(make_seeing: Callable[..., SeeingModel]) -> Iterator[ShortfinLocal]:
    with ShortfinLocal(make_seeing("idefics3").artifact, kv_pages=120) as backend:
        yield backend


def answer(state: Any) -> str:
    assert state.error() is None
    return str(state["answer"])


def test_files_bytes_and_pil_images(backend: ShortfinLocal, tmp_path: Path) -> None:
    image = picture(60, 40)
    path = tmp_path / "image.png"
    path.write_bytes(png(image))
    texts = [
        answer(ask.run(image=given, question="what?", backend=backend))
        for given in (str(path), png(image), image)
    ]
    assert len(set(texts)) == 1
    prompt = "<s>User: <image>what?<end_of_utterance>\nAssistant:"
    expected = backend.engine.generate(prompt, images=[path]).prompt_tokens
    state = ask.run(image=str(path), question="what?", backend=backend)
    assert state.get_meta_info("answer")["prompt_tokens"] == expected


def test_the_right_way_up(backend: ShortfinLocal) -> None:
    """SGLang's own copies of PIL images lose their orientation."""
    exif, file = PIL.Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    picture(60, 20).save(file, "JPEG", exif=exif)
    opened = PIL.Image.open(file)
    lying = PIL.Image.fromarray(np.asarray(opened))
    texts = [
        answer(ask.run(image=image, question="what?", backend=backend))
        for image in (file.getvalue(), opened, lying)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_forks_encode_and_prefill_once(backend: ShortfinLocal) -> None:
    """And they may choose, or follow a grammar."""

    @sgl.function
    def compare(s: Any, image: Any) -> None:
        s += sgl.user(sgl.image(image) + "what?")
        forks = s.fork(3)
        forks[0] += sgl.assistant(sgl.gen("text", max_tokens=4, temperature=0, ignore_eos=True))
        forks[1] += sgl.assistant_begin() + sgl.gen("digits", regex="[0-9]{3}", max_tokens=8)
        forks[2] += sgl.assistant_begin() + sgl.select("choice", ["cat", "dog"])
        s["all"] = [forks[0]["text"], forks[1]["digits"], forks[2]["choice"]]

    before = backend.engine.stats()
    state = compare.run(image=picture(90, 70, seed=9), backend=backend)
    assert state.error() is None
    text, digits, choice = state["all"]
    assert text and digits.isdigit() and choice in ("cat", "dog")
    after = backend.engine.stats()
    assert after["encoded_tiles"] - before["encoded_tiles"] == 3 * 3 + 1
    shown = len(backend.engine.prepare("<image>", [picture(90, 70, seed=9)]).ids)
    new = {name: after[name] - before[name] for name in ("prompt_tokens", "cached_tokens")}
    assert new["prompt_tokens"] > 4 * shown  # the forks, two choices
    assert new["prompt_tokens"] - new["cached_tokens"] < 2 * shown


def test_batches_and_streams(backend: ShortfinLocal) -> None:
    images = [png(picture(32, 32, seed)) for seed in range(3)]
    arguments = [{"image": image, "question": "what?"} for image in images]
    alone = [answer(ask.run(**each, backend=backend)) for each in arguments]
    states = ask.run_batch(arguments, backend=backend, num_threads=3)
    assert [answer(state) for state in states] == alone
    state = ask.run(**arguments[0], backend=backend, stream=True)
    assert "".join(state.text_iter("answer")) == alone[0]


def test_mistakes_are_kept_in_the_state(
    backend: ShortfinLocal, make_tiny: Callable[..., TinyModel], tmp_path: Path
) -> None:
    missing = ask.run(image=str(tmp_path / "none.png"), question="?", backend=backend)
    assert isinstance(error_of(missing), FileNotFoundError)
    broken = ask.run(image=b"no image", question="?", backend=backend)
    assert "image=" in str(error_of(broken))
    marked = ask.run(image=png(picture(8, 8)), question="<image>?", backend=backend)
    assert "there are 1, and 2 markers" in str(error_of(marked))
    with ShortfinLocal(make_tiny().artifact, kv_pages=40, chat_template="chatml") as blind:
        state = ask.run(image=png(picture(8, 8)), question="?", backend=blind)
        assert "is a text model" in str(error_of(state))


def test_smolvlm_writes_no_space_before_an_image(backend: ShortfinLocal) -> None:
    tokenizer = backend.engine.tokenizer
    template = resolve_chat_template(SMOLVLM, tokenizer, "smolvlm", "<image>")
    assert template.role_prefix_and_suffix["user"] == ("User: ", "<end_of_utterance>\n")
    assert template.image_token == "<image>"
    assert template.image_first == ("User: <image>", "User:<image>")


def test_llava_writes_a_line_for_an_image(backend: ShortfinLocal) -> None:
    template = resolve_chat_template(LLAVA, backend.engine.tokenizer, "llava", "<image>")
    assert template.role_prefix_and_suffix["user"] == ("USER: ", " ")
    assert template.image_token == "<image>\n"
    assert getattr(template, "image_first", None) is None
