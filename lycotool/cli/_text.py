"""Text from files, made safe to print."""

from __future__ import annotations

import unicodedata

#: Control, format, surrogate, line- and paragraph-separator characters.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def clean(text: str, *, limit: int = 10_000) -> str:
    r"""``text`` with control characters spelled out and a bounded length.

    Escape sequences, line breaks, bidirectional overrides and lone surrogates become
    ``\xNN``, ``\uNNNN`` or ``\UNNNNNNNN``.

    >>> clean("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    shown = text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
    if shown.isascii() and shown.isprintable():
        return shown
    return "".join(_escape(c) if unicodedata.category(c) in _UNSAFE else c for c in shown)


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
