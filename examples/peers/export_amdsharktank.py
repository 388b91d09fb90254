"""amdsharktank: a Llama to an artifact for this CPU: `export_amdsharktank.py SOURCE FOLDER`.

Runs in the environment `amdsharktank` of install_peers.sh. SOURCE is a Hugging Face folder with
model.safetensors and a tokenizer. amdsharktank does not read tied embeddings, so a tied output head
is written as a copy.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

TOKENIZER_FILES = "tokenizer.json", "tokenizer_config.json"
COMPILER_FLAGS = [
    "--iree-hal-target-device=local",
    "--iree-hal-local-target-device-backends=llvm-cpu",
    "--iree-llvmcpu-target-cpu=host",
    "--iree-llvmcpu-stack-allocation-limit=1048576",  # decode needs more than the default
]


def export(source: Path, folder: Path, options: list[str], dtype: str) -> None:
    """Write model.vmfb, config.json, weights.irpa and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        untied, mlir = Path(name), Path(name) / "model.mlir"
        write_untied(source, untied)
        run_module(
            "amdsharktank.tools.import_hf_dataset",
            "--config-json", untied / "config.json", "--params", "model.safetensors",
            "--output-irpa-file", folder / "weights.irpa",
        )  # fmt: skip
        dtypes = [f"--{part}-dtype={dtype}" for part in ("activation", "attention", "kv-cache")]
        run_module(
            "amdsharktank.examples.export_paged_llm_v1", "--irpa-file", folder / "weights.irpa",
            "--output-mlir", mlir, "--output-config", folder / "config.json",
            "--use-hf", *dtypes, *options,
        )  # fmt: skip
        compiler = Path(sys.executable).with_name("iree-compile")
        run(compiler, mlir, "-o", folder / "model.vmfb", *COMPILER_FLAGS)
    for file in TOKENIZER_FILES:
        shutil.copy(source / file, folder / file)


def write_untied(source: Path, folder: Path) -> None:
    """The model in f32, for all of its arithmetic is, with a head of its own."""
    tensors = {key: t.float() for key, t in load_file(source / "model.safetensors").items()}
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))


def run_module(name: str, *arguments: object) -> None:
    run(sys.executable, "-m", name, *arguments)


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32", help="of activations, attention, KV cache")
    parser.add_argument("--block-seq-stride", default="16", help="tokens a page")
    parser.add_argument("--bs", default="1,4", help="batch sizes")
    args, rest = parser.parse_known_args()  # the rest is for amdsharktank: --top-k 4, ...
    sizes = [f"--bs-prefill={args.bs}", f"--bs-decode={args.bs}"]
    stride = f"--block-seq-stride={args.block_seq_stride}"
    export(args.source, args.folder, [*sizes, stride, *rest], args.dtype)
