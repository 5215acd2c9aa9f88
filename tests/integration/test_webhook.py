"""A move of the alias takes effect in seconds, by a message that nobody can forge or repeat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import httpx
import pytest
from deployed import in_session, marked
from worlds import free

from flows.metrics import Exporter
from flows.promote import promote
from flows.registry import Registry
from flows.retrain import retrain
from flows.servers import start_mlflow, stop, wait_until_healthy
from flows.webhook import MAX_BYTES, Gatekeeper, Refused, Watcher, make_app, sign

if TYPE_CHECKING:
    from pathlib import Path

    from worlds import World

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
BODY = json.dumps({"data": {"name": "digits", "alias": "champion", "version": "1"}}).encode()
PATIENCE = 120


def headers(sent: datetime = NOW, key: str = "right", delivery: str = "one") -> dict[str, str]:
    """Give the headers of a message, as MLflow writes them."""
    at = str(int(sent.timestamp()))
    return {
        "x-mlflow-delivery-id": delivery,
        "x-mlflow-timestamp": at,
        "x-mlflow-signature": sign(key, delivery, at, BODY).decode(),
    }


def test_what_mlflow_signed_is_believed_once() -> None:
    """The same message again is refused, for as long as its time would be believed."""
    gate = Gatekeeper("right")
    assert gate.admit(headers(), BODY, NOW)["data"]["version"] == "1"
    for later in (0, 4):
        with pytest.raises(Refused, match="came before"):
            gate.admit(headers(), BODY, NOW + timedelta(minutes=later))


@pytest.mark.parametrize(
    ("sent", "body", "why"),
    [
        (headers(key="wrong"), BODY, "signature"),
        (headers() | {"x-mlflow-signature": ""}, BODY, "signature"),
        (headers() | {"x-mlflow-delivery-id": "two"}, BODY, "signature"),
        (headers(), BODY.replace(b"1", b"2"), "signature"),
        ({}, BODY, "signature"),
        (headers(NOW - timedelta(minutes=6)), BODY, "too old"),
        (headers(NOW + timedelta(minutes=6)), BODY, "too old"),
    ],
)
def test_what_mlflow_did_not_sign_is_refused(sent: dict[str, str], body: bytes, why: str) -> None:
    """Another secret, id, body or time, or none at all."""
    with pytest.raises(Refused, match=why):
        Gatekeeper("right").admit(sent, body, NOW)


def test_a_moved_alias_takes_effect_by_itself(
    small_world: Callable[[str], World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's server calls the receiver, which watches: the version that lost is marked.

    A watch that runs as the receiver is stopped ends with it.
    """
    world = small_world("hooked")
    world.arrive(0, 1, 2, labelled=True)
    retrain(str(world.path))
    registry = Registry(world.settings)
    promote(str(world.path), version=2, why="for the test")
    assert registry.alias("champion") == 2

    port, mlflow = free(), free()
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http,https")
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    monkeypatch.setenv("WEBHOOK_SECRET", "a secret")
    logs = tmp_path / "logs"
    address = f"http://127.0.0.1:{mlflow}"
    started = [start_mlflow(world.settings, mlflow, logs)]
    command = [
        *(sys.executable, "-m", "flows.cli", "webhook", "-s", str(world.path)),
        *("--port", str(port), "--register", f"http://127.0.0.1:{port}"),
    ]
    try:
        wait_until_healthy(f"{address}/health", "MLflow", started, logs)
        # the server and one worker; as shipped they are 15, with 2 GB
        assert len(in_session(started[0].pid)) == 2
        environment = {**os.environ, "MLFLOW_TRACKING_URI": address, "HOOKED": str(tmp_path)}
        mark = f"HOOKED={tmp_path}"
        started.append(subprocess.Popen(command, env=environment, start_new_session=True))
        wait(lambda: answers(f"http://127.0.0.1:{port}/health"))
        forged = httpx.post(f"http://127.0.0.1:{port}/mlflow", content=BODY, headers=headers())
        assert forged.status_code == 401
        big = httpx.post(f"http://127.0.0.1:{port}/mlflow", content=b"x" * (MAX_BYTES + 1))
        assert big.status_code == 413
        move = {"name": "hooked", "alias": "champion", "version": "1"}
        alias = f"{address}/api/2.0/mlflow/registered-models/alias"
        httpx.post(alias, json=move).raise_for_status()
        wait(lambda: registry.version(2).rolled_back)
        assert "moved by hand" in registry.version(2).tags["reason"]
        httpx.post(alias, json=move).raise_for_status()
        wait(lambda: any("watch" in line.split() for line in marked(mark).values()))
    finally:
        stop(started)
    assert not marked(mark)


def answers(url: str) -> bool:
    """Whether somebody is there."""
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def wait(until: Callable[[], bool]) -> None:
    """Look again and again, for a limited time."""
    end = time.monotonic() + PATIENCE
    while not until():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.5)


def test_other_models_moves_are_not_ours(small_world: Callable[[str], World]) -> None:
    """A message about another model is taken, and nothing runs."""
    from fastapi.testclient import TestClient

    world = small_world("ours")
    watcher = Watcher(world.settings)
    gate = Gatekeeper("right")
    exporter = Exporter([Registry(world.settings)])
    client = TestClient(make_app(gate, {"ours": watcher}, exporter))
    at = datetime.now(UTC)
    assert client.post("/mlflow", content=BODY, headers=headers(at)).status_code == 202
    assert not watcher.wanted.is_set()
    assert client.post("/mlflow", content=BODY, headers=headers(at)).status_code == 409
    endless = (b"x" * 1000 for _ in range(10_000))
    lies = {"content-length": "9"}
    assert client.post("/mlflow", content=endless, headers=lies).status_code == 413
