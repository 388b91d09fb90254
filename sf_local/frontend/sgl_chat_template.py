"""A model's own Jinja chat template as SGLang's ChatTemplate: a prefix and a suffix for each role.

SGLang writes a conversation role by role and knows no Jinja. So the Jinja text is rendered for
conversations of marker messages, and what stands between the markers becomes the prefixes and
suffixes. Then SGLang's writing of these and other conversations is compared with Jinja's, and a
warning tells where they differ. Roles that the template refuses raise when a program uses them; it
never keeps a program of plain text from starting.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sglang.lang.chat_template import ChatTemplate, ChatTemplateStyle, chat_template_registry

from sf_local.errors import ChatTemplateError
from sf_local.frontend.turns import (
    NEXT_USER_TURN,
    REPLY_TURN,
    SYSTEM_TURN,
    USER_TURN,
    Turn,
    TurnTemplate,
)
from sf_local.text.tokenizer import Tokenizer

_REMEDY = (
    "Pass chat_template= with the name of one of SGLang's templates, a Jinja text, or a "
    "sglang.lang.chat_template.ChatTemplate."
)
_NEXT_TURNS = [USER_TURN, REPLY_TURN, NEXT_USER_TURN]
_REASONING: Turn = ("assistant", f"<think>\nReason75\n</think>\n\n{REPLY_TURN[1]}")
_TRIALS = (
    ("In a later turn", _NEXT_TURNS),
    ("In a later turn after a system message", [SYSTEM_TURN, *_NEXT_TURNS]),
    ("With blanks around contents", [("user", f"\n {USER_TURN[1]} \n")]),
    ("After a reply that reasons", [USER_TURN, _REASONING, NEXT_USER_TURN]),
)


def resolve_chat_template(
    chat_template: str | ChatTemplate | None,
    tokenizer: Tokenizer,
    name: str,
    image_token: str | None = None,
) -> ChatTemplate:
    """The chat template a user asked for.

    Args:
        chat_template: None for the model's own, the name of one of SGLang's, a Jinja text, or a
            ChatTemplate, which is returned as it is.
        tokenizer: the model's tokenizer. If it has no template of its own, or one that cannot be
            split into roles, None gives one for plain text, on which roles raise.
        name: what a derived template is called.
        image_token: what stands for an image in a vision model's prompt. If the model expects a
            message that begins with an image in another form than SGLang writes it, the template
            has the attribute `image_first`: what SGLang writes, and what the model expects.

    Warns:
        UserWarning: SGLang's prefixes and suffixes cannot say all that the template does.

    Raises:
        ChatTemplateError: it is none of these, or a text that cannot be split into roles.
    """
    if isinstance(chat_template, ChatTemplate):
        return chat_template
    if chat_template is None and not tokenizer.chat_templates:
        return _plain_text(name, image_token, f"{name} has no chat template")
    if chat_template is None:
        try:
            return _derive(TurnTemplate(tokenizer, name), name, image_token)
        except ChatTemplateError as error:
            _warn(f"{error} Only plain text works.")
            return _plain_text(name, image_token, str(error).rstrip("."))
    if isinstance(chat_template, str):
        if chat_template in chat_template_registry:
            return chat_template_registry[chat_template]
        if "{%" in chat_template or "{{" in chat_template:
            return _derive(TurnTemplate(tokenizer, name, chat_template), name, image_token)
    raise ChatTemplateError(
        f"chat_template={chat_template!r} is not a chat template. Allowed are a Jinja text, a "
        "sglang.lang.chat_template.ChatTemplate, None for the model's own, and the names "
        f"{', '.join(sorted(chat_template_registry))}."
    )


def _derive(model: TurnTemplate, name: str, image_token: str | None) -> ChatTemplate:
    parts = _split(model)
    stops = model.stops_after(parts.assistant[1])
    if parts.system and (difference := _difference(model, parts, [SYSTEM_TURN, USER_TURN])):
        parts = replace(parts, system=None, no_system=f"In a system message {difference}")
    if difference := _difference(model, parts, [USER_TURN]):
        model.fail(f"is not a prefix and a suffix for each role: {difference.removesuffix('.')}")
    template = parts.to_chat_template(name, stops)
    differences = [
        f"{when} {difference}" for when, turns in _TRIALS
        if (parts.system or turns[0] != SYSTEM_TURN)
        and (difference := _difference(model, parts, turns))
    ]  # fmt: skip
    if image_token is not None:
        try:
            _add_images(template, model, parts.user[0], image_token)
        except ChatTemplateError as error:
            template.image_token = image_token
            differences.append(str(error))
    if differences:
        _warn(
            f"The chat template of {name} is more than a prefix and a suffix for each role, all "
            f"that SGLang knows. {' '.join(differences)}"
        )
    return template


def _plain_text(name: str, image_token: str | None, reason: str) -> ChatTemplate:
    plain = _PlainText(
        name=name, default_system_prompt=None, role_prefix_and_suffix={}, reason=reason
    )
    plain.image_token = image_token or plain.image_token
    return plain


def _warn(message: str) -> None:
    warnings.warn(f"{message} {_REMEDY}", UserWarning, stacklevel=2)


def _difference(model: TurnTemplate, parts: _Parts, turns: Sequence[Turn]) -> str:
    """What the model expects and what SGLang writes, where they differ; else empty."""
    try:
        wanted = model.render(turns)
    except ChatTemplateError as error:
        return str(error)
    written = _write(parts.to_chat_template("", ()), turns, parts.reply_space)
    if wanted == written:
        return ""
    differs = (n for n, (a, b) in enumerate(zip(wanted, written, strict=False)) if a != b)
    start = max(0, next(differs, min(len(wanted), len(written))) - 20)
    shown = slice(start, start + 80)
    return f"the model expects {wanted[shown]!r} where SGLang writes {written[shown]!r}."


def _add_images(
    template: ChatTemplate, model: TurnTemplate, user_prefix: str, image_token: str
) -> None:
    """Set what stands for an image, and `image_first` where that changes the text before it."""
    before, _ = model.gaps([USER_TURN])
    seeing, _ = model.gaps([USER_TURN], images=1)
    start = len(before) if seeing.startswith(before) else len(before.rstrip())
    template.image_token = seeing[start:]
    if not seeing.startswith(before.rstrip()) or image_token not in template.image_token:
        model.fail(f"writes an image as {seeing!r}, not after {before!r} as {image_token!r}")
    if start < len(before):
        written = user_prefix + template.image_token
        template.image_first = (written, written[: len(user_prefix.rstrip())] + seeing[start:])


@dataclass(frozen=True)
class _Parts:
    """A chat template in SGLang's terms; each role has a prefix and a suffix."""

    system: tuple[str, str] | None
    no_system: str  # why there is no system message, if there is none
    user: tuple[str, str]
    assistant: tuple[str, str]
    is_llama2: bool  # the system message stands inside the first user message
    default_system: str | None
    opening: str  # stands before a conversation without a system message
    reply_space: str  # "" or the " " that the model itself begins its replies with

    def to_chat_template(self, name: str, stop_strings: tuple[str, ...]) -> ChatTemplate:
        roles = {"user": self.user, "assistant": self.assistant}
        fields = {
            "name": name,
            "default_system_prompt": self.default_system,
            "role_prefix_and_suffix": roles | ({"system": self.system} if self.system else {}),
            "stop_str": stop_strings,  # a tuple, which sglang adds to a list
            "style": ChatTemplateStyle.LLAMA2 if self.is_llama2 else ChatTemplateStyle.PLAIN,
        }
        if not (self.opening or self.no_system):
            return ChatTemplate(**fields)
        return _OwnTemplate(**fields, opening=self.opening, no_system=self.no_system)


