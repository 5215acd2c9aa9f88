"""One check: a batch against the champion, measured in one forward pass and put on record.

A check counts once its MLflow run is finished. What earlier checks found is read from their runs,
so that the alarm over the stream, and the batches that were too small by themselves, need no state
of their own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows.digest import digest
from flows.feed import Batch, BatchNotReady
from flows.fresh import Labels
from flows.intake import BatchData, TooManyBad
from flows.kept import SEEN, as_json
from flows.records import CheckKey, CheckRecord, RegistryError, Version, of_batches_now
from flows.registry import Registry
from flows.settings import Settings
from flows.shadow import Shadow, compare_answers
from flows.shards import Seen, see_batch, see_read
from flows.words import count, slug
from monitoring.accuracy import Estimate, Track, estimate_accuracy, settle, track
from monitoring.detectors import Detection, detect_drift
from monitoring.explain import farthest, moved_dimensions
from monitoring.features import FeatureTable, Kind, concatenate
from monitoring.findings import findings
from monitoring.policy import Action, Decision, Evidence
from monitoring.reference import Reference
from monitoring.sequential import Running, StreamEvidence, StreamState, bets, step
from monitoring.slices import MAX_VALUES, Slice, check_slices, joined, values_of
from monitoring.triggers import rank_of
from sft.dataset import Role, role_of
from sft.memory import Memory
from sft.models import Network
from sft.pictures import thumbnail
from sft.tasks import rightly

POOLED = "pooled"
"""The action of a batch that was too small by itself: it is tested with the following ones."""
FAILED = "failed"
DISTANCE = "drift.distance"
NEARLY_ALL = 0.9
BATCHES_OF_REFERENCE = 10
MAX_PAST = 200
"""Earlier checks that a report draws."""
LATER_WORDS = (
    "this page was made before labels of the batch were compared with its answers: what they say"
    " stands in `sustain status` and on the check's run in MLflow, as accuracy.settled"
)


@dataclass(frozen=True)
class Against:
    """The champion that batches are checked against, loaded once.

    Samples in `used` (learned from, or part of the reference) are left out of a check: the champion
    is overconfident on the first, and the second are no news to it. The challenger in the `shadow`,
    if there is one, answers beside it.
    """

    version: Version
    network: Network
    reference: Reference
    memory: Memory
    used: frozenset[str]
    shadow: Shadow | None = None


@dataclass
class Past:
    """The newest finished checks against the champion, in order, and where they leave the stream.

    Each check puts on record where the stream stood after it, so that those before the first of
    these need not be read. A batch that grew counts once in it, as it was last; not at all the one
    that is `left_out`.
    """

    settings: Settings
    records: list[CheckRecord]
    left_out: str = ""
    running: Running = field(init=False, default_factory=Running)

    def __post_init__(self) -> None:
        """Fold the evidence once."""
        first = self.records[0] if self.records else None
        known = first.tags.get("sustain.running") if first and first.number > 1 else None
        if known:
            self.running = Running.from_json(known)
        for record in self.current:
            if not (known and record is first):
                self._add_up(record)

    @property
    def current(self) -> list[CheckRecord]:
        """The checks of what batches are now, without the one that is left out."""
        return [r for r in of_batches_now(self.records) if r.key.batch_id != self.left_out]

    def append(self, record: CheckRecord) -> None:
        """Add the newest check."""
        grew = self._knows(record.key.batch_id)
        self.records.append(record)
        if grew:
            self.running = Past(self.settings, self.records).running
        else:
            self._add_up(record)

    def before(self, batch_id: str) -> Past:
        """Give what came before a batch, which may have been checked when it was smaller."""
        return Past(self.settings, self.records, batch_id) if self._knows(batch_id) else self

    def _knows(self, batch_id: str) -> bool:
        return any(record.key.batch_id == batch_id for record in self.records)

    @property
    def number(self) -> int:
        """The number of the next check."""
        return 1 + max([len(self.records), *(record.number for record in self.records[-1:])])

    def place(self, running: Running) -> dict[str, str]:
        """Say where the next check stands in the stream, and what it leaves to the one after it."""
        return {"sustain.number": str(self.number), "sustain.running": running.to_json()}

    def step(self, evidence: StreamEvidence) -> tuple[Running, StreamState]:
        """Say where the stream would stand with one more batch; nothing is added."""
        return step(self.running, evidence, self.settings.stream, self.settings.detection.alpha)

    def _add_up(self, record: CheckRecord) -> None:
        if text := record.tags.get("sustain.stream"):
            self.running, _ = self.step(StreamEvidence.from_json(text))

    @property
    def waiting(self) -> list[CheckRecord]:
        """The newest checks whose batches were too small by themselves, if any."""
        found: list[CheckRecord] = []
        for record in reversed(self.current):
            if record.action != POOLED:
                break
            found.append(record)
        return found[::-1]


@dataclass(frozen=True)
class Measured:
    """What a check found.

    `features` are those of all that was tested: of the batch, and of smaller ones before it.
    """

    features: FeatureTable
    detection: Detection
    stream: StreamState
    evidence: StreamEvidence
    estimate: Estimate
    slices: tuple[Slice, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """What a batch shows by itself, whatever came before; `evidence` as it stands on record."""

    detection: Detection
    evidence: str
    estimate: Estimate
    slices: tuple[Slice, ...]
    notes: tuple[str, ...]


FOUND = as_json("found", Found)


@dataclass(frozen=True)
class Checked:
    """One check's result; the figures are NaN when it failed or waits for more pictures."""

    batch_id: str
    champion: int
    samples: int
    quarantined: int
    p_value: float
    alarm: bool
    estimated: float
    reference: float
    regime: str
    action: str
    reason: str
    run_id: str


