import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, processors
from transformers import PreTrainedTokenizerFast

from sf_local.errors import CorruptFileError, MissingFileError, RequestError
from sf_local.text.detokenizer import Detokenizer, StopChecker
from sf_local.text.tokenizer import Tokenizer
from tests.support.toy_tokenizers import byte_level_tokenizer, save, sentencepiece_tokenizer

SENTENCES = [
    "Hello, world!",
    " leading and trailing ",
    "Line\n\nbreaks\tand tabs",
    "naïve café 你好 日本語",
    "😀👩‍👩‍👧🇫🇷❤️",
    "",
]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("byte_level")
    return save(folder, byte_level_tokenizer(), bos_token="<|im_start|>", eos_token="<|im_end|>")


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("sentencepiece")
    return save(folder, sentencepiece_tokenizer(), bos_token={"content": "<s>"}, eos_token="</s>")


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def detokenize(tokenizer: Tokenizer, ids: list[int], prompt_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt_ids)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


# --- Tokenizer


@pytest.mark.parametrize("text", SENTENCES)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", SENTENCES)
def test_decode_agrees_with_the_library(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer._tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 410)))
def test_byte_level_decode_agrees_with_the_library(byte_level: Tokenizer, ids: list[int]) -> None:
    assert byte_level.decode(ids) == byte_level._tokenizer.decode(ids)


def test_a_long_text_lets_other_threads_run(byte_level: Tokenizer) -> None:
    text = "naïve café 你好 <|im_end|> " * 40_000
    encoding = threading.Event()
    seconds: list[float] = []

    def encode() -> None:
        encoding.set()
        started_at = time.thread_time()
        byte_level.encode(text)
        seconds.append(time.thread_time() - started_at)

    thread = threading.Thread(target=encode)
    thread.start()
    encoding.wait()
    started_at = time.thread_time()
    while not seconds:
        pass
    thread.join()
    assert time.thread_time() - started_at > seconds[0] / 10
    assert byte_level.encode(text) == byte_level._tokenizer.encode(text).ids


