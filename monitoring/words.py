"""Numbers as they stand in the sentences that people read."""

from __future__ import annotations


def number(value: float) -> str:
    """Write 1,000 or .05 without needless zeros."""
    return f"{value:,.10g}"


def p_words(value: float) -> str:
    """Write a p-value after the letter p: "= .03", "under .0001"."""
    return f"= {value:.2g}" if value >= 1e-4 else "under .0001"  # noqa: PLR2004


def count(n: int, noun: str, plural: str | None = None) -> str:
    """Write "1 label", "2 labels"."""
    return f"{n} {noun if n == 1 else plural or noun + 's'}"
