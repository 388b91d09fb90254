"""llama.cpp's GBNF: its language, and errors that speak of the user's text."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given, settings

from sf_local.errors import GrammarError
from sf_local.grammar.compiler import GrammarCompiler
from sf_local.text.tokenizer import Tokenizer
from tests.support.gbnf import (
    RECURSIVE,
    REGULAR,
    TEXTS,
    Tree,
    gbnf,
    matches,
    regex,
)
from tests.support.walk import Walk, accepts

# --- The language: what llama.cpp's guide says of each construct, written as a regex by hand

CASES: list[tuple[str, str, list[str]]] = [
    ("root ::= ([0-9]+)?", r"([0-9]+)?", ["", "7", "42", "x"]),
    ("root ::= ([0-9]{3}){2}", r"[0-9]{6}", ["123456", "12345", "123", "1234567"]),
    (r'root ::= "\u00e9" "\x41" "\U0001F600"', "éA😀", ["éA😀", "eA😀"]),
    ('root ::= start\nstart ::= "a" start | "b"', "a*b", ["b", "aab", "a"]),
    ('root ::= 1st 2-nd\n1st ::= "a"\n2-nd ::= "b"', "ab", ["ab", "a", "b"]),
    ('root ::= A_b-C\nA_b-C ::= "x"', "x", ["x", ""]),
    ('root ::= "x" ws " y"\nws ::= [ ]*', "x *( y)", ["x y", "x  y", "x     y", "xy"]),
    ('root ::= "x" ws " y"\nws ::= ([ ] ws)?', "x *( y)", ["x y", "x  y", "x     y", "xy"]),
    ('root ::= [a-z]+ "end"', "[a-z]+end", ["end", "xend", "endend", "xen"]),
    ('root ::= x\nx ::= [a-z]+ "end" | "(" x ")"', r"\(*[a-z]+end\)*", ["(xend)", "endend", "(x)"]),
    ('root ::= ("a" | "ab") "c"? "bc"', "(a|ab)c?bc", ["abc", "abbc", "acbc", "abcbc", "ac"]),
    (r'root ::= "\n\r\t\\\"\[\]"', r'\n\r\t\\"\[\]', ['\n\r\t\\"[]', "\n"]),
    (r"root ::= [\]\[\\^\-]+", r"[\]\[\\^\-]+", ["]", "[", "\\", "^", "-", "a"]),
    (r"root ::= [^\n\x00-\x1F\u00e0-\u00ff]", r"[^\n\x00-\x1fà-ÿ]", ["a", "é", "\n", "😀"]),
    ("root ::= [-a] [a-] [+--]", r"[-a][a-][+-\-]", ["-a,", "a-+", "aa-", "aaa"]),
    ("root ::= .{2}", "(?s:.{2})", ["é\n", "ab", "a"]),
    ('root ::= "a"{2,} "b"{0,2} "c"{2}', "a{2,}b{0,2}c{2}", ["aacc", "aaabbcc", "aabbbcc", "acc"]),
    ('root ::= "ab"{ 1 , 2 } "c"+ ?', "(ab){1,2}(c+)?", ["ab", "abab", "ababccc", "abb"]),
    ('root ::= "a" |\n  "b" | # or\n\n "c"\n\n# end', "[abc]", ["a", "b", "c", ""]),
    ('# first\r\nroot ::= (\r\n "a"\r\n | x # [\r\n)\r\nx ::=\r\n "b"', "[ab]", ["a", "b", "c"]),
    ('root ::= "a" opt "b"\nopt ::= | " " | "\\n" [ \\t]{0,20}', r"a( |\n[ \t]{0,20})?b", [
        "ab", "a b", "a\n \tb", "a  b"]),
    ('root ::= () "a"{0} ""', "", ["", "a"]),
    ('root ::= "a"\nunused ::= "b"\nroot ::= "c"', "c", ["c", "a"]),  # the last one counts
    (r"root ::= [\ud800-\ue000]", "\ue000", ["\ue000", "a"]),
    ('root ::= "/" [/] "<a>" [<>]', "//<a>[<>]", ["//<a><", "//<a>/"]),
]  # fmt: skip


@pytest.mark.parametrize(("grammar", "same", "texts"), CASES)
def test_language(
    tokenizer: Tokenizer, compiler: GrammarCompiler, grammar: str, same: str, texts: list[str]
) -> None:
    accepted = [text for text in texts if accepts(tokenizer, compiler.ebnf(grammar), text)]
    assert accepted == [text for text in texts if re.fullmatch(same, text)]
    walk = Walk(tokenizer, compiler.ebnf(grammar), seed=1)
    assert not walk.is_complete or re.fullmatch(same, walk.text)


JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (pair ("," ws pair)*)? "}" ws
pair   ::= string ":" ws value
array  ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
ws     ::= ([ \t\n] ws)?
"""


