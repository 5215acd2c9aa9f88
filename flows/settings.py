"""The settings of one model: a TOML file, overridden by the environment. Nothing else reads either.

Each section is a plain frozen dataclass, most of them the cores' own; the cores never see this
module.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from pydantic import TypeAdapter, ValidationError

from flows.feed import FeedSettings
from flows.preflight import SettingsError, read_toml
from flows.words import PASSWORD
from monitoring.detectors import DetectionSettings
from monitoring.policy import PolicySettings
from monitoring.sequential import StreamSettings
from monitoring.triggers import MAX_DAYS, Measure, measures, read_schedule
from sft.adaptation import AdaptationSettings
from sft.gate import GateSettings
from sft.models import ModelConfig
from sft.noise import NoiseSettings
from sft.pixels import IN_MEMORY_BYTES
from sft.ranges import at_least_one
from sft.search import SearchSettings
from sft.speed import ComputeSettings
from sft.tasks import LOSSES, TASKS, Regression
from sft.train import TrainingSettings

PREFIX = "SUSTAIN_"
_SECRET = re.compile(
    r"(^|_)(key|auth|authorization|pat|pass|pwd|jwt)$|bearer|cookie|secret|token"
    r"|passw|passphrase|credential|(^|_)sas(_|$)"
    r"|(account|access|api|customer|private|shared)_?key|connection_?string"
)
"""Names by which s3fs, gcsfs, adlfs and fsspec's others take what lets in."""
_HARMLESS = re.compile(r"(file|filename|path|name|(?<!sas_)ur[li]|md5)$")
"""Ends of names that say where a secret is, or whose; the address with a SAS is one."""
_PUBLIC = ("", "anon", "browser", "cache", "cloud", "google_default")
"""Values of gcsfs's `token` that name a way to log in."""


@dataclass(frozen=True)
class ModelSettings:
    """What is kept healthy. All but the name is inherited from the champion when left unset.

    Attributes:
        name: the registered model's name in MLflow.
        architecture: a torchvision name, `timm/NAME`, `small_cnn`, `mlp`, or your own factory
            `package.module:function`, called as `function(num_classes=…)`.
        task: `single_label` (one class of several; what an unset one means at bootstrap),
            `multi_label` (any number of labels, written as names between `|`) or `regression`
            (numbers, between `|` where there are several targets).
        tolerance: of a regression: the largest error that counts as right, in the labels' unit.
        regression_loss: of a regression: `mse` (at bootstrap, when unset) or `huber`.
        weights: where training starts at bootstrap: empty for random weights, the name of
            torchvision's (`DEFAULT`, which is timm's too), or a file.
        classes: names of classes, labels or targets; classes and labels that the champion lacks
            widen its head at the next retraining.
        image_size, resize_size: pixels; the shorter side is resized to `resize_size` (`image_size`
            when 0), then the centre is cropped.
        channels: 1 or 3.
        mean, std: one value a channel, for pixels in [0, 1]; unset at bootstrap, ImageNet's for
            torchvision's architectures, timm's own for timm's, the training data's for the others.
    """

    name: str = ""
    architecture: str = ""
    task: str = ""
    tolerance: float = 0.0
    regression_loss: str = ""
    weights: str = ""
    classes: tuple[str, ...] = ()
    image_size: int = 0
    resize_size: int = 0
    channels: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values outside their range, by name."""
        odd = any(char in "/:.%\"'\\" or not char.isprintable() for char in self.name)
        if odd or self.name != self.name.strip():
            raise ValueError(f"name must not hold any of / : . % \" ' \\, got {self.name!r}")
        if self.task not in ("", *TASKS):
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        if self.regression_loss not in ("", *LOSSES):
            raise ValueError(
                f"regression_loss must be one of {', '.join(LOSSES)}, got {self.regression_loss!r}"
            )
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(f"tolerance must be positive, got {self.tolerance}")
        if self.channels not in (0, 1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        if self.image_size < 0 or self.resize_size < 0:
            raise ValueError("image_size and resize_size must not be negative")
        if len(self.mean) != len(self.std) or any(value <= 0 for value in self.std):
            raise ValueError("mean and std need one value a channel each, and std positive ones")


@dataclass(frozen=True)
class ServerSettings:
    """Where MLflow and Prefect are.

    Attributes:
        mlflow: tracking URI; empty takes MLFLOW_TRACKING_URI, else an SQLite file beside the TOML.
        artifacts: where files go when `mlflow` names a database: a folder or URL (`s3://…`); empty
            for mlartifacts/ beside the TOML. A server keeps them where it was told to.
        mlflow_ui: address of MLflow's UI, for links.
        prefect: address of Prefect's API; empty takes Prefect's own profile, which starts a server
            for the time of a command when there is none.
        prefect_home: folder for Prefect's own files when no server is named; empty takes Prefect's.
    """

    mlflow: str = ""
    artifacts: str = ""
    mlflow_ui: str = "http://127.0.0.1:5000"
    prefect: str = ""
    prefect_home: str = ""

    def __post_init__(self) -> None:
        """Refuse a password in a server's address, wherever it was set: clients take it apart."""
        for name in ("mlflow", "mlflow_ui", "prefect"):
            address = getattr(self, name)
            if address.startswith("http") and PASSWORD.search(address):
                raise ValueError(
                    f"{name} must be an address without user and password: set them in the"
                    " environment, in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and"
                    " for Prefect in PREFECT_API_AUTH_STRING (user:password)"
                )


