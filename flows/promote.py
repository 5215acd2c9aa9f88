"""`sustain promote`: judge a version against today's champion; move the alias if it is better."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prefect import flow

from flows.fresh import held_out_labels
from flows.history import show_in_prefect
from flows.kept import as_json
from flows.logs import log
from flows.records import CHALLENGER, CHAMPION, ChampionMovedError, Version
from flows.registry import Registry
from flows.scores import per_class, worst_classes
from flows.settings import Settings, load_settings
from flows.story import story
from monitoring.features import number_text
from sft.dataset import HOLDOUT_SHARE, LabelledPictures, Role, join
from sft.evaluate import Answers, answer
from sft.footprint import largest_change, latency_ratio, weight_bytes
from sft.gate import Outcome, Pair, Serving, Verdict, judge
from sft.memory import Memory
from sft.models import Network
from sft.pictures import Preprocessing

WAITING = "waiting"
"""What became of a challenger that passed where a person has to approve it."""
COMPARED, TIMED = 64, 8
"""Pictures whose answers are compared with those before registering; and that are timed."""
MAX_TAG = 4000
"""Characters: MLflow takes 5,000 in a version's tag."""


@dataclass(frozen=True)
class Judged:
    """A verdict, how many fresh samples it rests on, and the gain of accuracy on these."""

    verdict: Verdict
    fresh: int
    gain: float


JUDGED = as_json("judged", Judged)


@dataclass(frozen=True)
class Promoted:
    """What became of a challenger."""

    version: int
    champion: int
    promoted: bool
    outcome: str
    reason: str

    @property
    def words(self) -> str:
        """One sentence."""
        if self.promoted:
            return f"version {self.version} was promoted: {self.reason}"
        return f"version {self.version} was not promoted ({self.outcome}): {self.reason}"


@flow(name="promote")
def promote(
    settings_path: str,
    version: int | None = None,
    why: str | None = None,
    who: str = "",
    *,
    approved: bool = True,
) -> Promoted:
    """Promote a version if the gate lets it, or because a person says why.

    Where `[gate] approval` is manual, to run this is to approve the verdict on record. A verdict
    against another champion than today's says nothing: the version is judged again, and waits.

    Args:
        settings_path: the model's TOML file.
        version: the version; by default the one with the alias `challenger`.
        why: a person's reason. With it a refused, inconclusive or rolled-back version is promoted
            too; it must still load.
        who: the person who asks for it, for the record.
        approved: false where no person asks for it.

    Raises:
        RegistryError: no such version, no challenger, or files that do not load.
    """
    return promote_on(
        Registry(load_settings(Path(settings_path))), version, why, who, approved=approved
    )


def promote_on(
    registry: Registry,
    version: int | None = None,
    why: str | None = None,
    who: str = "",
    *,
    approved: bool = True,
) -> Promoted:
    """Do what `promote` does, on a record."""
    settings, now = registry.settings, registry.now()
    if registry.observe_moves(now) is not None:
        show_in_prefect(registry)
    champion = registry.champion()
    candidate = registry.challenger() if version is None else registry.version(version)
    number = candidate.number
    if candidate.number == champion.number:
        registry.end_challenge(candidate)
        return Promoted(number, champion.number, True, "promote", "it is champion already")
    late = late_labels(registry, candidate)
    judged_now = (
        candidate.verdict is None
        or candidate.verdict_against != champion.number
        or labels_came(registry, candidate, champion, late)
    )
    if judged_now:
        # never judged, or since then labels came or the champion moved: a verdict is against one
        candidate = judge_version(registry, settings, candidate, champion, late)
    outcome = candidate.verdict or ""
    reason = _since_its_parent(candidate, champion) + candidate.tags.get("verdict_reason", "")
    if why is None and candidate.rolled_back:
        reason = (
            f"it was rolled back ({candidate.tags.get('reason', '')}); only a person may promote"
            f" it: {_by_hand(candidate)}"
        )
        return Promoted(number, champion.number, False, "rolled back", reason)
    if why is None and outcome != Outcome.PROMOTE.value:
        return Promoted(number, champion.number, False, outcome, reason)
    by_hand = settings.gate.approval == "manual"
    if why is None and by_hand and (judged_now or not approved):
        return _wait(registry, candidate, champion, reason)
    registry.network(candidate)  # it must load before anything moves
    try:
        registry.move_champion(
            candidate,
            by="a person" if why or by_hand else "the gate",
            why=why or reason,
            now=now,
            who=who,
            instead_of=champion.number,
        )
    except ChampionMovedError:  # while the two were judged: judge again
        return promote_on(registry, number, why, who, approved=approved)
    show_in_prefect(registry)
    log(settings, "promoted", version=number, before=champion.number, who=who, reason=why or reason)
    return Promoted(number, champion.number, True, outcome, why or reason)


