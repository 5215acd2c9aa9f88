"""Peers that this project may not depend on, in an environment of their own.

alibi-detect's licence forbids it as a dependency, and NannyML and river want older numpy and
pandas. `.peers-venv` beside this file is made when it is missing; arrays go there as .npz, answers
come back as JSON. This file is both sides: here `ask`, there a script.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ENVIRONMENT = Path(__file__).parent / ".peers-venv"
PACKAGES = (
    "alibi-detect[torch]==0.13.0",
    "nannyml==0.13.1",
    "river==0.23.0",
    "statsmodels==0.15.0",  # NannyML imports it and does not say so
    "numpy==1.26.4",
    "pandas==2.3.3",
)
ALPHA = 0.05


# --- this side


def make(python: str = sys.executable) -> str | None:
    """Make the environment if it is missing or of other packages; give why it could not be made."""
    mark = ENVIRONMENT / ".installed"
    wanted = hashlib.sha256("\n".join(PACKAGES).encode()).hexdigest()
    if mark.exists() and mark.read_text() == wanted:
        return None
    for command in (
        [python, "-m", "venv", "--clear", str(ENVIRONMENT)],
        [_python(), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES],
        [_python(), "-c", "import alibi_detect.cd, nannyml, river"],
    ):
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"{command[0]}: {error}"
        if run.returncode:
            last = [*run.stderr.strip().splitlines(), f"exit {run.returncode}"][-2:]
            return " ".join(last)
    mark.write_text(wanted)
    return None


def ask(task: str, **arrays: np.ndarray) -> Any:
    """Have a function of `TASKS` answered in the other environment.

    Raises:
        RuntimeError: with the last lines of its errors, if it fails.

    """
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder) / "given.npz", Path(folder) / "answer.json"
        np.savez(given, **arrays)
        run = subprocess.run(
            [_python(), str(Path(__file__)), task, str(given), str(answer)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "NML_DISABLE_USAGE_LOGGING": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        if run.returncode:
            raise RuntimeError(f"{task} in {ENVIRONMENT.name}: {run.stderr[-2000:]}")
        return json.loads(answer.read_text())


def _python() -> str:
    return str(ENVIRONMENT / "bin" / "python")


# --- the other side


def detect(given: dict[str, np.ndarray]) -> dict[str, list[bool]]:
    """Test batches with KSDrift and MMDDrift at their defaults.

    Args:
        given: `reference` (r, n, d) and `batches` (r, b, m, d): b batches against each reference.

    Returns:
        Whether each rang, references outside, batches inside.

    """
    from alibi_detect.cd import KSDrift, MMDDrift

    rang: dict[str, list[bool]] = {"KSDrift": [], "MMDDrift": []}
    for reference, batches in zip(given["reference"], given["batches"], strict=True):
        detectors = {
            "KSDrift": KSDrift(reference, p_val=ALPHA),
            "MMDDrift": MMDDrift(reference, backend="pytorch", p_val=ALPHA, device="cpu"),
        }
        for batch in batches:
            for name, detector in detectors.items():
                rang[name].append(bool(detector.predict(batch)["data"]["is_drift"]))
    return rang


def cost(given: dict[str, np.ndarray]) -> dict[str, float]:
    """Give CPU seconds of one answer of each detector: the median of three."""
    from alibi_detect.cd import KSDrift, MMDDrift

    reference, batch = given["reference"], given["batch"]
    detectors = {
        "KSDrift": KSDrift(reference, p_val=ALPHA),
        "MMDDrift": MMDDrift(reference, backend="pytorch", p_val=ALPHA, device="cpu"),
    }
    seconds = {}
    for name, detector in detectors.items():
        took = []
        for _ in range(3):
            began = time.process_time()
            detector.predict(batch)
            took.append(time.process_time() - began)
        seconds[name] = float(np.median(took))
    return seconds


def adwin(given: dict[str, np.ndarray]) -> list[list[int]]:
    """Give the batches at which river's ADWIN (defaults) rings on each stream of `values` (s, n).

    `batch` is the number of values in one batch.
    """
    from river.drift import ADWIN

    size = int(given["batch"])
    found = []
    for stream in given["values"]:
        detector, alarms = ADWIN(), []
        for i, value in enumerate(stream.tolist()):
            detector.update(value)
            if detector.drift_detected:
                alarms.append(i // size)
        found.append(alarms)
    return found


def cbpe(given: dict[str, np.ndarray]) -> list[float]:
    """Estimate the accuracy of each batch with NannyML's CBPE.

    Args:
        given: `probabilities` (n, classes) and `labels` (n,) of the reference, `batches` (b, m,
            classes).

    """
    import nannyml
    import pandas as pd

    classes = given["probabilities"].shape[1]

    def frame(probabilities: np.ndarray) -> Any:
        columns = {f"p{i}": probabilities[:, i].astype(float) for i in range(classes)}
        return pd.DataFrame(columns).assign(
            predicted=[f"c{i}" for i in probabilities.argmax(axis=1)]
        )

    reference = frame(given["probabilities"]).assign(truth=[f"c{i}" for i in given["labels"]])
    batches = given["batches"]
    estimator = nannyml.CBPE(
        problem_type="classification_multiclass",
        y_pred_proba={f"c{i}": f"p{i}" for i in range(classes)},
        y_pred="predicted",
        y_true="truth",
        metrics=["accuracy"],
        chunk_size=batches.shape[1],
    )
    estimator.fit(reference)
    result = estimator.estimate(frame(batches.reshape(-1, classes)))
    table = result.filter(period="analysis").to_df()
    return [float(value) for value in table[("accuracy", "value")]]


TASKS: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
    "detect": detect,
    "cost": cost,
    "adwin": adwin,
    "cbpe": cbpe,
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    with np.load(sys.argv[2]) as stored:
        arrays = dict(stored)
    Path(sys.argv[3]).write_text(json.dumps(TASKS[sys.argv[1]](arrays)))
