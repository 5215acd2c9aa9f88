"""Policies replayed on digits: MNIST, then optical digits, whose labels come half an hour later."""

from __future__ import annotations

import gc
import os
import tomllib
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import pytest
from histories import BEGIN, HOUR, Story, make_story, replayed

from flows.backtest import emit
from flows.check import check
from flows.grid import grid_of, read_grid
from flows.meter import total
from flows.past import Past, PastError, read_past
from flows.preflight import SettingsError
from flows.replay import Backtest, BacktestError, expand, find_ideal, replay_all
from flows.replay_page import write_page
from flows.settings import load_settings
from flows.simulated import SimulatedRegistry
from monitoring.replay import Replayed

KINDS = ("mnist", "optical", "optical", "optical", "mnist", "optical")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return make_story(tmp_path_factory.mktemp("story"), KINDS, labels=lambda _: True)


@pytest.fixture(scope="module")
def found(story: Story) -> Backtest:
    """Replay three policies."""
    done = replayed(story, default={"all": ["drift", "damage"]}, never="never", always="always")
    replays = tuple(one for one, _ in done.values())
    ideal = find_ideal(story.past, story.start, story.shelf, replays, 20.0, times=2)
    spent = {name: cost for _, costs in done.values() for name, cost in costs.items()}
    return Backtest(replays, ideal, 20.0, 0.8, total(spent.values()).cpu_seconds, story.past.notes)


def test_a_policy_retrains_when_labels_of_the_drift_came(found: Backtest) -> None:
    """The default trains for the optical digits, is promoted, and answers the last ones better."""
    default = found.replays[0]
    assert default.retrainings
    made = default.retrainings[0]
    assert made.at > BEGIN + HOUR
    assert "optical" in made.batch_id
    assert made.promoted
    assert "to learn from" in made.reason  # as it was then, though the check says more since
    assert default.served[-1].accuracy > found.replays[1].served[-1].accuracy + 0.2


def test_labels_of_quiet_batches_may_not_count(tmp_path: Path) -> None:
    """Three quiet batches have labels enough; counted from the alarm on, training waits."""
    story = make_story(tmp_path / "late", ("mnist",) * 3 + ("optical",) * 3, labels=lambda _: True)
    usual, late = (
        _one(story, story.past, {"retrain_when": "drift", "fresh_from": fresh}).retrainings[0].at
        for fresh in ("all", "alarm")
    )
    assert usual == BEGIN + 3 * HOUR
    assert late >= BEGIN + 3.5 * HOUR


def test_a_challenger_answers_in_the_shadow_first(story: Story, found: Backtest) -> None:
    """It is made when it would be anyway, but serves only after it has answered a batch."""
    default = found.replays[0].retrainings[0]
    drift = {"retrain_when": {"all": ["drift", "damage"]}}
    done = _one(story, story.past, drift, {"shadow_batches": 1})
    made = done.retrainings[0]
    assert (made.at, made.version) == (default.at, default.version)
    assert made.promoted
    after = [one.version for one in done.served if one.at > made.at]
    assert after[0] == done.served[0].version
    assert made.version in after[1:]


def test_never_never_trains_and_always_trains_most(found: Backtest) -> None:
    """One policy makes nothing and costs only checks; the other trains whenever labels suffice."""
    default, never, always = found.replays
    assert (never.retrainings, never.labels_used) == ((), 0)
    assert never.cpu_seconds < default.cpu_seconds
    assert len(always.retrainings) >= len(default.retrainings)


def test_no_policy_beats_the_oracle(found: Backtest) -> None:
    """Regret is not negative, and the oracle's accuracy is at least that of `never`."""
    assert found.ideal is not None
    for one in found.replays:
        assert not one.rollbacks
        assert found.regret(one) >= -1e-6
    assert found.ideal.accuracy >= found.replays[1].accuracy