class Decides(Protocol):
    """What decides on a check's evidence; `flows.decisions.Decider`."""

    @property
    def name(self) -> str:
        """Names the fresh labels that it knows of: with others, decisions are made again."""
        ...

    def decide(self, evidence: Evidence) -> Decision:
        """Turn what a check measured into one action."""
        ...


def stamps_of(batches: Sequence[Batch], settings: Settings) -> list[str]:
    """Name the states of batches and of the settings that their checks may fail by."""
    stated = [asdict(part) for part in (settings.feed, settings.detection, settings.checks)]
    named = digest(stated)[:8]
    return [f"{batch.stamp}-{named}" for batch in batches]


def that_rang(checks: Iterable[CheckRecord]) -> list[CheckRecord]:
    """Choose, of checks in order, those that rang, each with the small batches tested with it."""
    found: list[CheckRecord] = []
    waiting: list[CheckRecord] = []
    for check in checks:
        waiting.append(check)
        if check.action == POOLED:
            continue
        found += waiting if check.alarm else []
        waiting = []
    return found


def is_tested(record: CheckRecord) -> bool:
    """Whether a check tested something: no batch that waits, none that was all known."""
    return "drift.p_value" in record.metrics


def load_champion(registry: Registry, champion: Version, shadow: Shadow | None = None) -> Against:
    """Load all that checks against the champion need."""
    learned = registry.learned(champion)
    reference = registry.reference(champion)
    used = frozenset(learned[learned["role"] != Role.HOLDOUT.value]["sample_id"]).union(
        *(regime.features.sample_ids for regime in reference.regimes)
    )
    network, memory = registry.network(champion), registry.memory(champion)
    return Against(champion, network, reference, memory, used, shadow)


def _named(parameters: dict[str, Any]) -> str:
    """Name a run of the task by its batch. In a text Prefect would fill in what stands in {}."""
    return f"check {parameters['batch'].id}"


