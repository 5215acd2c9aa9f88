"""`sustain up` before anything is started: one at a time, and only with credentials when open."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.server.security_utils import is_allowed_host_header, should_block_cors_request

from flows.servers import MLFLOW_PASSWORD, MLFLOW_USER, authority
from flows.settings import ModelSettings, ServerSettings, Settings
from flows.up import (
    LOCK,
    PREFECT_AUTH,
    Place,
    UpError,
    _credentials,
    _mlflow_options,
    _named,
    only_one,
    up,
)

GOOD = {MLFLOW_USER: "ada", MLFLOW_PASSWORD: "twelve characters", PREFECT_AUTH: "ada:secret"}


def model(folder: Path, name: str = "digits", mlflow: str = "") -> Settings:
    return Settings(
        folder / f"{name}.toml",
        model=ModelSettings(name=name),
        servers=ServerSettings(mlflow=mlflow),
    )


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials of this machine's."""
    for name in GOOD:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.slow
def test_a_second_one_is_told_who_runs(tmp_path: Path) -> None:
    """The lock names the process; one whose holder was killed holds nothing."""
    with only_one(tmp_path):
        pid = int((tmp_path / LOCK).read_text())
        assert pid == os.getppid()
        with (
            pytest.raises(UpError, match=rf"runs already .* \(process {pid}\)"),
            only_one(tmp_path),
        ):
            pass
    holder = f"""
import os, signal
from pathlib import Path
from flows.up import only_one
with only_one(Path({str(tmp_path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", holder], check=False)
    assert killed.returncode < 0
    assert (tmp_path / LOCK).read_text()
    with only_one(tmp_path):
        pass


@pytest.mark.parametrize("missing", GOOD)
@pytest.mark.parametrize(
    "place",
    [
        *map(Place, ("0.0.0.0", "127.0.0.2", "::", "example.org")),  # noqa: S104
        Place(names=("https://models.example.org",)),
    ],
    ids=str,
)
def test_others_may_call_only_with_credentials(
    place: Place, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is not this machine's own loopback address, or has a name, asks for all of them."""
    for name, value in GOOD.items():
        monkeypatch.setenv(name, "" if name == missing else value)
    with pytest.raises(UpError, match=missing):
        up([model(tmp_path)], place)


def test_on_loopback_credentials_count_once_all_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two of the three the servers ask for nothing, with all of them for all of them."""
    for name, value in GOOD.items():
        assert _credentials(model(tmp_path), Place()) == {}
        monkeypatch.setenv(name, value)
    told = _credentials(model(tmp_path), Place())
    assert told["PREFECT_SERVER_API_AUTH_STRING"] == GOOD[PREFECT_AUTH]
    assert told["MLFLOW_AUTH_ADMIN_PASSWORD"] == GOOD[MLFLOW_PASSWORD]
    assert _mlflow_options(Place(), asks=True) == ["--app-name", "basic-auth"]
    assert _mlflow_options(Place(), asks=False) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [(MLFLOW_PASSWORD, "short", "at least 12"), (PREFECT_AUTH, "secret", "must be user:password")],
)
def test_weak_credentials_are_refused(
    name: str, value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a server would refuse later, with a traceback, is said at once."""
    for key, good in GOOD.items():
        monkeypatch.setenv(key, good)
    monkeypatch.setenv(name, value)
    with pytest.raises(UpError, match=message) as refused:
        up([model(tmp_path)], Place("0.0.0.0"))  # noqa: S104
    assert value not in str(refused.value).replace(message, "")


def test_an_address_with_an_api_path_or_none_is_one_server(tmp_path: Path) -> None:
    """As clients take them: with a slash at the end, with `/api`, or bare."""
    written = ("http://prefect:4200/api/", "http://prefect:4200/api", "http://prefect:4200/")
    models = [
        Settings(
            tmp_path / f"{number}.toml",
            model=ModelSettings(name=f"m{number}"),
            servers=ServerSettings(mlflow="http://mlflow:5000" + "/" * number, prefect=address),
        )
        for number, address in enumerate(written)
    ]
    assert _named(models) == ("http://mlflow:5000", "http://prefect:4200")


def test_models_of_several_databases_are_named(tmp_path: Path) -> None:
    """One server cannot show both; a password in an address is not shown."""
    secret = model(tmp_path, "b", mlflow="postgresql://ada:hidden@db/mlflow")
    with pytest.raises(UpError, match="on several servers") as refused:
        up([model(tmp_path, "a"), secret], Place())
    assert "hidden" not in str(refused.value)
    assert "db/mlflow" in str(refused.value)


def test_where_others_call(tmp_path: Path) -> None:
    """The names that are let in: those given, the machine's own, and loopback."""
    del tmp_path
    assert Place().called == ("127.0.0.1", "localhost")
    assert Place("10.0.0.7", names=("models.example",)).called[:2] == ("models.example", "10.0.0.7")
    assert Place("::1").origins(5000)[0] == "http://[::1]:5000"
    anywhere = Place("0.0.0.0")  # noqa: S104
    assert anywhere.near == "127.0.0.1"
    assert "0.0.0.0" not in anywhere.called  # noqa: S104


@pytest.mark.parametrize(
    ("name", "host", "origin"),
    [
        ("models.example.org", "models.example.org:5000", "http://models.example.org:5000"),
        ("https://models.example.org", "models.example.org", "https://models.example.org"),
        ("https://Proxy.example:443", "proxy.example", "https://proxy.example"),
        ("https://Proxy.example:8443", "proxy.example:8443", "https://proxy.example:8443"),
    ],
)
@pytest.mark.parametrize("listens", ["127.0.0.1", "0.0.0.0"])  # noqa: S104
def test_a_page_at_the_name_given_may_move_an_alias(
    listens: str, name: str, host: str, origin: str
) -> None:
    """MLflow's own checks of host and origin let the page and the proxy pass, and no other."""
    place = Place(listens, names=(name,))
    hosts, origins = list(place.hosts(5000)), list(place.origins(5000))
    assert is_allowed_host_header(hosts, host)
    assert is_allowed_host_header(hosts, "127.0.0.1:5000")  # as proxies have it that rewrite it
    assert not should_block_cors_request(origin, "POST", origins)
    assert origin.replace("5000", "4200") in place.origins(4200)
    for other in ("https://evil.example", f"{origin}.evil.example", "null"):
        assert should_block_cors_request(other, "POST", origins)
    assert not is_allowed_host_header(hosts, "evil.example")


@pytest.mark.parametrize(
    "name", ["*", "https://*", "https://a.example/mlflow", "a.example,b.example", "a.example:80"]
)
def test_a_name_that_lets_others_in_is_refused(name: str) -> None:
    """Wildcards, lists and paths mean something else to the servers, or nothing."""
    with pytest.raises(UpError, match="--name takes a host"):
        Place(names=(name,))


def test_a_port_that_is_taken_is_named() -> None:
    """Else another model's server would be taken for this one's."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UpError, match=rf"port {port} .*: name another one with --mlflow-port"):
            Place().require_free("mlflow", port)
    Place().require_free("mlflow", port)


def test_addresses_of_both_families() -> None:
    """An IPv6 address stands in brackets."""
    assert authority("::1", 4200) == "[::1]:4200"
    assert Place("::1").url(5000) == "http://[::1]:5000"
    assert Place("::").url(5000) == "http://[::1]:5000"  # who binds it is not on 127.0.0.1
    assert Place("0.0.0.0").url(5000) == Place().url(5000) == "http://127.0.0.1:5000"  # noqa: S104
