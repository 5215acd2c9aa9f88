"""`sustain prune`: delete, or archive, versions and reports that nothing needs any more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from prefect import flow

from flows.notify import tell_of_failure
from flows.records import CHAMPION, CheckRecord, RegistryError, Version
from flows.registry import Registry
from flows.settings import RetentionSettings, Settings, load_settings
from flows.storage import open_place
from flows.words import shown_uri

REPORTS = ("report.html", "features.parquet")
"""Of a check's files, those that take the room: megabytes each."""
PRUNED = "sustain.pruned"


@dataclass(frozen=True)
class Pruned:
    """What went, or with `dry_run` what would go.

    Attributes:
        versions: numbers of the versions.
        reports: how many checks lost their report and features; their figures stay.
        kept: why versions stayed that were old enough to go, by number.
        archived: where their files were copied to; empty for nowhere.
        dry_run: nothing was touched.
    """

    versions: tuple[int, ...]
    reports: int
    kept: dict[int, str]
    archived: str
    dry_run: bool

    @property
    def words(self) -> str:
        """A sentence, and a line for each version that stayed."""
        would = "would be " if self.dry_run else ""
        copied = f" after a copy to {shown_uri(self.archived)}" if self.archived else ""
        numbers = ", ".join(map(str, self.versions)) or "none"
        lines = [
            f"versions {would}deleted{copied}: {numbers}; reports {would}deleted: {self.reports}",
            *(f"version {number} stays: {why}" for number, why in self.kept.items()),
        ]
        return "\n".join(lines)


@flow(name="prune", on_failure=[tell_of_failure], on_crashed=[tell_of_failure])
def prune(settings_path: str, dry_run: bool = False) -> Pruned:
    """Delete old challengers and old reports by the settings' section [retention].

    Never the champion, the version before it, anything with an alias, what these descend from, or
    what was judged against the champion (the record of it keeps the same labels from being tried
    again). Killed in between, it is gone on with by the next run.

    Args:
        settings_path: the model's TOML file.
        dry_run: only tell.

    Raises:
        RegistryError: there is no champion, so that nobody can say what is needed; or a version
            that shall be archived is damaged. An archive that takes no copy raises its own error.
            The version stays then.
    """
    settings = load_settings(Path(settings_path))
    registry = Registry(settings)
    now = datetime.now(UTC)
    going, kept = choose(registry, settings.retention, now)
    reports = old_reports(registry, settings.retention, now)
    if not dry_run:
        for version in going:
            _archive(registry, settings, version)
            registry.delete_version(version, now)
        for check in reports:
            registry.delete_artifacts(check.run_id, REPORTS)
            registry.log(check.run_id, tags={PRUNED: now.isoformat(timespec="seconds")})
    return Pruned(
        tuple(v.number for v in going),
        len(reports),
        kept,
        settings.retention.archive if going else "",
        dry_run,
    )


def choose(
    registry: Registry, settings: RetentionSettings, now: datetime
) -> tuple[list[Version], dict[int, str]]:
    """Return the versions that may go, and why others of their age stay."""
    versions = [v for v in registry.versions() if "digest" in v.tags]
    needed = needed_by(registry, versions)
    newest = {v.number for v in versions[len(versions) - settings.keep :]}
    oldest = now - timedelta(days=settings.days)
    old = [v for v in versions if v.created < oldest and v.number not in newest]
    kept = {v.number: needed[v.number] for v in old if v.number in needed}
    return [v for v in old if v.number not in needed], kept


def needed_by(registry: Registry, versions: Sequence[Version]) -> dict[int, str]:
    """Tell which versions are needed, and what for."""
    champion = registry.champion()
    needed: dict[int, str] = {}
    for alias, number in registry.aliases().items():
        if number in {v.number for v in versions}:
            for one in registry.ancestry(registry.version(number)):
                needed.setdefault(one.number, f"{alias} descends from it")
            needed[number] = f"it is {alias}"
    before = champion.tags.get("promoted_from")
    for version in versions:
        if str(version.number) == before:
            for one in registry.ancestry(version):
                needed.setdefault(one.number, f"version {before} descends from it")
            needed[version.number] = f"the {CHAMPION} would go back to it"
        if champion.number in (version.parent, version.verdict_against):
            needed.setdefault(version.number, f"it was judged against the {CHAMPION}")
        if version.verdict is None:
            needed.setdefault(version.number, "it was not judged yet")
    return needed


def old_reports(
    registry: Registry, settings: RetentionSettings, now: datetime
) -> list[CheckRecord]:
    """Return the checks whose reports and features are old enough to go, and are still there."""
    if not settings.report_days:
        return []
    oldest = now - timedelta(days=settings.report_days)
    ended = f"attributes.end_time < {int(oldest.timestamp() * 1000)}"
    return registry.checks(None, ended, f"tags.`{PRUNED}` IS NULL")


def _archive(registry: Registry, settings: Settings, version: Version) -> None:
    """Copy a version's files, once they are seen to be whole, before they are deleted."""
    if not settings.retention.archive:
        return
    try:
        files = registry.verified_folder(version)
    except RegistryError:
        if "pruned_at" in version.tags:  # copied already, and killed while it was deleted
            return
        raise
    options = settings.feed.storage_options
    place = open_place(settings.retention.archive, options, settings.root)
    target = place.child(registry.name).child(str(version.number))
    target.fs.makedirs(target.path, exist_ok=True)
    target.fs.put(f"{files}/", f"{target.path}/", recursive=True)