@dataclass(frozen=True)
class MachineSettings(ComputeSettings):
    """Where training runs, and what reads and embeds a batch.

    Attributes:
        shard_pictures: a batch with more is read and embedded in shards of so many.
        shard_workers: shards at once, in this process, or in a Ray cluster that is started here.
        task_runner: `threads` of this process, or `ray`.
        ray_address: of a cluster that is there: `auto`, `ray://host:10001` or `host:6379`; empty
            starts one here for the time of a batch.
    """

    shard_pictures: int = 10_000
    shard_workers: int = 4
    task_runner: Literal["threads", "ray"] = "threads"
    ray_address: str = ""

    def __post_init__(self) -> None:
        """Refuse values outside their range, by name."""
        super().__post_init__()
        at_least_one(self, "shard_pictures", "shard_workers")


@dataclass(frozen=True)
class MemorySettings:
    """How many old samples a version carries, as encoded pictures, and how much is decoded at once.

    Attributes:
        rehearsal: most samples kept to be rehearsed.
        holdout: most held-out samples kept for each regime; they are the old hold-out of the gate
            and the reference of the check.
        in_memory_mb: a set of decoded pictures that is larger lies in a file in the system's folder
            for temporary files (TMPDIR), and its pictures are read as they are needed. The results
            are the same.
    """

    rehearsal: int = 2000
    holdout: int = 2000
    in_memory_mb: int = IN_MEMORY_BYTES // 2**20

    def __post_init__(self) -> None:
        """Refuse values outside their range, by name."""
        if self.rehearsal < 1 or self.holdout < 1:
            raise ValueError("rehearsal and holdout must be at least 1")
        if self.in_memory_mb < 0:
            raise ValueError(f"in_memory_mb must not be negative, got {self.in_memory_mb}")

    @property
    def carried(self) -> dict[str, object]:
        """What a version depends on."""
        return {"rehearsal": self.rehearsal, "holdout": self.holdout}

    @property
    def in_memory_bytes(self) -> int:
        """How large a decoded set may be in memory."""
        return self.in_memory_mb * 2**20


