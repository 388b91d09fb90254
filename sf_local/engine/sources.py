"""`from_source`: the artifact of a model that may have to be compiled first."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sf_local.artifact.cache import as_artifact, compiled, known_targets
from sf_local.device.info import device_names, find_device


def from_source(
    source: str | Path,
    device: str | Sequence[str] = "cpu",
    *,
    progress: bool | None = None,
    **build_options: Any,
) -> Path:
    """The path of a model's artifact, which is compiled on first use and kept in the cache.

    Args:
        source: "demo" (SmolLM2-135M-Instruct), a .gguf file, a Hugging Face folder, or a Hugging
            Face repo id such as "org/name"; or an artifact, which is used as it is.
        device: what the artifact is for, as `Engine` takes it. "auto" is the first GPU that can be
            compiled for, else the CPU.
        progress: show on standard error what is done, as `sf-compile` does; by default if that is
            a terminal.
        build_options: fields of `compile.BuildOptions`: weight_dtype, kv_dtype, max_seq_len, ...;
            `target` instead of that of `device`.

    The cache is `$SF_LOCAL_CACHE`, or else the user's cache folder. What is in it is compiled again
    if the source's content, an option, the compiler or the version of sf_local has changed, or
    other features of the CPU. An id stands for the newest revision that Hugging Face's own cache
    holds, else for the one that was compiled here last; the network is used only if there is no
    artifact of that. Processes that want the same compile it once.

    Raises CompileError for a source or an option that cannot be used, for a cache that cannot be
    written, and where something must be compiled and the extra `compile` is not installed; and
    DeviceError for a device that is not there.
    """
    if (artifact := as_artifact(source)) is not None:
        return artifact
    if "target" not in build_options:
        found = [find_device(name, known_targets()) for name in device_names(device)]
        chips = dict.fromkeys(device.chip for device in found)
        build_options["target"] = ",".join(chips)
    if progress is None:
        progress = sys.stderr is not None and sys.stderr.isatty()
    return compiled(source, progress, **build_options)
