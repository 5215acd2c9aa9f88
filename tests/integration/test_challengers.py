"""Challengers of other kinds, from how they are made to how they serve: an ensemble, and a bank."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pytest
import torch
from worlds import World, make_world

from flows.adapt import AdaptError, adapt
from flows.batches import read_batch
from flows.demo import Digits, _arrive, _label_late, _mnist
from flows.feed import list_batches
from flows.fresh import fresh_set
from flows.registry import Registry
from flows.retrain import retrain
from flows.watch import make_plan, watch


def answers_as_made(world: World, patch: pytest.MonkeyPatch) -> None:
    """The champion, loaded anew and served by MLflow, answers as when its reference was made."""
    registry = Registry(world.settings)
    champion = registry.champion()
    network, memory = registry.network(champion), registry.memory(champion)
    patch.setenv("MLFLOW_TRACKING_URI", registry.uri)
    # a factory is allowed by the process that serves
    patch.setenv("SUSTAIN_MODEL_ARCHITECTURE", network.config.architecture)
    served = mlflow.pyfunc.load_model(f"models:/{registry.name}@champion")
    patch.delenv("SUSTAIN_MODEL_ARCHITECTURE")
    for regime in registry.reference(champion).regimes:
        then = regime.features
        known = memory.pixels(then.sample_ids, network.config.preprocessing)
        pixels = torch.stack([known[name] for name in then.sample_ids])
        embedding, probabilities = network.embed(pixels)
        np.testing.assert_allclose(embedding.numpy(), then.embedding, atol=1e-5)
        np.testing.assert_allclose(probabilities.numpy(), then.probabilities, atol=1e-6)
        told = served.predict(pixels.permute(0, 2, 3, 1).numpy())
        assert told["class"].tolist() == [network.config.classes[i] for i in then.predicted]


def test_an_ensemble_is_promoted_served_and_watched(
    tmp_path: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a search before it, whose table is on the run; then it is a champion like any other."""
    assert prefect_server
    world = make_world(
        tmp_path / "ensemble",
        "ensemble",
        "max_latency_ratio = 4\n"  # two networks take twice the time of one, more or less
        "[search]\nenabled = true\nfolds = 2\ngrid = { learning_rate = [1e-6, 3e-3] }\n",
        change=(
            "[training]\nepochs = 40",
            '[training]\nepochs = 10\nafter = "ensemble"\nmembers = 2',
        ),
    )
    world.arrive(0, labelled=True)
    assert retrain(str(world.path)).promoted
    registry = Registry(world.settings)
    second = registry.champion()
    assert (second.number, registry.config(second).members) == (2, 2)
    answers_as_made(world, monkeypatch)
    run = registry.client.get_run(second.run_id)
    assert "together: validation loss" in run.data.tags["sustain.members"]
    assert float(run.data.params["learning_rate"]) > 1e-5
    table = registry.client.download_artifacts(second.run_id, "search.csv", str(tmp_path))
    stages = [line.split(",")[1] for line in Path(table).read_text().splitlines()]
    assert stages == ["stage", "head", "head", "full", "full", "full"]

    world.arrive(1)
    checked = watch(str(world.path)).checked
    assert [one.samples for one in checked] == [0, 100]  # it learned all of the first


@pytest.mark.nightly
def test_a_challenger_without_labels_waits_for_them_and_serves(
    tmp_path: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drift makes a bank of statistics, once; the labels that come later only judge it."""
    assert prefect_server
    world = make_world(
        tmp_path / "bank",
        "bank",
        "\n[adaptation]\nenabled = true\n",
        change=("small_cnn", "samples:batch_norm_net"),
    )
    with pytest.raises(AdaptError, match="no batch of the feed rang against version 1"):
        adapt(str(world.path))
    mnist = _mnist()
    dim = Digits((0.3 * mnist.pictures[400:800] + 150).astype(np.uint8), mnist.labels[400:800])
    feed = world.path.parent / "feed"
    ids = _arrive(feed, "dim", dim, (0, 1))
    watched = watch(str(world.path))
    assert watched.decision.action == "ask_for_labels"
    assert "version 2 was not promoted (inconclusive): not enough evidence" in watched.done
    registry = Registry(world.settings)
    second = registry.version(2)
    assert (registry.alias("champion"), registry.alias("challenger")) == (1, 2)
    assert "no sample has a label" in second.tags["verdict_reason"]
    assert int(second.tags["verdict_missing"]) == 34  # 10 held out of 10 in 3
    assert second.tags["adapted"].startswith("bank of ")
    assert make_plan(registry, world.settings, datetime.now(UTC)).idle
    again = adapt(str(world.path))
    assert (again.version, again.made_now) == (2, False)

    _label_late(world.path.parent / "labels" / "late.csv", feed, dim, ids)
    watched = watch(str(world.path))
    assert "version 2 was promoted" in watched.done
    registry = Registry(world.settings)
    assert registry.alias("champion") == 2
    assert registry.config(registry.champion()).domains == 2
    assert [r.name for r in registry.reference(second).regimes] == ["first", "since v1"]
    answers_as_made(world, monkeypatch)
    plan = make_plan(registry, world.settings, datetime.now(UTC))
    assert len(plan.fresh) > 0  # nothing was learned from them
    assert len(fresh_set(plan.labels, registry.learned(second))) == len(plan.fresh)
    assert not any(checked.alarm for checked in watch(str(world.path)).checked)


def test_a_challenger_answers_in_the_shadow_before_it_is_judged(
    small_world: Callable[[str], World],
) -> None:
    """It is made, and answers the next batch beside the champion; then the gate lets it through."""
    world = small_world("shadow")
    world.path.write_text(world.path.read_text().replace("[gate]", "[gate]\nshadow_batches = 1", 1))
    world.arrive(0, labelled=True)
    assert (
        "answers 1 more batch beside the champion before it is judged"
        in watch(str(world.path)).done
    )
    registry = Registry(world.settings)
    assert (registry.version(2).verdict, registry.alias("challenger")) == (None, 2)
    made = make_plan(registry, world.settings, datetime.now(UTC)).decider.history.remade
    assert made == "version 2, which answers beside the champion before it is judged"
    (batch,) = world.arrive(1)
    watched = watch(str(world.path))
    (record,) = [c for c in registry.checks(1) if c.key.batch_id == batch]
    features, second = registry.features(record), registry.version(2)
    pictures = read_batch(
        next(b for b in list_batches(world.settings.feed, world.settings.root) if b.id == batch),
        world.settings.feed,
        world.settings.root,
        registry.config(second).preprocessing,
    ).pixels
    said = registry.network(second).embed(pictures[range(100)])[1].argmax(1).numpy()
    metrics = record.metrics
    assert metrics["shadow.version"] == 2
    assert metrics["shadow.agreement"] == pytest.approx((said == features.predicted).mean())
    assert metrics["shadow.estimated"] > metrics["accuracy.estimated"]
    assert "in the shadow, version 2 agrees with the champion on " in record.tags["sustain.notes"]
    assert "version 2 was promoted" in watched.done
    assert registry.alias("champion") == 2
