"""Tells people what needs them, each thing once.

What there is to tell follows from the record: a flow that was killed before it told is made good by
the next one. A thing is marked as told just before the message goes out, and unmarked when nobody
could be reached; killed between the two, one message is lost rather than sent twice (the history
and the reports have it all the same).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from flows.records import CHALLENGER, CHAMPION, CheckRecord, Version
from flows.registry import Registry
from flows.settings import BLOCK, ENVIRONMENT, Settings, load_settings
from monitoring.policy import Action
from sft.gate import Outcome

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import FlowRun, State

LOOK_BACK = timedelta(days=7)
"""What is older is no news: else the first notification ever would tell the whole history."""


class NotifyError(RuntimeError):
    """A message cannot be sent; the message names the receiver and the way out."""


@dataclass(frozen=True)
class Event:
    """Something that a person should know.

    Attributes:
        kind: one of NOTIFY_EVENTS.
        mark: what it is called on the record, as `promoted 2026-11-22T…`: told once.
        on: the version, or the check, that it is about.
        title, body: for the message.
    """

    kind: str
    mark: str
    on: Version | CheckRecord
    title: str
    body: str


class Receiver(Protocol):
    """Takes a message to people."""

    def notify(self, body: str, title: str) -> bool:
        """Send; return whether it arrived."""
        ...


def tell(registry: Registry, settings: Settings, now: datetime) -> tuple[str, ...]:
    """Send a message for each event that was not told yet; return what could not be sent, in words.

    Args:
        registry: the record.
        settings: section [notify].
        now: the time.
    """
    if not settings.notify.to:
        return ()
    problems: list[str] = []
    for event in untold(registry, settings, now):
        _mark(registry, event, event.mark)
        failed = send(settings, event.title, event.body)
        problems += failed
        if len(failed) == len(settings.notify.to):  # nobody knows: the next flow tries again
            _mark(registry, event, "")
    return tuple(dict.fromkeys(problems))


def untold(registry: Registry, settings: Settings, now: datetime) -> list[Event]:
    """List what was not told yet, oldest first."""
    since = now - LOOK_BACK
    versions = [v for v in registry.versions() if "digest" in v.tags]
    found = [*_of_versions(registry, settings, versions, since), *_of_checks(registry, since)]
    wanted = [e for e in found if e.kind in settings.notify.events]
    return [e for e in wanted if _tags(e.on).get(_tag(e)) != e.mark]


def send(settings: Settings, title: str, body: str) -> list[str]:
    """Send a message to every receiver; return those that it did not reach, in words."""
    failed = []
    for name in settings.notify.to:
        try:
            reached = _receiver(name).notify(body=body, title=title)
        except NotifyError as error:
            failed.append(str(error))
            continue
        except Exception as error:  # noqa: BLE001 - no messenger may stop a flow
            failed.append(f"{name} could not be told ({type(error).__name__})")  # no secrets
            continue
        if not reached:
            failed.append(f"{name} did not take the message: is its address right?")
    return failed


def tell_of_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Tell that a flow failed, unless the run of it before failed in the same way.

    For Prefect's `on_failure` and `on_crashed`.
    """
    settings = load_settings(Path(str(flow_run.parameters["settings_path"])))
    if not settings.notify.to or "failed" not in settings.notify.events:
        return
    said = state.message or state.name or "no message"
    if _failed_before(flow_run, said):
        return
    name = settings.model.name
    send(settings, f"{name}: {flow.name} failed", f"The flow {flow.name} of {name} failed: {said}")


def _failed_before(run: FlowRun, said: str) -> bool:
    """Whether the newest ended run of the same flow and settings failed with the same words."""
    from prefect import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowFilterId, FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(id=FlowFilterId(any_=[run.flow_id])),
            flow_run_filter=FlowRunFilter(),
            sort=FlowRunSort.END_TIME_DESC,
            limit=50,
        )
    ended = [
        one
        for one in runs
        if one.id != run.id
        and one.parameters.get("settings_path") == run.parameters.get("settings_path")
        and one.state is not None
        and one.state.is_final()
    ]
    last = ended[0].state if ended else None
    return last is not None and not last.is_completed() and last.message == said


