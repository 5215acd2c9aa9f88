"""The book of record: a model's versions and aliases in MLflow; its runs are in `flows.tracking`.

Everything here can be killed between any two lines and run again: a version is made in one call
that carries its key, a check counts once its run is FINISHED, and a move of the `champion` alias is
announced before it happens and completed by whoever looks next.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from flows import package
from flows.batches import read_batch
from flows.feed import Batch
from flows.intake import BatchData
from flows.kept import Step, T
from flows.manifest import LOADER, MANIFEST, PARTS, check_file, check_parts, write_manifest
from flows.package import Package
from flows.records import (
    CHALLENGER,
    CHAMPION,
    ROLLBACK,
    ChampionMovedError,
    Move,
    RegistryError,
    Version,
    number_in,
    read_move,
)
from flows.settings import Settings
from flows.tracking import Tracking
from flows.view import Present, View
from flows.words import slug
from monitoring.reference import Reference
from sft import models
from sft.memory import Memory
from sft.models import Network
from sft.pictures import Preprocessing

MOVE = "sustain.move."
"""Begins the tag of the model that a move of its champion leaves; the time follows."""
SEEN, MOVING = "sustain.champion_seen", "sustain.champion_moving"
"""Tags of the model: the champion that was last seen, and a move that has begun."""
CONFIG = f"model/data/{package.NETWORK}/{models.CONFIG_FILE}"


class Registry(Tracking):
    """One model's versions, aliases and moves of its champion, beside its runs.

    Attributes:
        live: false in a replay (`flows.replay`): nothing is drawn, told or shown there, and no flow
            is started.
    """

    live = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._fetched: dict[str, Path] = {}
        self._fetched_files: dict[tuple[str, str], Path] = {}

    # ---- the present, which is another one in a replay

    def now(self) -> datetime:
        """Return the time."""
        return datetime.now(UTC)

    @property
    def view(self) -> View:
        """Show what there is in the feed."""
        return Present(self.settings)

    def read(
        self, batch: Batch, preprocessing: Preprocessing, only: AbstractSet[str] | None = None
    ) -> BatchData:
        """Read a batch, or some of its samples; raises as `flows.batches.read_batch`."""
        settings = self.settings
        return read_batch(
            batch,
            settings.feed,
            settings.root,
            preprocessing,
            only=only,
            in_memory_bytes=settings.memory.in_memory_bytes,
        )

    def once(self, step: Step[T], key: Sequence[object], make: Callable[[], T]) -> T:
        """Take a step; a replay takes it once for all policies.

        Args:
            step: what it is.
            key: all that its result follows from.
            make: takes it.
        """
        del step, key
        return make()

    def made(
        self, key: Sequence[object], make: Callable[[], Version], tags: Mapping[str, str]
    ) -> Version:
        """Make a version; a replay makes it once for all policies.

        Args:
            key: all that its content follows from.
            make: makes and registers it.
            tags: what else it is registered with.
        """
        del key, tags
        return make()

    # ---- versions

    def versions(self) -> list[Version]:
        """List every version, oldest first."""
        found = self.client.search_model_versions(f"name = '{self.name}'", max_results=10_000)
        return sorted((_version(v) for v in found), key=lambda v: v.number)

    def version(self, number: int) -> Version:
        """Return one version; raises RegistryError when it does not exist."""
        if (found := self._find(number)) is None:
            numbers = [v.number for v in self.versions()]
            raise RegistryError(
                f"model {self.name!r} has no version {number}; there are {numbers or 'none'}"
            )
        return found

    def alias(self, alias: str) -> int | None:
        """Return the number of the version that has the alias."""
        try:
            return int(self.client.get_model_version_by_alias(self.name, alias).version)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def champion(self) -> Version:
        """Return the champion; raises RegistryError when there is none, or when it is not ours."""
        number = self.alias(CHAMPION)
        if number is None:
            raise RegistryError(f"model {self.name!r} has no champion; {self._way_to_a_champion()}")
        version = self.version(number)
        if not version.ours:
            raise RegistryError(
                f"version {number} of {self.name!r} is champion, but sustain did not write it and"
                " will not load it: adopt its weights with `sustain bootstrap --adopt FILE`, or"
                f" move the alias {CHAMPION!r} to a version that sustain wrote"
            )
        return version

    def challenger(self) -> Version:
        """Return the version with the alias `challenger`; raises RegistryError without one."""
        number = self.alias(CHALLENGER)
        if number is None:
            raise RegistryError(
                f"model {self.name!r} has no version with the alias {CHALLENGER!r}: name one with"
                " --version"
            )
        return self.version(number)

    def ancestry(self, version: Version) -> list[Version]:
        """Return the version and its parents, newest first, down to one that was deleted."""
        chain = [version]
        while (parent := chain[-1].parent) is not None:
            if parent >= chain[-1].number:  # a tag edited by hand could make a circle
                raise RegistryError(
                    f"version {chain[-1].number} names version {parent} as its parent, which is no"
                    " older: its tag `parent` was altered"
                )
            if (found := self._find(parent)) is None:
                break
            chain.append(found)
        return chain

    def find_version(self, key: str) -> Version | None:
        """Return the version with this retrain key; the oldest, if a race made two."""
        return next((v for v in self.versions() if v.tags.get("retrain_key") == key), None)

    def verified_folder(self, version: Version) -> Path:
        """Download a version's parts and check them before anything is loaded.

        Raises:
            RegistryError: a file differs from what was registered, the loader is not this
                package's, or code came with the model.
        """
        if version.run_id in self._fetched:
            return self._fetched[version.run_id]
        target = self._folder / version.run_id
        shutil.rmtree(target, ignore_errors=True)  # what a refused attempt left
        target.mkdir()
        for part in (*PARTS, MANIFEST):
            self._download(version, part, target)
        check_parts(target, version)
        self._fetched[version.run_id] = target
        return target

    def network(self, version: Version) -> Network:
        """Load a version's network."""
        folder = self.verified_folder(version) / "model" / "data" / package.NETWORK
        try:
            return models.load(folder, allowed_factories=self.settings.allowed_factories)
        except models.ModelError as error:
            raise RegistryError(f"version {version.number} does not load: {error}") from error

    def config(self, version: Version) -> models.ModelConfig:
        """Read a version's configuration; of its files, only that one is fetched and checked."""
        try:
            return models.read_config(self._verified_file(version, CONFIG).parent)
        except models.ModelError as error:
            raise RegistryError(f"version {version.number} does not load: {error}") from error

    def reference(self, version: Version) -> Reference:
        """Load a version's own reference."""
        return Reference.load(self.verified_folder(version) / package.REFERENCE)

    def memory(self, version: Version) -> Memory:
        """Load a version's memory."""
        path = self.verified_folder(version) / package.MEMORY
        return Memory.load(path, self.settings.memory.in_memory_bytes)

    def learned(self, version: Version) -> pd.DataFrame:
        """Return `sample_id, label, role` of all that the version and its parents used.

        Newest first: a sample whose label was corrected is there more than once, and its first row
        counts. Of the version's files, only that one is fetched and checked.
        """
        return pd.read_parquet(self._verified_file(version, package.LEARNED))

    def register(self, made: Package, *, key: str, run_id: str, tags: Mapping[str, str]) -> Version:
        """Register a package once: the version with this key, made now or before.

        Args:
            made: what the version carries.
            key: its retrain key.
            run_id: the training run, whose artifacts the version's files become.
            tags: further tags.
        """
        if (existing := self.find_version(key)) is not None:
            return existing
        with tempfile.TemporaryDirectory(prefix="sustain-") as name:
            folder = Path(name)
            made.write(folder)
            _as_pyfunc(folder)
            digest = write_manifest(folder)
            for part in (*PARTS, MANIFEST):
                path = folder / part
                if path.is_dir():
                    self.client.log_artifacts(run_id, str(path), part)
                else:
                    self.client.log_artifact(run_id, str(path))
        self._ensure_model()
        uri = self.client.get_run(run_id).info.artifact_uri
        created = self.client.create_model_version(
            self.name,
            source=f"{uri}/model",
            run_id=run_id,
            tags={**tags, "retrain_key": key, "digest": digest},
        )
        version = _version(created)
        first = self.find_version(key)
        if first is not None and first.number != version.number:  # another writer was faster
            self.client.delete_model_version(self.name, str(version.number))
            return first
        return version

    def tag(self, version: Version, **tags: str) -> None:
        """Write tags on a version, in the order given."""
        for key, value in tags.items():
            self.client.set_model_version_tag(self.name, str(version.number), key, value)

    def describe(self, version: Version, text: str) -> None:
        """Set the description (Markdown) that MLflow shows on the version's page."""
        self.client.update_model_version(self.name, str(version.number), text)

    def aliases(self) -> dict[str, int]:
        """Return every alias, other people's too, and the version that has it."""
        try:
            found = self.client.get_registered_model(self.name).aliases
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise
        return {alias: int(number) for alias, number in found.items()}

    def delete_version(self, version: Version, now: datetime) -> None:
        """Delete a version's files, then the version; its training run stays, with its figures.

        Killed in between, the version is there without its files, marked `pruned_at`: called again,
        this goes on.
        """
        self.tag(version, pruned_at=now.isoformat(timespec="microseconds"))
        self.delete_artifacts(version.run_id, (*PARTS, MANIFEST))
        self.client.delete_model_version(self.name, str(version.number))

    def set_alias(self, alias: str, version: Version) -> None:
        """Point an alias, other than the champion's, at a version."""
        self.client.set_registered_model_alias(self.name, alias, str(version.number))

    def end_challenge(self, version: Version) -> None:
        """Take the alias `challenger` from a version that is champion."""
        if self.alias(CHALLENGER) == version.number:
            self.client.delete_registered_model_alias(self.name, CHALLENGER)

    def call_on_moves(self, url: str, secret: str) -> None:
        """Let MLflow's server call an address when an alias is moved; once for each address.

        Raises:
            RegistryError: the settings name a database. Only the server's own process can read a
                secret back, unless it was given MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY.
        """
        if not self.uri.startswith("http"):
            raise RegistryError(
                "a webhook is registered with MLflow's server: name its address under [servers]"
                " mlflow, or in MLFLOW_TRACKING_URI"
            )
        events: list[Any] = ["model_version_alias.created", "model_version_alias.deleted"]
        for known in self.client.list_webhooks():
            if known.url == url:
                self.client.update_webhook(known.webhook_id, events=events, secret=secret)
                return
        self.client.create_webhook(f"sustain-{slug(self.name)}"[:60], url, events, secret=secret)

    # ---- the champion's moves

    def moves(self) -> list[Move]:
        """List every move on record, oldest first."""
        tags = self._model_tags()
        found = [read_move(text, key) for key, text in tags.items() if key.startswith(MOVE)]
        return sorted(found, key=lambda move: move.at)

    def move_champion(
        self,
        after: Version,
        *,
        by: str,
        why: str,
        now: datetime,
        who: str = "",
        instead_of: int | None = None,
    ) -> Move:
        """Move the alias: announce, move, complete.

        Killed in between, the next `observe_moves` completes the move or forgets the announcement.

        Args:
            after: the version that shall serve.
            by: who moves it; ROLLBACK says that the version before is given up.
            why: the reason, for the record.
            now: the time, for the record.
            who: the person who asked for it, for the record.
            instead_of: the champion that it was judged against.

        Raises:
            ChampionMovedError: another version is champion than `instead_of`, or somebody else is
                moving the alias right now.
        """
        seen = self._model_tags().get(SEEN)
        before = self.alias(CHAMPION)
        if before is None or not self.version(before).ours:
            # nobody's, or somebody else's: the one that is left is the last of ours that served
            last = number_in(seen, SEEN) if seen else None
            before = None if last == after.number else last
        at = self._after_last_move(now)
        move = Move(before, after.number, by, why, at, promotes=by != ROLLBACK, who=who)
        announced = json.dumps(move.__dict__)
        self.client.set_registered_model_tag(self.name, MOVING, announced)
        if instead_of is not None and (
            self.alias(CHAMPION) != instead_of or self._model_tags().get(MOVING) != announced
        ):  # what is announced is forgotten by whoever looks next
            raise ChampionMovedError(f"version {instead_of} of {self.name!r} is champion no more")
        self.client.set_registered_model_alias(self.name, CHAMPION, str(after.number))
        self._complete(move)
        return move

    def observe_moves(self, now: datetime) -> Move | None:
        """Give a move of the alias its effect, whoever moved it; return it, or None.

        A version that loses the alias to its own descendant, or to a version that `promote` judged
        better, was succeeded. One that loses it otherwise was rolled back: it is marked, and so is
        every version between it and the new champion, and none of them is ever promoted again by
        itself. A move to a version that sustain did not write has no effect: `champion` refuses it.
        """
        current = self.alias(CHAMPION)
        tags = self._model_tags()
        seen = number_in(tags[SEEN], SEEN) if SEEN in tags else None
        announced = tags.get(MOVING)
        move = read_move(announced, MOVING) if announced else None
        if current is None or (current == seen and move is None):
            return None
        if not self.version(current).ours:
            return None
        if move is not None and current == move.after:
            self._complete(move)
            return move
        if current != seen:
            by_hand = Move(
                seen,
                current,
                by="a person",
                why=f"the alias {CHAMPION!r} was moved by hand",
                at=self._after_last_move(now),
                seen=True,
            )
            self._complete(by_hand)
            return by_hand
        self.client.delete_registered_model_tag(self.name, MOVING)
        return None

    def unobserved_move(self) -> bool:
        """Whether the alias was moved, or a move begun, since anybody looked."""
        tags = self._model_tags()
        current = self.alias(CHAMPION)
        return current is not None and (tags.get(SEEN) != str(current) or MOVING in tags)

    def _after_last_move(self, now: datetime) -> str:
        """Write the time of a move: later than the last one, even if the clock was set back."""
        last = self.moves()[-1:]
        times = [datetime.fromisoformat(one.at) + timedelta(microseconds=1) for one in last]
        return max([now, *times]).isoformat(timespec="microseconds")

    def _complete(self, move: Move) -> None:
        after = self.version(move.after)
        before = None if move.before in (None, move.after) else self._find(move.before)
        if before is not None:  # neither the first champion nor a deleted one
            ancestors = [v.number for v in self.ancestry(after)]
            given_up = self.ancestry(before)
            back = after.number in [v.number for v in given_up]
            if before.number in ancestors or (move.promotes and not back):
                self.tag(after, promoted_from=str(before.number))
            else:
                for lost in given_up:
                    if lost.number in ancestors:
                        break
                    self.tag(lost, reason=move.why, rolled_back_at=move.at)
        if move.before != move.after or "promoted_at" not in after.tags:
            self.tag(after, promoted_by=move.by, promoted_why=move.why, promoted_at=move.at)
        self.end_challenge(after)
        stamp = datetime.fromisoformat(move.at).astimezone(UTC).strftime("%Y-%m-%dT%H.%M.%S.%f")
        self.client.set_registered_model_tag(self.name, MOVE + stamp, json.dumps(move.__dict__))
        self.client.set_registered_model_tag(self.name, SEEN, str(move.after))
        self.client.delete_registered_model_tag(self.name, MOVING)

    def version_url(self, number: int) -> str:
        """Return the address of a version in MLflow's UI."""
        base = self.uri if self.uri.startswith("http") else self.settings.servers.mlflow_ui
        return f"{base.rstrip('/')}/#/models/{self.name}/versions/{number}"

    # ---- inside

    def _find(self, number: int) -> Version | None:
        try:
            return _version(self.client.get_model_version(self.name, str(number)))
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def _way_to_a_champion(self) -> str:
        seen = self._model_tags().get(SEEN)
        if seen is None:
            return "make a first one with `sustain bootstrap`"
        by_hand = f"set the alias {CHAMPION!r} in MLflow's UI"
        if self._find(number_in(seen, SEEN)) is not None:
            return (
                f"version {seen} was the last: give it back with `sustain rollback --to {seen}`, or"
                f" {by_hand}"
            )
        left = [v.number for v in self.versions() if v.verdict is not None]
        return (
            f"version {seen} was the last, and it was deleted: "
            + (f"name one of {left} with `sustain rollback --to`, or {by_hand}" if left else "")
            + ("" if left else "make a first one with `sustain bootstrap`")
        )

    def _verified_file(self, version: Version, path: str) -> Path:
        """Fetch one file of a version and check it against the manifest."""
        if version.run_id in self._fetched:
            return self._fetched[version.run_id] / path
        if (version.run_id, path) not in self._fetched_files:
            target = self._folder / f"{version.run_id}-files"
            target.mkdir(exist_ok=True)
            manifest = self._download(version, MANIFEST, target)
            file = self._download(version, path, target)
            check_file(file, path, manifest, version)
            self._fetched_files[version.run_id, path] = file
        return self._fetched_files[version.run_id, path]

    def _download(self, version: Version, path: str, target: Path) -> Path:
        failed = f"the files of version {version.number} cannot be fetched"
        return self._fetch(version.run_id, path, target, failed)

    def _ensure_model(self) -> None:
        try:
            self.client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _model_tags(self) -> dict[str, str]:
        try:
            return dict(self.client.get_registered_model(self.name).tags)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise


def _version(found: ModelVersion) -> Version:
    return Version(
        number=int(found.version),
        run_id=str(found.run_id or ""),
        tags=dict(found.tags),
        created=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
    )


def _as_pyfunc(folder: Path) -> None:
    """Wrap the network's folder as an MLflow pyfunc whose loader is this package's."""
    from importlib.metadata import version

    import mlflow.pyfunc

    source = folder / package.NETWORK
    # MLflow copies a folder to data/<its name>; the loader is told that path
    mlflow.pyfunc.save_model(
        str(folder / "model"),
        loader_module=LOADER,
        data_path=str(source),
        pip_requirements=[f"sustain=={version('sustain')}"],
    )
