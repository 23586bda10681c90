"""Text from elsewhere (names of layers, data sets, repositories) made harmless in a Markdown card."""

from __future__ import annotations

import html
import re


def escaped(text: str) -> str:
    """Text from elsewhere as plain words of a Markdown line: no markup, no HTML, no table cell."""
    return re.sub(r"([\\`*\[\]|~#{}]|(?<!\w)_|_(?!\w))", r"\\\1", html.escape(one_line(text), quote=False))


def code(text: str) -> str:
    """Text from elsewhere as inline code in a table cell."""
    return "`" + one_line(text).replace("`", "'").replace("|", "\\|") + "`"


def python_string(text: str) -> str:
    """Text from elsewhere as a string literal of the example, without the end of a code block."""
    return '"' + one_line(text).replace("\\", "\\\\").replace('"', '\\"').replace("`", "'") + '"'


def one_line(text: str) -> str:
    """Text from elsewhere on one line, and without a comment that could pass for the section's own."""
    return " ".join(str(text).split()).replace("<!--", "<! --").replace("-->", "-- >")
