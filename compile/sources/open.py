"""Finds and opens weights: the demo, a Hugging Face folder or repo id, or a .gguf file.

Each becomes one `Source`: the model's config, its tensors under canonical names, read from the
mapped files only when asked for, and its tokenizer. A model whose family or settings are not
supported is refused here, with the name of what is not supported. Whether the tensors are those of
the config is checked later, by `weights.check_tensors`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from compile.sources.demo import DEMO_NAME, DEMO_SAMPLING, DEMO_SHA256, demo_gguf
from compile.sources.hf_files import folder_sha256, weight_files
from compile.sources.source import Progress, Source
from sf_local.artifact.cache import known_sha256, recall, remember
from sf_local.artifact.path_kinds import (
    MAX_LISTED,
    describe,
    is_repo_id,
    models_beside,
    other_weights,
)
from sf_local.errors import SourceError

ALLOWED = (
    'allowed are "demo", a folder with config.json, safetensors, tokenizer.json and '
    'tokenizer_config.json, a .gguf file, or a Hugging Face repo id such as "org/name"'
)


def _ignore(message: str) -> None:
    pass


@dataclass(frozen=True)
class Location:
    """Where weights are: a file or folder at `path`, or what is fetched under `name`."""

    kind: Literal["demo", "gguf", "folder", "hub"]
    name: str
    path: Path = Path()

    def sha256(self, progress: Progress = _ignore) -> str | None:
        """The hash that `open` would find, without opening the weights or using the network.

        Of a repo on Hugging Face, that of its newest revision that is in Hugging Face's cache, or
        else that which `remember` was told; None if there is neither. Raises SourceError, and
        UnsupportedError for a folder whose config.json is of no family that can be compiled.
        """
        with _named_errors(self.path):
            if self.kind == "demo":
                return DEMO_SHA256
            if self.kind == "gguf":
                return known_sha256(self.path, progress)
            if self.kind == "folder":
                _check_family(self.path)  # before gigabytes are read
                return folder_sha256(self.path, weight_files(self.path), progress)
        if folder := _downloaded(self.name):
            return folder_sha256(folder, weight_files(folder), progress)
        known = recall(f"hub:{self.name}")
        return known if isinstance(known, str) else None

    def remember(self, sha256: str) -> None:
        """Keep the hash of what a repo on Hugging Face was when it was opened."""
        if self.kind == "hub":
            remember(f"hub:{self.name}", sha256)

    def open(self, progress: Progress = _ignore) -> Source:
        """The weights there; raises as `open_source` does."""
        # Both need the extra `compile`, without which this module can be imported nevertheless.
        from compile.sources.gguf import open_gguf
        from compile.sources.huggingface import open_folder

        with _named_errors(self.name if self.kind == "hub" else self.path):
            if self.kind == "demo":
                found = open_gguf(demo_gguf(progress), progress, DEMO_SHA256)
                return replace(found, name=self.name, sampling_defaults=DEMO_SAMPLING)
            if self.kind == "gguf":
                return open_gguf(self.path, progress)
            folder = self.path if self.kind == "folder" else _download(self.name, progress)
            return open_folder(folder, self.name, progress)


def open_source(source: str | Path, progress: Progress = _ignore) -> Source:
    """Open `source`: "demo", a Hugging Face folder, a .gguf file, or a Hugging Face repo id.

    Raises SourceError for weights that are missing, damaged or unreachable, and UnsupportedError
    for a model, tokenizer or data type that is not supported; both before any weight is read.
    """
    return locate(source).open(progress)


def locate(source: str | Path, or_artifact: bool = False) -> Location:
    """Where the weights are that `source` names; raises SourceError.

    or_artifact: errors say that the folder of an artifact is allowed as well.
    """
    if source == "demo":
        return Location("demo", DEMO_NAME)
    if not isinstance(source, str | Path):
        raise SourceError(f"source={source!r}: not a str or a Path; {ALLOWED}")
    if not str(source):
        raise SourceError(f"source '': is empty; {ALLOWED}")
    path = Path(os.path.expanduser(source))
    is_gguf = path.suffix.lower() == ".gguf"
    with _named_errors(path):
        is_folder = path.is_dir()
        if is_folder and (path / "config.json").exists():
            return Location("folder", path.resolve().name, path)
        if is_gguf and path.is_file():
            return Location("gguf", path.name, path)
        is_hub_id = is_repo_id(str(source)) and not (is_gguf or isinstance(source, Path))
        if is_hub_id and not path.exists():
            return Location("hub", str(source))
        if what := describe(path):
            raise SourceError(f"source {str(source)!r}: {what}")
        if is_folder:
            found = "a folder without config.json"
        else:
            found = "neither a folder nor a .gguf file" if path.exists() else "not found"
    allowed = f"{ALLOWED}, or a folder that sf-compile made" if or_artifact else ALLOWED
    raise SourceError(f"source {str(source)!r}: {found}; {allowed}{models_beside(path)}")


@contextmanager
def _named_errors(path: Path | str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        missing = f"{error.filename} is missing: download it too"
        raise SourceError(f"source {str(path)!r}: {missing}; {ALLOWED}") from error
    except OSError as error:
        raise SourceError(f"source {str(path)!r}: cannot be read: {error}; {ALLOWED}") from error


def _check_family(folder: Path) -> None:
    """Raise SourceError or UnsupportedError for the config.json of a model that is refused."""
    from compile.models.registry import find_hf_family
    from compile.reading import read_json

    path = folder / "config.json"
    raw = read_json(path)
    find_hf_family(path, raw).hf_config(path, raw)


def _downloaded(repo_id: str) -> Path | None:
    """The folder of a repo in Hugging Face's cache, if all that `open_folder` needs is there."""
    try:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(repo_id, local_files_only=True))
        needed = [folder / "config.json", folder / "tokenizer.json", *weight_files(folder)]
    except Exception:  # it is not installed, or raises what it likes, by version
        return None
    return folder if all(path.is_file() for path in needed) else None


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
        raise SourceError(_why_not(repo_id, error)) from error
    if not Path(folder, "config.json").exists():
        what = other_weights(Path(folder)) or (
            "a repo without config.json; if it has .gguf files, download one (hf download "
            f"{repo_id} FILE.gguf --local-dir .) and give its path"
        )
        raise SourceError(f"source {repo_id!r}: {what}")
    return Path(folder)