def _since_its_parent(candidate: Version, champion: Version) -> str:
    """Say that the champion which a version was tuned from serves no more; empty if it does."""
    if candidate.parent in (None, champion.number):
        return ""
    return (
        f"version {candidate.number} was tuned from version {candidate.parent}, which is champion"
        f" no more, and was judged against version {champion.number}: "
    )


def way_on(candidate: Version, outcome: Outcome) -> str:
    """Say what a person can do about a verdict; empty where the gate lets the version pass."""
    if outcome is Outcome.PROMOTE:
        return ""
    if outcome is Outcome.INCONCLUSIVE and candidate.adapted:
        return f"it is judged again when they are here; before, {_by_hand(candidate)}"
    other = "" if outcome is Outcome.INCONCLUSIVE else " or change [training]"
    return f"to go on, label more{other} and run `sustain retrain`, or {_by_hand(candidate)}"


def _by_hand(candidate: Version) -> str:
    return f"`sustain promote --version {candidate.number} --why REASON` promotes it all the same"


def _wait(registry: Registry, candidate: Version, champion: Version, reason: str) -> Promoted:
    """Leave a challenger that passed under its alias until a person approves it."""
    if registry.alias(CHALLENGER) != candidate.number:
        registry.set_alias(CHALLENGER, candidate)
    how = (
        f"it passed and waits for approval: run `sustain promote --version {candidate.number}` or"
        f" the deployment promote, or move the alias {CHAMPION!r} to it in MLflow's UI"
    )
    return Promoted(candidate.number, champion.number, False, WAITING, f"{reason}; {how}")


def judge_version(
    registry: Registry,
    settings: Settings,
    candidate: Version,
    champion: Version,
    late: Mapping[str, str],
) -> Version:
    """Let both answer the same held-out samples, judge, and write the verdict on the version."""
    before = _judged_before(registry, settings, candidate, champion)
    stated = (asdict(settings.gate), settings.checks.slices, before, sorted(late.items()))
    judged = registry.once(
        JUDGED,
        (candidate.tags["digest"], champion.tags["digest"], *stated),
        lambda: _judge(registry, settings, candidate, champion, late, before),
    )
    _record(registry, candidate, champion, judged)
    return registry.version(candidate.number)


def _judge(
    registry: Registry,
    settings: Settings,
    candidate: Version,
    champion: Version,
    late: Mapping[str, str],
    judged_before: int,
) -> Judged:
    ours, theirs = registry.network(candidate), registry.network(champion)
    # by name, since two versions may order their classes differently, or know others
    classes = tuple(dict.fromkeys((*ours.config.classes, *theirs.config.classes)))
    fresh, old = holdouts(registry, candidate, champion, classes, ours.config.preprocessing, late)
    told = _told(registry, candidate, champion) if settings.checks.slices else {}
    pairs = {
        name: Pair(
            _answer(theirs, data, classes),
            _answer(ours, data, classes),
            {column: _values(data, told, column) for column in settings.checks.slices},
        )
        for name, data in (("fresh", fresh), ("old", old))
    }
    verdict = judge(
        pairs["fresh"],
        pairs["old"],
        settings.gate,
        classes=classes,
        judged_before=judged_before,
        # in a replay nothing is timed, and nothing was registered that could come back otherwise
        serving=_serving(registry, candidate, ours, theirs) if registry.live else None,
    )
    if registry.live:
        _log_scores(registry, candidate, champion, pairs, classes)
        _log_charts(registry, candidate, champion, pairs, fresh, classes)
    new = pairs["fresh"]
    gain = new.challenger.accuracy - new.champion.accuracy if len(new) else 0.0
    return Judged(verdict, len(fresh), gain)


