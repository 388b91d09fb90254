"""Hugging Face folders, whole and damaged, with toy weights."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import LlamaConfig

from compile.models.spec import RopeScaling
from compile.sources.open import open_source
from sf_local.errors import SourceError, UnsupportedError
from tests.support.toy_sources import (
    CONFIG,
    HEADS,
    canonical_name,
    hf_weights,
    refused,
    whole,
    write_folder,
)

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134515008\n"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_folder(tmp_path: Path, dtype: Any) -> None:
    weights = hf_weights(dtype)
    source = open_source(write_folder(tmp_path / "toy", weights))
    assert source.name == "toy" and source.config == CONFIG
    assert (source.bos_token_id, source.eos_token_ids) == (0, (1,))
    assert source.vision is None and source.image_settings is None
    assert len(source.tensors) == len(weights)
    for name, weight in weights.items():
        tensor = source.tensors[canonical_name(name)]
        assert tensor.shape == weight.shape
        found = tensor.read(slice(None))
        assert found.dtype == weight.dtype
        np.testing.assert_array_equal(found, weight)


def test_folder_tokenizer(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "toy")
    out = tmp_path / "out"
    out.mkdir()
    open_source(str(folder)).write_tokenizer(out)
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert json.loads((out / "tokenizer_config.json").read_text()) == config
    (folder / "chat_template.jinja").write_text("file")
    open_source(folder).write_tokenizer(out)
    config["chat_template"] = "file"
    assert json.loads((out / "tokenizer_config.json").read_text()) == config
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    open_source(folder).write_tokenizer(out)
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == [
        {"name": "default", "template": "file"},
        {"name": "tool_use", "template": "tools"},
    ]


def test_every_eos_counts(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "toy", eos_token_id=[1, 5])
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert open_source(folder).eos_token_ids == (1, 5, 7)
    (folder / "generation_config.json").unlink()


def test_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_folder(tmp_path / "toy")
    whole_folder = open_source(folder)
    names = list(hf_weights())
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: hf_weights()[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    index_path = folder / "model.safetensors.index.json"
    index_path.write_text(json.dumps(index))
    with caplog.at_level("WARNING"):
        assert open_source(folder).sha256 != whole_folder.sha256
    assert "the shards beside it are not" in caplog.text  # as transformers does
    save_file(
        {name: 0 * hf_weights()[name] for name in parts["a.safetensors"]}, folder / "a.safetensors"
    )
    np.testing.assert_array_equal(
        whole(open_source(folder), "token_embd.weight"), whole(whole_folder, "token_embd.weight")
    )
    save_file(
        {name: hf_weights()[name] for name in parts["a.safetensors"]}, folder / "a.safetensors"
    )
    (folder / "model.safetensors").unlink()
    sharded = open_source(folder)
    assert set(sharded.tensors) == set(whole_folder.tensors)
    for name in sharded.tensors:
        np.testing.assert_array_equal(whole(sharded, name), whole(whole_folder, name))
    assert sharded.sha256 != whole_folder.sha256

    (folder / "b.safetensors").unlink()
    refused(folder, SourceError, "b.safetensors", "1 of 2 shards are missing")
    index_path.write_text('{"weight_map": {"x": "../b.safetensors"}}')
    refused(folder, SourceError, "'../b.safetensors'")
    index_path.write_text("{}")
    refused(folder, SourceError, "weight_map")


def test_sha256_changes_with_any_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "toy")
    first = open_source(folder).sha256
    assert open_source(folder).sha256 == first
    (folder / "chat_template.jinja").write_text("x")
    second = open_source(folder).sha256
    assert second != first
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("x")
    assert open_source(folder).sha256 not in (first, second)


def test_tied_and_untied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As transformers does it: other weights are used, whatever the config says."""
    embeddings = hf_weights()["model.embed_tokens.weight"]
    same, other = {"lm_head.weight": embeddings}, {"lm_head.weight": np.ones_like(embeddings)}
    folder = write_folder(tmp_path / "toy", hf_weights() | same)
    source = open_source(folder)
    assert source.config.tied_embeddings and "output.weight" not in source.tensors
    assert not caplog.text
    for is_tied in (True, False):
        write_folder(folder, hf_weights() | other, tie_word_embeddings=is_tied)
        source = open_source(folder)
        assert not source.config.tied_embeddings and (whole(source, "output.weight") == 1).all()
        assert ("lm_head.weight differs from the embeddings" in caplog.text) == is_tied
        caplog.clear()
    write_folder(folder, tie_word_embeddings=False)
    refused(folder, SourceError, "missing: output.weight")
    weights = hf_weights() | same
    del weights["model.embed_tokens.weight"]
    source = open_source(write_folder(folder, weights))
    assert source.config.tied_embeddings
    np.testing.assert_array_equal(whole(source, "token_embd.weight"), embeddings)


