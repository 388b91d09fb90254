"""The backend on the newest sglang. `python tests/tools/newest_sglang.py FOLDER [VERSION]`

Makes a virtual environment in FOLDER with the newest sglang (or VERSION), without its dependencies,
which are CUDA packages. Installs this checkout beside it with the commands of sf_local/README.md,
which must leave sglang as it is. Then runs programs of every structure on a tiny random model,
built here with `compile`. Exits with 1 if one of them fails.

From 0.5.11 on `import sglang` loads `sglang.srt.utils`, whose `__init__` needs torch; SGLang's
language uses nothing of it. Where torch is missing an empty package takes its place.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
FRONTEND = ["aiohttp", "ipython", "msgspec", "requests", "tqdm"]  # what SGLang's language imports


def main(folder: Path, version: str | None) -> int:
    """Runs in the environment of the tests."""
    artifact = build_tiny(folder)
    python = make_environment(folder / "venv", version)
    return subprocess.run([python, __file__, "--check", artifact], cwd=folder).returncode


def build_tiny(folder: Path) -> Path:
    from compile import build
    from tests.support.reference import random_weights, write_hf_folder
    from tests.support.tiny import TINY, TINY_OPTIONS

    write_hf_folder(folder / "source", TINY, random_weights(TINY, 7))
    return build(folder / "source", folder / "artifact", TINY_OPTIONS)


def make_environment(folder: Path, version: str | None) -> Path:
    """The Python of a new virtual environment."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--no-warn-conflicts"]
    sglang = "sglang" if version is None else f"sglang=={version}"
    subprocess.run([*pip, "--no-deps", sglang], check=True)
    subprocess.run([*pip, *FRONTEND], check=True)
    installed = installed_sglang(python)
    for command in readme_commands():
        subprocess.run([*pip, *command], check=True)
    assert installed_sglang(python) == installed
    return python


def readme_commands() -> list[list[str]]:
    """What sf_local/README.md passes to `pip install` beside a newer sglang, for this checkout."""
    found = re.findall(
        r"^pip install (--no-deps sf-local)\npip install (.*)$",
        (CHECKOUT / "sf_local" / "README.md").read_text(),
        re.MULTILINE,
    )
    [commands] = [[shlex.split(line) for line in lines] for lines in found]
    return [[str(CHECKOUT) if word == "sf-local" else word for word in line] for line in commands]


def installed_sglang(python: Path) -> str:
    code = "import importlib.metadata as m; print(m.version('sglang'))"
    return subprocess.check_output([python, "-c", code], text=True)


def check(artifact: Path) -> int:
    """Runs in the new environment."""
    print("sglang", importlib.metadata.version("sglang"))
    if subprocess.run([sys.executable, "-c", "import sglang"], capture_output=True).returncode:
        print("does not import without torch: sglang.srt.utils is left out")
        leave_out("sglang.srt.utils")
    import sglang as sgl

    import sf_local  # noqa: F401

    failed = 0
    with sgl.ShortfinLocal(vmfb=artifact) as backend:
        sgl.set_default_backend(backend)
        for program in PROGRAMS:
            try:
                program(sgl, backend)
                assert backend.engine.stats()["pages_used"] == 0
                print("passed", program.__name__)
            except Exception:
                failed += 1
                print(f"FAILED {program.__name__}\n{traceback.format_exc()}")
    print(f"{len(PROGRAMS) - failed} passed, {failed} failed")
    return int(failed > 0)


def leave_out(name: str) -> None:
    """Put an empty package in the place of one; its modules can still be imported."""
    spec = importlib.util.find_spec(name.partition(".")[0])
    assert spec is not None and spec.origin is not None
    package = ModuleType(name)
    package.__path__ = [str(Path(spec.origin).parent.joinpath(*name.split(".")[1:]))]
    sys.modules[name] = package


GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 8}


def finished(state: Any) -> Any:
    """The state, once it has run; raises what SGLang kept of its errors."""
    if state.error() is not None:
        raise state.error()
    return state


