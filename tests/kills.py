"""Cases for integration/kill_driver.py: processes that take them, and what an answer is worth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

from stores import POSTGRES, SQLITE

DRIVERS = 2
TWICE = ("RetrainError: 0 fresh labels", "RegistryError: version 1 is the first champion")
ENVIRONMENT = {
    "DO_NOT_TRACK": "true",
    "GOMP_SPINCOUNT": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",  # the drivers fork, so they must have no threads
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
}


class Drivers:
    """Processes that each have a world of their own, and take the cases as they come."""

    def __init__(self, folder: Path, prefect: str, store: str = SQLITE) -> None:
        self.store = store
        inherited = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
        here = Path(__file__).parent
        environment = {
            **inherited,
            **ENVIRONMENT,
            "PREFECT_API_URL": prefect,
            "PREFECT_HOME": str(folder / "prefect"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH")])),
            **({"KILL_POSTGRES": "1"} if store == POSTGRES else {}),
        }
        self.free: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()
        self.pool = ThreadPoolExecutor(DRIVERS)
        self.processes = []
        for number in range(DRIVERS):
            world = folder / f"world-{number}"
            world.mkdir(exist_ok=True)
            process = subprocess.Popen(
                [sys.executable, str(here / "integration" / "kill_driver.py"), str(world)],
                env=environment | {"TMPDIR": str(world)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self.processes.append(process)
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", "see children.log in the world"
            self.free.put(process)

    def ask(self, case: str, scenario: str, **rest: object) -> Future[dict[str, Any]]:
        """Run a case when a driver is free."""
        return self.pool.submit(self._answer, {"case": case, "scenario": scenario, **rest})

    def _answer(self, request: dict[str, object]) -> dict[str, Any]:
        process = self.free.get()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return cast("dict[str, Any]", json.loads(process.stdout.readline()))
        finally:
            self.free.put(process)

    def close(self) -> None:
        """End the drivers."""
        self.pool.shutdown(cancel_futures=True)
        for process in self.processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.wait(timeout=60)
            process.stdout.close()


@dataclass(frozen=True)
class Cases:
    """The cases of one scenario: where each happens, and what came of it."""

    undisturbed: dict[str, Any]
    kills: dict[str, Future[dict[str, Any]]]
    overtakings: dict[str, Future[dict[str, Any]]]


def differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """Say where two states differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            line
            for key in sorted({*found, *wanted})
            for line in differences(found.get(key), wanted.get(key), f"{path}/{key}")
        ]
    return [] if found == wanted else [f"{path}: {found!r}, and not {wanted!r}"]


def complaint(
    answer: dict[str, Any], undisturbed: dict[str, Any], *, leave: tuple[str, ...] = ()
) -> str:
    """Say what is wrong with a case; "" when it ended as one or two undisturbed runs do."""
    if "broken" in answer:
        return str(answer["broken"])
    if answer.get("unjudged"):
        return f"when it was killed, version {answer['unjudged']} without a verdict was champion"
    if odd := [e for e in answer["errors"] if e and not e.startswith(TWICE)]:
        return f"the command failed: {odd}"
    book = {k: v for k, v in answer["book"].items() if k not in leave}
    found = [
        differences(book, {k: v for k, v in wanted.items() if k not in leave})
        for wanted in undisturbed["books"]
    ]
    return "" if not all(found) else "\n      ".join(min(found, key=len)[:8])


def lost(answer: dict[str, Any], undisturbed: dict[str, Any]) -> int:
    """Count the batches and labels of an undisturbed run that a case has no record of."""
    book = answer.get("book") or {"kept": []}
    return len({*undisturbed["books"][0]["kept"]} - {*book["kept"]})


def report(complaints: dict[str, str]) -> str:
    """List the failed cases by the place where they happened."""
    failed = {where: text for where, text in complaints.items() if text}
    lines = [f"  {where}:\n      {text}" for where, text in failed.items()]
    return "\n".join([f"{len(failed)} of {len(complaints)} cases:", *lines])