def _of_versions(
    registry: Registry, settings: Settings, versions: Iterable[Version], since: datetime
) -> Iterator[Event]:
    name, start = settings.model.name, since.isoformat(timespec="microseconds")
    challenger = registry.alias(CHALLENGER)
    for version in versions:
        tags = version.tags
        link = registry.version_url(version.number)
        promoted, back = tags.get("promoted_at", ""), tags.get("rolled_back_at", "")
        if promoted > start and version.parent is not None:
            yield Event(
                "promoted",
                f"promoted {promoted}",
                version,
                f"{name}: version {version.number} is champion",
                f"By {tags['promoted_by']}: {tags['promoted_why']}\n{link}",
            )
        if back > start:
            yield Event(
                "rolled_back",
                f"rolled back {back}",
                version,
                f"{name}: version {version.number} was rolled back",
                f"{tags.get('reason', '')}\n{link}",
            )
        judged = f"{version.verdict} against {version.verdict_against}"
        if version.created <= since or promoted or version.rolled_back:
            continue
        if version.verdict in (Outcome.REFUSE.value, Outcome.INCONCLUSIVE.value):
            yield Event(
                "refused",
                judged,
                version,
                f"{name}: version {version.number} was not promoted ({version.verdict})",
                f"{tags.get('verdict_reason', '')}\n{link}",
            )
        waits = settings.gate.approval == "manual" and challenger == version.number
        if version.verdict == Outcome.PROMOTE.value and waits:
            yield Event(
                "approval",
                judged,
                version,
                f"{name}: version {version.number} waits for approval",
                f"{tags.get('verdict_reason', '')}\nApprove it with `sustain promote --version"
                f" {version.number}`, the deployment promote/{name}, or the alias {CHAMPION}:\n"
                f"{link}",
            )


def _of_checks(registry: Registry, since: datetime) -> Iterator[Event]:
    """Tell of a drift when it begins to hurt, and not again while it goes on."""
    champion = registry.alias(CHAMPION)
    checks = registry.newest_checks(champion) if champion is not None else []
    hurt = asked = False
    for place, check in enumerate(c for c in checks if c.finished and c.action):
        batch, link = check.key.batch_id, registry.run_url(check.run_id, artifact="report.html")
        hurts = check.action in (Action.RETRAIN.value, Action.ASK_FOR_LABELS.value)
        asks = "sustain.requested" in check.tags
        if place == 0 and check.number > 1:  # those before it were not read: no beginning
            hurt, asked = hurts, asks
            continue
        if hurts and not hurt and check.ended > since:
            yield Event(
                "drift",
                "hurts",
                check,
                f"{registry.name}: drift that hurts, batch {batch}",
                f"{check.reason}\n{link}",
            )
        if asks and not asked and check.ended > since:
            yield Event(
                "labels",
                "wanted",
                check,
                f"{registry.name}: labels wanted, batch {batch}",
                f"Samples that are worth labelling: label_requests.csv, or `sustain ask`\n{link}",
            )
        hurt, asked = hurts, asks


def _receiver(name: str) -> Receiver:
    if name.startswith(ENVIRONMENT):
        import apprise

        variable = name.removeprefix(ENVIRONMENT)
        address = os.environ.get(variable)
        if not address:
            raise NotifyError(
                f"[notify] to names the environment variable {variable}, which is not set"
            )
        # mail is HTML: names that come from the data are text there too
        plain = apprise.AppriseAsset(body_format=apprise.NotifyFormat.TEXT)
        receiver = apprise.Apprise(asset=plain)
        if not receiver.add(address):
            raise NotifyError(f"{variable} holds no address that apprise knows (scheme://…)")
        return cast("Receiver", receiver)
    return _Block(name.removeprefix(BLOCK))


class _Block:
    """A notification block of Prefect's."""

    def __init__(self, name: str) -> None:
        from prefect.blocks.core import Block

        try:
            self.block: Any = Block.load(name)
        except ValueError as error:
            raise NotifyError(
                f"Prefect has no block {name}: make it under Blocks in its UI"
            ) from error

    def notify(self, body: str, title: str) -> bool:
        self.block.notify(body, subject=title)
        return True


def _tags(on: Version | CheckRecord) -> Mapping[str, str]:
    return on.tags


def _tag(event: Event) -> str:
    told = f"told_{event.kind}"
    return told if isinstance(event.on, Version) else f"sustain.{told}"


def _mark(registry: Registry, event: Event, mark: str) -> None:
    if isinstance(event.on, Version):
        registry.tag(event.on, **{_tag(event): mark})
    else:
        registry.log(event.on.run_id, tags={_tag(event): mark})