@task(
    name="check",
    cache_policy=NO_CACHE,
    task_run_name=_named,  # type: ignore[arg-type]  # Prefect's protocol fits no plain function
)
def check(
    registry: Registry,
    settings: Settings,
    against: Against,
    batch: Batch,
    past: Past,
    decider: Decides,
) -> Checked:
    """Check one batch and put it on record: features, detection, estimate, decision, report.

    A batch that cannot be read or tested is recorded as failed, and tried again when it changes or
    the settings do.
    """
    champion, past = against.version, past.before(batch.id)
    look = Look(registry, against, batch)
    key = CheckKey(champion.number, batch.id, batch.digest)
    run_id = registry.begin_check(key, *stamps_of([batch], settings))
    try:
        own = look_once(registry, look)
    except (BatchNotReady, TooManyBad) as error:  # other errors are the storage's: try again
        return _fail(registry, batch, champion, run_id, str(error), past)
    if own is None:
        reason = "The champion learned from every sample of the batch, or has it in its reference."
        none = Action.NONE.value
        return _without_test(registry, batch, champion, run_id, none, reason, 0, past)
    try:
        own.require_finite("batch")
    except ValueError as error:
        return _fail(registry, batch, champion, run_id, str(error), past)
    tested, notes = _with_waiting(registry, past, own)
    registry.log_features(run_id, own)
    if registry.live and look.seen.read.quarantined:
        registry.log_text(run_id, _quarantine(look.seen.read), "quarantine.csv")
    if len(tested) < settings.checks.min_batch:
        reason = (
            f"{count(range(len(tested)), 'picture')} in all, fewer than min_batch ="
            f" {settings.checks.min_batch}: tested together with the next batch."
        )
        return _without_test(registry, batch, champion, run_id, POOLED, reason, len(own), past)
    try:
        measured = measure(registry, against, tested, past, notes)
    except ValueError as error:  # such as a reference that is too small for alpha
        return _fail(registry, batch, champion, run_id, str(error), past)
    quarantined = len(look.seen.read.quarantined) if registry.live else 0
    metrics = _metrics(measured, len(own), quarantined) | _distance(measured.detection, past)
    shadow = against.shadow
    if shadow is not None and (theirs := look_once(registry, look, shadow)) is not None:
        config = against.network.config
        told, words = compare_answers(shadow, theirs, config, own, measured.estimate)
        metrics |= told
        measured = replace(measured, notes=(*measured.notes, words))
    decision = decider.decide(evidence_of(batch.id, metrics, settings))
    if registry.live:
        _log_report(registry, run_id, against, batch, look.seen, past, measured, decision)
    registry.chart(champion.number, metrics, step=past.number)
    registry.log(
        run_id,
        metrics=metrics,
        tags={
            "sustain.action": decision.action.value,
            "sustain.reason": decision.reason,
            **suppressed_tags(decision),
            "sustain.regime": measured.detection.regime,
            "sustain.stream": measured.evidence.to_json(),
            **past.place(past.step(measured.evidence)[0]),
            "sustain.fresh": decider.name,
            "sustain.notes": "; ".join(measured.notes)[:4000],
            "mlflow.note.content": decision.reason,
        },
    )
    registry.end_run(run_id)
    checked = Checked(
        batch_id=batch.id,
        champion=champion.number,
        samples=len(own),
        quarantined=quarantined,
        p_value=measured.detection.p_value,
        alarm=measured.detection.alarm,
        estimated=measured.estimate.value,
        reference=measured.estimate.reference,
        regime=measured.detection.regime,
        action=decision.action.value,
        reason=decision.reason,
        run_id=run_id,
    )
    if registry.live:
        _show_in_prefect(registry, checked)
    return checked


def measure(
    registry: Registry,
    against: Against,
    features: FeatureTable,
    past: Past,
    notes: Sequence[str] = (),
) -> Measured:
    """Measure what was seen of a batch, without deciding anything."""
    settings = registry.settings
    stated = (asdict(settings.detection), settings.checks.slices, features.sample_ids)
    found = registry.once(
        FOUND,
        (against.version.tags["digest"], *stated),
        lambda: find(settings, against.reference, features),
    )
    # what is on record is rounded: the same is added up now as later
    evidence = StreamEvidence.from_json(found.evidence)
    _, stream = past.step(evidence)
    return Measured(
        features=features,
        detection=replace(found.detection, alarm=stream.alarm),
        stream=stream,
        evidence=evidence,
        estimate=found.estimate,
        slices=found.slices,
        notes=(*notes, *found.notes),
    )