@dataclass(frozen=True)
class RetentionSettings:
    """What `sustain prune` may delete; it only runs when it is called, or deployed.

    Attributes:
        keep: the newest versions stay, whatever their age.
        days: younger versions stay.
        archive: folder or fsspec URL that a version's files are copied to before they are deleted;
            empty for none.
        report_days: reports and feature tables of older checks are deleted (their figures and
            decisions stay); 0 keeps them for ever.
    """

    keep: int = 5
    days: float = 30.0
    archive: str = ""
    report_days: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values outside their range, by name."""
        for name in ("keep", "days", "report_days"):
            if not 0 <= getattr(self, name) <= MAX_DAYS:
                raise ValueError(
                    f"{name} must lie between 0 and {MAX_DAYS:,}, got {getattr(self, name)}"
                )


@dataclass(frozen=True)
class CheckSettings:
    """What a check looks at besides the batch as a whole, and what it leaves behind.

    Attributes:
        min_batch: a batch with fewer pictures is tested together with the following ones.
        slices: metadata columns whose values are checked one by one too, such as `["camera"]`.
        max_regimes: worlds that a version's reference keeps apart; of more, the nearest are merged.
        labels_wanted: samples that a check asks labels for; 0 for as many as a retraining lacks.
        workspace: folder of an Evidently workspace that collects the reports; empty for none.
    """

    min_batch: int = 10
    slices: tuple[str, ...] = ()
    max_regimes: int = 8
    labels_wanted: int = 0
    workspace: str = ""

    def __post_init__(self) -> None:
        """Refuse values outside their range, by name."""
        for name in ("min_batch", "max_regimes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.labels_wanted < 0:
            raise ValueError(f"labels_wanted must not be negative, got {self.labels_wanted}")
        if len(set(self.slices)) < len(self.slices):
            raise ValueError(f"slices names a column twice: {list(self.slices)}")


@dataclass(frozen=True)
class ScheduleSettings:
    """When the flows run that `sustain deploy` registers.

    Attributes:
        watch: seconds from one run to the next, or a crontab line.
        prune, reconcile: crontab lines.
        timezone: of the crontab lines.
        retrain_pool: Prefect's work pool for retrainings; empty for that of the other flows.

    Of each time, 0 or empty is never by itself.
    """

    watch: float | str = 600.0
    prune: str = "0 4 * * *"
    reconcile: str = "30 3 * * *"
    timezone: str = "UTC"
    retrain_pool: str = ""

    def __post_init__(self) -> None:
        """Refuse what is no crontab line, and an interval that no run can keep."""
        for name in ("watch", "prune", "reconcile"):
            value = getattr(self, name)
            if isinstance(value, str) and value:
                read_schedule(value, self.timezone, (name, "timezone"))
        most = MAX_DAYS * 86_400
        if not isinstance(self.watch, str) and self.watch != 0 and not 1 <= self.watch <= most:
            raise ValueError(
                f"watch must lie between 1 and {most:,} seconds, or be 0 for never,"
                f" got {self.watch}"
            )


@dataclass(frozen=True)
class LogSettings:
    """What is written for machines to read.

    Attributes:
        format: empty for nothing, or `json`: a line for each thing that happens, with the model,
            the version and the batch.
        file: the lines are appended to it; empty for stderr.
    """

    format: str = ""
    file: str = ""

    def __post_init__(self) -> None:
        """Refuse forms that there are not."""
        if self.format not in ("", "json"):
            raise ValueError(f'format must be empty or "json", got {self.format!r}')


NOTIFY_EVENTS = ("drift", "labels", "approval", "promoted", "refused", "rolled_back", "failed")
ENVIRONMENT, BLOCK = "env:", "block:"


@dataclass(frozen=True)
class NotifySettings:
    """Who is told of what.

    Attributes:
        to: `env:NAME`, an environment variable that holds an apprise URL (`slack://…`,
            `mailto://…`, `json://…`), or `block:TYPE/NAME`, a notification block of Prefect's.
            Addresses hold secrets, so none stands in the settings themselves.
        events: which of drift (that hurts), labels (are wanted), approval (is wanted), promoted,
            refused, rolled_back and failed (a flow).
    """

    to: tuple[str, ...] = ()
    events: tuple[str, ...] = NOTIFY_EVENTS

    def __post_init__(self) -> None:
        """Refuse receivers of another form, and events that there are not."""
        if any(not one.startswith((ENVIRONMENT, BLOCK)) for one in self.to):
            raise ValueError(
                f"to must name {ENVIRONMENT}VARIABLE or {BLOCK}TYPE/NAME: an address itself holds"
                " secrets, so put it into an environment variable"
            )
        if odd := sorted(set(self.events) - set(NOTIFY_EVENTS)):
            raise ValueError(f"events knows {', '.join(NOTIFY_EVENTS)}, not {', '.join(odd)}")


def _bootstrap_training() -> TrainingSettings:
    return TrainingSettings(
        epochs=30, batch_size=64, rehearsal=0.0, l2_sp=0.0, freeze_batch_norm=False
    )


@dataclass(frozen=True)
class Settings:
    """Everything one model needs; relative paths start from the folder of the TOML file `path`."""

    path: Path
    model: ModelSettings = field(default_factory=ModelSettings)
    feed: FeedSettings = field(default_factory=FeedSettings)
    servers: ServerSettings = field(default_factory=ServerSettings)
    detection: DetectionSettings = field(default_factory=DetectionSettings)
    stream: StreamSettings = field(default_factory=StreamSettings)
    checks: CheckSettings = field(default_factory=CheckSettings)
    policy: PolicySettings = field(default_factory=PolicySettings)
    bootstrap: TrainingSettings = field(default_factory=_bootstrap_training)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    compute: MachineSettings = field(default_factory=MachineSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    adaptation: AdaptationSettings = field(default_factory=AdaptationSettings)
    noise: NoiseSettings = field(default_factory=NoiseSettings)
    gate: GateSettings = field(default_factory=GateSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    notify: NotifySettings = field(default_factory=NotifySettings)
    retention: RetentionSettings = field(default_factory=RetentionSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    logs: LogSettings = field(default_factory=LogSettings)

    def __post_init__(self) -> None:
        """Refuse a trigger that nothing would ever measure."""
        distances = {Measure.DISTANCE, Measure.DISTANCE_RANK}
        wanted = sorted(distances & measures(self.policy.retrain_when))
        if wanted and "mmd" not in self.detection.detectors:
            raise SettingsError(
                f"{self.path.name}: [policy] retrain_when has {wanted[0]}, and the distance is that"
                " of the test mmd: name it in detectors under [detection]"
            )

    @property
    def root(self) -> Path:
        """The folder of the TOML file."""
        return self.path.parent

    @property
    def workspace(self) -> Path | None:
        """The Evidently workspace, if one is named."""
        return (self.root / self.checks.workspace).resolve() if self.checks.workspace else None

    @property
    def allowed_factories(self) -> tuple[str, ...]:
        """Factories of the user's own that may be called: only the settings can allow one."""
        return (self.model.architecture,) if ":" in self.model.architecture else ()

    @property
    def mlflow_uri(self) -> str:
        """The tracking URI, with a relative SQLite path resolved against the TOML's folder."""
        uri = self.servers.mlflow or "sqlite:///mlflow.db"
        local = uri.removeprefix("sqlite:///")
        if local != uri and not local.startswith("/"):
            return f"sqlite:///{(self.root / local).resolve()}"
        return uri

    @property
    def artifacts_uri(self) -> str:
        """Where MLflow's files go, as a URL, unless a server of the user's own keeps them."""
        location = self.servers.artifacts or "mlartifacts"
        return location if "://" in location else (self.root / location).resolve().as_uri()


