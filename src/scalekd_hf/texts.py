"""Text of others, as it may be told: in logs and errors without secrets, on a screen in one line, in Markdown as text."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from huggingface_hub import get_token


__all__ = ["code", "inline", "one_line", "redacted", "without_secrets"]

HIDDEN = "(hidden)"
SECRETS = (
    (re.compile(r"(?<=://)[^/?#@\s'\"<>]+@"), f"{HIDDEN}@"),  # user and password of a URL
    (
        re.compile(r"([?&](?:[\w.-]*(?:token|sig|credential|secret|policy|password|key)[\w.-]*)=)[^&\s'\"<>]+", re.I),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(\bBearer\s+)[\w.~+/=-]+", re.I), rf"\1{HIDDEN}"),
    (re.compile(r"\bhf_[A-Za-z0-9]{30,}"), HIDDEN),
)
LONGEST = 500  # characters of a name in Markdown
IN_MARKDOWN = re.compile(r"[\\`*\[\]|~$#]|(?<!\w)_|_(?!\w)")
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def redacted(text: Any, *secrets: str | None) -> str:
    """A text without tokens: those given, the one that one is logged in with, and what signs or opens a URL."""
    told = str(text)
    for secret in (*secrets, get_token()):
        if secret:
            told = told.replace(secret, HIDDEN)
    for pattern, instead in SECRETS:
        told = pattern.sub(instead, told)
    return told


def without_secrets(error: BaseException, *secrets: str | None) -> BaseException | None:
    """An error to name as the cause of another; None where it, or what has led to it, tells a secret."""
    led, seen = error, set[int]()
    while led is not None and id(led) not in seen:  # an error may be raised from itself
        if redacted(led, *secrets) != str(led):
            return None
        seen.add(id(led))
        led = led.__cause__ or led.__context__  # type: ignore[assignment]
    return error


def one_line(text: Any) -> str:
    """A text that moves no cursor and begins no line: what cannot be printed as its escape."""
    return "".join(_printable(character) for character in str(text))


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    if unicodedata.category(character) == "Zs":  # spaces of other widths
        return " "
    return character.encode("unicode_escape").decode()


def inline(text: Any) -> str:
    """A text in a line or a table of Markdown, as it is read: no tag, link or column of its own; only `code` stays code."""
    parts = _shortened(one_line(text)).split("`")
    if len(parts) % 2 == 0:  # a mark that is not closed
        return _escaped("'".join(parts))
    return "".join(code(part) if place % 2 else _escaped(part) for place, part in enumerate(parts))


def code(text: Any) -> str:
    """A text as code in a line or a table of Markdown; in quotes where code could not hold it."""
    told = _shortened(one_line(text))
    plain = not set("`|<>") & set(told) and told == told.strip() != ""
    return f"`{told}`" if plain else f'"{_escaped(told)}"'


def _escaped(text: str) -> str:
    text = IN_MARKDOWN.sub(lambda found: f"\\{found[0]}", text)
    return "".join(ENTITIES.get(character, character) for character in text)


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