def _serving(registry: Registry, candidate: Version, ours: Network, theirs: Network) -> Serving:
    """Measure the candidate as it came back, on samples whose answers its reference has kept."""
    kept = registry.reference(candidate).regimes[0].features
    names = kept.sample_ids[:COMPARED]
    pixels = registry.memory(candidate).pixels(names, ours.config.preprocessing)
    found = [place for place, name in enumerate(names) if name in pixels]
    pictures = torch.stack([pixels[names[place]] for place in found])
    return Serving(
        bytes=weight_bytes(ours),
        latency_ratio=latency_ratio(ours, theirs, pictures[:TIMED]),
        round_trip=largest_change(ours, pictures, kept.probabilities[found]),
    )


def _told(registry: Registry, candidate: Version, champion: Version) -> dict[str, dict[str, Any]]:
    """Return sample id to the user's own columns, of all samples that either remembers."""
    return {
        name: about.get("metadata", {})
        for version in (champion, candidate)
        for memory in (registry.memory(version),)
        for name, about in zip(
            memory.table["sample_id"], memory.about(list(memory.table["sample_id"])), strict=True
        )
    }


def _values(
    data: LabelledPictures, told: Mapping[str, Mapping[str, Any]], column: str
) -> tuple[str | None, ...]:
    found = (told[name].get(column) for name in data.sample_ids)
    return tuple(number_text(v) if isinstance(v, float) else v for v in found)


def holdouts(
    registry: Registry,
    candidate: Version,
    champion: Version,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    late: Mapping[str, str],
) -> tuple[LabelledPictures, LabelledPictures]:
    """Return the fresh and the old hold-out of a candidate, neither ever trained on by anybody.

    Fresh is what the candidate's lineage holds out and the champion's does not know; the rest is
    old. Both come from the versions' memories, so they are there when the feed's data is gone.
    `late` labels, by sample id, are of held-out samples that had none when they were remembered.
    """
    memory: Memory = registry.memory(candidate).told(late)
    task = registry.config(candidate).task
    held = memory.labelled(Role.HOLDOUT, classes, preprocessing, task)
    known = set(registry.learned(champion)["sample_id"])
    is_old = [name in known for name in held.sample_ids]
    fresh = held.take([i for i, old in enumerate(is_old) if not old])
    old = held.take([i for i, old in enumerate(is_old) if old])
    # what the candidate's parent remembers and the candidate no longer does is old, too
    earlier = registry.memory(champion).labelled(Role.HOLDOUT, classes, preprocessing, task)
    have = set(held.sample_ids)
    rest = earlier.take([i for i, name in enumerate(earlier.sample_ids) if name not in have])
    return fresh, join([old, rest])


def late_labels(registry: Registry, candidate: Version) -> dict[str, str]:
    """Gather what labels tell by now about the held-out pictures of a version made without any."""
    if not candidate.adapted:
        return {}
    batches, config = registry.view.batches(), registry.config(candidate)
    return held_out_labels(registry.view.labels(batches, config.classes, config.task))


def labels_came(
    registry: Registry, candidate: Version, champion: Version, late: Mapping[str, str]
) -> bool:
    """Whether as many labels came as the verdict on a version made without labels asked for.

    Not at each label: a gate that is asked often says yes by chance.
    """
    waits = candidate.adapted and candidate.verdict_against == champion.number
    if not waits or candidate.verdict != Outcome.INCONCLUSIVE.value:
        return False
    missing = ceil(candidate.number_of("verdict_missing") * HOLDOUT_SHARE)
    known = set(registry.learned(champion)["sample_id"])
    if len(late.keys() - known) < missing:  # its memory need not be fetched
        return False
    table = registry.memory(candidate).told(late).table
    held = table[(table["role"] == Role.HOLDOUT.value) & table["label"].notna()]
    fresh = set(held["sample_id"]) - known
    return len(fresh) >= candidate.number_of("verdict_fresh") + missing