def find(settings: Settings, reference: Reference, features: FeatureTable) -> Found:
    """Hold a batch against the reference, by itself."""
    detection = detect_drift(reference, features, settings.detection)
    slices = check_slices(reference, features, settings.checks.slices, settings.detection)
    p_value = joined(detection.p_value, slices)
    return Found(
        detection=replace(detection, p_value=p_value),
        evidence=StreamEvidence(p_value, bets(reference, features)).to_json(),
        estimate=estimate_accuracy(reference, features),
        slices=slices,
        notes=(*_small_reference(reference, features), *findings(reference, features)),
    )


def suppressed_tags(decision: Decision) -> dict[str, str]:
    """Tell why a retraining was not made, and what that saved; empty where none was in question."""
    return {"sustain.suppressed": decision.suppressed or "", "sustain.saved": decision.saved}


def _small_reference(reference: Reference, features: FeatureTable) -> tuple[str, ...]:
    """Say when the stated rates rest on too little: a reference's own error is in every check."""
    if reference.n >= BATCHES_OF_REFERENCE * len(features):
        return ()
    words = (
        f"the reference has {reference.n} pictures, under {BATCHES_OF_REFERENCE} times the batch:"
        " false alarms may come more often than stated"
    )
    return (words,)


def stream_words(state: StreamState, settings: Settings) -> str:
    """Say what the alarm over the stream promises, and on what condition."""
    if settings.stream.method == "per_batch":
        return f"each batch by itself, at alpha {settings.detection.alpha:g}"
    return (
        f"at least {settings.stream.run_length:,} quiet batches lie between two false alarms on"
        f" average, if the reference represents them; strongest: {state.leading}"
    )


def evidence_on_record(record: CheckRecord, settings: Settings) -> Evidence:
    """Read what a check found, with the labels that came since."""
    return evidence_of(record.key.batch_id, record.metrics, settings)


def evidence_of(batch_id: str, metrics: Mapping[str, float], settings: Settings) -> Evidence:
    """Give what the policy decides on, from the figures that stand on record."""
    settled_n = int(metrics.get("accuracy.settled_n", 0))  # 0 again once labels are withdrawn
    return Evidence(
        batch_id=batch_id,
        alarm=metrics["drift.alarm"] > 0,
        p_value=metrics["drift.p_value"],
        alpha=metrics["drift.alpha"],
        estimated=metrics["accuracy.estimated"],
        reference=metrics["accuracy.reference"],
        reference_n=int(metrics.get("accuracy.reference_n", 0)),
        settled=metrics.get("accuracy.settled") if settled_n else None,
        settled_n=settled_n,
        settled_high=metrics.get("accuracy.settled_high") if settled_n else None,
        novelty=metrics["accuracy.novelty"],
        believable=metrics["accuracy.believable"] > 0,
        estimated_high=metrics.get("accuracy.estimated_high", metrics["accuracy.estimated"]),
        stream=_stream_short(settings),
        distance=metrics.get(DISTANCE),
        distance_rank=metrics.get(f"{DISTANCE}_rank"),
    )


def settle_check(
    registry: Registry, record: CheckRecord, labels: Labels, *, asked: bool
) -> float | None:
    """Compare a check's predictions with the labels that came; return the true accuracy.

    Args:
        registry: of the model.
        record: the check.
        labels: all labels.
        asked: a list of wanted labels was written: see `representative`.
    """
    batch_labels = labels.of_batch(record.key.batch_id)
    settled = {"sustain.settled": labels_digest(batch_labels)}
    try:
        features = registry.features(record)
    except RegistryError:  # it is gone for good: nothing can be settled any more
        registry.log(record.run_id, tags=settled)
        return None
    config = registry.config(registry.version(record.key.champion))
    counted = representative(features.sample_ids, batch_labels) if asked else batch_labels
    rows = [i for i, name in enumerate(features.sample_ids) if name in counted]
    accuracy, metrics = None, {"accuracy.settled_n": 0.0}
    if rows:
        labelled = features.take(rows)
        truth = [batch_labels[name] for name in labelled.sample_ids]
        right = rightly(config.task, labelled.probabilities, truth, config.classes)
        estimated = record.metrics.get("accuracy.estimated", float("nan"))
        if features.kind is Kind.REGRESSION:  # what stands there is the reference's accuracy
            estimated = float("nan")
        result = settle(estimated, right)
        accuracy = result.accuracy
        metrics = {
            "accuracy.settled": result.accuracy,
            "accuracy.settled_low": result.low,
            "accuracy.settled_high": result.high,
            "accuracy.settled_n": float(result.n),
            "accuracy.estimate_error": result.error,
            **_settled_slices(registry.settings, labelled, right),
        }
    registry.log_anew(record.run_id, metrics, always="accuracy.settled_n")
    registry.log(record.run_id, tags=settled)
    return accuracy


