"""Text to token ids and back, with the files of a Hugging Face tokenizer.

Every token stands for bytes, and a text is the bytes of its tokens read as UTF-8. So decoding token
by token and all at once gives the same text.
"""

import ctypes
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from sf_local.artifact.json_file import read_object
from sf_local.errors import CorruptFileError, MissingFileError, RequestError

MANY_CHARACTERS = 4096  # in a text, whose encoding then takes some milliseconds
# Added tokens that end the model's turn, whatever its files declare; llama.cpp has such a list, too
TURN_ENDS = (
    "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<|end|>",
    "<end_of_turn>", "<end_of_utterance>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>",
    "<EOT>", "_<EOT>", "< EOT >",
)  # fmt: skip
_REMEDY = "Copy the file from the model's own folder, or compile the model again."


class Tokenizer:
    """The tokenizer of one model, read from `tokenizer.json` and `tokenizer_config.json`.

    Attributes:
        vocab_size: number of tokens, added ones included.
        special_tokens: texts and ids of tokens such as BOS that `decode` leaves out.
        special_ids: the ids of these.
        end_ids: of the tokens that end a text or a turn, as the model's files or their texts say.
        adds_bos: whether `encode` begins every prompt with the BOS token.
        strips_first_space: whether `decode` drops the space with which the first token begins.
        chat_templates: the Jinja texts of the model's chat templates by name; "default" is used
            where no other is asked for.
        named_tokens: texts of tokens as templates call them, such as "eos_token".
    """

    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    chat_templates: dict[str, str]
    named_tokens: dict[str, str]
    vocab_size: int
    special_tokens: dict[str, int]
    special_ids: frozenset[int]
    end_ids: frozenset[int]
    adds_bos: bool
    strips_first_space: bool

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer in `folder`.

        Raises:
            MissingFileError: one of the two files is not there.
            CorruptFileError: one of them cannot be read, or they contradict each other.
        """
        config_file, tokenizer_file = folder / "tokenizer_config.json", folder / "tokenizer.json"
        config = _read_config(config_file)
        self._tokenizer = _read_tokenizer(tokenizer_file)
        self._token_to_bytes, self.strips_first_space = _read_decoder(
            self._tokenizer.decoder, tokenizer_file
        )
        self.bos_token, self.bos_token_id = self._declared_token(config, "bos_token", config_file)
        self.eos_token, self.eos_token_id = self._declared_token(config, "eos_token", config_file)
        self.chat_templates = _read_chat_templates(config.get("chat_template"), config_file)
        first = self._first_token()
        if self.bos_token is None and first is not None:
            self.bos_token, self.bos_token_id = self._tokenizer.id_to_token(first), first

        self.named_tokens = _named_tokens(config)
        if self.bos_token is not None:
            self.named_tokens["bos_token"] = self.bos_token
        self._of_plain_text: tokenizers.Tokenizer | None = None

        added = self._tokenizer.get_added_tokens_decoder()
        self._added_ids = {token.content: token_id for token_id, token in added.items()}
        self.special_tokens = {t.content: i for i, t in added.items() if t.special}
        self.special_ids = frozenset(self.special_tokens.values())
        ends = {self._added_ids.get(text) for text in TURN_ENDS} | {self.eos_token_id}
        self.end_ids = frozenset(token_id for token_id in ends if token_id is not None)
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.adds_bos = self._should_add_bos(config.get("add_bos_token"), first)
        ctypes.CDLL(None).malloc_trim(0)  # returns 10 MB that reading the file took

    def encode(self, text: str) -> list[int]:
        """The ids of `text` as a prompt, after exactly one BOS if the model expects one.

        Raises:
            RequestError: `text` is not a str, or holds a surrogate, which UTF-8 cannot express.
        """
        return self.with_bos(self.encode_parts([(text, False)]))

    def with_bos(self, ids: list[int]) -> list[int]:
        """The ids of a text, after exactly one BOS if the model expects one."""
        if self.bos_token_id is None:
            return ids
        num_bos = next((n for n, i in enumerate(ids) if i != self.bos_token_id), len(ids))
        has_bos = self.adds_bos or num_bos > 0
        return [self.bos_token_id, *ids[num_bos:]] if has_bos else ids

    def encode_parts(self, parts: Iterable[tuple[str, bool]]) -> list[int]:
        """The ids of a text in parts, each with whether special tokens in it are plain text.

        No BOS is added. Raises RequestError as `encode` does.
        """
        ids: list[int] = []
        for text, is_plain in parts:
            check_text(text)
            ids += self._encode_plain(text) if is_plain else self._encode(text)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        """The ids of a text within a prompt, without special tokens."""
        if self._of_plain_text is None:
            self._of_plain_text = self._without_special_tokens()
        encode = functools.partial(self._of_plain_text.encode, add_special_tokens=False)
        if self.strips_first_space:  # to a beginning it adds that space
            line = encode("\n").ids
            ids = encode("\n" + text).ids
            if ids[: len(line)] == line:
                return list(ids[len(line) :])
        return list(encode(text).ids)

    def _without_special_tokens(self) -> tokenizers.Tokenizer:
        """The same tokenizer, to which special tokens are texts like others."""
        added = self._tokenizer.get_added_tokens_decoder()
        plain = tokenizers.Tokenizer(self._tokenizer.model)  # shared, which a copy is not
        plain.normalizer = self._tokenizer.normalizer
        plain.pre_tokenizer = self._tokenizer.pre_tokenizer
        plain.add_tokens([token for _, token in sorted(added.items())])
        if plain.get_added_tokens_decoder().keys() != added.keys():  # their ids have gaps
            plain = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain

    def _encode(self, text: str) -> list[int]:
        if len(text) < MANY_CHARACTERS:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        else:  # lets other threads run, but starts a thread on each core
            [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
            ids = encoding.ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens and ids that are not in the vocabulary."""
        text = b"".join(map(self.token_bytes, ids)).decode(errors="replace")
        return text.removeprefix(" ") if self.strips_first_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to a text: none for special and unknown ids."""
        if token_id in self.special_ids:
            return b""
        token = self._tokenizer.id_to_token(token_id)
        return b"" if token is None else self._token_to_bytes(token)

    def written_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for in a prompt, where special tokens are written out."""
        if token_id in self.special_ids:
            return (self._tokenizer.id_to_token(token_id) or "").encode()
        return self.token_bytes(token_id)

    def written_text(self, token_id: int) -> str:
        """`written_bytes` as text, with U+FFFD for incomplete characters."""
        return self.written_bytes(token_id).decode(errors="replace")

    def token_id(self, text: str) -> int | None:
        """The id of the added or special token whose text is exactly `text`."""
        return self._added_ids.get(text)

    def _declared_token(
        self, config: dict[str, Any], key: str, file: Path
    ) -> tuple[str | None, int | None]:
        """Text and id of the token that `config` names as its `key`; it becomes a special one."""
        text = config.get(key)
        text = text.get("content") if isinstance(text, dict) else text
        if text is None:
            return None, None
        token_id = self._tokenizer.token_to_id(text) if isinstance(text, str) else None
        if token_id is None:
            remedy = "Take both files from the same model."
            raise CorruptFileError(
                f"{file} declares {key} {text!r}, which tokenizer.json beside it does not have. "
                + (remedy if text else f"Write null for a model without {key}.")
            )
        self._tokenizer.add_special_tokens([text])
        return text, token_id

    def _should_add_bos(self, declared: bool | None, first: int | None) -> bool:
        """`add_bos_token` decides if it is set, as in transformers; else tokenizer.json does."""
        if self.bos_token_id is None:
            return False
        if declared is not None:
            return bool(declared)
        return self.bos_token_id == first

    def _first_token(self) -> int | None:
        """The special token that tokenizer.json puts before every text."""
        ids = self._tokenizer.encode("a").ids
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        return ids[0] if ids[1 : 1 + len(plain)] == plain and ids[: len(plain)] != plain else None