def test_what_policies_agree_on_is_made_once(story: Story, found: Backtest) -> None:
    """All together cost less than the sum, and again nothing new is put on the shelf."""
    assert found.cpu_seconds < sum(one.cpu_seconds for one in found.replays)
    before = sorted(path.name for path in story.shelf.folder.rglob("*.costs"))
    again, _ = replayed(story, default={"all": ["drift", "damage"]})["default"]
    assert sorted(path.name for path in story.shelf.folder.rglob("*.costs")) == before
    assert replace(again, overrides={}) == replace(found.replays[0], overrides={})


@pytest.mark.nightly
def test_two_processes_do_as_one(story: Story, found: Backtest) -> None:
    """What they find is what one process found; one that dies is told of, with the way out."""
    grids = [
        grid_of(name, {"policy": {"retrain_when": when}})
        for name, when in {"default": {"all": ["drift", "damage"]}, "never": "never"}.items()
    ]
    candidates = list(expand(story.settings, grids))
    done = replay_all(story.past, story.start, story.shelf, candidates, jobs=2)
    for (again, _), before in zip(done, found.replays, strict=False):
        assert replace(again, overrides={}) == replace(before, overrides={})
    deadly = replace(candidates[1], overrides={"policy": {"retrain_when": _Deadly()}})
    with pytest.raises(BacktestError, match="killed, or ran out of memory: take fewer --jobs"):
        replay_all(story.past, story.start, story.shelf, [deadly], jobs=2)


class _Deadly:
    """Kills the process that it is sent to."""

    def __reduce__(self) -> object:
        return os._exit, (1,)


