"""The search for the cheapest policy above an accuracy, on digits."""

from __future__ import annotations

from pathlib import Path

import pytest
from histories import Story, make_story

from flows.replay import BacktestError
from flows.suggest import search

pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    kinds = ("mnist", "mnist", "mnist", "mnist", "optical", "optical")
    return make_story(tmp_path_factory.mktemp("story"), kinds, labels=lambda _: True)


@pytest.mark.nightly
def test_the_cheapest_policy_is_found_and_validated_on_what_came_later(story: Story) -> None:
    """The earlier part is quiet and nothing is trained; how the later one went is told apart."""
    found = search(story.past, story.start, story.shelf, 0.5, 3)
    assert found.searched.accuracy >= 0.5
    assert (len(found.searched.served), len(found.later.served)) == (4, 2)
    assert found.searched.retrainings == ()
    assert found.later.served[0].batch_id == "04-optical"
    assert "never saw" in found.words(0.5)
    assert ("did NOT hold" in found.words(0.99)) == (found.later.accuracy < 0.99)


@pytest.mark.nightly
def test_what_cannot_be_reached_is_said(story: Story) -> None:
    """No policy is always right, and the message has the best."""
    with pytest.raises(BacktestError, match="none of 2 policies stays above 1: the best reaches 0"):
        search(story.past, story.start, story.shelf, 1.0, 2)


def test_a_short_history_is_refused(tmp_path: Path) -> None:
    """Three batches cannot be searched and validated on."""
    short = make_story(tmp_path / "short", ("mnist",) * 3, labels=lambda _: True)
    with pytest.raises(BacktestError, match="at least 6 are needed"):
        search(short.past, short.start, short.shelf, 0.5, 2)