def test_json_as_it_is_usually_written(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    for text in ['{"a": [1, -2.5e+10, "b\\"\\u00e9"], "c" :null}', "{ }", '{"é":{}\n}  ']:
        assert accepts(tokenizer, compiler.ebnf(JSON), text), text
    for text in ["{", "[]", '{"a": 01}', '{"a" "b"}', '{"a": [1,]}']:
        assert not accepts(tokenizer, compiler.ebnf(JSON), text), text


LINES = r"""
root ::= (sum "=" ws term "\n")+
sum  ::= term ([-+*/] term)*
term ::= name | [0-9]+ ws | "(" ws sum ")" ws
name ::= [a-z] [a-z0-9_]* ws
ws   ::= [ \t\n]*
"""


def test_blanks_that_are_also_what_follows_them(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    """A new line ends a line and is a blank as well."""
    assert accepts(tokenizer, compiler.ebnf(LINES), "a +b1= 3 \n\n(x)*\n 2=4\n") is False
    assert accepts(tokenizer, compiler.ebnf(LINES), "a +b1= 3 \n\n(x)*2\n=4\n")
    assert accepts(tokenizer, compiler.ebnf(LINES), "a= 3\n")
    assert not accepts(tokenizer, compiler.ebnf(LINES), "a= 3")


@given(tree=REGULAR, texts=TEXTS)
@settings(max_examples=150, deadline=None)
def test_random_regular_grammars(
    tokenizer: Tokenizer, compiler: GrammarCompiler, tree: Tree, texts: list[str]
) -> None:
    """Alone, and inside a grammar that is not regular."""
    alone, inner = f"root ::= {gbnf(tree)}", f'root ::= x | "c" root "c"\nx ::= {gbnf(tree)}'
    pattern = re.compile(regex(tree))
    for text in texts:
        assert accepts(tokenizer, compiler.ebnf(alone), text) == bool(pattern.fullmatch(text))
        is_inner = any(
            text[:i] == "c" * i == text[len(text) - i :]
            and pattern.fullmatch(text[i : len(text) - i])
            for i in range(len(text) // 2 + 1)
        )
        assert accepts(tokenizer, compiler.ebnf(inner), text) == is_inner


@given(rules=RECURSIVE, texts=TEXTS)
@settings(max_examples=150, deadline=None)
def test_random_recursive_grammars(
    tokenizer: Tokenizer, compiler: GrammarCompiler, rules: dict[str, Tree], texts: list[str]
) -> None:
    text = "\n".join(f"{name} ::= {gbnf(tree)}" for name, tree in rules.items())
    try:
        grammar = compiler.ebnf(text)
    except GrammarError as error:
        assume("no text that ends" not in str(error))
        raise
    walk = Walk(tokenizer, grammar, seed=1, limit=12)
    for candidate in [*texts, walk.text]:
        is_match = accepts(tokenizer, compiler.ebnf(text), candidate)
        assert is_match == matches(rules, candidate), candidate


# --- Errors: where in the user's text, what is expected, what to do

ERRORS: list[tuple[str, list[str]]] = [
    ('root ::= "a', ['a " for the " at line 1, column 10', "line 1, column 12", "the end"]),
    ('root ::= "b"\n\nx ::= [a', ["expected a ] for the [ at line 3, column 7"]),
    ("root ::= (a |\n", ["expected a ) for the ( at line 1, column 10", "line 2, column 1"]),
    ('root ::= "a")', ["line 1, column 13", "not ')'", "No ( opens it."]),
    ('root ::=\n  "a" | *', ["line 2, column 9", "What it repeats must stand before it."]),
    ('root ::= "a"\n  | "b"', ["line 2, column 3", "Write | at the end of the line before"]),
    ("root ::= 'a'", ["line 1, column 10", "double quotes"]),
    ("root ::= /a/", ["line 1, column 10", "no regexes"]),
    ('root ::= "a" ::= "b"', ["line 1, column 14", "not ':'"]),
    ('root ::= "a"\nx = "b"', ["expected ::= after a rule's name at line 2, column 3"]),
    (r'root ::= "ab\q"', ["line 1, column 13", r"\uNNNN"]),
    (r'root ::= "\u00g0"', ["line 1, column 11", r"\uNNNN"]),
    (r'root ::= "\ud83d"', [r"surrogate \ud83d at line 1, column 11", r"\UNNNNNNNN"]),
    (r'root ::= "\U00110000"', ["line 1, column 11", "Lower it"]),
    ("root ::= []", ["'[]' at line 1, column 10", "no characters"]),
    ("root ::= [^]", ["'[^]'", "Write . for any"]),
    (r"root ::= [^\x00-\U0010FFFF]", ["line 1, column 10", "no character"]),
    ("root ::= [xz-a]", ["'z-a' at line 1, column 12", "Exchange"]),
    ('root ::= "a"{3,1}', ["'{3,1}' at line 1, column 13", "Exchange"]),
    ('root ::= "a"{,3}', ["line 1, column 14", "{0,5}"]),
    ('root ::= "a"{12345}', ["'{12345}' at line 1, column 13", "10,000"]),
    (f'root ::= "a"{{{"9" * 5000}}}', ["line 1, column 13", "10,000"]),
    ("root ::= b\nb ::= nowhere", ["'nowhere' at line 2, column 7", "not defined", "Add nowhere"]),
    ('a ::= "x"', ["no rule root", "Name the first rule root"]),
    ('root ::= root "a" | "b"', ["begins with itself", "line 1, column 10", "root -> root"]),
    ('root ::= "(" a\na ::= ws b\nws ::= " "*\nb ::= a | "y"', ["a -> b -> a", "line 4, column 7"]),
    ('root ::= "b" | "a" x\nx ::= "c" x', ["rule 'x'", "no text that ends"]),
    ("root ::= <think>", ["token '<think>' at line 1, column 10", "Write its text in quotes"]),
    ("root ::= .* !<[12]>", ["token '!<[12]>' at line 1, column 13"]),
    ("root ::= " + "(" * 40 + '"a"' + ")" * 40, ["more than 30 parentheses", "line 1, column 40"]),
    ('root ::= "a"\n' + "\n".join(f'r{i} ::= "b"' for i in range(1100)), ["1,101 rules", "1,000"]),
]  # fmt: skip


@pytest.mark.parametrize(("grammar", "words"), ERRORS)
def test_errors(compiler: GrammarCompiler, grammar: str, words: list[str]) -> None:
    with pytest.raises(GrammarError) as caught:
        compiler.ebnf(grammar)
    message = str(caught.value).removeprefix("ebnf=")
    for word in words:
        assert word in message
    assert len(message) < 500
    assert "lark" not in message.lower()


# --- Hostile texts: a grammar that works, or an error by name


def rules_of(count: int, rule: str) -> str:
    rules = "\n".join(rule.format(i, i + 1) for i in range(count))
    return f'root ::= r0\n{rules}\nr{count} ::= "e"'


HOSTILE = [
    rules_of(900, 'r{0} ::= "x" r{1}'),
    rules_of(900, 'r{0} ::= "x" r{1} | "(" root ")"'),
    rules_of(60, "r{0} ::= r{1} r{1}"),
    rules_of(60, 'r{0} ::= r{1}? r{1}* | "(" root ")"'),
    "root ::= " + "(" * 30 + '"a"' + ")*" * 30,
    "root ::= " + "(" * 30 + '"a"?' + "){0,9}" * 30,
    "root ::= " + '("b" | ' * 30 + '"a"? "[" root "]"' + "){0,9}" * 30,
    'root ::= "a"' + "*" * 20_000,
    'root ::= "a"' + "{2}" * 5_000,
    "root ::= " + '"a"? ' * 4_000,
    'root ::= "(" root ")" | ' + '"a"? ' * 4_000,
    "root ::= a{10000}\na ::= b{10000}\nb ::= [bc]{10000}",
    'root ::= (("a" "b"?){1,200}){1,200}',
    'root ::= x\nx ::= .* .* .* .* "end" .* | "(" x ")"',
    'root ::= "' + "x" * 30_000 + '"',
    'root ::= "(" root ")" | "' + "x" * 30_000 + '"',
    "root ::= (" + " | ".join(f'"w{i}"' for i in range(3_000)) + ' | "(" root ")")+',
    "root ::= [" + "a-b" * 10_000 + "]",
    "root ::= " + "a-" * 10_000,
]


@pytest.mark.parametrize("index", range(len(HOSTILE)))
def test_hostile(tokenizer: Tokenizer, compiler: GrammarCompiler, index: int) -> None:
    try:
        Walk(tokenizer, compiler.ebnf(HOSTILE[index]), seed=0, limit=20)
    except GrammarError as error:
        assert "ebnf=" in str(error) or "too complex" in str(error)
