"""`sustain up` before anything is started: one at a time, and only with credentials when open."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flows.servers import MLFLOW_PASSWORD, MLFLOW_USER
from flows.settings import ModelSettings, ServerSettings, Settings
from flows.up import LOCK, PREFECT_AUTH, Place, UpError, only_one, up

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
@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.2", "::", "example.org"])  # noqa: S104
def test_others_may_call_only_with_credentials(
    host: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is not this machine's own loopback address asks for all of them, by name."""
    for name, value in GOOD.items():
        monkeypatch.setenv(name, "" if name == missing else value)
    with pytest.raises(UpError, match=missing):
        up([model(tmp_path)], Place(host))


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
    anywhere = Place("0.0.0.0")  # noqa: S104
    assert anywhere.near == "127.0.0.1"
    assert "0.0.0.0" not in anywhere.called  # noqa: S104


def test_a_port_that_is_taken_is_named() -> None:
    """Else another model's server would be taken for this one's."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UpError, match=rf"port {port} .*: name another one with --mlflow-port"):
            Place().require_free("mlflow", port)
    Place().require_free("mlflow", port)


def test_addresses_of_both_families() -> None:
    """An IPv6 address stands in brackets."""
    assert Place("::1").url(5000) == "http://[::1]:5000"
    assert Place("::").url(5000) == Place().url(5000) == "http://127.0.0.1:5000"