def _answer(network: Network, data: LabelledPictures, classes: Sequence[str]) -> Answers:
    """Let a network answer in terms of `classes`, which hold all of its own."""
    found, task = answer(network, data), network.config.task
    place = np.array([classes.index(name) for name in network.config.classes])
    probabilities = np.zeros((len(data), len(classes)), dtype=np.float32)
    probabilities[:, place] = found.probabilities
    predicted = task.predicted(torch.from_numpy(probabilities)).numpy()
    return Answers(predicted, found.labels, probabilities, task)


def _log_scores(
    registry: Registry,
    candidate: Version,
    champion: Version,
    pairs: Mapping[str, Pair],
    classes: Sequence[str],
) -> None:
    """Put accuracy and confusions or errors on the training run, and a table by class."""
    scores = {
        name: {
            f"version {version.number}": {
                "accuracy": answers.accuracy,
                "score": float(answers.scores.mean()),
                **answers.details(classes),
            }
            for version, answers in ((champion, pair.champion), (candidate, pair.challenger))
        }
        for name, pair in pairs.items()
        if len(pair)
    }
    text = json.dumps({"classes": classes, **scores}, indent=2)
    registry.log_text(candidate.run_id, text, f"scores-against-{champion.number}.json")
    table = per_class(pairs, classes)
    csv = table.to_csv(index=False).encode(errors="backslashreplace").decode()
    registry.log_text(candidate.run_id, csv, f"per-class-against-{champion.number}.csv")
    registry.tag(candidate, worst_classes=worst_classes(table)[:MAX_TAG])


def _log_charts(
    registry: Registry,
    candidate: Version,
    champion: Version,
    pairs: Mapping[str, Pair],
    fresh: LabelledPictures,
    classes: Sequence[str],
) -> None:
    """Put the confusions before and after, and what is still wrong, on the training run."""
    from flows.charts import draw_confusions, draw_still_wrong  # matplotlib takes a second

    with tempfile.TemporaryDirectory(prefix="sustain-") as name:
        folder = Path(name)
        draw_confusions(folder / f"confusion-against-{champion.number}.png", pairs, classes)
        wrong = folder / f"still-wrong-against-{champion.number}.png"
        draw_still_wrong(wrong, fresh.pixels, pairs["fresh"], classes)
        for path in sorted(folder.iterdir()):
            registry.log_file(candidate.run_id, path)


def _judged_before(
    registry: Registry, settings: Settings, candidate: Version, champion: Version
) -> int:
    """Count how often this fresh hold-out has judged already, from the record.

    A hold-out that was too small for a promotion has not judged.
    """
    least = settings.gate.min_fresh
    return sum(
        str(champion.number) in v.tags.get("judged_against", "").split(",")
        and (v.number != candidate.number or v.adapted)
        and v.number_of("verdict_fresh", least) >= least
        for v in registry.versions()
    )


def _record(registry: Registry, candidate: Version, champion: Version, judged: Judged) -> None:
    """Write the verdict on the version; the tag `verdict` comes last and makes it count."""
    verdict = judged.verdict
    registry.log_text(
        candidate.run_id,
        json.dumps(asdict(verdict), indent=2),
        f"verdict-against-{champion.number}.json",
    )
    reason = verdict.reason[:MAX_TAG]
    if registry.live:  # in a replay nobody goes on
        then = way_on(candidate, verdict.outcome)
        reason = "; ".join(filter(None, (reason, then)))
        told = story(registry, candidate, verdict, champion, judged.gain, then)
        registry.describe(candidate, told)
    before = [one for one in candidate.tags.get("judged_against", "").split(",") if one]
    registry.tag(
        candidate,
        judged_against=",".join(dict.fromkeys([*before, str(champion.number)])),
        **(
            {"verdict_fresh": str(judged.fresh), "verdict_missing": str(verdict.missing)}
            if candidate.adapted  # what it takes to judge it again
            else {}
        ),
        gain=f"{judged.gain:.4f}",
        verdict_reason=reason,
        verdict_against=str(champion.number),
        verdict=verdict.outcome.value,
    )
