"""Every way in which an artifact can be wrong, and the error that says so before anything loads."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sf_local.artifact import irpa
from sf_local.artifact import open as module
from sf_local.artifact.manifest import (
    CONFIG,
    MANIFEST,
    REPAIR,
    TOKENIZER_FILES,
    VMFB,
    WEIGHTS,
    file_sha256,
    parameters_sha256,
)
from sf_local.artifact.open import (
    Artifact,
    check_target,
    compiled_targets,
    host_cpu_features,
    open_artifact,
    read_config,
    verify,
)
from sf_local.device.info import DeviceInfo
from sf_local.engine.engine import Engine
from sf_local.errors import (
    ArtifactError,
    CorruptFileError,
    MismatchError,
    MissingFileError,
    TargetError,
    VersionError,
)
from tests.support.tiny import TinyModel


@pytest.fixture
def folder(tiny: TinyModel, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny.artifact, tmp_path / "artifact"))


@pytest.fixture
def no_hashes_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the large files of a real model."""
    monkeypatch.setattr(module, "MAX_HASHED_AT_LOAD", -1)


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of the object, or of those inside: paged_kv_cache__kv_cache_dtype="float8"."""
    data = json.loads(path.read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        owner = data
        for parent in parents:
            owner = owner[parent]
        owner[last] = value
    path.write_text(json.dumps(data))


def rehash(folder: Path) -> None:
    """Let artifact.json vouch for the files as they are now."""
    names = json.loads((folder / MANIFEST).read_text())["files"]
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
        for name in names
    }
    edit_json(folder / MANIFEST, files=files)


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 0xFF
    path.write_bytes(data)


def fails(kind: type[ArtifactError], *parts: object, vmfb: Path, **others: Any) -> None:
    """open_artifact raises exactly `kind`, with all `parts` in its message, and a remedy."""
    with pytest.raises(ArtifactError) as caught:
        open_artifact(vmfb, **others)
    assert type(caught.value) is kind
    for part in (*parts, "compile the model again"):
        assert str(part) in str(caught.value)


def test_a_good_artifact(tiny: TinyModel, folder: Path) -> None:
    for path in (tiny.artifact, str(tiny.artifact), folder, folder / VMFB):
        artifact = open_artifact(path)
        verify(artifact)
        assert artifact.name == "artifact"
        assert artifact.num_weight_bytes == (folder / WEIGHTS).stat().st_size
        assert artifact.manifest is not None
        check_target(artifact.manifest, "cpu")
    assert artifact.config.page_size == 8
    assert artifact.config.page_bytes == 4 * artifact.config.page_elements


@pytest.mark.parametrize("without_manifest", [False, True])
@pytest.mark.parametrize("name", [VMFB, WEIGHTS, CONFIG, *TOKENIZER_FILES])
def test_a_missing_file(folder: Path, name: str, without_manifest: bool) -> None:
    (folder / name).unlink()
    if without_manifest:
        (folder / MANIFEST).unlink()
    fails(MissingFileError, folder / name, vmfb=folder)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.vmfb"])
def test_a_missing_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(MissingFileError, match=f"{name}': no such file or folder; compile one"):
        open_artifact(tmp_path / name)


def test_an_empty_folder_and_a_folder_for_a_file(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    fails(MissingFileError, tmp_path / "empty" / VMFB, vmfb=tmp_path / "empty")
    (folder / VMFB).unlink()
    (folder / VMFB).mkdir()
    fails(MissingFileError, folder / VMFB, vmfb=folder)


@pytest.mark.parametrize(
    ("name", "change"),
    [(VMFB, -1), (VMFB, -9000), *((name, 1) for name in (VMFB, WEIGHTS, CONFIG, *TOKENIZER_FILES))],
)
def test_a_file_of_another_size(
    folder: Path, name: str, change: int, no_hashes_at_load: None
) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:change] if change < 0 else data + b" " * change)
    sizes = f"{len(data)} bytes expected, {len(data) + change} found"
    fails(CorruptFileError, folder / name, sizes, "copy it again", vmfb=folder)


@pytest.mark.parametrize("without_manifest", [False, True])
@pytest.mark.parametrize("size", [0, 3, 95, 96, 200, 4096, -1])
def test_truncated_weights(folder: Path, size: int, without_manifest: bool) -> None:
    data = (folder / WEIGHTS).read_bytes()[:size]
    (folder / WEIGHTS).write_bytes(data)
    if without_manifest:
        (folder / MANIFEST).unlink()
    found = f"not a whole parameter archive of {len(data)} bytes"
    fails(CorruptFileError, folder / WEIGHTS, found, "copy it again", vmfb=folder)


@pytest.mark.parametrize("data", [b"garbage" * 100, b"GGUF" + bytes(1000), b"IRPA" * 100])
def test_garbage_for_weights(folder: Path, data: bytes) -> None:
    (folder / WEIGHTS).write_bytes(data)
    (folder / MANIFEST).unlink()
    fails(CorruptFileError, folder / WEIGHTS, "not a whole parameter archive", vmfb=folder)


@pytest.mark.parametrize("name", [VMFB, WEIGHTS, CONFIG, *TOKENIZER_FILES])
def test_a_small_file_that_changed(folder: Path, name: str) -> None:
    expected = file_sha256(folder / name)
    if name == CONFIG:
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace('"module"', '"modulo"'))
    else:
        flip_byte(folder / name)
    hashes = f"sha256 {expected} expected, {file_sha256(folder / name)} found"
    fails(CorruptFileError, folder / name, "changed since", hashes, vmfb=folder)


@pytest.mark.parametrize("name", [VMFB, WEIGHTS])
def test_verify_finds_a_flipped_byte_in_a_large_file(
    folder: Path, name: str, no_hashes_at_load: None
) -> None:
    flip_byte(folder / name)
    artifact = open_artifact(folder)
    with pytest.raises(CorruptFileError) as caught:
        verify(artifact)
    for part in (folder / name, "changed since", "sha256", REPAIR):
        assert str(part) in str(caught.value)


def test_verify_needs_all_files(folder: Path) -> None:
    artifact = open_artifact(folder)
    (folder / TOKENIZER_FILES[0]).unlink()
    with pytest.raises(MissingFileError, match=TOKENIZER_FILES[0]):
        verify(artifact)
    (folder / MANIFEST).unlink()
    shutil.copy(folder / CONFIG, folder / TOKENIZER_FILES[0])
    with pytest.raises(MissingFileError, match="no hashes to verify"):
        verify(open_artifact(folder))


@pytest.mark.parametrize("name", [CONFIG, MANIFEST])
@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "not readable as JSON"),
        (b"{", "not readable as JSON"),
        (b"\xff\xfe\x00", "not readable as JSON"),
        (b"\x00" * 500, "not readable as JSON"),
        (b"[]", "it holds a list, not an object"),
        (b"null", "it holds a NoneType, not an object"),
        (b'{"a":' * 990 + b"1" + b"}" * 990, "nested"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ["\\ud800"]}', "half of a surrogate pair"),
        (b'{"\\udc00": 1}', "half of a surrogate pair"),
    ],
)
def test_garbage_for_json(folder: Path, name: str, data: bytes, found: str) -> None:
    (folder / name).write_bytes(data)
    fails(CorruptFileError, folder / name, found, vmfb=folder)


@pytest.mark.parametrize("name", [CONFIG, MANIFEST])
def test_files_that_never_end(folder: Path, name: str) -> None:
    (folder / name).unlink()
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        make(folder / name)
        with pytest.raises(ArtifactError, match=name):
            open_artifact(folder)
        (folder / name).unlink()


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"surprise": 1}, "unknown keys: surprise"),
    ({"paged_kv_cache__surprise": 1}, "unknown keys: surprise"),
    ({"paged_kv_cache": None}, "an object was expected, found None"),
    ({"paged_kv_cache": []}, "an object was expected, found []"),
    ({"paged_kv_cache": {}}, "attention_head_count_kv"),
    ({"max_seq_len": 0}, "max_seq_len must be a positive integer, found 0"),
    ({"max_seq_len": "256"}, "max_seq_len must be a positive integer, found '256'"),
    ({"transformer_block_count": True}, "transformer_block_count must be a positive integer"),
    ({"attn_head_dim": 8.0}, "attn_head_dim must be a positive integer, found 8.0"),
    ({"paged_kv_cache__block_seq_stride": -8}, "block_seq_stride must be a positive integer"),
    ({"paged_kv_cache__attention_head_count_kv": None}, "attention_head_count_kv must be"),
    ({"paged_kv_cache__kv_cache_dtype": "float8"}, "kv_cache_dtype 'float8'; one of"),
    ({"paged_kv_cache__kv_cache_dtype": ["f32"]}, "not a paged_llm_v1 config"),
    ({"prefill_batch_sizes": []}, "prefill_batch_sizes must be an ascending list, found []"),
    ({"prefill_batch_sizes": 4}, "prefill_batch_sizes must be an ascending list, found 4"),
    ({"decode_batch_sizes": [4, 1]}, "decode_batch_sizes must be an ascending list"),
    ({"decode_batch_sizes": [0, 1]}, "decode_batch_sizes must be a positive integer, found 0"),
    ({"decode_batch_sizes": [1, "4"]}, "not a paged_llm_v1 config"),
    ({"paged_kv_cache__paged_kv_block_size_elements_per_device": [7]}, "is 7, but layers * "),
    ({"attn_head_dim": 16}, "is 512, but layers * "),
]


@pytest.mark.parametrize(("changes", "found"), BAD_CONFIGS, ids=str)
def test_a_config_that_makes_no_sense(folder: Path, changes: dict[str, Any], found: str) -> None:
    edit_json(folder / CONFIG, **changes)
    fails(CorruptFileError, folder / CONFIG, "not a paged_llm_v1 config", found, vmfb=folder)


def test_a_config_without_a_key(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    for key in ("max_seq_len", "decode_batch_sizes", "paged_kv_cache"):
        rest = {name: value for name, value in config.items() if name != key}
        (folder / CONFIG).write_text(json.dumps(rest))
        fails(CorruptFileError, folder / CONFIG, "not a paged_llm_v1 config", vmfb=folder)


def test_a_config_needs_only_what_shortfin_needs(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    for key in ("module_name", "module_abi_version", "logits_normalization", "top_k"):
        del config[key]
    del config["paged_kv_cache"]["paged_kv_block_size_elements_per_device"]
    (folder / CONFIG).write_text(json.dumps(config))
    assert read_config(folder / CONFIG).page_elements == 512


DISAGREEING: list[tuple[dict[str, Any], str]] = [
    ({"decode_batch_sizes": [1, 4, 7]}, "decode_batch_sizes is [1, 4, 7], but"),
    ({"prefill_batch_sizes": [2, 3]}, "compiled with [1, 3]"),
    (
        {
            "paged_kv_cache__block_seq_stride": 16,
            "paged_kv_cache__paged_kv_block_size_elements_per_device": [1024],
        },
        "block_seq_stride is 16, but",
    ),
    (
        {
            "transformer_block_count": 3,
            "paged_kv_cache__paged_kv_block_size_elements_per_device": None,
        },
        "transformer_block_count is 3, but",
    ),
    ({"max_seq_len": 4096}, "max_seq_len is 4096, but"),
    ({"paged_kv_cache__kv_cache_dtype": "float16"}, "kv_cache_dtype is 'float16', but"),
    ({"has_prefill_position": False}, "has_prefill_position is False, but"),
    ({"paged_kv_cache__block_seq_stride": 16, "attn_head_dim": 4}, "attn_head_dim is 4, but"),
]


@pytest.mark.parametrize("beside", [True, False], ids=["beside", "elsewhere"])
@pytest.mark.parametrize(("changes", "part"), DISAGREEING, ids=str)
def test_a_config_that_disagrees_with_the_vmfb(
    folder: Path, tmp_path: Path, changes: dict[str, Any], part: str, beside: bool
) -> None:
    other = tmp_path / "other.json"
    shutil.copy(folder / CONFIG, other)
    edit_json(other, **changes)
    if beside:
        shutil.move(other, folder / CONFIG)
        fails(CorruptFileError, folder / CONFIG, vmfb=folder)  # by its hash
        rehash(folder)
        fails(MismatchError, part, vmfb=folder)
    else:
        fails(MismatchError, other, part, vmfb=folder, config=other)


def test_weights_of_another_model(folder: Path, make_tiny: Callable[..., TinyModel]) -> None:
    other = make_tiny(intermediate_size=200, has_code=False).artifact / WEIGHTS
    parts = (other, folder / VMFB, "names or shapes differ")
    fails(MismatchError, *parts, vmfb=folder, parameters=other)
    fails(MismatchError, *parts, vmfb=folder, parameters=[other])
    shutil.copy(other, folder / WEIGHTS)
    fails(CorruptFileError, folder / WEIGHTS, "bytes expected", vmfb=folder)  # by its size
    rehash(folder)
    fails(MismatchError, folder / WEIGHTS, "names or shapes differ", vmfb=folder)


def test_a_shard_of_the_weights_is_missing(folder: Path, tmp_path: Path) -> None:
    first, second = split_weights(folder / WEIGHTS, tmp_path)
    fails(MismatchError, first, "names or shapes differ", vmfb=folder, parameters=[first])
    fails(MismatchError, second, "names or shapes differ", vmfb=folder, parameters=second)
    assert open_artifact(folder, parameters=[first, second]).weights == (first, second)


def split_weights(weights: Path, folder: Path) -> tuple[Path, Path]:
    """The parameters in two archives."""
    data, table = weights.read_bytes(), list(irpa.read_table(weights).items())
    paths = folder / "first.irpa", folder / "second.irpa"
    for path, part in zip(paths, (table[::2], table[1::2]), strict=True):
        with path.open("wb") as file:
            irpa.write_archive(
                file,
                [(name, entry.type, entry.num_bytes) for name, entry in part],
                [data[entry.offset : entry.offset + entry.num_bytes] for _, entry in part],
            )
    return paths


def test_parameters_sha256_depends_on_names_and_types_alone() -> None:
    types = {"a": "4xf32", "b": "2x3xbf16"}
    assert parameters_sha256(types) == parameters_sha256(dict(reversed(types.items())))
    others = [{"a": "4xf32"}, {"a": "4xf32", "b": "3x2xbf16"}, {"a": "4xf32", "c": "2x3xbf16"}]
    assert len({parameters_sha256(t) for t in [types, *others]}) == 4


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"format_version": 1}, ["format_version 1", "this sf_local reads 5"]),
        ({"format_version": 4, "target": "gfx942"}, ["format_version 4", "--target gfx942"]),
        ({"format_version": None}, ["format_version None"]),
        ({"format_version": 1, "surprise": 1}, ["format_version 1"]),  # not the unknown key
        ({"compiler_version": "3.10.0"}, ["iree-compile 3.10.0", "only what 3.9.0 made"]),
        ({"compiler_version": "3.9.0rc1"}, ["iree-compile 3.9.0rc1"]),
    ],
    ids=str,
)
def test_another_version(folder: Path, changes: dict[str, Any], parts: list[str]) -> None:
    edit_json(folder / MANIFEST, **changes)
    for vmfb in folder, folder / VMFB:
        fails(VersionError, folder / MANIFEST, *parts, vmfb=vmfb)


def test_unknown_and_missing_keys_of_the_manifest(folder: Path) -> None:
    edit_json(folder / MANIFEST, surprise=1)
    fails(CorruptFileError, folder / MANIFEST, "unknown keys: surprise", vmfb=folder)
    (folder / MANIFEST).write_text('{"format_version": 5}')
    fails(CorruptFileError, folder / MANIFEST, "compiler_version", vmfb=folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": None},
        {"files": []},
        {"files": {CONFIG: {}}},
        {"files": {CONFIG: 5}},
        {"files": {"../config.json": {"size": 1, "sha256": ""}}},
        {"files": {"a\0b": {"size": 1, "sha256": ""}}},
        {"functions": None},
        {"functions": 5},
        {"functions": [5]},
        {"cpu_features": [5]},
        {"cpu_features": [["avx2"]]},
        {"eos_token_ids": ["2"]},
        {"target": 5},
        {"config": {}},
        {"config": {"paged_kv_cache": 5}},
    ],
    ids=str,
)
def test_values_of_the_wrong_type_in_the_manifest(folder: Path, changes: dict[str, Any]) -> None:
    edit_json(folder / MANIFEST, **changes)
    fails(CorruptFileError, folder / MANIFEST, vmfb=folder)


def test_no_parameters_at_all(folder: Path) -> None:
    with pytest.raises(ArtifactError):
        open_artifact(folder, parameters=[])


def test_page_sizes_that_are_no_list(folder: Path) -> None:
    edit_json(folder / CONFIG, paged_kv_cache__paged_kv_block_size_elements_per_device={"gpu": 512})
    fails(CorruptFileError, folder / CONFIG, vmfb=folder)


def opened(folder: Path, **changes: Any) -> Artifact:
    edit_json(folder / MANIFEST, **changes)
    return open_artifact(folder)


GPU = DeviceInfo("hip:0", "gfx942", "Card", 1 << 33)


@pytest.mark.parametrize(
    ("changes", "device", "parts"),
    [
        (
            {"target": "gfx1100", "device": "hip"},
            "cpu",
            ["compiled for gfx1100, not for cpu", "--target gfx1100,cpu"],
        ),
        (
            {"target": "gfx1100", "device": "hip"},
            "hip",
            ["compiled for gfx1100, not for gfx942", "--target gfx1100,gfx942"],
        ),
        ({}, "hip", ["compiled for cpu, not for gfx942", "--target cpu,gfx942"]),
        (
            {"cpu_features": ["fma", "amx_bf16_x", "abacus"]},
            "cpu",
            ["another CPU", "lacks abacus, amx_bf16_x;", "sf-compile --cpu generic"],
        ),
    ],
)
def test_another_target(
    folder: Path,
    changes: dict[str, Any],
    device: str,
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sf_local.engine.worker.Device", None)  # nothing native may load
    monkeypatch.setattr("sf_local.device.info._gpus", lambda: [GPU])
    monkeypatch.setattr(module, "host_cpu_features", lambda: frozenset({"fma"}))
    opened(folder, **{"cpu_features": ["fma"], **changes})
    with pytest.raises(TargetError) as caught:
        Engine(folder, device)
    for part in parts:
        assert part in str(caught.value)


def test_several_targets(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device says which; without one the first will do."""
    monkeypatch.setattr("sf_local.device.info._gpus", lambda: [GPU])
    several = tmp_path / "several"
    for name in ("cpu", "gfx1100"):
        shutil.copytree(folder, several / name)
        edit_json(several / name / MANIFEST, target=name)
    assert compiled_targets(several) == ["cpu", "gfx1100"]
    assert open_artifact(several).vmfb == several / "cpu" / VMFB
    assert open_artifact(several, targets=["gfx1100"]).vmfb == several / "gfx1100" / VMFB
    with pytest.raises(TargetError) as caught:
        Engine(several, "hip")
    assert "compiled for cpu, gfx1100, not for gfx942" in str(caught.value)
    assert "--target cpu,gfx1100,gfx942" in str(caught.value)