def test_facts(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert (byte_level.bos_token, byte_level.bos_token_id) == ("<|im_start|>", 1)
    assert (byte_level.eos_token, byte_level.eos_token_id) == ("<|im_end|>", 2)
    assert byte_level.vocab_size == 401
    assert byte_level.special_ids == {0, 1, 2}
    assert byte_level.token_id("<think>") == 400
    assert byte_level.token_id("<|im_end|>") == 2
    assert byte_level.token_id("the") is None
    assert (sentencepiece.bos_token, sentencepiece.bos_token_id) == ("<s>", 1)
    assert byte_level.chat_templates == {}


def test_ids_outside_the_vocabulary_decode_to_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hello")
    assert tokenizer.decode([*ids, tokenizer.vocab_size, 1_000_000]) == "Hello"


def test_special_tokens_are_skipped_and_added_tokens_are_not(byte_level: Tokenizer) -> None:
    assert byte_level.decode(byte_level.encode("<|im_start|>a<think>b<|im_end|>")) == "a<think>b"


def test_one_bos(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert sentencepiece.adds_bos and not byte_level.adds_bos
    for text in ("", "<s>", "<s><s>"):
        assert sentencepiece.encode(text) == [1]
    for text in ("Hello", "<s>Hello", "<s><s>Hello"):
        assert sentencepiece.encode(text) == [1, *sentencepiece.encode("Hello")[1:]]
    assert 1 not in byte_level.encode("Hello")
    assert byte_level.encode("<|im_start|>Hello") == [1, *byte_level.encode("Hello")]
    assert sentencepiece.encode("a</s><s>b").count(1) == 2  # inside a prompt it is content


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "$A </s>", "$A"])
def test_bos_that_only_the_post_processor_adds(tmp_path: Path, single: str) -> None:
    """As transformers does, which has no BOS of another kind then."""
    library = byte_level_tokenizer()
    library.add_special_tokens(["<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(t, library.token_to_id(t)) for t in ("<s>", "</s>")]
    )
    ours = save(tmp_path, library)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("Hello", "", "<s>Hello"):
        expected = [i for i in theirs(text).input_ids if i != library.token_to_id("</s>")]
        assert ours.encode(text) == list(dict.fromkeys(expected[:1])) + [
            i for n, i in enumerate(expected) if n and not i == expected[0] == ours.bos_token_id
        ]
    assert (ours.bos_token == "<s>") == single.startswith("<s>")


def test_what_ends_a_turn(tmp_path: Path) -> None:
    """Declared or not, as llama.cpp does it."""
    library = byte_level_tokenizer()
    library.add_special_tokens(["<|eot_id|>", "<|other|>"])
    ends = save(tmp_path, library, eos_token="<|im_start|>").end_ids
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>")
    assert ends == {library.token_to_id(name) for name in names}


def test_config_decides_whether_bos_is_added(tmp_path: Path) -> None:
    off = save(tmp_path, sentencepiece_tokenizer(), bos_token="<s>", add_bos_token=False)
    assert 1 not in off.encode("Hello")
    on = save(tmp_path, byte_level_tokenizer(), bos_token="<|im_start|>", add_bos_token=True)
    assert on.encode("Hello")[0] == 1 and on.encode("<|im_start|>Hello").count(1) == 1
    none = save(tmp_path, byte_level_tokenizer(), bos_token=None, add_bos_token=True)
    assert none.bos_token_id is None and none.decode(none.encode("Hello")) == "Hello"


def test_a_prompt_ends_without_eos(tmp_path: Path) -> None:
    library = sentencepiece_tokenizer()
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ids = save(tmp_path, library, bos_token="<s>", eos_token="</s>").encode("Hello")
    assert ids[0] == 1 and 2 not in ids


def test_truncation_and_padding_of_the_training_are_off(tmp_path: Path) -> None:
    library = byte_level_tokenizer()
    library.enable_truncation(2)
    library.enable_padding(length=9)
    tokenizer = save(tmp_path, library)
    assert tokenizer.decode(tokenizer.encode("The quick brown fox")) == "The quick brown fox"
    assert len(tokenizer.encode("a")) == 1


@pytest.mark.parametrize("text", ["a\ud800", "\udfff"])
def test_lone_surrogates(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(RequestError, match="lone surrogate"):
        tokenizer.encode(text)


def test_a_prompt_must_be_a_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="must be a str, not bytes"):
        tokenizer.encode(b"Hello")  # type: ignore[arg-type]


def test_named_chat_templates(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    saved = save(tmp_path, byte_level_tokenizer(), chat_template=templates)
    assert saved.chat_templates == {"tool_use": "T", "default": "D"}
    saved = save(tmp_path, byte_level_tokenizer(), chat_template="C")
    assert saved.chat_templates == {"default": "C"}
    for wrong, kind in (3, "int"), ([3], "list"), ([{"name": "a"}], "list"), ({"a": "b"}, "dict"):
        with pytest.raises(CorruptFileError, match=f"chat_template of type {kind}"):
            save(tmp_path, byte_level_tokenizer(), chat_template=wrong)


def test_missing_and_corrupt_files(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"tokenizer_config\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(MissingFileError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(CorruptFileError, match=r"tokenizer\.json is not a readable tokenizer"):
        Tokenizer(tmp_path)
    for content, message in (
        ("[]", "holds a list"),
        ("{", "not readable JSON"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested more than 100 deep"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(CorruptFileError, match=message):
            Tokenizer(tmp_path)


def test_files_that_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="eos_token '<nope>'"):
        save(tmp_path, byte_level_tokenizer(), eos_token="<nope>")


def test_unsupported_decoder(tmp_path: Path) -> None:
    library = byte_level_tokenizer()
    library.decoder = decoders.WordPiece()
    with pytest.raises(CorruptFileError, match="WordPiece"):
        save(tmp_path, library)


def test_import_is_light() -> None:
    code = (
        "import sys, sf_local.text.tokenizer; print({'transformers', 'sglang'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


# --- Detokenizer


@given(ids=st.lists(st.integers(0, 430)))
def test_deltas_concatenate_to_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    deltas = detokenize(tokenizer, ids, [])
    assert "".join(deltas) == tokenizer.decode(ids)


@given(text=st.text(), extra=st.text())
def test_deltas_continue_a_prompt(tokenizer: Tokenizer, text: str, extra: str) -> None:
    prompt_ids, ids = tokenizer.encode(text), tokenizer.encode(extra)
    deltas = detokenize(tokenizer, ids, prompt_ids)
    assert tokenizer.decode(prompt_ids) + "".join(deltas) == tokenizer.decode(prompt_ids + ids)
    assert "\ufffd" not in "".join(deltas) or "\ufffd" in extra


def test_leading_space_is_kept_after_a_prompt(sentencepiece: Tokenizer) -> None:
    hello = sentencepiece.encode("Hello")[1:]
    assert "".join(detokenize(sentencepiece, hello, sentencepiece.encode("[INST]"))) == " Hello"
    assert "".join(detokenize(sentencepiece, hello, [1])) == "Hello"
    assert "".join(detokenize(sentencepiece, hello, [])) == "Hello"


def test_a_character_comes_whole(sentencepiece: Tokenizer) -> None:
    ids = [3 + byte for byte in "a😀b".encode()]  # <0x00> is token 3
    assert detokenize(sentencepiece, ids, []) == ["a", "", "", "", "😀", "b", ""]


def test_invalid_bytes_do_not_hold_back(sentencepiece: Tokenizer) -> None:
    ids = [3 + byte for byte in b"\xf0\x9fa\xff\xe4\xbd"]
    assert detokenize(sentencepiece, ids, []) == ["", "", "\ufffda", "\ufffd", "", "", "\ufffd"]


# --- StopChecker

SPECIAL = {"<s>": 1, "</s>": 2}
TOKENS = st.sampled_from(["a", "b", "\n", *SPECIAL])


def cut(text: str, stops: list[str]) -> str:
    return text[: min((i for stop in stops if stop and (i := text.find(stop)) >= 0), default=None)]


def check(chunks: list[str], stops: list[str]) -> tuple[str, bool]:
    checker, emitted = StopChecker(stops, {}), ""
    for chunk in chunks:
        emitted += checker.push(chunk)
        if checker.matched is not None:
            return emitted, True
    return emitted + checker.flush(), checker.matched is not None


@given(
    chunks=st.lists(st.text("abc", max_size=4)),
    stops=st.lists(st.text("abc", max_size=4), max_size=4),
)
def test_any_chunking_cuts_at_the_earliest_stop(chunks: list[str], stops: list[str]) -> None:
    text = "".join(chunks)
    emitted, stopped = check(chunks, stops)
    assert emitted == cut(text, stops)
    assert stopped is any(stop and stop in text for stop in stops)


@given(
    text=st.text("abc", max_size=20),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_nothing_is_held_back_that_cannot_become_a_stop(text: str, stops: list[str]) -> None:
    checker, emitted = StopChecker(stops, {}), ""
    for end, char in enumerate(text, 1):
        emitted += checker.push(char)
        if checker.matched is not None:
            return
        held = text[len(emitted) : end]
        assert not held or any(stop.startswith(held) for stop in stops)


@example(tokens=["</s>", "a", "<s>", "a"], stops=["</s>aa"])
@given(
    tokens=st.lists(TOKENS),
    stops=st.lists(st.lists(TOKENS, max_size=3).map("".join), max_size=3),
)
@settings(max_examples=300)
def test_special_tokens_in_stop_strings(tokens: list[str], stops: list[str]) -> None:
    checker, text = StopChecker(stops, SPECIAL), ""
    for token in tokens:
        text += checker.push(checker.marks.get(SPECIAL[token], "") if token in SPECIAL else token)
        if checker.matched is not None:
            break
    text += checker.flush()
    written = "".join(tokens)
    special = [stop for stop in stops if re.search("|".join(SPECIAL), stop)]
    visible = re.sub("|".join(SPECIAL), "", cut(written, special))
    assert text == cut(visible, stops)
    assert (checker.matched is None) == (written == cut(written, special) and visible == text)


def test_of_two_special_tokens_that_begin_alike_the_longer_is_meant() -> None:
    checker = StopChecker(["<s><s>a\n"], {"<s>": 1, "<s>a": 2})
    assert [checker.push(checker.marks[token]) for token in (1, 1, 1, 2)] == [""] * 4
    assert checker.push("\nb") == "" and checker.matched == "<s><s>a\n"


def test_overlapping_stops() -> None:
    checker = StopChecker(("abc", "ab", "", "ab"), {})
    assert checker.push("xa") == "x"
    assert checker.push("b") == ""  # certain: whatever follows, the cut is here
    assert checker.matched == "ab"
    assert checker.push("c") == ""
    assert checker.flush() == ""


def test_a_stop_inside_an_unfinished_one() -> None:
    checker = StopChecker(["abcd", "bc"], {})
    assert checker.push("abc") == ""  # "abcd" would begin earlier
    assert checker.push("x") == "a"
    assert checker.matched == "bc"
    checker = StopChecker(["abcd", "bc"], {})
    checker.push("abc")
    assert (checker.flush(), checker.matched) == ("a", "bc")


def test_no_stops_hold_nothing_back() -> None:
    checker = StopChecker([""], SPECIAL)
    assert checker.push("abc") == "abc"
    assert checker.flush() == ""
