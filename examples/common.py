"""What the examples share: --vmfb and --device, and the demo model when neither is given."""

import argparse

import sglang as sgl

import sf_local  # noqa: F401  (attaches sgl.ShortfinLocal)


def open_backend() -> "sgl.ShortfinLocal":
    parser = argparse.ArgumentParser()
    parser.add_argument("--vmfb", help="artifact folder (default: the demo model, built once)")
    parser.add_argument("--device", default="cpu", help="cpu, hip or hip:N")
    args = parser.parse_args()
    backend = sgl.ShortfinLocal(vmfb=args.vmfb or demo_artifact(), device=args.device)
    sgl.set_default_backend(backend)
    return backend


def demo_artifact() -> str:
    from compile import demo
    from compile.progress import progress_display

    with progress_display() as progress:
        return str(demo(progress=progress))


def checked(state: "sgl.lang.interpreter.ProgramState") -> "sgl.lang.interpreter.ProgramState":
    """SGLang keeps a program's exception instead of raising it."""
    if state.error():
        raise state.error()
    return state