def gen(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "abc" + sgl.gen("out", **GREEDY, return_logprob=True, stop=["no such text"])

    state = finished(program.run())
    assert state.text() == "abc" + state["out"]
    meta = state.get_meta_info("out")
    assert meta["completion_tokens"] == len(meta["output_token_logprobs"]) == 8


def roles(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += sgl.system("short")
        s += sgl.user("why?")
        with s.assistant():
            s += sgl.gen("out", **GREEDY)

    state = finished(program.run())
    assert state.text().startswith("[system]\nshort[end]\n[user]\nwhy?[end]\n[assistant]\n")
    assert [message["role"] for message in state.messages()] == ["system", "user", "assistant"]


def fork(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "root "
        forks = s.fork(3)
        for i, each in enumerate(forks.states):
            each += f"{i}:" + sgl.gen("x", **GREEDY)
        s += "|".join(each["x"] for each in forks.states)

    assert finished(program.run()).text().count("|") >= 2


def join(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s: Any, mode: str) -> None:
        s += "root "
        forks = s.fork(2)
        forks += lambda i: f"<{i}>" + sgl.gen("x", **GREEDY)
        forks.join(mode)

    assert len(finished(program.run(mode="gather_variable"))["x"]) == 2
    text = finished(program.run(mode="concate_and_append")).text()
    assert text.startswith("root <0>") and "<1>" in text


def select(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s: Any, method: Any) -> None:
        s += "colour: " + sgl.select("out", ["red", "green"], choices_method=method)

    for name in "token_length", "unconditional_likelihood":
        state = finished(program.run(method=getattr(sgl, name + "_normalized")))
        assert state["out"] in ("red", "green") and state.text() == "colour: " + state["out"]
    assert finished(program.run(method=sgl.greedy_token_selection))["out"] in ("red", "green")


def stream(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "abc" + sgl.gen("out", **GREEDY)

    state = program.run(stream=True)
    assert "".join(state.text_iter("out")) == finished(program.run())["out"]
    finished(state)


def run_batch(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s: Any, word: str) -> None:
        s += "a beginning that all of the batch has in common, to be computed once only: "
        s += word
        s += sgl.gen("out", **GREEDY)

    words = [str(i) for i in range(30)]
    states = program.run_batch([{"word": word} for word in words])
    assert finished(states[7])["out"] == finished(program.run(word="7"))["out"]
    assert all(finished(state)["out"] for state in states)


def regex(sgl: Any, backend: Any) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "abc" + sgl.gen("digits", regex=r"\d{3}-[xyz]") + sgl.gen("truth", dtype=bool)
        s += sgl.gen("json", json_schema='{"enum": [{"a": 1}]}')

    state = finished(program.run())
    assert re.fullmatch(r"\d{3}-[xyz]", state["digits"]) and state["truth"] in ("True", "False")
    assert json.loads(state["json"]) == {"a": 1}


def new_arguments(sgl: Any, backend: Any) -> None:
    """Those of `sgl.gen` that sf_local/README.md has no row for are refused by name."""
    from sf_local.errors import RequestError

    readme = (CHECKOUT / "sf_local" / "README.md").read_text()
    for name in inspect.signature(sgl.gen).parameters:
        if re.search(rf"^\|[^|]*`{name}`[^|]*\|", readme, re.M):
            continue

        @sgl.function
        def program(s: Any, name: str = name) -> None:
            s += "abc" + sgl.gen("out", **{name: "x"}, **GREEDY)

        print(" ", name, "is new")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the program failed
            error = program.run().error()
        assert isinstance(error, RequestError) and name in str(error), (name, error)


def hooks(sgl: Any, backend: Any) -> None:
    assert sgl.get_server_info()["model_path"] == backend.get_model_name()
    sgl.flush_cache()
    assert sgl.get_server_info()["pages_cached"] == 0


PROGRAMS: list[Callable[[Any, Any], None]] = [
    gen, roles, fork, join, select, stream, run_batch, regex, new_arguments, hooks
]  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "--check":
        sys.exit(check(Path(sys.argv[2])))
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2] if len(sys.argv) > 2 else None))
