"""Tables that a notebook shows of a value."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def make_html_table(header: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """Return an HTML table of texts and numbers; what they hold is escaped, and numbers stand to the right."""
    lines = [f"<caption>{html.escape(caption)}</caption>"] if caption else []
    lines.append(_make_row(header, "th"))
    lines += [_make_row(row, "td") for row in rows]
    return "<table>" + "".join(lines) + "</table>"


def _make_row(cells: Iterable[object], tag: str) -> str:
    texts = []
    for cell in cells:
        side = "left" if isinstance(cell, str) else "right"
        text = f"{cell:,}" if isinstance(cell, int) else f"{cell:.4g}" if isinstance(cell, float) else str(cell)
        texts.append(f'<{tag} style="text-align:{side}">{html.escape(text)}</{tag}>')
    return f"<tr>{''.join(texts)}</tr>"
