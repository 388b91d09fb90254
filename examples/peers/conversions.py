"""Models as OpenVINO GenAI, ONNX Runtime GenAI and CTranslate2 read them.

Each is made by the peer's own converter, in its environment (`python`), from the same weights, of
the demo in f32; once, and kept in the cache folder. RuntimeError tells why one could not be made.
"""

import os
import subprocess
import tempfile
from pathlib import Path

from peers.models import demo_as_folder, kept

DEMO = "SmolLM2-135M-Instruct"
OPENVINO = {"int8": [], "int4": ["--group-size", "32", "--ratio", "1.0"], "fp16": []}
# Activations in 8 bits. Logits of a prompt's last token only: the default computes all of them. The
# embedding stays f32: one that shares 4 asymmetric bits with the head does not load in 0.18.
ONNX = [
    "block_size=32", "is_symmetric=false", "accuracy_level=4", "prune_lm_head=true",
    "shared_embeddings=false", "hf_token=false",
]  # fmt: skip
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def openvino(python: Path, kind: str, model: Path | None = None) -> Path:
    """By optimum-intel: weights in f16, in 8 bits, or in 4 bits in groups of 32, asymmetric.

    With 4 bits the embedding and the head have 8, nncf's default. model: a Hugging Face folder,
    instead of the demo model.
    """
    folder = model or demo_as_folder("f32")
    return _converted(
        f"openvino-{kind}",
        [python.with_name("optimum-cli"), "export", "openvino", "--model", folder, "--task",
         "text-generation-with-past", "--weight-format", kind, *OPENVINO[kind]],
        model.name if model else DEMO,
    )  # fmt: skip


def onnxruntime(python: Path, kind: str) -> Path:
    """By onnxruntime-genai's builder: weights in 8 or 4 bits in groups of 32, asymmetric."""
    return _converted(
        f"onnx-{kind}",
        [python, "-m", "onnxruntime_genai.models.builder", "-i", demo_as_folder("f32"), "-p", kind,
         "-e", "cpu", "-c", tempfile.gettempdir(), "--extra_options", *ONNX, "-o"],
    )  # fmt: skip


def ctranslate2(python: Path, kind: str) -> Path:
    """By CTranslate2's converter: int8, a scale a row."""
    return _converted(
        f"ctranslate2-{kind}",
        [python.with_name("ct2-transformers-converter"), "--model", demo_as_folder("f32"),
         "--quantization", kind, "--output_dir"],
    )  # fmt: skip


def _converted(name: str, command: list[str | Path], model: str = DEMO) -> Path:
    """What `command` makes of a model in the folder that is its last argument."""
    return kept(f"{model}-{name}", lambda folder: _run([*command, folder]))


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True, text=True, env={**os.environ, **OFFLINE},
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise RuntimeError(f"{' '.join(map(str, command[:3]))} failed: {reason}")