def representative(sample_ids: Sequence[str], labels: Mapping[str, str]) -> set[str]:
    """Name the labelled samples that stand for their batch although some labels were asked for.

    The list chooses what to learn from by how new it looks, and draws what to judge on at random:
    accuracy on the first is not the batch's. So only the second count, unless nearly all samples
    that may be learned from have a label.
    """
    training = [name for name in sample_ids if role_of(name) is Role.TRAIN]
    told = [name for name in training if name in labels]
    if len(told) >= NEARLY_ALL * len(training):
        return set(labels)
    return set(labels) - set(training)


def labels_digest(labels: Mapping[str, str]) -> str:
    """Name a set of labels of a batch; "" for none."""
    return digest(sorted(labels.items()))[:16] if labels else ""


def estimate_track(records: Sequence[CheckRecord]) -> Track:
    """Say how far off the estimates were where labels came."""
    return track(
        [
            (r.metrics["accuracy.estimate_error"], int(r.metrics["accuracy.settled_n"]))
            for r in records
            if "accuracy.estimate_error" in r.metrics and r.metrics["accuracy.settled_n"] > 0
        ]
    )


# ---- inside


@dataclass(frozen=True)
class Look:
    """A look at a batch through the eyes of the champion; its pictures are read once, if at all."""

    registry: Registry
    against: Against
    batch: Batch

    @cached_property
    def seen(self) -> Seen:
        """Let champion and challenger see what is news to the champion."""
        against, shadow = self.against, self.against.shadow
        networks = [against.network, *([] if shadow is None else [shadow.network])]
        return see_batch(self.batch, self.registry.settings, networks, against.used)

    def features(self, shadow: Shadow | None) -> FeatureTable | None:
        """Give what the champion or the challenger sees; None if nothing is news."""
        against = self.against
        if self.registry.live:
            tables, place = self.seen.tables, int(shadow is not None)
        else:  # which reads a batch once for all policies
            read = self.registry.read(self.batch, against.network.config.preprocessing)
            network = against.network if shadow is None else shadow.network
            tables, place = see_read(read, [network], against.used).tables, 0
        return tables[place] if tables else None


def look_once(registry: Registry, look: Look, shadow: Shadow | None = None) -> FeatureTable | None:
    """Look at a batch, or let the challenger look; a replay does it once for all policies."""
    batch, against = look.batch, look.against
    digests = [against.version.tags["digest"]]
    digests += [] if shadow is None else [shadow.version.tags["digest"]]
    stated = (batch.id, batch.digest, asdict(registry.settings.feed))
    return registry.once(SEEN, (digests, *stated), lambda: look.features(shadow))


def _quarantine(read: BatchData) -> str:
    rows = [(q.sample_id, q.reason) for q in read.quarantined]
    return str(pd.DataFrame(rows, columns=["sample_id", "reason"]).to_csv(index=False))


def _with_waiting(
    registry: Registry, past: Past, own: FeatureTable
) -> tuple[FeatureTable, tuple[str, ...]]:
    """Put a batch together with those that wait; say which those are, and which are lost."""
    tables, names, notes = [], [], []
    for record in past.waiting:
        name = record.key.batch_id
        try:
            tables.append(registry.features(record))
            names.append(name)
        except RegistryError:
            notes.append(f"the features of {name}, which waited, are gone")
    if not tables:
        return own, tuple(notes)
    samples = sum(map(len, tables))
    words = f"tested together with {samples} pictures of {', '.join(names)}, too few by themselves"
    return concatenate([*tables, own]), (words, *notes)