def _split(model: TurnTemplate) -> _Parts:
    """Read the parts off rendered conversations; if they do not fit, comparing will tell.

    Raises ChatTemplateError where contents are not found, once and in their places.
    """
    no_system = _refusal(model, [SYSTEM_TURN, USER_TURN])
    begin = [] if no_system else [SYSTEM_TURN]
    first, *_ = model.gaps(_NEXT_TURNS)
    *before, user_to_reply, reply_to_user, after_user = model.gaps([*begin, *_NEXT_TURNS])
    user_suffix = model.gaps([*begin, USER_TURN], add_generation_prompt=False)[-1]
    reply_end = model.gaps([*begin, USER_TURN, REPLY_TURN], add_generation_prompt=False)[-1]

    is_first_plain = reply_to_user.endswith(first)
    user_prefix = first if is_first_plain else reply_to_user.removeprefix(reply_end)
    reply_prefix = after_user.removeprefix(user_suffix)
    reply_space = user_to_reply.removeprefix(user_suffix).removeprefix(reply_prefix)

    is_llama2, system, default_system = False, None, None
    if not no_system:
        before_system, system_to_user = before
        is_llama2 = not system_to_user.endswith(user_prefix)
        if is_llama2:
            system = (before_system.removeprefix(user_prefix), system_to_user)
        else:
            system = (before_system, system_to_user.removesuffix(user_prefix))
        if first.startswith(before_system) and first.endswith(system_to_user):
            default_system = first[len(before_system) : -len(system_to_user) or None] or None
    return _Parts(
        system=system,
        no_system=no_system,
        user=(user_prefix, user_suffix),
        assistant=(reply_prefix, reply_to_user.removesuffix(user_prefix)),
        is_llama2=is_llama2,
        default_system=default_system,
        opening="" if default_system else first.removesuffix(user_prefix),
        reply_space=reply_space if reply_space == " " else "",
    )


