"""A model's own Jinja chat template as SGLang's ChatTemplate: a prefix and a suffix for each role.

SGLang writes a conversation role by role and knows no Jinja. So the Jinja text is rendered for
conversations of marker messages, and what stands between the markers becomes the prefixes and
suffixes. Then SGLang's writing of these conversations is compared with Jinja's: a template that
prefixes and suffixes cannot express is refused, never approximated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang.lang.chat_template import ChatTemplate, ChatTemplateStyle, chat_template_registry

from sf_local.errors import ChatTemplateError
from sf_local.text.chat_template import (
    NEXT_USER_TURN,
    REPLY_TURN,
    SYSTEM_TURN,
    USER_TURN,
    JinjaTemplate,
    Turn,
)
from sf_local.text.tokenizer import Tokenizer

_REMEDY = (
    "Pass chat_template= with the name of one of SGLang's templates, a Jinja text, or a "
    "sglang.lang.chat_template.ChatTemplate."
)
_TRIALS = (
    [SYSTEM_TURN, USER_TURN],
    [USER_TURN],
    [SYSTEM_TURN, USER_TURN, REPLY_TURN, NEXT_USER_TURN],
    [USER_TURN, REPLY_TURN, NEXT_USER_TURN],
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
        tokenizer: the model's tokenizer. If it has no template of its own, None gives one for
            plain text, on which roles raise.
        name: what a derived template is called.
        image_token: what stands for an image in a vision model's prompt. If the model expects a
            message that begins with an image in another form than SGLang writes it, the template
            has the attribute `image_first`: what SGLang writes, and what the model expects.

    Raises:
        ChatTemplateError: it is none of these, or cannot be expressed as a ChatTemplate.
    """
    if isinstance(chat_template, ChatTemplate):
        return chat_template
    if chat_template is None and tokenizer.chat_template is None:
        plain = _PlainText(name=name, default_system_prompt=None, role_prefix_and_suffix={})
        plain.image_token = image_token or plain.image_token
        return plain
    is_text = isinstance(chat_template, str)
    if is_text and chat_template in chat_template_registry:
        return chat_template_registry[chat_template]
    if chat_template is None or (is_text and ("{%" in chat_template or "{{" in chat_template)):
        try:
            return _derive(JinjaTemplate(tokenizer, name, chat_template), name, image_token)
        except ChatTemplateError as error:
            raise ChatTemplateError(f"{error} {_REMEDY}") from None
    raise ChatTemplateError(
        f"chat_template={chat_template!r} is not a chat template. Allowed are a Jinja text, a "
        "sglang.lang.chat_template.ChatTemplate, None for the model's own, and the names "
        f"{', '.join(sorted(chat_template_registry))}."
    )


def _derive(model: JinjaTemplate, name: str, image_token: str | None) -> ChatTemplate:
    parts = _split(model)
    template = parts.to_chat_template(name, model.stop_strings(parts.assistant[1]))
    for turns in _TRIALS:
        wanted, written = model.render(turns), _write(template, turns, parts.reply_space)
        if wanted != written:
            model.fail(_difference(wanted, written))
    if image_token is not None:
        _add_images(template, model, parts.user[0], image_token)
    return template


def _difference(wanted: str, written: str) -> str:
    differs = (n for n, (a, b) in enumerate(zip(wanted, written, strict=False)) if a != b)
    start = max(0, next(differs, min(len(wanted), len(written))) - 20)
    return (
        "is not a prefix and a suffix for each role, all that SGLang knows: the model expects "
        f"{wanted[start : start + 80]!r} where SGLang would write {written[start : start + 80]!r}"
    )


def _add_images(
    template: ChatTemplate, model: JinjaTemplate, user_prefix: str, image_token: str
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

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    is_llama2: bool  # the system message stands inside the first user message
    default_system: str | None
    opening: str  # stands before a conversation without a system message
    reply_space: str  # "" or the " " that the model itself begins its replies with

    def to_chat_template(self, name: str, stop_strings: tuple[str, ...]) -> ChatTemplate:
        fields = {
            "name": name,
            "default_system_prompt": self.default_system,
            "role_prefix_and_suffix": {
                "system": self.system,
                "user": self.user,
                "assistant": self.assistant,
            },
            "stop_str": stop_strings,  # a tuple, which sglang adds to a list
            "style": ChatTemplateStyle.LLAMA2 if self.is_llama2 else ChatTemplateStyle.PLAIN,
        }
        if not self.opening:
            return ChatTemplate(**fields)
        return _WithOpening(**fields, opening=self.opening)


def _split(model: JinjaTemplate) -> _Parts:
    """Read the parts off rendered conversations; if they do not fit, comparing will tell."""
    first, *_ = model.gaps([USER_TURN, REPLY_TURN, NEXT_USER_TURN])
    before_system, system_to_user, user_to_reply, reply_to_user, after_user = model.gaps(
        [SYSTEM_TURN, USER_TURN, REPLY_TURN, NEXT_USER_TURN]
    )
    user_suffix = model.gaps([SYSTEM_TURN, USER_TURN], add_generation_prompt=False)[-1]
    reply_end = model.gaps([SYSTEM_TURN, USER_TURN, REPLY_TURN], add_generation_prompt=False)[-1]

    is_first_plain = reply_to_user.endswith(first)
    user_prefix = first if is_first_plain else reply_to_user.removeprefix(reply_end)
    reply_prefix = after_user.removeprefix(user_suffix)
    reply_space = user_to_reply.removeprefix(user_suffix).removeprefix(reply_prefix)

    is_llama2 = not system_to_user.endswith(user_prefix)
    if is_llama2:
        system = (before_system.removeprefix(user_prefix), system_to_user)
    else:
        system = (before_system, system_to_user.removesuffix(user_prefix))
    default_system = None
    if first.startswith(before_system) and first.endswith(system_to_user):
        default_system = first[len(before_system) : -len(system_to_user) or None] or None
    return _Parts(
        system=system,
        user=(user_prefix, user_suffix),
        assistant=(reply_prefix, reply_to_user.removesuffix(user_prefix)),
        is_llama2=is_llama2,
        default_system=default_system,
        opening="" if default_system else first.removesuffix(user_prefix),
        reply_space=reply_space if reply_space == " " else "",
    )


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
class _WithOpening(ChatTemplate):  # type: ignore[misc]  # sglang is untyped
    """Writes `opening` before conversations that begin without a system message.

    Llama 3.1 writes a system header even then, and no default text can stand for an empty one.
    """

    opening: str = ""

    def get_prefix_and_suffix(self, role: str, hist_messages: list[Any]) -> tuple[str, str]:
        prefix, suffix = super().get_prefix_and_suffix(role, hist_messages)
        begins = role != "system" and not hist_messages
        return (self.opening + prefix if begins else prefix), suffix


class _PlainText(ChatTemplate):  # type: ignore[misc]
    """The template of a base model: plain text works, roles raise."""

    def get_prefix_and_suffix(self, role: str, hist_messages: list[Any]) -> tuple[str, str]:
        raise ChatTemplateError(
            f"{self.name} has no chat template, so sgl.{role}() has no meaning; give one with "
            'ShortfinLocal(chat_template="chatml"), or write the prompt as plain text'
        )
