"""What a version's page in MLflow tells: its origin, what it learned, how it was judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pandas as pd

from flows.records import Version
from flows.registry import Registry
from sft.dataset import Role
from sft.gate import Criterion, Verdict

MOST = 20
"""Classes and batches that are named; the commonest first."""


def first_story(registry: Registry, version: Version) -> str:
    """Tell of a first version, as Markdown."""
    return "\n\n".join(
        [
            f"**The first version**: {version.tags.get('cause', 'unknown')}.",
            _learned(registry, version),
            f"[Training run]({registry.run_url(version.run_id)})",
        ]
    )


def story(
    registry: Registry,
    version: Version,
    verdict: Verdict,
    champion: Version,
    gain: float,
    then: str = "",
) -> str:
    """Tell of a version that was judged against a champion, as Markdown.

    `gain` is that of accuracy on the fresh hold-out; `then` what a person can do about a refusal.
    """

    def link(words: str, artifact: str) -> str:
        return f"[{words}]({registry.run_url(version.run_id, artifact=artifact)})"

    against = f"against-{champion.number}"
    links = (
        link("Training run", ""),
        link("confusion matrices", f"confusion-{against}.png"),
        link("what is still wrong", f"still-wrong-{against}.png"),
        link("scores", f"scores-{against}.json"),
    )
    return "\n\n".join(
        [
            f"**{verdict.outcome.value}** against {_named(registry, champion.number)}"
            + (f"; {then}" if then else ""),
            _table(verdict.criteria),
            _origin(registry, version),
            "\n".join(
                [
                    _learned(registry, version),
                    f"- judged: {version.tags.get('labels', 'no')}",
                    f"- {cost_words(registry, version, gain)}",
                ]
            ),
            " · ".join(links),
        ]
    )


def cost_words(registry: Registry, version: Version, gain: float) -> str:
    """Say what a version cost, and how many labels for each point of accuracy regained."""
    spent = registry.cost(version)
    labels, points = len(new_labels(registry, version)[0]), gain * 100
    words = f"cost: {'not measured' if spent is None else spent.words}, {labels} labels"
    regained = (
        f"{points:.1f} points of accuracy regained on the fresh hold-out,"
        f" {labels / points:.1f} labels a point"
        if points > 0
        else "no accuracy regained on the fresh hold-out"
    )
    return f"{words}; {regained}"


def _origin(registry: Registry, version: Version) -> str:
    tags = version.tags
    words = f"Tuned from {_named(registry, version.parent)}: {tags.get('cause', 'unknown')}."
    if check := tags.get("cause_check"):
        report = registry.run_url(check, artifact="report.html")
        words += f" [Drift report]({report}) · [check]({registry.run_url(check)})"
    return words


def _learned(registry: Registry, version: Version) -> str:
    """Count the labels that no parent had, by class and by batch."""
    table, parent = new_labels(registry, version)
    whose = "it and its parents learned from" if version.parent else "it learned from"
    if parent:
        whose = "its parents had not"
    held = int((table["role"] == Role.HOLDOUT.value).sum())
    return (
        f"**Labels that {whose}**: {len(table)}, of which {held} are held out."
        f"\n- classes: {_counted(table['label'].tolist())}"
        f"\n- batches: {_counted([name.split('/', 1)[0] for name in table['sample_id']])}"
    )


def new_labels(registry: Registry, version: Version) -> tuple[pd.DataFrame, bool]:
    """Return the labels that no parent had, and whether there is a parent to compare with."""
    table = registry.learned(version)
    parent = registry.ancestry(version)[1:2]
    if parent:  # the newest are on top
        table = table.head(len(table) - len(registry.learned(parent[0])))
    return table, bool(parent)


def _counted(names: Sequence[str]) -> str:
    counts = sorted(Counter(names).items(), key=lambda found: (-found[1], found[0]))
    told = ", ".join(f"`{name}` {count}" for name, count in counts[:MOST])
    return told + (f", and {len(counts) - MOST} more" if len(counts) > MOST else "")


def _table(criteria: Sequence[Criterion]) -> str:
    rows = [f"| {c.name} | {'yes' if c.passed else 'no'} | {c.words} |" for c in criteria]
    return "\n".join(["| criterion | holds | figures |", "|---|---|---|", *rows])


def _named(registry: Registry, number: int | None) -> str:
    return f"[version {number}]({registry.version_url(number)})" if number else "nothing"
