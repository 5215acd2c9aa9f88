"""Settings: one TOML file a model, overridden by the environment."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from flows.feed import FeedSettings, list_batches
from flows.labels import read_labels
from flows.settings import (
    SECTIONS,
    Settings,
    SettingsError,
    load_settings,
    refuse_contradiction,
    write_template,
)
from flows.storage import FeedError
from flows.words import shown_uri
from sft.models import ModelConfig
from sft.pictures import Preprocessing
from sft.tasks import Regression


def written(folder: Path, text: str) -> Path:
    path = folder / "sustain.toml"
    path.write_text(text)
    return path


def test_the_template_is_the_defaults(tmp_path: Path) -> None:
    """What `sustain init` writes loads as the defaults, but for the name."""
    path = tmp_path / "sustain.toml"
    write_template(path, "digits")
    settings = load_settings(path, environ={})
    default = Settings(path)
    assert settings.model.name == "digits"
    for section in SECTIONS:
        if section != "model":
            assert getattr(settings, section) == getattr(default, section)


def test_the_template_explains_every_key() -> None:
    """No key is missing from the template, and none is there that does not exist."""
    text = (Path(__file__).parents[2] / "flows" / "template.toml").read_text()
    keys = {name: set(values) for name, values in tomllib.loads(text).items()}
    assert keys == {
        name: {f.name for f in dataclasses.fields(section)} for name, section in SECTIONS.items()
    }


def test_a_trigger_that_nothing_measures_is_refused(tmp_path: Path) -> None:
    """A drift distance is the test mmd's: without it the trigger would never be met."""
    model = '[model]\nname = "m"\n'
    policy = '[policy]\nretrain_when = { any = ["drift", { drift_distance_above = 0.3 }] }\n'
    load_settings(written(tmp_path, model + policy), environ={})
    without = written(tmp_path, f"{model}{policy}[detection]\ndetectors = {{ scores = 1.0 }}\n")
    with pytest.raises(SettingsError, match="has drift_distance_above, and the distance is that"):
        load_settings(without, environ={})