def test_a_cpu_that_has_more_will_do(folder: Path) -> None:
    assert host_cpu_features()
    some = sorted(host_cpu_features())[:2]
    for features in ([], some):
        manifest = opened(folder, cpu_features=features).manifest
        assert manifest is not None
        check_target(manifest, "cpu")


def test_files_that_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    moved = {name: there / f"my_{name}" for name in (WEIGHTS, CONFIG)}
    for name in (VMFB, MANIFEST):
        shutil.copy(folder / name, here / name)
    for name, path in moved.items():
        shutil.copy(folder / name, path)
    for name in TOKENIZER_FILES:
        shutil.copy(folder / name, there / name)
    others = {"config": moved[CONFIG], "parameters": moved[WEIGHTS], "tokenizer": there}
    for tokenizer in (there, str(there), there / "tokenizer.json"):
        artifact = open_artifact(here / VMFB, **{**others, "tokenizer": tokenizer})
        assert (artifact.tokenizer, artifact.weights) == (there, (moved[WEIGHTS],))
        assert artifact.manifest is not None
    for name, default in [("config", CONFIG), ("parameters", WEIGHTS), ("tokenizer", "tokenizer")]:
        rest = {key: path for key, path in others.items() if key != name}
        fails(MissingFileError, here / default, vmfb=here / VMFB, **rest)
        fails(MissingFileError, there / "gone", vmfb=here, **rest, **{name: there / "gone"})


def test_without_a_manifest_the_files_must_only_be_readable(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    edit_json(folder / CONFIG, decode_batch_sizes=[7])
    assert open_artifact(folder).manifest is None


@pytest.mark.parametrize(
    ("name", "damage", "kind"),
    [
        (VMFB, lambda path: path.unlink(), MissingFileError),
        (VMFB, lambda path: path.write_bytes(path.read_bytes()[:-1]), CorruptFileError),
        (WEIGHTS, lambda path: path.write_bytes(path.read_bytes()[:-1]), CorruptFileError),
        (WEIGHTS, flip_byte, CorruptFileError),
        (CONFIG, lambda path: path.write_text("{}"), CorruptFileError),
        (TOKENIZER_FILES[0], lambda path: path.unlink(), MissingFileError),
        (MANIFEST, lambda path: edit_json(path, format_version=9), VersionError),
    ],
)
def test_the_engine_raises_it(
    folder: Path, name: str, damage: Callable[[Path], object], kind: type[ArtifactError]
) -> None:
    damage(folder / name)
    with pytest.raises(kind, match=name):
        Engine(folder)