def test_what_decides_holds_nothing_of_the_future(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that a check can reach is searched for a sample or label that came later."""
    past, seen = story.past, []

    def nosy(registry: SimulatedRegistry, *others: object) -> object:
        later = {b.id for b in past.batches if b.arrived > registry.now()}
        texts = _texts([registry, *others])
        leaked = [text for text in texts if text.split("/", 1)[0] in later]
        assert not leaked
        known = registry.view.labels(registry.view.batches(), (*map(str, range(10)),), TASK).table
        times = {BEGIN + int(name[:2]) * HOUR + HOUR / 2 for name in known["sample_id"]}
        assert all(time <= registry.now() for time in times)
        seen.append(len(known))
        return check.fn(registry, *others)

    from sft.tasks import SINGLE_LABEL as TASK

    monkeypatch.setattr("flows.watch.check", type("Nosy", (), {
        "fn": staticmethod(nosy), "with_options": lambda *_, **__: None,
    }))  # fmt: skip
    _one(story, past, {"retrain_when": "always"})
    assert len(set(seen)) > 3


def _one(
    story: Story, past: Past, policy: dict[str, object], gate: dict[str, object] | None = None
) -> Replayed:
    from flows.replay import replay

    grid = grid_of("x", {"policy": policy, "gate": gate or {}})
    [candidate] = expand(story.settings, [grid])
    return replay(past, story.start, story.shelf, candidate)[0]


def _texts(roots: list[object]) -> set[str]:
    """Collect every text that can be reached, but through modules, classes and functions."""
    seen, texts, open_ = set(), set(), list(roots)
    while open_:
        one = open_.pop()
        if id(one) in seen or isinstance(one, ModuleType | type) or callable(one):
            continue
        seen.add(id(one))
        if isinstance(one, str):
            texts.add(one)
        open_ += gc.get_referents(one)
    return texts


def test_labels_count_from_when_they_came(story: Story) -> None:
    """An hour's batch has its labels half an hour later, and not a microsecond before."""
    past = story.past
    at = BEGIN + 2 * HOUR + HOUR / 2
    batches = past.batches
    from sft.tasks import SINGLE_LABEL

    def known(moment: object) -> int:
        seen = past.at(moment)
        return len(seen.labels(seen.batches(), (*map(str, range(10)),), SINGLE_LABEL).table)

    assert known(at) - known(at - timedelta(microseconds=1)) == 60
    assert len(past.moments) == 2 * len(batches)


def test_without_labels_it_says_what_cannot_be_had(tmp_path: Path) -> None:
    """The alarms are replayed; accuracy, regret and frontier are not made up."""
    story = make_story(tmp_path / "mute", KINDS[:3], labels=lambda _: False)
    assert "accuracy" in " ".join(story.past.notes)
    done, _ = replayed(story, always="always")["always"]
    assert any(one.alarm for one in done.served)
    assert done.accuracy != done.accuracy
    found = Backtest((done,), None, 20.0, None, 1.0, story.past.notes)
    assert (found.frontier, found.regret(done)) == ((), None)
    assert "Without labels" in write_page(found, "digits", None)


def test_an_empty_feed_is_refused(tmp_path: Path) -> None:
    """There is nothing to replay, and the message names the feed."""
    story = make_story(tmp_path / "empty", (), labels=lambda _: False)
    with pytest.raises(PastError, match="nothing to replay: feed holds no batch"):
        read_past(story.settings)


def test_batches_in_another_order_and_twice_are_told(tmp_path: Path) -> None:
    """Batches go by their arrival, and a copy of a batch is named."""
    import shutil

    story = make_story(tmp_path / "mixed", KINDS[:3], labels=lambda _: True)
    feed = story.settings.root / "feed"
    shutil.copytree(feed / "01-optical", feed / "00-again")
    early = (BEGIN - HOUR).timestamp()
    for file in (feed / "02-optical").iterdir():
        os.utime(file, (early, early))
    past = story.past
    assert past.batches[0].id == "02-optical"
    assert any("another order" in note for note in past.notes)
    assert any("00-again, 01-optical" in note for note in past.notes)
    done, _ = replayed(story, never="never")["never"]
    assert [one.batch_id for one in done.served] == [b.id for b in past.batches]


def test_a_list_is_a_grid(story: Story) -> None:
    """Lists of values and of triggers multiply; a trigger's own list stays together."""
    grid = grid_of(
        "g",
        {
            "policy": {
                "min_drop": [0.03, 0.05],
                "retrain_when": [
                    {"batches_since_training": [1, 3]},
                    {"all": ["drift", {"any": ["estimated_damage", "true_damage"]}]},
                ],
            }
        },
    )
    assert grid.points == 6
    names = [one.name for one in expand(story.settings, [grid])]
    assert len(set(names)) == 6
    assert "g: min_drop=0.03, retrain_when=batches_since_training 3" in names


def test_a_policy_that_is_none_is_refused(story: Story, tmp_path: Path) -> None:
    """An unknown section and a value out of its range are named."""
    with pytest.raises(SettingsError, match=r"section \[polcy\]"):
        grid_of("g", {"polcy": {}})
    with pytest.raises(SettingsError, match="min_drop"):
        list(expand(story.settings, [grid_of("g", {"policy": {"min_drop": [0.1, 7]}})]))
    with pytest.raises(SettingsError, match="cannot be read"):
        read_grid(tmp_path / "nothing.toml")


def test_what_is_emitted_is_the_policy_with_its_evidence(story: Story, found: Backtest) -> None:
    """The file loads, has the policy's settings beside all others, and says why."""
    path = story.settings.root / "best.toml"
    chosen = found.choose("default")
    emit(story.settings, found, chosen, path)
    loaded = load_settings(path, environ={})
    [candidate] = expand(loaded, [grid_of("default", chosen.overrides)])
    assert loaded.policy == candidate.settings.policy
    assert loaded.gate.min_fresh == story.settings.gate.min_fresh
    text = path.read_text()
    assert f"mean accuracy: {chosen.accuracy:.3f}" in text
    assert chosen.retrainings[0].batch_id in text
    assert tomllib.loads(text)["policy"]["retrain_when"] == {"all": ["drift", "damage"]}


def test_the_page_tells_every_reason(found: Backtest) -> None:
    """One file with its own plotly, a row a policy, and the reason of each retraining."""
    page = write_page(found, "<digits>", found.replays[0])
    assert "plotly.js v" in page  # the whole of it, in the file itself
    assert "&lt;digits&gt;" in page
    for one in found.replays:
        assert f"<td>{one.name}</td>" in page
        assert all(made.batch_id in page for made in one.retrainings)