def _stream_short(settings: Settings) -> str:
    if settings.stream.method == "per_batch":
        return ""
    return f"at most one false alarm in {settings.stream.run_length:,} quiet batches on average"


def _settled_slices(
    settings: Settings,
    features: FeatureTable,
    right: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
) -> dict[str, float]:
    """Give the true accuracy of each slice."""
    found = {}
    for column in settings.checks.slices:
        if column in features.metadata.columns:
            told = values_of(features, column)
            for value in told.value_counts().index[:MAX_VALUES]:
                of_slice = right[(told == value).to_numpy()]
                found[f"slice.{_metric_name(column, value)}.settled"] = float(of_slice.mean())
    return found


def _metric_name(column: str, value: str) -> str:
    """Write a slice in the few characters that a metric's name may have."""
    wanted = f"{column} {value}"
    name = "".join(c if c.isascii() and (c.isalnum() or c in "_-. ") else "_" for c in wanted)[:150]
    if name == wanted:
        return name
    return f"{name} {digest(wanted)[:6]}"


def _metrics(measured: Measured, samples: int, quarantined: int) -> dict[str, float]:
    detection, estimate = measured.detection, measured.estimate
    return {
        "drift.p_value": float(detection.p_value),
        "drift.alarm": float(detection.alarm),
        "drift.alpha": float(detection.alpha),
        "drift.parts": float(len(detection.parts)),
        "drift.stream": float(measured.stream.value),
        "drift.stream_threshold": float(measured.stream.threshold),
        "drift.slices_alarmed": float(sum(row.alarm for row in measured.slices)),
        "accuracy.estimated": float(estimate.value),
        "accuracy.estimated_low": float(estimate.low),
        "accuracy.estimated_high": float(estimate.high),
        "accuracy.reference": float(estimate.reference),
        "accuracy.reference_n": float(estimate.reference_n),
        "accuracy.novelty": float(estimate.novelty),
        "accuracy.believable": float(estimate.believable),
        "batch.samples": float(samples),
        "batch.tested": float(len(measured.features)),
        "batch.quarantined": float(quarantined),
    }


def _distance(detection: Detection, past: Past) -> dict[str, float]:
    """Tell how far the batch is, and of how many of the last checks' distances that is more."""
    if (distance := detection.distance) is None:
        return {}
    before = [r.metrics[DISTANCE] for r in past.current if DISTANCE in r.metrics]
    rank = rank_of(distance, before)
    return {DISTANCE: distance} | ({} if rank is None else {f"{DISTANCE}_rank": rank})


def _log_report(
    registry: Registry,
    run_id: str,
    against: Against,
    batch: Batch,
    seen: Seen,
    past: Past,
    measured: Measured,
    decision: Decision,
) -> None:
    from monitoring.report import Page, write_report  # Evidently takes seconds to import
    from monitoring.report import Past as Drawn

    settings = registry.settings
    title = f"Batch {batch.id} against version {against.version.number}"
    page = Page(
        title=title,
        reference=against.reference,
        batch=measured.features,
        detection=measured.detection,
        estimate=measured.estimate,
        decision=decision,
        stream_words=stream_words(measured.stream, settings),
        stream_value=measured.stream.value,
        stream_threshold=measured.stream.threshold,
        past=tuple(
            Drawn(
                batch_id=record.key.batch_id,
                at=record.started,
                p_value=record.metrics["drift.p_value"],
                stream=record.metrics["drift.stream"],
                alarm=record.alarm,
                estimated=record.metrics["accuracy.estimated"],
                low=record.metrics["accuracy.estimated_low"],
                high=record.metrics["accuracy.estimated_high"],
                settled=record.settled[0] if record.settled else None,
            )
            for record in past.records
            if "drift.stream" in record.metrics
        )[-MAX_PAST:],
        strays=_strays(against, seen, measured.features),
        dimensions=tuple(
            f"embedding {moved.index + 1} {moved.move:+.1f} sd"
            for moved in moved_dimensions(against.reference, measured.features)
        ),
        slices=measured.slices,
        error_words=estimate_track(past.records).words,
        later_words=LATER_WORDS,
        notes=measured.notes,
        min_drop=settings.policy.min_drop,
    )
    with tempfile.TemporaryDirectory(prefix="sustain-") as name:
        path = Path(name) / "report.html"
        write_report(
            path,
            page,
            workspace=settings.workspace,
            project=registry.name,
            run_key=f"{against.version.number} {batch.id} {batch.digest}",
        )
        registry.log_file(run_id, path)