def test_a_recipe_gets_the_name_and_keeps_its_words(tmp_path: Path) -> None:
    """What is written is the recipe, whose settings load; what is no recipe is named."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('# Why.\n[model]\nname = ""\narchitecture = "mlp"\n')
    write_template(tmp_path / "sustain.toml", "digits", recipe)
    assert (tmp_path / "sustain.toml").read_text().startswith("# Why.\n")
    settings = load_settings(tmp_path / "sustain.toml", environ={})
    assert (settings.model.name, settings.model.architecture) == ("digits", "mlp")
    with pytest.raises(SettingsError, match=r"no recipe at .*gone\.toml: deployments/recipes/"):
        write_template(tmp_path / "other.toml", "digits", tmp_path / "gone.toml")
    recipe.write_text('[model]\nname = "x"\n')
    with pytest.raises(SettingsError, match=r"recipe\.toml is no recipe: it has no line"):
        write_template(tmp_path / "other.toml", "digits", recipe)
    assert not (tmp_path / "other.toml").exists()


def test_the_template_overwrites_nothing(tmp_path: Path) -> None:
    """A file that is there stays as it is."""
    path = written(tmp_path, "mine")
    with pytest.raises(SettingsError, match="is there already; it was left as it is"):
        write_template(path, "digits")
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model\nname = 1", "cannot be read as TOML"),
        ("", r"\[model\] name is missing"),
        (
            '[modle]\nname = "a"',
            r"no section \[modle\] \(did you mean 'model'\?\); allowed: model,",
        ),
        ('[model]\nname = "a"\narchitectur = "x"', r"no key 'architectur' \(did you mean 'arch"),
        ('model = "digits"', "model must be a section"),
        ('[model]\nname = "a"\n[training]\nepochs = 0', "epochs must be at least 1, got 0"),
        ('[model]\nname = "a"\n[training]\nepochs = "many"', r"epochs = 'many'.*integer"),
        (
            '[model]\nname = "a"\n[training]\nrehearsal = 1.0',
            "rehearsal must be at least 0 and bel",
        ),
        ('[model]\nname = "a"\n[gate]\nalpha = 5', "alpha must lie between 0 and 1, got 5"),
        ('[model]\nname = "a"\n[detection]\nalpha = 0.0', "alpha"),
        ('[model]\nname = "a"\n[feed]\nclosed_by = "hope"', r"closed_by = 'hope'.*'rename'"),
        ('[model]\nname = "a/b"', "name must not hold"),
        ("[model]\nname = 'a\\b'", "name must not hold"),
        ('[model]\nname = "a"\n[retention]\ndays = inf', "days must lie between 0 and 36,500"),
        ('[model]\nname = "a"\n[retention]\nreport_days = nan', "report_days must lie between"),
        ('[model]\nname = "a"\n[schedule]\nwatch = 1e15', "watch must lie between 1 and"),
        ('[model]\nname = "a"\n[training]\nafter = "stew"', "after = 'stew'.*'greedy_soup'"),
        ('[model]\nname = "a"\n[search]\ngrid = {rate = [1.0]}', "rate cannot be searched; these"),
        ('[model]\nname = "a"\n[search]\ngrid = {l2_sp = [-1.0]}', "l2_sp must not be negative"),
        ('[model]\nname = "a"\n[search]\nfolds = 1', "folds must be at least 2, got 1"),
        ('[model]\nname = "a"\n[adaptation]\nmethod = "x"', "method = 'x'.*'reestimate'"),
        ('[model]\nname = "a"\nchannels = 2', "channels must be 1 or 3, got 2"),
        ('[model]\nname = "a"\ntask = "poetry"', "task must be one of single_label, multi_label"),
        ('[model]\nname = "a"\nregression_loss = "l3"', "regression_loss must be one of mse, hub"),
        ('[model]\nname = "a"\ntolerance = -1', "tolerance must be positive, got -1"),
        ('[model]\nname = "a"\nmean = [0.5]', "mean and std need one value a channel"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    """A wrong file, section, key or value is refused by its name, with what is allowed."""
    with pytest.raises(SettingsError, match=f"(?s){message}"):
        load_settings(written(tmp_path, text), environ={})


def test_a_missing_file_says_the_way_out(tmp_path: Path) -> None:
    """No settings: the message names `sustain init`."""
    with pytest.raises(SettingsError, match="sustain init NAME"):
        load_settings(tmp_path / "none.toml", environ={})


def test_the_environment_overrides(tmp_path: Path) -> None:
    """SUSTAIN_SECTION_KEY wins over the file, with TOML's types or as a string."""
    path = written(tmp_path, '[model]\nname = "a"\n[training]\nepochs = 3')
    settings = load_settings(
        path,
        environ={
            "SUSTAIN_TRAINING_EPOCHS": "7",
            "SUSTAIN_TRAINING_L2_SP": "0.5",
            "SUSTAIN_MODEL_CLASSES": '["x", "y"]',
            "SUSTAIN_SERVERS_MLFLOW": "http://127.0.0.1:5001",
        },
    )
    assert settings.training.epochs == 7
    assert settings.training.l2_sp == 0.5
    assert settings.model.classes == ("x", "y")
    assert settings.mlflow_uri == "http://127.0.0.1:5001"


def test_an_unknown_variable_is_refused(tmp_path: Path) -> None:
    """A misspelt variable is an error, not silence."""
    with pytest.raises(SettingsError, match=r"SUSTAIN_TRAINING_EPOCH names no setting.*EPOCHS"):
        load_settings(
            written(tmp_path, '[model]\nname = "a"'), environ={"SUSTAIN_TRAINING_EPOCH": "7"}
        )


def test_standard_variables_fill_what_is_unset(tmp_path: Path) -> None:
    """MLFLOW_TRACKING_URI and PREFECT_API_URL count when the settings name no address."""
    environ = {"MLFLOW_TRACKING_URI": "http://m:1", "PREFECT_API_URL": "http://p:2/api"}
    unset = load_settings(written(tmp_path, '[model]\nname = "a"'), environ=environ)
    assert (unset.mlflow_uri, unset.servers.prefect) == ("http://m:1", "http://p:2/api")
    named = load_settings(
        written(tmp_path, '[model]\nname = "a"\n[servers]\nmlflow = "http://own:3"'),
        environ=environ,
    )
    assert named.mlflow_uri == "http://own:3"


def test_a_local_database_lies_beside_the_file(tmp_path: Path) -> None:
    """A relative SQLite path starts from the TOML's folder, wherever the command runs."""
    settings = load_settings(written(tmp_path, '[model]\nname = "a"'), environ={})
    assert settings.mlflow_uri == f"sqlite:///{tmp_path.resolve() / 'mlflow.db'}"


