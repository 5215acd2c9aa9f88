"""`sustain webhook`: MLflow tells of a moved alias, and it takes effect in seconds.

Without it a move takes effect at the next check: the receiver only runs `sustain watch` early. It
also tells Prometheus what is on record.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from flows.metrics import Exporter
from flows.registry import Registry
from flows.servers import LOOPBACK, MLFLOW_PASSWORD, MLFLOW_USER, WEBHOOK_SECRET, basic
from flows.settings import Settings

FRESH = timedelta(minutes=5)
"""How far a message's time may be off: clocks differ, and MLflow tries again for a minute."""
MAX_BYTES = 65_536


class WebhookError(RuntimeError):
    """The receiver cannot run; the message names the way out."""


class Refused(Exception):  # noqa: N818 - carries the reason, and the status that says it
    """A message that is not believed."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass
class Gatekeeper:
    """Believes a message that MLflow signed, once.

    Attributes:
        secret: that MLflow signs with.
        seen: ids of the messages of the last minutes, and when they came.
    """

    secret: str
    seen: dict[str, datetime] = field(default_factory=dict)

    def admit(self, headers: Mapping[str, str], body: bytes, now: datetime) -> dict[str, Any]:
        """Return what a message says.

        Args:
            headers: its headers, by names in lower case.
            body: as it came.
            now: the time.

        Raises:
            Refused: it was not signed with the secret, is too old, or came before.
        """
        delivery = headers.get("x-mlflow-delivery-id", "")
        sent = headers.get("x-mlflow-timestamp", "")
        signature = headers.get("x-mlflow-signature", "")
        if not hmac.compare_digest(signature.encode(), sign(self.secret, delivery, sent, body)):
            raise Refused(401, "the signature is not MLflow's")
        try:
            moment = datetime.fromtimestamp(int(sent), UTC)
            told = json.loads(body)
        except (ValueError, OverflowError, OSError, RecursionError) as error:
            raise Refused(400, "the message is not MLflow's form") from error
        if abs(now - moment) > FRESH:
            raise Refused(401, "the message is too old, or from the future: compare the clocks")
        self.seen = {name: at for name, at in self.seen.items() if now - at <= 2 * FRESH}
        if delivery in self.seen:
            raise Refused(409, "the message came before")
        self.seen[delivery] = now
        return dict(told) if isinstance(told, dict) else {}


def model_of(told: Mapping[str, Any]) -> str | None:
    """Name the model that a message tells of; None when it tells of none."""
    data = told.get("data")
    name = data.get("name") if isinstance(data, dict) else None
    return name if isinstance(name, str) else None


def sign(secret: str, delivery: str, sent: str, body: bytes) -> bytes:
    """Sign as MLflow does: `v1,` and the base64 of HMAC-SHA256 over `id.time.body`."""
    message = f"{delivery}.{sent}.".encode() + body
    digest = hmac.new(secret.encode(), message, hashlib.sha256).digest()
    return b"v1," + base64.b64encode(digest)


class Watcher:
    """Runs `sustain watch`, one at a time; what is asked for meanwhile is one more run after it."""

    def __init__(self, settings: Settings) -> None:
        self.command = [sys.executable, "-m", "flows.cli", "watch", "-s", str(settings.path)]
        self.wanted = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def ask(self) -> None:
        """Ask for a run, soon."""
        self.wanted.set()

    def _run(self) -> None:
        while True:
            self.wanted.wait()
            self.wanted.clear()
            subprocess.run(self.command, check=False)  # noqa: S603 - our own command line


def make_app(
    gatekeeper: Gatekeeper,
    watchers: Mapping[str, Watcher],
    exporter: Exporter,
    login: str = "",
) -> FastAPI:
    """Make the receiver: POST /mlflow, GET /metrics and GET /health.

    Args:
        gatekeeper: says what is believed.
        watchers: by model.
        exporter: of the metrics.
        login: `user:password` that /metrics asks for; empty for nothing.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    def health() -> str:
        return "OK"

    @app.get("/metrics")
    def metrics(request: Request) -> Response:
        sent = request.headers.get("authorization", "")
        if login and not hmac.compare_digest(sent.encode(), basic(login).encode()):
            raise HTTPException(401, headers={"WWW-Authenticate": "Basic"})
        return Response(exporter.text(), media_type=CONTENT_TYPE_LATEST)

    @app.post("/mlflow")
    async def moved(request: Request) -> Response:
        body = bytearray()
        async for part in request.stream():  # whatever a header says of its length
            body += part
            if len(body) > MAX_BYTES:
                raise HTTPException(413, "a message of MLflow's is shorter")
        try:
            told = gatekeeper.admit(request.headers, bytes(body), datetime.now(UTC))
        except Refused as refused:
            raise HTTPException(refused.status, str(refused)) from refused
        if (name := model_of(told)) is not None and name in watchers:
            watchers[name].ask()
        return Response(status_code=202)

    return app


def serve(
    models: Sequence[Settings],
    port: int,
    *,
    host: str = LOOPBACK[0],
    register: str = "",
    asks: bool = False,
) -> None:
    """Receive until it is stopped.

    Args:
        models: whose moves and metrics.
        port: to listen on.
        host: address to listen on; anywhere but on loopback /metrics asks for the credentials of
            MLflow's clients. Put a proxy with TLS before it to be reached from elsewhere.
        register: the receiver's address as MLflow's server sees it; MLflow is told to call it.
        asks: /metrics asks for them on loopback, too.

    Raises:
        WebhookError: there is no secret, or there are no credentials, in the environment.
    """
    secret = os.environ.get(WEBHOOK_SECRET, "")
    if not secret:
        raise WebhookError(
            f"the environment variable {WEBHOOK_SECRET} is not set: MLflow signs its messages with"
            " it, and nobody else's are believed (openssl rand -hex 32)"
        )
    user, password = os.environ.get(MLFLOW_USER, ""), os.environ.get(MLFLOW_PASSWORD, "")
    login = f"{user}:{password}" if asks or host not in LOOPBACK else ""
    if login and not (user and password):
        raise WebhookError(
            f"{MLFLOW_USER} and {MLFLOW_PASSWORD} are needed in the environment: /metrics asks for"
            f" them, with --ask and wherever others can call (here {host})"
        )
    registries = [Registry(settings) for settings in models]
    if register:
        registries[0].call_on_moves(f"{register.rstrip('/')}/mlflow", secret)
    watchers = {settings.model.name: Watcher(settings) for settings in models}
    app = make_app(Gatekeeper(secret), watchers, Exporter(registries), login)
    uvicorn.run(app, host=host, port=port, log_level="warning")
