"""The cache of artifacts: models that were compiled on first use, and what is known of sources.

`$SF_LOCAL_CACHE`, or else the user's cache folder, holds

    artifacts/<name>-<key>   an artifact; its key is a hash of all that it was compiled from
    known/<hash>.json        the SHA-256 of a large file, or of a repo on Hugging Face

This is the one module of sf_local that imports `compile`, and only inside of functions. The names
of what is in the cache need no compiler, so that an install without it opens what is there.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from sf_local.artifact.manifest import COMPILER_VERSION, file_sha256
from sf_local.artifact.open import compiled_targets, open_artifact
from sf_local.artifact.path_kinds import is_compiled
from sf_local.errors import ArtifactError, CompileError, OutputError, UnsupportedError

if TYPE_CHECKING:
    from compile.options import BuildOptions
    from compile.progress import Progress

MAX_NAME = 48  # characters of a source's name that the folder's name begins with
SETTLED = 2.0  # seconds after which another change of a file has another time of change
# What options of `sf-compile`, and of other libraries, are called in BuildOptions
_OTHER_NAMES = {
    **dict.fromkeys(("weights", "dtype", "quantization"), "weight_dtype"), "kv": "kv_dtype",
    "activations": "activation_dtype",
    **dict.fromkeys(("n_ctx", "max_model_len", "context_length"), "max_seq_len"),
}  # fmt: skip
REMEDY = "set SF_LOCAL_CACHE to a folder that you may write to and that has room"


def cache_dir() -> Path:
    """The cache folder: `$SF_LOCAL_CACHE`, else the user's cache folder. May not exist yet.

    Raises OutputError where there is neither, for want of a home.
    """
    try:
        place = os.environ.get("SF_LOCAL_CACHE") or platformdirs.user_cache_dir("sf-local")
        return Path(place).expanduser().absolute()
    except RuntimeError as error:  # of both
        raise OutputError(f"no home folder to keep a cache in: {error}; {REMEDY}") from None


def as_artifact(source: str | Path) -> Path | None:
    """The path of a source that is an artifact, or a .vmfb file; None for any other."""
    if not isinstance(source, str | Path):
        return None
    path = Path(os.path.expanduser(source))
    try:
        return path if path.suffix == ".vmfb" or is_compiled(path) else None
    except (OSError, ValueError):  # no path at all, or a folder that must not be read
        return None


def known_targets() -> list[str]:
    """What can be compiled for: "cpu", and the chips of AMD GPUs such as "gfx942"."""
    from compile.target import HIP_CHIPS

    return ["cpu", *HIP_CHIPS]


def compiled(source: str | Path, progress: bool = False, **build_options: Any) -> Path:
    """The folder of a source's artifact, compiled now if it is not in the cache.

    source: "demo", a .gguf file, a Hugging Face folder, or a repo id such as "org/name". progress:
    show on standard error what is done. build_options: fields of `compile.BuildOptions`.

    An id stands for the revision that Hugging Face's own cache holds whole, as `hf download` leaves
    it, or else for the one that was compiled here last. Only if there is no artifact of that is the
    network used, for the newest revision.

    Processes that want the same wait for the first of them. Raises CompileError.
    """
    from compile.sources.open import locate

    options = _build_options(build_options)
    place = locate(source, or_artifact=True)
    with _display(progress) as show:
        tell = partial(show, share=None)
        if known := place.sha256(tell):
            folder = artifact_folder(place.name, known, options)
            if _is_whole(folder):
                return folder
        _check_compiler(str(source), options)
        tell(f"opening {source}")
        opened = place.open(tell)
        folder = artifact_folder(place.name, opened.sha256, options)
        with _named_errors(folder), locked(folder, tell):
            if not _is_whole(folder):
                from compile.build import build

                shutil.rmtree(folder, ignore_errors=True)  # what is left of one, if anything
                build(opened, folder, options, progress=show)
        place.remember(opened.sha256)
    return folder


def artifact_folder(name: str, sha256: str, options: BuildOptions) -> Path:
    """Where the artifact of a source with this content is, or would be."""
    readable = re.sub(r"[^\w.-]", "_", name)[:MAX_NAME]
    return cache_dir() / "artifacts" / f"{readable}-{cache_key(sha256, options)}"


def cache_key(sha256: str, options: BuildOptions, code: Sequence[Path] | None = None) -> str:
    """A hash of all that an artifact depends on.

    That is the content of the source, the compiler's version, the options, the targets with the
    CPU's features, and the Python code of the folders `code`: by default those that decide what is
    compiled, and its format.
    """
    digest = hashlib.sha256(f"{sha256} {COMPILER_VERSION} {options}".encode())
    digest.update(repr(options.targets).encode())
    folders = code_folders() if code is None else code
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def code_folders() -> list[Path]:
    """The packages that decide what is compiled, and its format."""
    import compile

    return [Path(compile.__path__[0]), Path(__file__).parent]


def known_sha256(path: Path, progress: Callable[[str], None] = lambda message: None) -> str:
    """The SHA-256 of a file, remembered for as long as the file does not change. Raises OSError.

    A change is one of the file's size, inode or times, of which no program can set all. progress:
    told if the file must be read.
    """
    path, now = path.resolve(), time.time()
    before = _state(path)
    match recall(str(path)):
        case [state, str(sha256)] if state == before:
            return sha256
    progress(f"hashing {path}")
    sha256 = file_sha256(path)
    if _state(path) == before and now - os.stat(path).st_ctime > SETTLED:
        remember(str(path), [before, sha256])
    return sha256


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def remember(subject: str, facts: Any) -> None:
    """Keep facts, which are JSON values; not in a cache that cannot be written."""
    with suppress(OSError, OutputError):
        path = _facts_path(subject)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}-{time.monotonic_ns()}")
        try:
            new.write_text(json.dumps({"subject": subject, "facts": facts}))
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)


def recall(subject: str) -> Any:
    """What `remember` was given last; None if there is nothing."""
    with suppress(OSError, OutputError, ValueError):
        found = json.loads(_facts_path(subject).read_text())
        if isinstance(found, dict) and found.get("subject") == subject:
            return found.get("facts")
    return None


def _facts_path(subject: str) -> Path:
    name = hashlib.sha256(os.fsencode(subject)).hexdigest()[:32]
    return cache_dir() / "known" / f"{name}.json"


@contextmanager
def locked(folder: Path, wait: Callable[[str], None]) -> Iterator[None]:
    """Nobody else, in this process or another, is in here for the same folder.

    A file beside it is locked, and removed at the end; the lock of a process that dies is gone with
    it. `wait` is told if somebody else is in here. Where the file system has no locks, nobody
    waits. Raises OSError if the file cannot be written.
    """
    path = folder.with_name(f"{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("w") as file:
            _lock(file.fileno(), lambda: wait(f"waiting for another process to make {folder.name}"))
            if not _is_at(path, file.fileno()):  # removed by whoever was in here
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                with suppress(OSError):  # not left to the end of children that have the file open
                    fcntl.flock(file, fcntl.LOCK_UN)
            return


def _lock(file: int, wait: Callable[[], None]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        wait()
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        pass


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _is_whole(folder: Path) -> bool:
    """Whether an artifact can be opened; cleaners of caches remove single files."""
    try:
        targets = compiled_targets(folder)
        for target in targets:
            open_artifact(folder, targets=[target])
    except ArtifactError:
        return False
    return bool(targets)


def _build_options(given: dict[str, Any]) -> BuildOptions:
    from compile.options import BuildOptions

    names = [field.name for field in dataclasses.fields(BuildOptions)]
    for name, value in given.items():
        if name not in names:
            near = [_OTHER_NAMES[name]] if name in _OTHER_NAMES else get_close_matches(name, names)
            remedy = f"did you mean {near[0]}?" if near else f"use {', '.join(names)}"
            raise UnsupportedError(f"{name}={value!r}: there is no such build option; {remedy}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return BuildOptions(**values)


def _check_compiler(source: str, options: BuildOptions) -> None:
    """Raise CompileError unless the compiler is installed, with what to do elsewhere."""
    from compile.toolchain import check_installed

    try:
        check_installed()
    except CompileError as error:
        raise CompileError(
            f"source={source!r} was not compiled for {options.target} before, and {error}; or run "
            f"where it is installed: {_command(source, options)}; and give the folder that it makes"
        ) from error


def _command(source: str, options: BuildOptions) -> str:
    """The call of sf-compile with these options."""
    flags = {
        "weight_dtype": "--weights", "activation_dtype": "--activations", "kv_dtype": "--kv",
    }  # fmt: skip
    words = ["sf-compile", source]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value != field.default:
            flag = flags.get(field.name, f"--{field.name.replace('_', '-')}")
            words += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


@contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OutputError as error:
        raise OutputError(f"{error}; {REMEDY}") from error
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{folder}: cannot be written ({reason}); {REMEDY}") from error


@contextmanager
def _display(progress: bool) -> Iterator[Progress]:
    """What shows the progress: nothing, or sf-compile's line from the first message on."""
    from compile.progress import progress_display, silent

    if not progress or find_spec("rich") is None:
        yield silent
        return
    with ExitStack() as stack:
        displays: list[Progress] = []

        def show(stage: str, share: float | None) -> None:
            if not displays:
                displays.append(stack.enter_context(progress_display()))
            displays[0](stage, share)

        yield show