def test_bootstrap_keeps_its_own_defaults(tmp_path: Path) -> None:
    """A [bootstrap] with one key set still trains without rehearsal and without freezing."""
    text = '[model]\nname = "a"\n[bootstrap]\nepochs = 5'
    settings = load_settings(written(tmp_path, text), environ={})
    assert settings.bootstrap.epochs == 5
    assert settings.bootstrap.rehearsal == 0.0
    assert not settings.bootstrap.freeze_batch_norm


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('task = "single_label"', r"task = 'single_label', but the champion has 'regression'"),
        ("tolerance = 3", r"tolerance = 3.0, but the champion has 1.5"),
        ('regression_loss = "huber"', r"regression_loss = 'huber', but the champion has 'mse'"),
        (
            'classes = ["age", "ink"]',
            r"classes = \('age', 'ink'\), but the champion has \('age',\)",
        ),
    ],
)
def test_a_champion_keeps_its_task(tmp_path: Path, text: str, message: str) -> None:
    """Another task, tolerance, loss or target is another model; what agrees or is unset goes."""
    task = Regression(tolerance=1.5)
    config = ModelConfig("mlp", ("age",), Preprocessing(8, channels=1), (0.5,), (0.5,), task)
    head = '[model]\nname = "a"\n'
    same = 'task = "regression"\ntolerance = 1.5\nclasses = ["age"]\n'
    for right in (head, head + same):
        refuse_contradiction(load_settings(written(tmp_path, right), environ={}), config)
    with pytest.raises(SettingsError, match=message):
        refuse_contradiction(load_settings(written(tmp_path, head + text), environ={}), config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('watch = "*/10 * * *"', r"\[schedule\]: watch = .* is no crontab line: five fields"),
        ('prune = "0 25 * * *"', r"prune = .* is no crontab line"),
        ('timezone = "Europe/Berlinn"', r"is no time zone \(did you mean 'Europe/Berlin'\?\)"),
        ("watch = 0.5", "watch must lie between 1 and .* or be 0 for never"),
        ("watch = -1", "watch must lie between 1 and"),
        ("watch = nan", "watch must lie between 1 and"),
    ],
)
def test_schedules_that_cannot_be_kept_are_refused(tmp_path: Path, text: str, message: str) -> None:
    """By name, when the settings are read, and not by the server at night."""
    path = written(tmp_path, f'[model]\nname = "m"\n[schedule]\n{text}\n')
    with pytest.raises(SettingsError, match=message):
        load_settings(path, environ={})


def test_schedules_are_intervals_or_crontab_lines(tmp_path: Path) -> None:
    """Both from the file and from the environment."""
    path = written(tmp_path, '[model]\nname = "m"\n[schedule]\nwatch = 30\n')
    assert load_settings(path, environ={}).schedule.watch == 30
    told = {"SUSTAIN_SCHEDULE_WATCH": "*/5 * * * *", "SUSTAIN_SCHEDULE_PRUNE": ""}
    schedule = load_settings(path, environ=told).schedule
    assert (schedule.watch, schedule.prune) == ("*/5 * * * *", "")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("servers", "mlflow", '"postgresql://ada:hidden@db/mlflow"'),
        ("feed", "url", '"ftp://ada:hidden@files/feed"'),
        ("feed", "storage_options", '{ endpoint_url = "https://ada:hidden@s3" }'),
    ],
)
def test_a_password_in_the_file_is_refused(
    tmp_path: Path, section: str, key: str, value: str
) -> None:
    """The message names the variable that it belongs into, and not the password."""
    path = written(tmp_path, f'[model]\nname = "m"\n[{section}]\n{key} = {value}\n')
    variable = f"SUSTAIN_{section}_{key}".upper()
    with pytest.raises(SettingsError, match=variable) as refused:
        load_settings(path, environ={})
    assert "hidden" not in str(refused.value)
    told = written(tmp_path, '[model]\nname = "m"\n')
    assert load_settings(told, environ={variable: value.strip('"')})


