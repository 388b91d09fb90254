"""The host's memory, with folders in the place of the kernel's cgroups."""

from __future__ import annotations

from pathlib import Path

import pytest

from sf_local.device import host_memory
from sf_local.device.host_memory import ROOM
from sf_local.device.info import find_device
from sf_local.engine.engine import Engine
from sf_local.errors import RequestError
from tests.support.tiny import TinyModel

MIB = 1 << 20
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
UNLIMITED = 9223372036854771712  # what version 1 says of no limit


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 GiB, 8 of them free, and no limits."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: {16 << 20} kB\nMemFree: 1 kB\nMemAvailable: {8 << 20} kB\n")
    monkeypatch.setattr(host_memory, "MEMINFO", meminfo)
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(host_memory, "OWN_CGROUPS", tmp_path / "own")


def group(
    folder: Path, names: tuple[str, str, str], limit: int | str, used: int, files: int = 0
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_anon 3\n{names[2]} {files}\n")


def found() -> tuple[int, int]:
    return host_memory.total_bytes() // MIB, (host_memory.free_bytes() + ROOM) // MIB


def test_no_cgroups() -> None:
    assert found() == (16384, 8192)


@pytest.mark.parametrize(("names", "own"), [(V2, "0::"), (V1, "9:pids:/x\n4:cpu,memory:")])
def test_the_smallest_limit_counts(tmp_path: Path, names: tuple[str, str, str], own: str) -> None:
    root = tmp_path / "cgroup" / ("" if names is V2 else "memory")
    (tmp_path / "own").write_text(f"{own}/a/b/c\n")
    group(root, names, "max" if names is V2 else UNLIMITED, 0)
    group(root / "a", names, 2000 * MIB, 1500 * MIB, files=100 * MIB)
    group(root / "a" / "b", names, 1000 * MIB, 300 * MIB)
    group(root / "other", names, 1, 0)
    assert found() == (1000, 600)  # of b there are 700 left, of a 600
    group(root / "a" / "b" / "c", names, 900 * MIB, 850 * MIB)
    assert host_memory.total_bytes() == 900 * MIB
    assert host_memory.free_bytes() == 0  # 50 MiB are less than what is left to the program


@pytest.mark.parametrize("own", ["0::/", "0::/../host/path", "4:memory:/docker/123"])
def test_a_container_sees_its_own_root(tmp_path: Path, own: str) -> None:
    (tmp_path / "own").write_text(f"{own}\n")
    group(tmp_path / "cgroup", V2, 700 * MIB, 0)
    group(tmp_path / "cgroup" / "memory", V1, 700 * MIB, 0)
    assert found() == (700, 700)


@pytest.mark.parametrize("text", ["", "many\n", "-"])
def test_files_that_say_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "own").write_text("0::/a\n")
    group(tmp_path / "cgroup" / "a", V2, text, 0)
    assert found() == (16384, 8192)


@pytest.mark.parametrize("missing", ["memory.stat", "memory.current"])
def test_a_limit_counts_though_other_files_are_missing(tmp_path: Path, missing: str) -> None:
    (tmp_path / "own").write_text("0::/\n")
    group(tmp_path / "cgroup", V2, 700 * MIB, 0)
    (tmp_path / "cgroup" / missing).unlink()
    assert found() == (700, 700)


def test_replicas_share_what_is_free(tiny: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/\n")
    group(tmp_path / "cgroup", V2, ROOM + 4 * MIB, 0)
    with Engine(tiny.artifact, kv_memory="100%") as engine:
        most = engine.stats()["pages_total"]
    with Engine(tiny.artifact, ["cpu", "cpu"], kv_memory="100%") as engine:
        assert engine.stats()["pages_total"] == most  # of both together
    with pytest.raises(RequestError, match=f"use at most {most // 2:.0f} pages"):
        Engine(tiny.artifact, ["cpu", "cpu"], kv_pages=int(most))


def test_an_engine_keeps_to_the_limit(tiny: TinyModel, tmp_path: Path) -> None:
    """Also with all of the memory, and with the number of pages that the error recommends."""
    (tmp_path / "own").write_text("0::/\n")
    group(tmp_path / "cgroup", V2, ROOM + 4 * MIB, MIB)
    page_bytes = 8 * 2 * 2 * 2 * 8 * 4  # tokens, layers, keys and values, heads, size, f32
    most = 3 * MIB // page_bytes
    with pytest.raises(RequestError, match=f"256 MiB that are left .* use at most {most} pages"):
        Engine(tiny.artifact, kv_pages=10 * most)
    with pytest.raises(RequestError, match=r"256 MiB that are left .* use at most 3 MiB"):
        Engine(tiny.artifact, kv_memory="1GiB")
    for options in ({"kv_memory": "100%"}, {"kv_memory": "3 MiB"}, {"kv_pages": most}):
        with Engine(tiny.artifact, **options) as engine:  # type: ignore[arg-type]
            assert engine.stats()["pages_total"] == most
    assert find_device("cpu").total_bytes == ROOM + 4 * MIB
