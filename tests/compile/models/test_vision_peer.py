"""Compiled models that see, against transformers' own on torch, in float32 with random weights.

From pictures and a text to tiles and tokens, which must be equal, to embeddings, and to logits. It
takes the environment that `examples/install_peers.sh FOLDER torch` makes, as SF_LOCAL_PEERS=FOLDER.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from PIL import Image

from compile import BuildOptions, build
from compile.models.spec import LlamaConfig, VisionConfig
from compile.tools.gpu_report import SHAPES, TOWERS
from sf_local.artifact.manifest import ImageSettings
from sf_local.artifact.open import open_artifact
from sf_local.model.runner import ModelRunner
from sf_local.request.batch import Row
from sf_local.text.tokenizer import Tokenizer
from sf_local.vision.processor import ImageProcessor
from sf_local.vision.reader import ImageReader
from tests.support.pictures import picture
from tests.support.reference import Array
from tests.support.running import encode_all, open_runner
from tests.support.tiny import TINY, TINY_OPTIONS, peer
from tests.support.vision_reference import (
    IDEFICS3,
    LLAVA,
    ask_transformers,
    random_model,
    write_vision_folder,
)

TOLERANCE = 1e-4  # of the largest value
UNTIED = replace(TINY, tied_embeddings=False)
SMOLVLM_2B = replace(  # fewer layers
    TOWERS["smolvlm-256m"], image_size=384, patch_size=14, hidden_size=1152, num_heads=16,
    intermediate_size=4304, num_layers=2, scale_factor=3,
)  # fmt: skip
CLIP_L = replace(TOWERS["llava-1.5-7b"], num_layers=2)
LONGER = replace(UNTIED, max_seq_len=1024)
SMOLVLM_TEXT, SMOLVLM = (shapes["smolvlm-256m"] for shapes in (SHAPES, TOWERS))


@dataclass(frozen=True)
class Question:
    """Pictures of some sizes, which Idefics3 may split, and words."""

    sizes: list[tuple[int, int]]
    splits: bool = True

    @property
    def text(self) -> str:
        return "see " + " and <image>" * len(self.sizes) + " what?"

    @property
    def images(self) -> list[Image.Image]:
        return [picture(*size, seed=i) for i, size in enumerate(self.sizes)]


SMALL = [
    Question([(32, 32)], splits=False),
    Question([(40, 30), (64, 64)], splits=False),
    Question([(90, 60)]),
    Question([(31, 77), (96, 96)]),
    Question([(200, 20), (7, 3)]),
]


def ours(artifact: Path, question: Question) -> dict[str, Array]:
    opened, tokenizer = open_artifact(artifact), Tokenizer(artifact)
    assert opened.manifest and opened.manifest.images
    settings = ImageSettings(**opened.manifest.images)
    settings = replace(settings, splits=settings.splits and question.splits)
    reader = ImageReader(settings, tokenizer, 1 << 30, allow_urls=False)
    ids = tokenizer.encode(question.text)
    prompt = reader.expand(ids, question.images, opened.max_tokens)
    tiles = [span.tile.pixels for span in prompt.spans if span.tile.pixels is not None]
    pages = list(range(1, 2 + len(prompt.ids) // opened.config.page_size))

    async def evaluate(runner: ModelRunner) -> tuple[Array, Array]:
        embeddings = await encode_all(runner, tiles)
        for span, values in zip(prompt.spans, embeddings, strict=True):
            span.tile.embeds = values
        [logits] = await runner.prefill_all([Row(prompt.ids, 0, pages, prompt.spans)])
        return np.stack(embeddings), logits

    with open_runner(artifact) as run:
        embeddings, logits = run(evaluate)
    pixels = ImageProcessor(settings).normalized(np.stack(tiles))
    return {
        "tokens": np.array(prompt.ids), "pixels": pixels,
        "embeddings": embeddings, "logits": logits,
    }  # fmt: skip


def check(python: Path, folder: Path, artifact: Path, questions: Sequence[Question]) -> None:
    found = [ours(artifact, question) for question in questions]
    inputs = [
        {"tokens": values["tokens"], "pixels": values["pixels"],
         "text": np.array(question.text), "splits": np.array(question.splits)}
        | {f"image_{i}": np.asarray(image) for i, image in enumerate(question.images)}
        for question, values in zip(questions, found, strict=True)
    ]  # fmt: skip
    names = {"tokens", "pixels", "embeddings", "logits"}
    for values, theirs in zip(found, ask_transformers(python, folder, inputs), strict=True):
        assert theirs.keys() == names
        for name, expected in theirs.items():
            assert values[name].shape == expected.shape, name
            bound = TOLERANCE * np.abs(expected).max() if name in ("embeddings", "logits") else 0
            assert np.abs(values[name] - expected).max() <= bound, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vision", "text"), [(IDEFICS3, TINY), (LLAVA, UNTIED)], ids=["idefics3", "llava"]
)
def test_small(tmp_path: Path, vision: VisionConfig, text: LlamaConfig) -> None:
    python, folder = peer("torch"), tmp_path / "model"
    write_vision_folder(folder, text, vision, random_model(text, vision, seed=7))
    check(python, folder, build(folder, tmp_path / "artifact", TINY_OPTIONS), SMALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vision", "sizes"),
    [(SMOLVLM_2B, [(384, 384), (500, 400)]), (CLIP_L, [(336, 336), (500, 400)])],
    ids=["smolvlm-2.2b", "llava-1.5"],
)
def test_real_towers(
    tmp_path: Path, vision: VisionConfig, sizes: Sequence[tuple[int, int]]
) -> None:
    """But for their depth. Of SmolVLM-2.2B's, 27 x 27 patches leave six pixels over."""
    python, folder = peer("torch"), tmp_path / "model"
    write_vision_folder(folder, LONGER, vision, random_model(LONGER, vision, seed=7))
    options = replace(TINY_OPTIONS, max_seq_len=1024, page_size=32)
    questions = [Question([size], splits=i > 0) for i, size in enumerate(sizes)]
    check(python, folder, build(folder, tmp_path / "artifact", options), questions)


@pytest.mark.slow
def test_smolvlm_256m(tmp_path: Path) -> None:
    """At its real shape: one tile of 512 x 512 pixels, 2 x 2 of them and the whole, two images."""
    python = peer("torch")
    with TemporaryDirectory(dir=tmp_path) as work:  # 2 GB
        folder, weights = Path(work) / "model", random_model(SMOLVLM_TEXT, SMOLVLM, seed=7)
        write_vision_folder(folder, SMOLVLM_TEXT, SMOLVLM, weights)
        del weights
        path = folder / "preprocessor_config.json"
        settings = json.loads(path.read_text()) | {"size": {"longest_edge": 1024}}
        path.write_text(json.dumps(settings))
        options = BuildOptions(weight_dtype="f32", kv_dtype="f32", prefill_batch_sizes=(1,),
                               decode_batch_sizes=(1,), max_seq_len=1024)  # fmt: skip
        artifact = build(folder, Path(work) / "artifact", options)
        questions = [
            Question([(512, 512)], splits=False), Question([(700, 640)]),
            Question([(301, 77), (640, 480)], splits=False),
        ]  # fmt: skip
        check(python, folder, artifact, questions)
