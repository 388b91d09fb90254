"""Parameter archives: what is written can be read, and nothing else crashes the reader."""

import io
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sf_local.artifact import irpa
from sf_local.errors import CorruptFileError, MissingFileError

HEADER_BYTES, ENTRY_BYTES = 96, 80
SMALL = [("norm", "3xf32", b"\x01" * 12), ("größe", "2x2xbf16", b"\x02" * 8), ("rest", "0xi8", b"")]
in_one_folder = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def archive(parameters: list[tuple[str, str, bytes]], chunk: int = 5) -> bytes:
    """Its bytes, written in chunks."""
    chunks = (data[i : i + chunk] for _, _, data in parameters for i in range(0, len(data), chunk))
    file = io.BytesIO()
    irpa.write_archive(file, [(name, kind, len(data)) for name, kind, data in parameters], chunks)
    return file.getvalue()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.irpa"


@in_one_folder
@given(
    st.lists(
        st.tuples(
            st.text(max_size=20), st.text("0123456789xbfi", max_size=12), st.binary(max_size=300)
        ),
        max_size=8,
        unique_by=lambda parameter: parameter[0],
    ),
    st.integers(1, 100),
)
def test_round_trip(path: Path, parameters: list[tuple[str, str, bytes]], chunk: int) -> None:
    path.write_bytes(archive(parameters, chunk))
    whole, table = path.read_bytes(), irpa.read_table(path)
    assert list(table) == [name for name, _, _ in parameters]
    for name, kind, data in parameters:
        entry = table[name]
        assert (entry.type, entry.num_bytes) == (kind, len(data))
        assert whole[entry.offset : entry.offset + entry.num_bytes] == data
        assert entry.offset % 64 == 0
    assert archive(parameters, 1000) == whole  # however it is cut into chunks


def test_takes_chunks_of_any_type() -> None:
    values = np.arange(6, dtype=np.float32)
    file = io.BytesIO()
    irpa.write_archive(file, [("a", "6xf32", 24)], [memoryview(values.data)])
    assert file.getvalue() == archive([("a", "6xf32", values.tobytes())])


@pytest.mark.parametrize("chunks", [[b"12345"], [b"123", b"45"]])
def test_too_many_bytes_for_a_parameter(chunks: list[bytes]) -> None:
    with pytest.raises(AssertionError, match="do not add up"):
        irpa.write_archive(io.BytesIO(), [("a", "4xi8", 4)], chunks)


def test_iree_reads_it(path: Path) -> None:
    runtime = pytest.importorskip("iree.runtime")
    path.write_bytes(archive(SMALL))
    index = runtime.ParameterIndex()
    index.load(str(path))
    found = {key: bytes(entry.file_view) for key, entry in index.items()}
    assert found == {name: data for name, _, data in SMALL}


def test_a_missing_file(path: Path) -> None:
    for missing in (path, path.parent):
        with pytest.raises(MissingFileError, match=str(missing)):
            irpa.read_table(missing)


def test_truncated_anywhere(path: Path) -> None:
    whole = archive(SMALL)
    text_at = HEADER_BYTES + ENTRY_BYTES * len(SMALL)
    boundaries = {0, 4, 6, 8, 16, 88, HEADER_BYTES, HEADER_BYTES + ENTRY_BYTES, text_at, 4096}
    for boundary in boundaries | {len(whole)}:
        for size in {max(boundary - 1, 0), boundary, boundary + 1} - {len(whole), len(whole) + 1}:
            path.write_bytes(whole[:size])
            with pytest.raises(CorruptFileError) as caught:
                irpa.read_table(path)
            message = str(caught.value)
            assert str(path) in message and f"{size} bytes" in message and "again" in message


@pytest.mark.parametrize(
    ("offset", "field"),
    [
        pytest.param(0, b"GGUF", id="magic"),
        pytest.param(4, b"\x01\x00", id="major version"),
        pytest.param(32, struct.pack("<Q", 4), id="one entry too many"),
        pytest.param(32, struct.pack("<Q", 2**64 - 1), id="endlessly many entries"),
        pytest.param(40, struct.pack("<Q", 2**64 - 1), id="table far away"),
        pytest.param(48, struct.pack("<Q", 2**63), id="huge table"),
        pytest.param(64, struct.pack("<Q", 2**63), id="huge text"),
        pytest.param(72, struct.pack("<Q", 2**40), id="storage far away"),
        pytest.param(80, struct.pack("<Q", 2**40), id="huge storage"),
        pytest.param(HEADER_BYTES, struct.pack("<Q", 2**40), id="huge entry"),
        pytest.param(HEADER_BYTES, struct.pack("<Q", 2**63), id="entry beyond ssize_t"),
        pytest.param(HEADER_BYTES + 56, struct.pack("<Q", 2**60), id="data outside"),
        pytest.param(HEADER_BYTES + 64, struct.pack("<Q", 2**60), id="too much data"),
        pytest.param(HEADER_BYTES + ENTRY_BYTES * 3, b"\xff", id="name is no UTF-8"),
    ],
)
def test_damaged_fields(path: Path, offset: int, field: bytes) -> None:
    whole = bytearray(archive(SMALL))
    whole[offset : offset + len(field)] = field
    path.write_bytes(whole)
    with pytest.raises(CorruptFileError, match=str(path)):
        irpa.read_table(path)


def read_any(path: Path, data: bytes) -> None:
    """Only CorruptFileError, and memory of the file's own order."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        irpa.read_table(path)
    except CorruptFileError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1_000_000 + 10 * len(data)


@in_one_folder
@given(st.binary(max_size=400))
@example(b"")
@example(b"IRPA")
def test_arbitrary_bytes(path: Path, data: bytes) -> None:
    read_any(path, data)
    read_any(path, b"IRPA" + bytes(4) + data)


@in_one_folder
@given(
    st.lists(
        st.tuples(
            st.integers(0, (HEADER_BYTES + 3 * ENTRY_BYTES) // 4 - 1),
            st.sampled_from([0, 1, 2, 64, 80, 4096, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1),
        ),
        max_size=6,
    )
)
def test_overwritten_words(path: Path, words: list[tuple[int, int]]) -> None:
    whole = bytearray(archive(SMALL))
    for position, value in words:
        struct.pack_into("<I", whole, 4 * position, value)
    read_any(path, bytes(whole))


def test_an_entry_of_no_size_ends(path: Path) -> None:
    """The reader must not stay at one entry for as many rounds as the header promises."""
    whole = bytearray(archive(SMALL))
    struct.pack_into("<Q", whole, 32, 2**63)
    struct.pack_into("<Q", whole, HEADER_BYTES, 0)
    path.write_bytes(whole)
    with pytest.raises(CorruptFileError, match=str(path)):
        irpa.read_table(path)
