"""A page of small pictures with words: it is one file, loads nothing and runs nothing."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_KINDS = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
}
_STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2rem;color:#222;background:#fff}"
    "ol{display:grid;grid-template-columns:repeat(auto-fill,minmax(13rem,1fr));gap:1rem;padding:0;"
    "list-style:none}"
    "li{border:1px solid #ccc;border-radius:.4rem;padding:.6rem;overflow-wrap:anywhere}"
    "img{display:block;width:100%;height:9rem;object-fit:contain;background:#eee;"
    "image-rendering:auto;margin-bottom:.5rem}"
    "small{display:block;color:#555}"
)


@dataclass(frozen=True)
class Shown:
    """One picture of a page; all words are shown as they are.

    Attributes:
        name: of the sample.
        lines: below it.
        thumbnail: a small PNG, JPEG, GIF or WebP; another is not shown.
    """

    name: str
    lines: tuple[str, ...]
    thumbnail: bytes = b""


def gallery(title: str, heading: str, words: str, pictures: Sequence[Shown]) -> str:
    """Write the page: HTML that any UTF-8 encoder takes.

    Args:
        title: of the window.
        heading: above everything.
        words: below it.
        pictures: numbered from 1.
    """
    items = "\n".join(_item(number, picture) for number, picture in enumerate(pictures, start=1))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{html.escape(heading)}</h1>\n<p>{html.escape(words)}</p>\n"
        f"<ol>\n{items}\n</ol></body></html>\n"
    )
    return page.encode(errors="backslashreplace").decode()


def _item(number: int, shown: Shown) -> str:
    picture = ""
    kind = next((kind for magic, kind in _KINDS.items() if shown.thumbnail.startswith(magic)), None)
    if kind is not None:
        encoded = base64.b64encode(shown.thumbnail).decode("ascii")
        picture = f'<img alt="" src="data:{kind};base64,{encoded}">'
    lines = "".join(f"<small>{html.escape(line)}</small>" for line in shown.lines)
    return f"<li>{picture}<b>{number}</b> {html.escape(shown.name)}{lines}</li>"
