"""The policy as a table: evidence, labels and history in, one action and its reason out."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from monitoring.policy import (
    Action,
    Evidence,
    FreshLabels,
    History,
    PolicySettings,
    decide,
)

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
SETTINGS = PolicySettings(min_drop=0.05, min_labels=100, min_classes=2, cooldown_hours=24)
HURT = Evidence("b", alarm=True, p_value=1e-6, alpha=0.01, estimated=0.7, reference=0.9)
QUIET = replace(HURT, alarm=False, p_value=0.4, estimated=0.9)
SHIFTED = replace(HURT, estimated=0.88)
LABELS = FreshLabels(n=150, classes=10)
NOTHING = History()


def ago(hours: float) -> datetime:
    return NOW - timedelta(hours=hours)


@pytest.mark.parametrize(
    ("evidence", "labels", "history", "action", "words"),
    [
        pytest.param(QUIET, LABELS, NOTHING, "none", ["looks like", "0.4", "0.01"], id="quiet"),
        pytest.param(
            replace(QUIET, estimated=0.5), LABELS, NOTHING, "none", ["looks like"], id="no-alarm"
        ),
        pytest.param(
            SHIFTED, LABELS, NOTHING, "watch", ["not shown to hurt", "0.880", "0.900"], id="benign"
        ),
        pytest.param(
            replace(SHIFTED, estimated=0.99), LABELS, NOTHING, "watch", ["0.990"], id="better"
        ),
        pytest.param(
            HURT, LABELS, NOTHING, "retrain", ["0.200", "0.700", "150 fresh", "10 classes"],
            id="hurt",
        ),
        pytest.param(
            replace(HURT, estimated=0.85), LABELS, NOTHING, "retrain", ["0.050"],
            id="a-fall-of-exactly-min-drop",
        ),
        pytest.param(
            replace(HURT, estimated=0.851), LABELS, NOTHING, "watch", [], id="just-under-min-drop"
        ),
        pytest.param(
            replace(SHIFTED, novelty=0.62, believable=False), LABELS, NOTHING, "ask_for_labels",
            ["only labels can tell", "62%", "0.880"], id="not-to-be-believed",
        ),
        pytest.param(
            replace(
                SHIFTED, novelty=0.6, believable=False,
                settled=0.89, settled_n=80, settled_high=0.95,
            ),
            LABELS, NOTHING, "watch", ["0.890 on 80 labels"], id="labels-told",
        ),
        pytest.param(
            replace(SHIFTED, settled=0.8, settled_n=300, settled_high=0.845), LABELS, NOTHING,
            "retrain", ["300 labels", "0.800", "0.845"], id="labels-show-it",
        ),
        pytest.param(
            replace(SHIFTED, settled=0.8, settled_n=20, settled_high=0.94), LABELS, NOTHING,
            "watch", ["(0.800 on 20 labels)"], id="few-labels-prove-nothing",
        ),
        pytest.param(
            replace(SHIFTED, settled=0.88, settled_n=9000, settled_high=0.887), LABELS, NOTHING,
            "watch", [], id="certain-but-small",
        ),
        pytest.param(
            replace(HURT, settled=0.9, settled_n=30, settled_high=0.96), LABELS, NOTHING, "watch",
            ["labels decide", "0.900 on 30 labels"], id="labels-overrule-the-estimate",
        ),
        pytest.param(
            replace(HURT, settled=0.9, settled_n=29, settled_high=0.96), LABELS, NOTHING,
            "retrain", ["0.900 on 29 labels"], id="too-few-labels-to-overrule",
        ),
        pytest.param(
            replace(HURT, settled=0.85, settled_n=60, settled_high=0.93), LABELS, NOTHING,
            "retrain", ["probably fell"], id="labels-that-fell-too-overrule-nothing",
        ),
        pytest.param(
            replace(HURT, settled=0.88, settled_n=9000, settled_high=0.887), LABELS, NOTHING,
            "retrain", ["probably fell"], id="labels-shown-lower-overrule-nothing",
        ),
        pytest.param(
            HURT, FreshLabels(40, 10), NOTHING, "ask_for_labels",
            ["60 labels are missing", "40 of 100"], id="too-few-labels",
        ),
        pytest.param(
            HURT, FreshLabels(99, 10), NOTHING, "ask_for_labels", ["1 label is missing"],
            id="one-label-missing",
        ),
        pytest.param(
            HURT, FreshLabels(0, 0), NOTHING, "ask_for_labels", ["100 labels are missing"],
            id="no-labels",
        ),
        pytest.param(HURT, FreshLabels(100, 2), NOTHING, "retrain", [], id="just-enough"),
        pytest.param(
            HURT, FreshLabels(500, 1), NOTHING, "ask_for_labels", ["1 class and", "at least 2"],
            id="one-class",
        ),
        pytest.param(
            HURT, LABELS, History(remade="version 2, which was rolled back"), "ask_for_labels",
            ["version 2, which was rolled back", "more labels", "a person who promotes it"],
            id="remade",
        ),
        pytest.param(
            HURT, FreshLabels(40, 10), History(remade="version 2"), "ask_for_labels",
            ["60 labels are missing"], id="missing-labels-come-first",
        ),
        pytest.param(
            HURT, LABELS, History(last_rollback=ago(3)), "watch",
            ["last rollback was 3.0 hours ago", "24 hours", "another 21.0 hours"], id="cool-down",
        ),
        pytest.param(
            HURT, LABELS, History(ago(30), ago(50), ago(2)), "watch",
            ["last training was 2.0 hours ago"], id="latest-change-counts",
        ),
        pytest.param(
            HURT, LABELS, History(last_promotion=ago(24)), "retrain", [], id="cool-down-is-over"
        ),
        pytest.param(
            HURT, LABELS, History(last_training=ago(1), remade="version 2"), "ask_for_labels", [],
            id="remade-outlasts-cool-down",
        ),
    ],
)  # fmt: skip
def test_decide(
    evidence: Evidence, labels: FreshLabels, history: History, action: str, words: list[str]
) -> None:
    """Each row of the table has its action, and a reason that holds the figures."""
    decision = decide(evidence, labels, history, NOW, SETTINGS)
    assert decision.action == Action(action)
    for word in words:
        assert word in decision.reason
    assert decision.reason.endswith(".")


def test_no_cooldown_by_default() -> None:
    """Without a cool-down a rollback a second ago does not stop training."""
    history = History(last_rollback=NOW)
    assert decide(HURT, LABELS, history, NOW, PolicySettings()).action is Action.RETRAIN


@pytest.mark.parametrize("field", ["estimated", "reference"])
def test_not_a_number_is_refused(field: str) -> None:
    """NaN would read as "no damage", so it is an error that names the batch."""
    with pytest.raises(ValueError, match="batch b: accuracy"):
        decide(replace(HURT, **{field: float("nan")}), LABELS, NOTHING, NOW, SETTINGS)


@pytest.mark.parametrize(
    "settings",
    [
        {"min_drop": 0},
        {"min_drop": 1},
        {"min_drop": float("nan")},
        {"min_labels": 0},
        {"min_classes": 0},
        {"cooldown_hours": -1},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    """A value that cannot be meant is an error that names it."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        PolicySettings(**settings)  # type: ignore[arg-type]