def _why_not(repo_id: str, error: BaseException) -> str:
    """Why a repo cannot be downloaded, and what to do."""
    from huggingface_hub import errors

    here = f"no folder {repo_id!r} here{models_beside(Path(repo_id))}"
    page, log_in = f"https://huggingface.co/{repo_id}", "log in (hf auth login) or set HF_TOKEN"
    causes = [error, error.__cause__]  # the hub looks into its cache after an error, and may fail
    if any(isinstance(cause, errors.GatedRepoError) for cause in causes):
        return (
            f"the repo {repo_id!r} is gated: accept its licence at {page}, where its owner may "
            f"have to agree, and {log_in}, of the account that accepted"
        )
    if any(isinstance(cause, errors.RepositoryNotFoundError) for cause in causes):
        return (
            f"{here}, and no repo that you may read on Hugging Face: look at "
            f"{page}; if it is private or gated, {log_in}"
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    found = f"{here}, and it cannot be downloaded from Hugging Face: {reason}"
    statuses = [getattr(getattr(c, "response", None), "status_code", None) for c in causes]
    if 401 in statuses or 403 in statuses:
        return (
            f"{found}; look whether {page} is gated, and {log_in} with a token that is valid and "
            "may read gated repos"
        )
    if 429 in statuses:
        return f"{found}; wait some minutes, or {log_in}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{found}; free some space there, or set HF_HOME to a folder elsewhere"
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        found += "; unset HF_HUB_OFFLINE"
    return (
        f"{found}; without a network give a folder, a .gguf file, or a repo that is in Hugging "
        f"Face's cache{_cached_repos()}; or download it on another machine (hf download {repo_id} "
        "--local-dir FOLDER) and pass the folder"
    )


def _cached_repos() -> str:
    """The repos in Hugging Face's cache that can be opened."""
    from huggingface_hub import constants

    folders = sorted(Path(constants.HF_HUB_CACHE).glob("models--*"))
    names = [folder.name.removeprefix("models--").replace("--", "/", 1) for folder in folders]
    found = [name for name in names if _downloaded(name)]
    return f" ({', '.join(found[:MAX_LISTED])})" if found else ", which is empty"
