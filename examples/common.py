"""What the examples share: the options --vmfb and --device, and the demo model as the default."""

import argparse

import sglang as sgl

import sf_local  # attaches sgl.ShortfinLocal


def open_backend() -> "sgl.ShortfinLocal":
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--vmfb",
        default="demo",
        help="artifact, or what is compiled once: demo (default), x.gguf, ...",
    )
    parser.add_argument("--device", default="cpu", help="cpu, hip or hip:N")
    args = parser.parse_args()
    artifact = sf_local.from_source(args.vmfb, args.device, progress=True)
    backend = sgl.ShortfinLocal(vmfb=artifact, device=args.device)
    sgl.set_default_backend(backend)
    return backend


def checked(state: "sgl.lang.interpreter.ProgramState") -> "sgl.lang.interpreter.ProgramState":
    """SGLang keeps a program's exception instead of raising it."""
    if state.error():
        raise state.error()
    return state