@pytest.mark.parametrize(
    "options",
    [
        '{ key = "AKIA", secret = "hidden" }',
        '{ client_kwargs = { aws_secret_access_key = "hidden" } }',
        '{ client_kwargs = { headers = { Authorization = "hidden" } } }',
        '{ s3_additional_kwargs = { SSECustomerKey = "hidden" } }',
        '{ account_key = "hidden" }',
        '{ sas_token = "hidden" }',
        '{ credential = "hidden" }',
        '{ connection_string = "hidden" }',
        '{ tenant_id = "t", client_secret = "hidden" }',
        '{ username = "ada", password = "hidden" }',
        '{ token = "hidden" }',
        '{ token = [{ private_key = "hidden" }] }',
        '{ endpoint_url = "https://s3/?X-Amz-Signature=hidden" }',
    ],
)
def test_a_secret_option_in_the_file_is_refused(tmp_path: Path, options: str) -> None:
    """By its name, nested or not; the message says where it belongs and not what it is."""
    model = '[model]\nname = "m"\n'
    path = written(tmp_path, f"{model}[feed]\nstorage_options = {options}\n")
    with pytest.raises(SettingsError, match="SUSTAIN_FEED_STORAGE_OPTIONS") as refused:
        load_settings(path, environ={})
    assert "hidden" not in str(refused.value)
    told = written(tmp_path, model)
    assert load_settings(told, environ={"SUSTAIN_FEED_STORAGE_OPTIONS": options})


def test_options_that_hold_no_secret_are_taken(tmp_path: Path) -> None:
    """Names of profiles, files and ways to log in stay in the file; keys in the environment."""
    options = {
        "profile": "sustain", "endpoint_url": "http://127.0.0.1:8333", "token": "google_default",
        "account_name": "ada", "key_filename": "/home/ada/.ssh/id", "SSEKMSKeyId": "alias/one",
    }  # fmt: skip
    stated = ", ".join(f'{key} = "{value}"' for key, value in options.items())
    model = '[model]\nname = "m"\n'
    path = written(tmp_path, f"{model}[feed]\nstorage_options = {{ {stated} }}\n")
    assert load_settings(path, environ={}).feed.storage_options == options
    told = {"SUSTAIN_FEED_STORAGE_OPTIONS": '{ key = "AKIA", secret = "hidden" }'}
    loaded = load_settings(path, environ=told).feed
    assert loaded.storage_options == {"key": "AKIA", "secret": "hidden"}


@pytest.mark.parametrize(
    ("name", "key"), [("MLFLOW_TRACKING_URI", "mlflow"), ("SUSTAIN_SERVERS_PREFECT", "prefect")]
)
def test_a_server_is_given_its_password_apart(tmp_path: Path, name: str, key: str) -> None:
    """Within its address none is taken, from anywhere; the message names the variables that are."""
    address = "https://ada:hidden@server/api"
    model = '[model]\nname = "m"\n'
    for text, environ in ((f'[servers]\n{key} = "{address}"\n', {}), ("", {name: address})):
        with pytest.raises(SettingsError, match="MLFLOW_TRACKING_PASSWORD") as refused:
            load_settings(written(tmp_path, model + text), environ=environ)
        assert "hidden" not in str(refused.value)


def test_options_are_of_any_kind(tmp_path: Path) -> None:
    """Switches, numbers and tables reach fsspec as they were written."""
    text = 'anon = true, default_block_size = 1000000, client_kwargs = { region_name = "eu-1" }'
    model = '[model]\nname = "m"\n'
    path = written(tmp_path, f"{model}[feed]\nstorage_options = {{ {text} }}\n")
    assert load_settings(path, environ={}).feed.storage_options == {
        "anon": True,
        "default_block_size": 1_000_000,
        "client_kwargs": {"region_name": "eu-1"},
    }


def test_errors_of_a_feed_show_no_password(tmp_path: Path) -> None:
    """An address with a password comes from the environment, and is shown without it."""
    feed = FeedSettings(url="ftp://ada:hidden@127.0.0.1:1/f", labels="nowhere://ada:hidden@h/l")
    for read in (list_batches, read_labels):
        with pytest.raises(FeedError, match=r"://\.\.\.@") as failed:
            read(feed, tmp_path)
        assert "hidden" not in str(failed.value)


def test_shown_addresses_hold_no_password() -> None:
    """Only the credentials go; an @ elsewhere stays."""
    assert (
        shown_uri("postgresql://h/db?user=u&password=p&x=1") == "postgresql://h/db?user=u&...&x=1"
    )
    assert shown_uri("postgresql+psycopg2://u:p%40@h:5/db") == "postgresql+psycopg2://...@h:5/db"
    assert shown_uri("postgresql://u:a/b?c@d@h:5/db") == "postgresql://...@h:5/db"
    assert shown_uri("no http://h:5000 nor s3://u:p@k now") == "no http://h:5000 nor s3://...@k now"
    for plain in ("sqlite:////a/b@c:d.db", "http://h:5000/x@y", "models:/m@champion", "s3://b/k"):
        assert shown_uri(plain) == plain