def test_names_that_do_not_belong(tmp_path: Path) -> None:
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    extra = {inv_freq: np.ones(4, np.float32), "strange": np.ones(4, np.float32)}
    source = open_source(write_folder(tmp_path / "toy", hf_weights() | extra))
    assert "strange" in source.tensors and inv_freq not in source.tensors


@pytest.mark.parametrize(
    ("config", "theta", "scaling"),
    [
        ({"rope_scaling": None}, 500.0, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 500.0, RopeScaling("linear", 2.0)),
        ({"rope_theta": None}, 10000.0, None),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
            },
            500.0,
            RopeScaling("linear", 2.0),
        ),
        (
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0},
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0},
            },
            9.0,
            RopeScaling("linear", 2.0),
        ),
        (
            {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            500.0,
            RopeScaling("linear", 2.0),
        ),
        (
            {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            7.0,
            None,
        ),
        (
            {
                "rope_theta": None,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 7.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            },
            7.0,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
        ),
        ({"rope_scaling": LLAMA3}, 500.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 64)),
        (
            {
                "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32},
                "original_max_position_embeddings": 16,
            },
            500.0,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 16),
        ),
    ],
)
def test_rope_spellings(
    tmp_path: Path, config: dict[str, Any], theta: float, scaling: RopeScaling | None,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """As transformers reads them; what is left out is said."""
    folder = write_folder(tmp_path / "toy", **config)
    found = open_source(folder).config
    assert (found.rope_theta, found.rope_scaling) == (theta, scaling)
    read = LlamaConfig.from_pretrained(folder)
    read.standardize_rope_params()  # as when frequencies are computed of it
    theirs = read.rope_parameters
    assert theirs["rope_type"] == (scaling.kind if scaling else "default")
    assert theirs["rope_theta"] in (theta, None)
    if scaling and scaling.kind == "llama3":
        assert theirs["original_max_position_embeddings"] == scaling.original_max_seq_len
    both = config.get("rope_scaling"), config.get("rope_parameters")
    assert ("rope_parameters beside it" in caplog.text) == (all(both) and both[0] != both[1])


def test_explicit_head_dim_and_old_defaults(tmp_path: Path) -> None:
    config = open_source(
        write_folder(tmp_path / "toy", head_dim=16, num_key_value_heads=None)
    ).config
    assert (config.head_dim, config.num_kv_heads) == (16, HEADS)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "qwen2"}, ["model_type 'qwen2'", "'llama'"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequence"]),
        ({"attention_bias": True}, ["attention_bias True"]),
        ({"mlp_bias": True}, ["mlp_bias True"]),
        ({"num_local_experts": 8}, ["num_local_experts 8"]),
        ({"sliding_window": 4096}, ["sliding_window 4096"]),
        ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", "'silu'"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor 0.5"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, ["'yarn'", "'llama3'"]),
        ({"rope_parameters": {"rope_type": "dynamic"}}, ["'dynamic'"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["'longrope'"]),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            ["quantization_config {'quant_method': 'gptq'}", ".gguf", "sf-compile --weights int8"],
        ),
        ({"num_key_value_heads": 3}, ["4 heads of size 8 over 3"]),
        ({"num_attention_heads": 5}, ["5 heads of size 6.4"]),
        ({"head_dim": 7}, ["size 7 over", "even size"]),
    ],
)
def test_refusals_by_name(tmp_path: Path, config: dict[str, Any], words: list[str]) -> None:
    folder = write_folder(tmp_path / "toy", **config)
    refused(folder, UnsupportedError, "config.json", *words)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_scaling": "linear"}, "an object for rope_parameters or rope_scaling"),
        (
            {
                "rope_scaling": {
                    "type": "llama3", "factor": 2.0, "low_freq_factor": 4.0,
                    "high_freq_factor": 1.0, "original_max_position_embeddings": 8,
                }
            },
            "0 < low_freq_factor < high_freq_factor",
        ),
        ({"eos_token_id": "2"}, "token ids for bos and eos"),
    ],
)  # fmt: skip
def test_senseless_settings(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    refused(write_folder(tmp_path / "toy", **config), SourceError, "config.json", words)


def test_tensors_refused_by_name(tmp_path: Path) -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    folder = write_folder(tmp_path / "toy", hf_weights() | {bias: np.ones(4, np.float32)})
    refused(folder, UnsupportedError, bias)
    write_folder(folder, hf_weights() | {"odd": np.ones(4, np.float64)})
    refused(folder, UnsupportedError, "tensor odd of type F64", "BF16")


def test_no_tokenizer(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "toy")
    (folder / "tokenizer.json").unlink()
    refused(folder, SourceError, "tokenizer.json", "tokenizer.model", "save_pretrained")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "[" * 100_000, "\0\1", '{"a": "\\ud800"}', '{"a":' * 990 + "1" + "}" * 990],
    ids=range(7),
)
def test_damaged_json(tmp_path: Path, file: str, text: str) -> None:
    folder = write_folder(tmp_path / "toy")
    (folder / file).write_text(text)
    refused(folder, SourceError, file, "download it again")


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_a_clone_without_git_lfs(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "toy")
    (folder / name).write_text(LFS)
    refused(folder, SourceError, name, f"run git lfs pull in {folder}")


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
     "generation_config.json", "chat_template.jinja", "special_tokens_map.json"],
)  # fmt: skip
def test_files_that_never_end(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "toy")
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        refused(folder, SourceError, name, "no regular file")


