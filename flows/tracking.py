"""The runs in MLflow: checks, trainings, replays, and what they leave behind.

A check counts once its run is FINISHED: whatever is killed before is taken up, or told as killed.
"""

from __future__ import annotations

import posixpath
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from flows.kept import T
from flows.meter import Cost
from flows.records import ArtifactError, CheckKey, CheckRecord, RegistryError, Version, number_in
from flows.servers import unreachable
from flows.settings import Settings
from flows.words import shown_uri
from monitoring.features import FeatureTable

WINDOW = 200
"""Checks that are read at least: as many as a report draws."""
RECENT_DAYS = 7.0
"""Checks are first looked for so far back, and everywhere if that is not enough."""
SKEW = timedelta(hours=1)
"""How far the clock of whoever writes the feed may be ahead."""


class _Client(MlflowClient):
    """MLflow's client, where two can write the same tag, alias or parameter at the same time.

    MLflow's store reads the row and then inserts it: the later of two first writers gets the
    database's refusal. Written again, it finds the other's row.
    """

    def set_tag(self, *args: Any, **kwargs: Any) -> None:
        _write(super().set_tag, *args, **kwargs)

    def log_batch(self, *args: Any, **kwargs: Any) -> Any:
        return _write(super().log_batch, *args, **kwargs)

    def set_model_version_tag(self, *args: Any, **kwargs: Any) -> None:
        _write(super().set_model_version_tag, *args, **kwargs)

    def set_registered_model_tag(self, *args: Any, **kwargs: Any) -> None:
        _write(super().set_registered_model_tag, *args, **kwargs)

    def set_registered_model_alias(self, *args: Any, **kwargs: Any) -> None:
        _write(super().set_registered_model_alias, *args, **kwargs)