SECTIONS: dict[str, type[Any]] = {
    "model": ModelSettings,
    "feed": FeedSettings,
    "servers": ServerSettings,
    "detection": DetectionSettings,
    "stream": StreamSettings,
    "checks": CheckSettings,
    "policy": PolicySettings,
    "bootstrap": TrainingSettings,
    "training": TrainingSettings,
    "compute": MachineSettings,
    "search": SearchSettings,
    "adaptation": AdaptationSettings,
    "noise": NoiseSettings,
    "gate": GateSettings,
    "memory": MemorySettings,
    "notify": NotifySettings,
    "retention": RetentionSettings,
    "schedule": ScheduleSettings,
    "logs": LogSettings,
}


def load_settings(path: Path, environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings of one model.

    Args:
        path: the TOML file.
        environ: overrides, `SUSTAIN_<SECTION>_<KEY>`; the process's environment by default.

    Raises:
        SettingsError: the file is missing or is not TOML, or a key or value is unknown or wrong.
    """
    environ = os.environ if environ is None else environ
    path = path.resolve()
    raw = read_toml(path)
    sections = {name: _section(path.name, name, value) for name, value in raw.items()}
    _refuse_secrets(path.name, sections)
    for variable, value in environ.items():
        if variable.startswith(PREFIX):
            section, key = _variable(variable)
            sections.setdefault(section, {})[key] = _parse(value)
    servers = sections.setdefault("servers", {})
    for key, variable in (("mlflow", "MLFLOW_TRACKING_URI"), ("prefect", "PREFECT_API_URL")):
        if not servers.get(key) and environ.get(variable):
            servers[key] = environ[variable]

    settings = Settings(
        path=path, **{name: _build(path.name, name, values) for name, values in sections.items()}
    )
    if not settings.model.name:
        raise SettingsError(f"{path.name}: [model] name is missing: give the model a name")
    return settings


def changed(settings: Settings, overrides: Mapping[str, Mapping[str, Any]], name: str) -> Settings:
    """Return settings in which some keys have other values; `name` stands in messages.

    Raises:
        SettingsError: a section, key or value is unknown or wrong.
    """
    parts = {}
    for section, values in overrides.items():
        stated = _section(name, section, values)
        known = getattr(settings, section)
        kept = {f.name: getattr(known, f.name) for f in dataclasses.fields(known)}
        parts[section] = _build(name, section, {**kept, **stated})
    return dataclasses.replace(settings, **parts)


def export_to_environment(settings: Settings) -> None:
    """Set where Prefect is and how it speaks, for a command; call it before Prefect is imported.

    The rest of the environment is set by the package itself.
    """
    if settings.servers.prefect:
        os.environ["PREFECT_API_URL"] = settings.servers.prefect
    elif settings.servers.prefect_home:
        home = (settings.root / settings.servers.prefect_home).resolve()
        os.environ["PREFECT_HOME"] = str(home)
    for name, value in {
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the command says what happens
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",  # 20 is often too short
    }.items():
        os.environ.setdefault(name, value)


def under_torchrun(environ: Mapping[str, str] | None = None) -> bool:
    """Tell whether torchrun, or a job of a cluster that does as it does, started several of us."""
    environ = os.environ if environ is None else environ
    known = all(environ.get(name) for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    return known and environ.get("WORLD_SIZE", "1") != "1"


def refuse_contradiction(settings: Settings, config: ModelConfig) -> None:
    """Refuse settings under [model] that the champion contradicts; what is unset is inherited.

    Raises:
        SettingsError: names the key, both values and the way out.
    """
    model, seen = settings.model, config.preprocessing
    stated: dict[str, tuple[object, object]] = {
        "architecture": (model.architecture, config.architecture),
        "task": (model.task, config.task.name),
        "image_size": (model.image_size, seen.image_size),
        "resize_size": (model.resize_size, seen.resize_size),
        "channels": (model.channels, seen.channels),
        "mean": (model.mean, config.mean),
        "std": (model.std, config.std),
    }
    if isinstance(config.task, Regression):
        stated |= {
            "tolerance": (model.tolerance, config.task.tolerance),
            "regression_loss": (model.regression_loss, config.task.loss_kind),
            "classes": (model.classes, config.classes),  # its targets cannot grow
        }
    for key, (wanted, has) in stated.items():
        if wanted and wanted != has:
            raise SettingsError(
                f"{settings.path.name}: [model] {key} = {wanted!r}, but the champion has {has!r}:"
                " leave it out to inherit it, or choose another name for a new model"
            )


def write_template(path: Path, name: str, recipe: Path | None = None) -> None:
    """Write commented settings: every key, or those of a recipe, whose `name = ""` gets the name.

    Raises:
        SettingsError: rather than overwriting a file, or when there is no such recipe.
    """
    source = recipe or Path(__file__).parent / "template.toml"
    try:
        template = source.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(
            f"there is no recipe at {source}: deployments/recipes/ of sustain's repository has some"
        ) from error
    if 'name = ""' not in template:
        raise SettingsError(f'{source} is no recipe: it has no line `name = ""` to fill in')
    _build(path.name, "model", {"name": name})
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(template.replace('name = ""', f'name = "{name}"', 1))
    except FileExistsError as error:
        raise SettingsError(f"{path} is there already; it was left as it is") from error
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror}") from error


def _refuse_secrets(file: str, sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse an address with a password: the file is read by many."""
    for section, values in sections.items():
        for key, value in values.items():
            server = section == "servers" and str(value).startswith("http")  # says so itself
            if PASSWORD.search(str(value)) and not server:
                raise SettingsError(
                    f"{file}: [{section}] {key} holds a password: take it out of the file, and set"
                    f" the environment variable {PREFIX}{section.upper()}_{key.upper()} instead"
                )
    options = sections.get("feed", {}).get("storage_options")
    if found := _secrets(options):
        raise SettingsError(
            f"{file}: [feed] storage_options holds a secret, {', '.join(found)}: take it out of the"
            " file. The storage's own library looks for it in the environment or a profile"
            " (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY;"
            " GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_CONNECTION_STRING), or set all options"
            f" in the environment variable {PREFIX}FEED_STORAGE_OPTIONS"
        )


def _secrets(options: object) -> list[str]:
    """Name the options, and those within options, that hold a secret."""
    if isinstance(options, list):
        return [name for one in options for name in _secrets(one)]
    if not isinstance(options, dict):
        return []
    found = []
    for name, value in options.items():
        # accessKey and access-key as access_key
        told = re.sub(r"(?<=[a-z])(?=[A-Z])|-", "_", name).lower()
        public = isinstance(value, bool) or (told == "token" and value in _PUBLIC)
        if _SECRET.search(told) and not _HARMLESS.search(told) and not public:
            found.append(name)
        else:
            found += _secrets(value)
    return found


def _section(file: str, name: str, value: object) -> dict[str, Any]:
    if name not in SECTIONS:
        raise SettingsError(
            f"{file}: there is no section [{name}]{_did_you_mean(name, SECTIONS)};"
            f" allowed: {', '.join(SECTIONS)}"
        )
    if not isinstance(value, dict):
        raise SettingsError(
            f"{file}: {name} must be a section: write [{name}] on a line of its own"
        )
    return dict(value)


def _build(file: str, name: str, values: Mapping[str, Any]) -> Any:
    known = [f.name for f in dataclasses.fields(SECTIONS[name])]
    for key in values:
        if key not in known:
            raise SettingsError(
                f"{file}: [{name}] has no key {key!r}{_did_you_mean(key, known)};"
                f" allowed: {', '.join(known)}"
            )
    defaults = dataclasses.asdict(_bootstrap_training()) if name == "bootstrap" else {}
    types = get_type_hints(SECTIONS[name])
    told = {
        k: str(v) if types[k] is str and type(v) in (int, float) else v for k, v in values.items()
    }
    try:
        return TypeAdapter(SECTIONS[name]).validate_python({**defaults, **told})
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        where = ".".join(str(part) for part in first["loc"])
        # options may come with secrets from the environment
        value = "" if where.startswith("storage_options") else f" = {first['input']!r}"
        stated = f" {where}{value}" if where else ""
        raise SettingsError(f"{file}: [{name}]{stated}: {message}") from error


def _variable(variable: str) -> tuple[str, str]:
    rest = variable.removeprefix(PREFIX).lower()
    section, _, key = rest.partition("_")
    if section not in SECTIONS or key not in {
        f.name for f in dataclasses.fields(SECTIONS[section])
    }:
        allowed = [
            f"{PREFIX}{name}_{f.name}".upper()
            for name, section_type in SECTIONS.items()
            for f in dataclasses.fields(section_type)
        ]
        raise SettingsError(
            f"the environment variable {variable} names no setting"
            f"{_did_you_mean(variable, allowed)}; the form is {PREFIX}SECTION_KEY,"
            f" for example {PREFIX}SERVERS_MLFLOW"
        )
    return section, key


def _parse(value: str) -> object:
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        return value


def _did_you_mean(word: str, among: object) -> str:
    near = difflib.get_close_matches(word, list(among), n=1)  # type: ignore[call-overload]  # any iterable
    return f" (did you mean {near[0]!r}?)" if near else ""
