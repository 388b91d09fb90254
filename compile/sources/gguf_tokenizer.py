"""Converts the tokenizer in GGUF metadata to a `tokenizers.Tokenizer` and its tokenizer_config.

It reads the keys `tokenizer.ggml.*`. Supported are byte-level BPE as of SmolLM and Llama 3, and
SentencePiece BPE as of Llama 2; other kinds are refused, with their name.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from sf_local.errors import SourceError, UnsupportedError

# the values of tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
UNSET_ID = 0xFFFFFFFF  # how GGUF writes "no such token"
SPACE = "▁"  # SentencePiece's visible space

LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def convert_tokenizer(fields: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """Convert the tokenizer in `fields` (GGUF key -> plain Python value).

    Returns the tokenizer, whose ids are the GGUF's, and the contents of tokenizer_config.json.
    Raises UnsupportedError for another kind of tokenizer, SourceError for metadata that is
    missing or contradicts itself.
    """
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if model is None:
        raise SourceError(
            "no tokenizer: expected the metadata key tokenizer.ggml.model, found none; "
            "use a GGUF that was converted together with its tokenizer"
        )
    byte_level = model == "gpt2" and (pre == "smollm" or pre in LLAMA3_NAMES)
    if not byte_level and model != "llama":
        raise UnsupportedError(
            f"tokenizer model {model!r} with pre-tokenizer {pre!r} is not supported; supported: "
            f"'gpt2' with one of {', '.join(map(repr, ('smollm', *LLAMA3_NAMES)))}, and 'llama'"
        )
    tokens = _list(fields, "tokens", str)
    types = _types(fields, tokens)
    try:
        tokenizer = (
            _byte_level(fields, tokens) if byte_level else _sentencepiece(fields, tokens, types)
        )
    except SourceError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise SourceError(
            f"the tokenizer's tokens and merges contradict each other: {error}; "
            "the file is damaged: download it again"
        ) from error
    _add_special_tokens(tokenizer, tokens, types)
    config = _tokenizer_config(fields, tokens)
    _add_post_processor(tokenizer, fields, config)
    return tokenizer, config


def special_id(fields: Mapping[str, Any], name: str) -> int | None:
    """The id in `tokenizer.ggml.{name}_token_id`, or None where there is no such token."""
    default = {"bos": 1, "eos": 2, "unknown": 0} if _is_sentencepiece(fields) else {}
    key = f"tokenizer.ggml.{name}_token_id"
    number = fields.get(key, default.get(name))
    if number is None or number == UNSET_ID:
        return None
    size = len(fields["tokenizer.ggml.tokens"])
    if not isinstance(number, int) or not 0 <= number < size:
        raise SourceError(f"{key}: expected an id below {size}, found {number!r}")
    return number


def _is_sentencepiece(fields: Mapping[str, Any]) -> bool:
    return bool(fields.get("tokenizer.ggml.model") == "llama")


def _list(fields: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    values = fields.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        found = "none" if values is None else "something else"
        raise SourceError(
            f"tokenizer.ggml.{name}: expected an array of {kind.__name__}, found {found}; "
            "the file is damaged or was converted without its tokenizer: download it again"
        )
    return values


def _types(fields: Mapping[str, Any], tokens: list[str]) -> list[int]:
    if "tokenizer.ggml.token_type" not in fields:
        return [NORMAL] * len(tokens)
    types = _list(fields, "token_type", int)
    _check_length("token_type", types, tokens)
    return types


def _check_length(name: str, values: list[Any], tokens: list[str]) -> None:
    if len(values) != len(tokens):
        raise SourceError(
            f"tokenizer.ggml.{name}: expected {len(tokens)} values, one a token, "
            f"found {len(values)}; the file is damaged: download it again"
        )


def _byte_level(fields: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in _list(fields, "merges", str)]
    llama3 = fields["tokenizer.ggml.pre"] in LLAMA3_NAMES
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=llama3))
    before: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    if llama3:
        before = [
            pre_tokenizers.Split(Regex(LLAMA3_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(before)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(fields: Mapping[str, Any], tokens: list[str], types: list[int]) -> Tokenizer:
    scores = _list(fields, "scores", float)
    _check_length("scores", scores, tokens)
    unknown = special_id(fields, "unknown")
    tokenizer = Tokenizer(
        BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=sentencepiece_merges(tokens, scores, types),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    before: list[Any] = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    after: list[Any] = [decoders.Strip(content=" ", left=1, right=0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return tokenizer


def sentencepiece_merges(
    tokens: list[str], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """Merges for a SentencePiece vocabulary, which has scores instead: any two pieces that make a
    third are merged, those with the best score first.

    The order is that of transformers' `generate_merges`, ties included.
    """
    # bytes and control tokens are never built out of text
    ids = {
        token: i for i, token in enumerate(tokens) if types[i] in (NORMAL, USER_DEFINED) and token
    }
    merges = []
    for token, i in ids.items():
        cuts = [(token[:k], token[k:]) for k in range(1, len(token))]
        pairs = [(left, right) for left, right in cuts if left in ids and right in ids]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [(scores[i], len(left), len(right), left, right) for left, right in pairs]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in merges]


def _add_special_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Tokens that are found in the text before it is split: control and user-defined ones."""
    for kinds, special in (((UNKNOWN, CONTROL), True), ((USER_DEFINED,), False)):
        tokenizer.add_tokens(
            [
                AddedToken(token, special=special, normalized=False)
                for token, kind in zip(tokens, types, strict=True)
                if kind in kinds
            ]
        )


def _tokenizer_config(fields: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    # llama.cpp's defaults for files that do not say
    adds_bos = _is_sentencepiece(fields) or fields["tokenizer.ggml.pre"] in LLAMA3_NAMES
    architecture = fields.get("general.architecture")
    config = {
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", adds_bos)),
        "add_eos_token": bool(fields.get("tokenizer.ggml.add_eos_token", False)),
        "chat_template": _chat_template(fields),
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields.get(f"{architecture}.context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, short in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token_id = special_id(fields, name)
        config[f"{short}_token"] = None if token_id is None else tokens[token_id]
    return {key: value for key, value in config.items() if value is not None}


def _chat_template(fields: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """The chat template; a list if there are others beside it, such as one for tools."""
    default = fields.get("tokenizer.chat_template")
    others = {name: fields.get(f"tokenizer.chat_template.{name}")
              for name in fields.get("tokenizer.chat_templates", ())}  # fmt: skip
    named = {name: text for name, text in others.items() if isinstance(text, str)}
    if not named or not isinstance(default, str):
        return default
    named = {"default": default} | named
    return [{"name": name, "template": text} for name, text in named.items()]


def _add_post_processor(
    tokenizer: Tokenizer, fields: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Let the tokenizer put bos before and eos after a text, if the config asks for them."""
    added: dict[str, list[str]] = {"bos": [], "eos": []}
    ids = []
    for name, tokens in added.items():
        token_id = special_id(fields, name)
        if config[f"add_{name}_token"] and token_id is not None:
            tokens.append(config[f"{name}_token"])
            ids.append((config[f"{name}_token"], token_id))
    if ids:
        single = [*added["bos"], "$A", *added["eos"]]
        pair = [*single, *added["bos"], "$B:1", *added["eos"]]
        tokenizer.post_processor = TemplateProcessing(single=single, pair=pair, special_tokens=ids)