def _write(write: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    try:
        return write(*args, **kwargs)
    except MlflowException as error:
        if not any(sign in str(error) for sign in ("IntegrityError", "UniqueViolation")):
            raise
    return write(*args, **kwargs)


class Tracking:
    """One model's runs, in an experiment of its own.

    Raises RegistryError from the constructor when MLflow does not answer within seconds.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.name = settings.model.name
        self.uri = settings.mlflow_uri
        if self.uri.startswith("http") and (
            problem := unreachable(f"{self.uri.rstrip('/')}/health")
        ):
            raise RegistryError(
                f"MLflow at {shown_uri(self.uri)} {problem}: is the server running, and is"
                " [servers] mlflow (or MLFLOW_TRACKING_URI) right?"
            )
        try:
            self.client = _Client(tracking_uri=self.uri, registry_uri=self.uri)
            self.experiment_id = self._experiment()
        except (MlflowException, OSError) as error:
            raise RegistryError(
                f"MLflow at {shown_uri(self.uri)} cannot be used: {shown_uri(str(error))}"
            ) from error
        self._charts: dict[int, str] = {}

    @cached_property
    def _folder(self) -> Path:
        """A folder for downloads that goes when the registry does."""
        folder = Path(tempfile.mkdtemp(prefix="sustain-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    def checks(self, champion: int | None, *also: str) -> list[CheckRecord]:
        """List the ended checks against a champion, one for each key, in their order.

        None lists those against every champion, deleted ones too; `also` are further conditions in
        the words of MLflow. Of several with a key, the first that finished counts; if none did, the
        last that failed.
        """
        tags = {} if champion is None else {"sustain.champion": str(champion)}
        return _in_order(self._runs("check", tags, *also))

    def finished_since(self, since: datetime | None) -> Iterator[CheckRecord]:
        """List the finished checks, against any champion, that ended after a time; None: all."""
        also = ["attributes.status = 'FINISHED'"]
        if since is not None:
            also.append(f"attributes.end_time > {int(since.timestamp() * 1000)}")
        return (_check_record(run) for run in self._runs("check", {}, *also))

    def has_check(self, champion: int | None, condition: str) -> bool:
        """Whether any check against a champion, or any, meets a condition in MLflow's words."""
        tags = {} if champion is None else {"sustain.champion": str(champion)}
        return next(self._runs("check", tags, condition, page=1), None) is not None

    def newest_checks(
        self, champion: int, batches: Mapping[str, datetime | None] | None = None
    ) -> list[CheckRecord]:
        """List the newest checks against a champion as `checks` does, without reading all of them.

        Args:
            champion: its number.
            batches: id, and when it arrived: the checks of these are among what is returned.
        """
        for days in (RECENT_DAYS, None):  # MLflow sorts all that are in question before it pages
            missing = dict(batches or {})
            found: list[Run] = []
            for run in self._newest(champion, days):
                found.append(run)
                missing.pop(run.data.tags["sustain.batch"], None)
                if len(found) % WINDOW == 0 and _all_after(missing, run):
                    return _in_order(reversed(found))
        return _in_order(reversed(found))

    def _newest(self, champion: int, days: float | None) -> Iterator[Run]:
        also = []
        if days is not None:
            since = datetime.now(UTC) - timedelta(days=days)
            also.append(f"attributes.start_time > {int(since.timestamp() * 1000)}")
        tags = {"sustain.champion": str(champion)}
        return self._runs("check", tags, *also, newest_first=True, page=WINDOW)

    def check_record(self, run_id: str) -> CheckRecord:
        """Read one check again."""
        return _check_record(self.client.get_run(run_id))

    def begin_check(self, key: CheckKey, stamp: str) -> str:
        """Open the run of a check, or the one that an interrupted check left; return its id."""
        tags = {
            "sustain.champion": str(key.champion),
            "sustain.batch": key.batch_id,
            "sustain.batch_digest": key.digest,
            "sustain.batch_stamp": stamp,
        }
        identity = {k: v for k, v in tags.items() if k != "sustain.batch_stamp"}
        for run in self._open_runs("check"):
            if all(run.data.tags.get(k) == v for k, v in identity.items()):
                if run.data.tags.get("sustain.batch_stamp") != stamp:  # else it would fail for ever
                    self.client.set_tag(run.info.run_id, "sustain.batch_stamp", stamp)
                return str(run.info.run_id)
        return self._begin_run("check", f"check {key.batch_id} v{key.champion}", tags)

    def chart(self, champion: int, metrics: Mapping[str, float], step: int) -> None:
        """Add a point to the champion's own run, where MLflow draws its checks over time."""
        if champion not in self._charts:
            tags = {"sustain.champion": str(champion)}
            found = next(self._runs("monitoring", tags), None)
            self._charts[champion] = (
                self._begin_run("monitoring", f"monitoring v{champion}", tags)
                if found is None
                else str(found.info.run_id)
            )
        self.log(self._charts[champion], metrics=metrics, step=step)

    def begin_training(self, name: str, tags: Mapping[str, str]) -> str:
        """Open a training run; return its id. What killed trainings left open is closed as killed.

        A training never takes up another's run, as a check does: two trainings at once would write
        over the files that the other's version is known by.

        Args:
            name: shown in MLflow.
            tags: of the run.
        """
        for left in self._open_runs("training"):  # one that is still alive ends by itself
            self.client.set_terminated(left.info.run_id, status="KILLED")
        return self._begin_run("training", name, tags)

    def end_abandoned(self, before: datetime) -> list[str]:
        """End the checks and trainings that began before a time and are still open; list their ids.

        One that is alive all the same ends by itself, with its own status.
        """
        latest = before.timestamp() * 1000
        ended = []
        for run in (*self._open_runs("check"), *self._open_runs("training")):
            if run.info.start_time < latest:
                self.client.set_terminated(run.info.run_id, status="KILLED")
                ended.append(str(run.info.run_id))
        return ended

    def training_seconds(self, version: Version) -> float | None:
        """Return how long the training run of a version took; None when it is not known."""
        try:
            info = self.client.get_run(version.run_id).info
        except MlflowException:
            return None
        return None if info.end_time is None else (info.end_time - info.start_time) / 1000

    def cost(self, version: Version) -> Cost | None:
        """Return what the fine-tuning of a version cost; None when it is not on record."""
        try:
            metrics = self.client.get_run(version.run_id).data.metrics
        except MlflowException:
            return None
        return Cost.read(metrics)

    def finish_training(self, version: Version) -> None:
        """Close the run of a version whose maker was killed right after registering it."""
        if self.client.get_run(version.run_id).info.status != "FINISHED":
            self.end_run(version.run_id)

    def log(
        self,
        run_id: str,
        *,
        metrics: Mapping[str, float] | None = None,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
        step: int = 0,
    ) -> None:
        """Write metrics, params and tags in one call; what is not a number (NaN) is left out."""
        at = int(datetime.now(UTC).timestamp() * 1000)
        self.client.log_batch(
            run_id,
            metrics=[Metric(k, v, at, step) for k, v in (metrics or {}).items() if v == v],  # noqa: PLR0124 - NaN
            params=[Param(k, str(v)[:500]) for k, v in (params or {}).items()],
            tags=[RunTag(k, v) for k, v in (tags or {}).items()],
        )

    def log_anew(self, run_id: str, metrics: Mapping[str, float], *, always: str) -> None:
        """Write metrics in the place of those that stand there, whatever clocks say.

        MLflow shows a metric's value of the last step, and only within a step that of the last
        time; so each writing is a step of its own. `always` names a metric that none leaves out.
        """
        before = self.client.get_metric_history(run_id, always)
        self.log(run_id, metrics=metrics, step=len(before))

    def log_file(self, run_id: str, path: Path) -> None:
        """Store a file as an artifact of the run."""
        self.client.log_artifact(run_id, str(path))

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """Store a text as an artifact of the run."""
        self.client.log_text(run_id, text, name)

    def end_run(self, run_id: str, *, failed: bool = False) -> None:
        """Close a run. Only now does a check count."""
        self.client.set_terminated(run_id, status="FAILED" if failed else "FINISHED")

    def features(self, check: CheckRecord) -> FeatureTable:
        """Load the feature table that a check kept.

        Raises:
            RegistryError: it is gone or damaged.
            ArtifactError: it cannot be had now.
        """
        failed = f"the features of the check of {check.key.batch_id} cannot be read"
        path = self._fetch(check.run_id, "features.parquet", self._folder, failed)
        try:
            return FeatureTable.load(path)
        except (OSError, ValueError, KeyError) as error:
            raise RegistryError(f"{failed}: {error}") from error
        finally:
            path.unlink(missing_ok=True)

    def log_features(self, run_id: str, features: FeatureTable) -> None:
        """Store the feature table of a check."""
        with tempfile.TemporaryDirectory(prefix="sustain-") as name:
            path = Path(name) / "features.parquet"
            features.save(path)
            self.log_file(run_id, path)

    def delete_artifacts(self, run_id: str, names: Sequence[str]) -> None:
        """Delete some files or folders of a run, those that are there."""
        uri = self.client.get_run(run_id).info.artifact_uri
        repository = get_artifact_repository(uri, tracking_uri=self.uri)
        for there in self.client.list_artifacts(run_id):
            if there.path in names:
                repository.delete_artifacts(there.path)  # type: ignore[no-untyped-call]  # as MLflow has it

    def log_replay(
        self,
        name: str,
        metrics: Mapping[str, float],
        curve: Sequence[float],
        tags: Mapping[str, str],
        page: Path | None = None,
    ) -> str:
        """Put a replayed policy on record, in an experiment of its own; return the run.

        Args:
            name: of the policy.
            metrics: its figures.
            curve: accuracy on each batch, NaN where nobody knows it.
            tags: what else is told.
            page: a file to keep beside it.
        """
        experiment = self._experiment("/backtest")
        run = self.client.create_run(
            experiment,
            run_name=name,
            tags={"sustain.kind": "replay", "sustain.model": self.name, **tags},
        )
        run_id = str(run.info.run_id)
        self.log(run_id, metrics=metrics)
        at = int(datetime.now(UTC).timestamp() * 1000)
        points = [Metric("accuracy.served", v, at, i) for i, v in enumerate(curve) if v == v]  # noqa: PLR0124 - NaN
        for start in range(0, len(points), 1000):  # as many as one call takes
            self.client.log_batch(run_id, metrics=points[start : start + 1000])
        if page is not None:
            self.log_file(run_id, page)
        self.end_run(run_id)
        return run_id

    def run_url(self, run_id: str, *, artifact: str = "") -> str:
        """Return the address of a run in MLflow's UI."""
        base = self.uri if self.uri.startswith("http") else self.settings.servers.mlflow_ui
        tail = f"/artifacts/{artifact}" if artifact else ""
        return f"{base.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{run_id}{tail}"

    # ---- inside

    def _fetch(self, run_id: str, path: str, target: Path, failed: str) -> Path:
        """Fetch a file or folder of a run.

        Raises:
            RegistryError: the run keeps no such thing, or no longer.
            ArtifactError: it cannot be had now, since the storage is away or this disk is full.
        """
        try:
            return Path(self.client.download_artifacts(run_id, path, str(target)))
        except (MlflowException, OSError) as error:
            folder = posixpath.dirname(path) or None
            if any(there.path == path for there in self.client.list_artifacts(run_id, folder)):
                raise ArtifactError(
                    f"{failed} now: {error}. Run the same command again when the storage answers"
                    " and this disk has room"
                ) from error
            raise RegistryError(f"{failed}: {error}") from error

    def _experiment(self, below: str = "") -> str:
        name = f"sustain/{self.name}{below}"
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage != "active":
                self.client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        location = None
        if not self.uri.startswith("http"):  # else MLflow would write below the working directory
            location = self.settings.artifacts_uri.rstrip("/") + below
        try:
            return str(self.client.create_experiment(name, artifact_location=location))
        except MlflowException:
            raced = self.client.get_experiment_by_name(name)
            if raced is None:
                raise
            return str(raced.experiment_id)

    def _begin_run(self, kind: str, name: str, tags: Mapping[str, str]) -> str:
        run = self.client.create_run(
            self.experiment_id,
            run_name=name,
            tags={"sustain.kind": kind, "sustain.model": self.name, **tags},
        )
        return str(run.info.run_id)

    def _open_runs(self, kind: str) -> list[Run]:
        return list(self._runs(kind, {}, "attributes.status = 'RUNNING'"))

    def _runs(
        self,
        kind: str,
        tags: Mapping[str, str],
        *also: str,
        newest_first: bool = False,
        page: int = 1000,
    ) -> Iterator[Run]:
        wanted = {"sustain.kind": kind, **tags}
        query = " and ".join([*(f"tags.`{k}` = '{v}'" for k, v in wanted.items()), *also])
        token: str | None = None
        while True:
            found = self.client.search_runs(
                [self.experiment_id],
                query,
                run_view_type=ViewType.ACTIVE_ONLY,
                max_results=page,
                order_by=[f"attributes.start_time {'DESC' if newest_first else 'ASC'}"],
                page_token=token,
            )
            yield from found
            token = found.token
            if not token:
                return


def _in_order(runs: Iterable[Run]) -> list[CheckRecord]:
    """Turn runs, the oldest first, into ended checks, one for each key."""
    records: dict[CheckKey, CheckRecord] = {}
    for run in runs:
        if run.info.status in ("FINISHED", "FAILED"):
            record = _check_record(run)
            known = records.get(record.key)
            if known is None or not known.finished:
                records[record.key] = record
    return sorted(records.values(), key=lambda r: (r.number, r.ended, r.run_id))


def _all_after(batches: Mapping[str, datetime | None], run: Run) -> bool:
    """Whether these batches arrived since a check began, so that no older check is theirs."""
    began = datetime.fromtimestamp(run.info.start_time / 1000, UTC)
    now = datetime.now(UTC)
    return all(at is not None and began + SKEW < at <= now for at in batches.values())


def _check_record(run: Run) -> CheckRecord:
    tags = run.data.tags
    return CheckRecord(
        run_id=str(run.info.run_id),
        key=CheckKey(
            number_in(tags["sustain.champion"], "sustain.champion of a check"),
            tags["sustain.batch"],
            tags["sustain.batch_digest"],
        ),
        finished=run.info.status == "FINISHED",
        stamp=tags.get("sustain.batch_stamp", ""),
        tags=tags,
        metrics=run.data.metrics,
        started=datetime.fromtimestamp(run.info.start_time / 1000, UTC),
        ended=datetime.fromtimestamp((run.info.end_time or run.info.start_time) / 1000, UTC),
    )