def _strays(
    against: Against, seen: Seen, features: FeatureTable
) -> tuple[tuple[str, bytes, str, bytes, float], ...]:
    """Give the farthest pictures beside the nearest ones that the reference has."""
    found = farthest(against.reference, features)
    pixels = seen.pictures({stray.sample_id for stray in found} & {*seen.read.samples["sample_id"]})
    preprocessing = against.network.config.preprocessing
    known = against.memory.pixels([stray.nearest_id for stray in found], preprocessing)
    return tuple(
        (
            stray.sample_id,
            thumbnail(pixels[stray.sample_id]),
            stray.nearest_id,
            thumbnail(known[stray.nearest_id]) if stray.nearest_id in known else b"",
            stray.distance,
        )
        for stray in found
        if stray.sample_id in pixels  # the others came with an earlier batch
    )


def _show_in_prefect(registry: Registry, checked: Checked) -> None:
    run = registry.run_url(checked.run_id)
    report = registry.run_url(checked.run_id, artifact="report.html")
    create_markdown_artifact(
        key=f"check-{slug(registry.name)}",
        description=f"{checked.batch_id}: {checked.action}",
        markdown=(
            f"## {checked.action}: `{checked.batch_id}` against version {checked.champion}\n\n"
            f"{checked.reason}\n\n"
            "| | |\n|---|---|\n"
            f"| samples | {checked.samples} ({checked.quarantined} quarantined) |\n"
            f"| p-value | {checked.p_value:.3g} |\n"
            f"| accuracy, estimated | {checked.estimated:.3f} |\n"
            f"| accuracy, reference | {checked.reference:.3f} |\n"
            f"| nearest regime | {checked.regime} |\n\n"
            f"[Drift report]({report}) · [check in MLflow]({run}) ·"
            f" [version {checked.champion}]({registry.version_url(checked.champion)})\n"
        ),
    )


def _fail(
    registry: Registry, batch: Batch, champion: Version, run_id: str, reason: str, past: Past
) -> Checked:
    tags = {"sustain.action": FAILED, "sustain.reason": reason}
    registry.log(run_id, tags=tags | past.place(past.running))
    registry.end_run(run_id, failed=True)
    return _unmeasured(batch, champion, run_id, FAILED, reason)


def _without_test(
    registry: Registry,
    batch: Batch,
    champion: Version,
    run_id: str,
    action: str,
    reason: str,
    samples: int,
    past: Past,
) -> Checked:
    """Put a check on record that tested nothing."""
    tags = {"sustain.action": action, "sustain.reason": reason, "mlflow.note.content": reason}
    metrics = {"batch.samples": float(samples)}
    registry.log(run_id, metrics=metrics, tags=tags | past.place(past.running))
    registry.end_run(run_id)
    return replace(_unmeasured(batch, champion, run_id, action, reason), samples=samples)


def _unmeasured(batch: Batch, champion: Version, run_id: str, action: str, reason: str) -> Checked:
    """Describe a check without figures."""
    nan = float("nan")
    return Checked(
        batch_id=batch.id,
        champion=champion.number,
        samples=0,
        quarantined=0,
        p_value=nan,
        alarm=False,
        estimated=nan,
        reference=nan,
        regime="",
        action=action,
        reason=reason,
        run_id=run_id,
    )
