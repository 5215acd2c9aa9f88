"""Several labels and numbers through the whole product: the loop knows nothing of the task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from worlds import make_world

from flows.registry import Registry
from flows.watch import watch

ROUND = (0, 6, 8, 9)


def attributes(digit: int) -> str:
    """Write which of three attributes a digit has; 1 and 3 have none."""
    held = {"even": digit % 2 == 0, "over_four": digit > 4, "round": digit in ROUND}
    return "|".join(name for name, it_has in held.items() if it_has) or "|"


MULTI_LABEL = 'task = "multi_label"\n'
REGRESSION = 'task = "regression"\ntolerance = 1.5\nclasses = ["digit"]\n'


@pytest.mark.parametrize(
    ("name", "model", "label", "column"),
    [
        ("attributes", MULTI_LABEL, attributes, "labels"),
        ("value", REGRESSION, str, "values"),
    ],
)
def test_a_task_goes_through_the_whole_loop(
    tmp_path: Path,
    prefect_server: str,
    name: str,
    model: str,
    label: Callable[[int], str],
    column: str,
) -> None:
    """Bootstrap, drift, late labels, settling, retraining, the gate, promotion, and serving."""
    import mlflow.pyfunc

    del prefect_server
    world = make_world(tmp_path / name, name, model=model, label=label)
    registry = Registry(world.settings)
    first = registry.reference(registry.champion()).accuracy
    assert first > 0.5

    world.arrive(0)
    (checked,) = watch(str(world.path)).checked
    assert checked.alarm
    assert checked.action == "ask_for_labels"
    (batch,) = world.arrive(1, labelled=True, label=label)
    watched = watch(str(world.path))
    assert watched.settled[batch] < first - 0.1
    assert watched.decision.action == "retrain"
    assert registry.alias("champion") == 2
    second = registry.version(2)
    assert second.verdict == "promote"
    files = {f.path for f in registry.client.list_artifacts(second.run_id)}
    assert {"confusion-against-1.png", "scores-against-1.json"} <= files
    assert {label(digit) for digit in range(10)} >= set(registry.learned(second)["label"])

    network = registry.network(second)
    assert network.config.task == registry.config(registry.version(1)).task
    folder = registry.verified_folder(second)
    loaded = mlflow.pyfunc.load_model(str(folder / "model"))
    pictures = np.zeros((2, 28, 28), dtype=np.uint8)
    answers = loaded.predict(pictures)
    assert len(answers[column]) == 2
