"""What a version's page in MLflow tells: its origin, what it learned, how it was judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from flows.registry import Registry, Version
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


def story(registry: Registry, version: Version, verdict: Verdict, champion: Version) -> str:
    """Tell of a version that was judged against a champion, as Markdown."""

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
            f"**{verdict.outcome.value}** against {_named(registry, champion.number)}",
            _table(verdict.criteria),
            _origin(registry, version),
            f"{_learned(registry, version)}\n- judged: {version.tags.get('labels', 'no')}",
            " · ".join(links),
        ]
    )


def _origin(registry: Registry, version: Version) -> str:
    tags = version.tags
    words = f"Tuned from {_named(registry, version.parent)}: {tags.get('cause', 'unknown')}."
    if check := tags.get("cause_check"):
        report = registry.run_url(check, artifact="report.html")
        words += f" [Drift report]({report}) · [check]({registry.run_url(check)})"
    return words


def _learned(registry: Registry, version: Version) -> str:
    """Count the labels that no parent had, by class and by batch."""
    table = registry.learned(version)
    parent = registry.ancestry(version)[1:2]
    whose = "it and its parents learned from" if version.parent else "it learned from"
    if parent:  # the newest are on top
        table = table.head(len(table) - len(registry.learned(parent[0])))
        whose = "its parents had not"
    held = int((table["role"] == Role.HOLDOUT.value).sum())
    return (
        f"**Labels that {whose}**: {len(table)}, of which {held} are held out."
        f"\n- classes: {_counted(table['label'].tolist())}"
        f"\n- batches: {_counted([name.split('/', 1)[0] for name in table['sample_id']])}"
    )


def _counted(names: Sequence[str]) -> str:
    counts = sorted(Counter(names).items(), key=lambda found: (-found[1], found[0]))
    told = ", ".join(f"`{name}` {count}" for name, count in counts[:MOST])
    return told + (f", and {len(counts) - MOST} more" if len(counts) > MOST else "")


def _table(criteria: Sequence[Criterion]) -> str:
    rows = [f"| {c.name} | {'yes' if c.passed else 'no'} | {c.words} |" for c in criteria]
    return "\n".join(["| criterion | holds | figures |", "|---|---|---|", *rows])


def _named(registry: Registry, number: int | None) -> str:
    return f"[version {number}]({registry.version_url(number)})" if number else "nothing"
