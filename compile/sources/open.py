"""Opens weights: the demo, a Hugging Face folder or repo id, or a .gguf file.

Each becomes one `Source`: the model's config, its tensors under canonical names, read from the
mapped files only when asked for, and its tokenizer. A model whose family or settings are not
supported is refused here, with the name of what is not supported. Whether the tensors are those of
the config is checked later, by `weights.check_tensors`.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from compile.sources.demo import DEMO_NAME, DEMO_SHA256, demo_gguf
from compile.sources.source import Progress, Source
from sf_local.errors import SourceError


def open_source(source: str | Path, progress: Progress = lambda message: None) -> Source:
    """Open `source`: "demo", a Hugging Face folder, a .gguf file, or a Hugging Face repo id.

    Raises SourceError for weights that are missing, damaged or unreachable, and UnsupportedError
    for a model, tokenizer or data type that is not supported; both before any weight is read.
    """
    # Both need the extra `compile`, without which this module can be imported nevertheless.
    from compile.sources.gguf import open_gguf
    from compile.sources.huggingface import open_folder

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


def _download(repo_id: str, progress: Progress) -> Path:
    import huggingface_hub  # slow to import, and only needed here

    progress(f"downloading {repo_id} from Hugging Face")
    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
        folder = huggingface_hub.snapshot_download(
            repo_id, allow_patterns=wanted,
            ignore_patterns=["*/*.json", "*/*.safetensors", "tokenizer/*"],  # of other models
        )  # fmt: skip
    except Exception as error:  # requests, httpx, OSError, and the hub's own, by version
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(
            f"no folder {repo_id!r} here, and it cannot be downloaded from Hugging Face: {reason}; "
            f"download it on another machine (hf download {repo_id}) and pass the folder"
        ) from error
    return Path(folder)
