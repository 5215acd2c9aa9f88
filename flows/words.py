"""Counts, names and errors as they stand in the sentences that people read."""

import re
from collections.abc import Sized
from typing import Literal

PASSWORD = re.compile(
    # user and password within an address; what follows a port is neither
    r"(?<=://)[^/@\s:]*:(?!\d+(?:[/?#\s]|$))[^\s'\"]+(?=@)"
    r"|(?<=[?&;])(?:password|sig|token|access_token|X-(?:Amz|Goog)-Signature"
    r"|AccountKey|SharedAccessKey)=[^&;\s'\"]+",
    re.IGNORECASE,
)
"""What of an address lets in whoever reads it."""
_SHOWN = 3


def shown_uri(uri: str) -> str:
    """Write an address, or a text with addresses in it, without what lets in."""
    return PASSWORD.sub("...", uri)


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its class where it has none."""
    return shown_uri((str(error).strip().splitlines() or [""])[0]) or type(error).__name__


def printable(name: str) -> str:
    """Write the bytes of a file name that are not UTF-8 as escapes."""
    return name.encode(errors="backslashreplace").decode()


def slug(name: str) -> str:
    """Write a name as Prefect's keys have it: small letters, digits and dashes."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in name.lower()).strip("-")


def count(things: Sized, noun: str) -> str:
    """Write "1 sample", "2 samples"."""
    return f"{len(things)} {noun}" + ("" if len(things) == 1 else "s")


def first_few(names: list[str] | tuple[str, ...]) -> str:
    """Write the first three names, and dots for the others."""
    return ", ".join([*map(printable, names[:_SHOWN]), *(["..."] if len(names) > _SHOWN else [])])


def tell_rows(
    numbers: list[int],
    noun: str,
    verb: Literal["has", "is"],
    problem: str,
    *,
    skipped: bool = False,
) -> tuple[str, ...]:
    """Tell in one sentence what is wrong with some rows; in none where there are no such rows."""
    if not numbers:
        return ()
    first = f"{noun} {numbers[0]}"
    if len(numbers) == 1:
        return (f"{first} {verb} {problem}" + (" and was skipped" if skipped else ""),)
    plural = {"has": "have", "is": "are"}[verb]
    ending = " and were skipped" if skipped else ""
    return (f"{len(numbers)} {noun}s {plural} {problem}{ending} (first: {first})",)