def _refusal(model: TurnTemplate, turns: Sequence[Turn]) -> str:
    """Why the model does not take such a conversation; empty if it does."""
    try:
        model.gaps(turns)
    except ChatTemplateError as error:
        return str(error)
    return ""


def _write(template: ChatTemplate, turns: Sequence[Turn], reply_space: str) -> str:
    """The prompt that SGLang's interpreter writes for `turns` and the beginning of a reply."""
    messages = [
        {"role": role, "content": reply_space + content if role == "assistant" else content}
        for role, content in turns
    ]
    if template.default_system_prompt and turns[0][0] != "system":
        messages.insert(0, {"role": "system", "content": template.default_system_prompt})
    reply_prefix, _ = template.get_prefix_and_suffix("assistant", messages)
    return f"{template.get_prompt(messages)}{reply_prefix}"


@dataclass
class _OwnTemplate(ChatTemplate):  # type: ignore[misc]  # sglang is untyped
    """A model's template that is more than prefixes and suffixes.

    opening: stands before conversations that begin without a system message. Llama 3.1 writes a
        system header even then, and no default text can stand for an empty one.
    no_system: why a system message raises; empty if it does not.
    """

    opening: str = ""
    no_system: str = ""

    def get_prefix_and_suffix(self, role: str, hist_messages: list[Any]) -> tuple[str, str]:
        if role == "system" and self.no_system:
            raise ChatTemplateError(
                f"{self.no_system} Write what sgl.system() says into the first sgl.user()."
            )
        prefix, suffix = super().get_prefix_and_suffix(role, hist_messages)
        begins = role != "system" and not hist_messages
        return (self.opening + prefix if begins else prefix), suffix


@dataclass
class _PlainText(ChatTemplate):  # type: ignore[misc]
    """The template of a base model: plain text works, roles raise. `reason` tells why."""

    reason: str = ""

    def get_prefix_and_suffix(self, role: str, hist_messages: list[Any]) -> tuple[str, str]:
        raise ChatTemplateError(
            f"{self.reason}, so sgl.{role}() has no meaning; give a template with "
            'ShortfinLocal(chat_template="chatml"), or write the prompt as plain text'
        )
