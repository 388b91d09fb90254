"""Reads the tokenizer of a Hugging Face folder as transformers 5 does, whatever file says what."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from compile.reading import check_file, corrupt, read_json
from sf_local.artifact.json_file import MAX_BYTES
from sf_local.errors import SourceError

log = logging.getLogger("sf_local.compile")
LISTS = ("extra_special_tokens", "additional_special_tokens")  # the newer and the older name


@dataclass(frozen=True)
class HFTokenizer:
    """A tokenizer with all of its added tokens.

    tokenizer_json: the file for the artifact. config: of tokenizer_config.json, with the chat
    template and special tokens of other files.
    """

    tokenizer: Tokenizer
    tokenizer_json: bytes
    config: dict[str, Any]


def open_tokenizer(folder: Path) -> HFTokenizer:
    """The tokenizer of a folder; raises SourceError, and OSError."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise SourceError(
            f"{path}: expected the model's tokenizer, found none; download it too, or make it of a "
            "tokenizer.model: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    check_file(path, "a tokenizer", MAX_BYTES)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise corrupt(path, "a tokenizer", error) from error
    config = _read_config(folder)
    missing = _missing_tokens(folder, tokenizer, config)
    if not missing:
        return HFTokenizer(tokenizer, path.read_bytes(), config)
    tokenizer.add_tokens(missing)
    names = ", ".join(token.content for token in missing)
    log.warning("%s: added tokens that tokenizer.json lacks: %s", folder, names)
    return HFTokenizer(tokenizer, tokenizer.to_str(pretty=True).encode(), config)


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "tokenizer_config.json")
    special, template = folder / "special_tokens_map.json", folder / "chat_template.jinja"
    old_template = folder / "chat_template.json"  # of models that take images
    if "added_tokens_decoder" not in config and special.exists():
        lists = {key: value for key, value in config.items() if key in LISTS}
        config |= read_json(special) | lists
    if template.exists():
        config["chat_template"] = _read_text(template)
    elif old_template.exists():
        config["chat_template"] = read_json(old_template).get("chat_template")
    others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if others and isinstance(config.get("chat_template"), str):
        named = {"default": config["chat_template"]} | {f.stem: _read_text(f) for f in others}
        config["chat_template"] = [{"name": k, "template": text} for k, text in named.items()]
    return config


def _read_text(template: Path) -> str:
    check_file(template, "a chat template", MAX_BYTES)
    try:
        return template.read_text(encoding="utf-8")
    except ValueError as error:
        raise corrupt(template, "UTF-8 text", error) from error


def _missing_tokens(folder: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> list[AddedToken]:
    """Tokens that other files add to those of tokenizer.json, or describe otherwise."""
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    special = list(_special_tokens(config))
    tokens = {
        token.content: token
        for token in _declared_tokens(folder, config, {token.content for token in special})
        if repr(known.get(token.content)) != repr(token)
    }
    tokens |= {t.content: t for t in special if t.content not in (known | tokens)}
    return list(tokens.values())


def _declared_tokens(
    folder: Path, config: dict[str, Any], special: set[str]
) -> Iterator[AddedToken]:
    """The tokens of added_tokens_decoder, or else of added_tokens.json, by id."""
    path = folder / "added_tokens.json"
    try:
        if "added_tokens_decoder" in config:
            for _, entry in sorted(config["added_tokens_decoder"].items(), key=lambda i: int(i[0])):
                yield _added_token(entry)
        elif path.exists():
            for text, _ in sorted(read_json(path).items(), key=lambda item: int(item[1])):
                yield AddedToken(text, normalized=text not in special, special=text in special)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise corrupt(folder / "tokenizer_config.json", "added tokens by id", error) from error


def _special_tokens(config: dict[str, Any]) -> Iterator[AddedToken]:
    """Tokens that are named, such as "bos_token", or listed as special."""
    extra, listed = (config.get(key) or [] for key in LISTS)
    if isinstance(extra, dict):  # by name, and so beside a list
        extra = [*extra.values(), *listed]
    names = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    others = [key for key in config if key.endswith("_token") and key not in names]
    for value in (
        *(config.get(name) for name in (*names, *others)),
        *(extra or listed),
    ):
        if isinstance(value, str):
            yield AddedToken(value, special=True, normalized=False)
        elif isinstance(value, dict) and isinstance(value.get("content"), str):
            yield _added_token(value | {"special": True})


def _added_token(entry: dict[str, Any]) -> AddedToken:
    fields = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(entry["content"], **{name: entry[name] for name in fields if name in entry})