def check_text(text: object) -> None:
    """Raise RequestError unless `text` is a str that UTF-8 can express."""
    if not isinstance(text, str):
        raise RequestError(f"The prompt must be a str, not {type(text).__name__}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"The prompt holds the lone surrogate {text[error.start]!r} at character "
            f"{error.start}, which is not Unicode text. Decode the prompt's source with "
            "errors='replace', or remove the character."
        ) from None


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Texts of the tokens that a configuration names as transformers does."""
    names = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    values = {name: config.get(name) for name in names}
    texts = {n: v.get("content") if isinstance(v, dict) else v for n, v in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _read_config(file: Path) -> dict[str, Any]:
    _check_exists(file)
    try:
        return read_object(file)
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"{file} is not readable JSON: {error}. {_REMEDY}") from error


def _read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    _check_exists(file)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise CorruptFileError(f"{file} is not a readable tokenizer: {error}. {_REMEDY}") from error
    tokenizer.no_truncation()  # a tokenizer may have been saved with both
    tokenizer.no_padding()
    return tokenizer


def _check_exists(file: Path) -> None:
    if not file.is_file():
        raise MissingFileError(f"There is no {file}. {_REMEDY}")


def _read_chat_templates(value: Any, file: Path) -> dict[str, str]:
    """By name; a template without one is "default"."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    templates: dict[str, str] = {}
    for item in value if isinstance(value, list) else [value]:
        name, text = (item.get("name"), item.get("template")) if isinstance(item, dict) else (0, 0)
        if not isinstance(name, str) or not isinstance(text, str):
            raise CorruptFileError(
                f"{file} has a chat_template of type {type(value).__name__}; it must be a text or "
                f"a list of named texts. {_REMEDY}"
            )
        templates[name] = text
    return templates