def test_a_shard_whose_name_is_none(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "toy")
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a\0b"}}))
    refused(folder, SourceError, "file names in weight_map")


@pytest.mark.parametrize("key", ["num_hidden_layers", "max_position_embeddings"])
def test_numbers_that_would_never_be_done(tmp_path: Path, key: str) -> None:
    refused(write_folder(tmp_path / "toy", **{key: 1 << 32}), SourceError, f"for {key}", "at most")


@pytest.mark.parametrize("value", [None, 0, -1, 1.5, "32", True, [32], 10**400, float("nan")])
def test_senseless_config_numbers(tmp_path: Path, value: Any) -> None:
    refused(write_folder(tmp_path / "toy", hidden_size=value), SourceError, "hidden_size")


def test_damaged_safetensors(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "toy")
    path = folder / "model.safetensors"
    good = path.read_bytes()
    damaged = [b"", b"\0" * 7, b"\xff" * 64, good[:-1], good[: len(good) // 2], good[:100]]
    huge = struct.pack("<Q", 2**62) + good[8:]
    for data in [*damaged, huge, good + b"x"]:
        path.write_bytes(data)
        refused(folder, SourceError, "model.safetensors", "download it again")
    path.unlink()
    refused(folder, SourceError, "no model.safetensors", "convert other weights")
