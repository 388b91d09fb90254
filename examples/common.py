"""What the examples share: the options --vmfb and --device, and the demo model as the default."""

import argparse
from pathlib import Path

import sglang as sgl

import sf_local  # noqa: F401  (attaches sgl.ShortfinLocal)


def open_backend() -> "sgl.ShortfinLocal":
    parser = argparse.ArgumentParser()
    parser.add_argument("--vmfb", help="artifact folder (default: the demo model, built once)")
    parser.add_argument("--device", default="cpu", help="cpu, hip or hip:N")
    args = parser.parse_args()
    backend = sgl.ShortfinLocal(vmfb=args.vmfb or built(), device=args.device)
    sgl.set_default_backend(backend)
    return backend


def built(source: str | Path = "demo") -> Path:
    """The artifact of the demo model, a folder or a Hugging Face id, built on first use."""
    from compile import BuildOptions, build_once, demo
    from compile.progress import progress_display

    with progress_display() as progress:
        if source == "demo":
            return demo(BuildOptions(weight_dtype="int4"), progress=progress)
        return build_once(source, progress=progress)


def checked(state: "sgl.lang.interpreter.ProgramState") -> "sgl.lang.interpreter.ProgramState":
    """SGLang keeps a program's exception instead of raising it."""
    if state.error():
        raise state.error()
    return state