def _read_decoder(decoder: Any, file: Path) -> tuple[Callable[[str], bytes], bool]:
    """The function from a token to its bytes, and whether a text drops its first space."""
    steps = list(_decoder_steps(json.loads(decoder.__getstate__()) if decoder else {}))
    kinds = {"Regex" if "Regex" in step.get("pattern", ()) else step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _byte_level_bytes, False
    if not kinds or not kinds <= {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}:
        raise CorruptFileError(
            f"{file} has the decoder {sorted(kinds)}; sf_local reads byte-level and "
            "SentencePiece tokenizers, as Llama models use them. Convert the tokenizer to one."
        )
    strips = any(
        step.get("start", 0) > 0
        if step["type"] == "Strip"
        else step.get("prepend_scheme", "never") != "never"
        for step in steps
    )
    return _SentencePieceBytes(steps), strips


def _decoder_steps(decoder: dict[str, Any]) -> Iterable[dict[str, Any]]:
    if decoder.get("type") != "Sequence":
        return [decoder] if decoder else []
    return [step for part in decoder["decoders"] for step in _decoder_steps(part)]


class _SentencePieceBytes:
    """Bytes of a SentencePiece token: U+2581 is a space, and <0x0A> is one byte."""

    def __init__(self, steps: Iterable[dict[str, Any]]) -> None:
        self._has_byte_tokens = False
        self._replacements: list[tuple[str, str]] = []
        for step in steps:
            if step["type"] == "ByteFallback":
                self._has_byte_tokens = True
            elif step["type"] == "Metaspace":
                self._replacements.append((step["replacement"], " "))
            elif step["type"] == "Replace":
                self._replacements.append((step["pattern"]["String"], step["content"]))

    def __call__(self, token: str) -> bytes:
        if self._has_byte_tokens and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes.fromhex(token[3:5])
        for pattern, content in self._replacements:
            token = token.replace(pattern, content)
        return token.encode()


def _byte_level_bytes(token: str) -> bytes:
    """Bytes of a byte-level BPE token, or of an added token, which may be any text."""
    try:
        return bytes(map(_BYTE_OF_CHAR.__getitem__, token))
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are their own character, the others U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()
