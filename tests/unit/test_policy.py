"""The policy as a table: evidence, labels and history in, one action and its reason out."""

import functools
import random
import tomllib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from pydantic import TypeAdapter, ValidationError
from scipy import stats

from monitoring.accuracy import Pooled
from monitoring.policy import (
    Action,
    Decision,
    Evidence,
    FreshFrom,
    FreshLabels,
    History,
    PolicySettings,
    decide,
    decide_rollback,
    describe,
    on_probation,
    reference_needed,
    smallest_fall,
)
from monitoring.probation import Comparison, compare_pairs, count_pairs, paired_e_value
from monitoring.triggers import Measure, measures, parse_trigger, rank_of

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
SETTINGS = PolicySettings(min_drop=0.05, min_labels=100, min_classes=2, cooldown_hours=24)
HURT = Evidence(
    "b", True, p_value=1e-6, alpha=0.01, estimated=0.7, reference=0.9, estimated_high=0.75
)
QUIET = replace(HURT, alarm=False, p_value=0.4, estimated=0.9)
SHIFTED = replace(HURT, estimated=0.88)
DARK = Pooled(n_batches=1, n=60, accuracy=0.9, high=0.96, estimated=0.7, off_by_chance=0.13)
ROSY = Pooled(n_batches=1, n=60, accuracy=0.7, high=0.81, estimated=0.9, off_by_chance=0.13)
LARGE = Pooled(n_batches=10, n=600, accuracy=0.9, high=0.92, estimated=0.7, off_by_chance=0.04)
LABELS = FreshLabels(n=150, classes=10)
NOTHING = History()


def compare_paired(version: int, now: list[bool], before: list[bool]) -> Comparison:
    return compare_pairs(version, count_pairs(version, now, before))


def ago(hours: float) -> datetime:
    return NOW - timedelta(hours=hours)


@pytest.mark.parametrize(
    ("evidence", "labels", "history", "action", "words"),
    [
        pytest.param(
            replace(QUIET, settled=0.8, settled_n=300, settled_high=0.845), LABELS, NOTHING,
            "watch", ["looks like", "but accuracy on 300 labels", "Not due: the data is not"],
            id="labels-show-damage-without-an-alarm",
        ),
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
            ["only labels can tell", "62%", "0.880", "Label some of it."], id="not-to-be-believed",
        ),
        pytest.param(
            replace(SHIFTED, novelty=0.62, believable=False), FreshLabels(40, 10), NOTHING,
            "ask_for_labels", ["only labels can tell", "60 labels are missing"],
            id="not-to-be-believed-and-labels-missing",
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
            replace(HURT, pooled=DARK), LABELS, NOTHING, "watch",
            ["0.900 against 0.900", "0.700 before correction", "60 labels", "0.200 too dark"],
            id="labels-of-its-drift-show-the-estimate-to-be-too-dark",
        ),
        pytest.param(
            replace(HURT, estimated=0.6, pooled=DARK), LABELS, NOTHING, "watch",
            ["0.800 against 0.900", "may look so by chance: more labels decide"],
            id="a-corrected-fall-within-the-interval",
        ),
        pytest.param(
            replace(HURT, estimated=0.4, estimated_high=0.45, pooled=DARK), LABELS, NOTHING,
            "retrain", ["fell by 0.300, from 0.900 to 0.600"], id="a-corrected-fall-beyond-it",
        ),
        pytest.param(
            replace(SHIFTED, pooled=ROSY), LABELS, NOTHING, "retrain",
            ["accuracy on 60 labels of batches that rang is 0.700 (at most 0.810) against 0.900"],
            id="labels-of-its-drift-show-a-fall",
        ),
        pytest.param(
            replace(SHIFTED, estimated_high=0.89, pooled=replace(ROSY, accuracy=0.86, high=0.93)),
            LABELS, NOTHING, "watch", ["0.840 against 0.900", "0.040 too rosy", "by chance"],
            id="labels-of-its-drift-show-the-estimate-to-be-too-rosy",
        ),
        pytest.param(
            replace(HURT, settled=0.76, settled_n=60, settled_high=0.86, pooled=DARK), LABELS,
            NOTHING, "retrain", ["accuracy on 60 labels of it is 0.760"],
            id="the-one-labelled-batch-looks-bad",
        ),
        pytest.param(
            replace(HURT, settled=0.8, settled_n=60, settled_high=0.89, pooled=LARGE), LABELS,
            NOTHING, "watch", ["not shown to hurt"], id="one-of-ten-looks-bad-by-chance",
        ),
        pytest.param(
            replace(HURT, settled=0.7, settled_n=60, settled_high=0.81, pooled=LARGE), LABELS,
            NOTHING, "retrain", ["accuracy on 60 labels of it is 0.700"],
            id="one-of-ten-looks-worse-than-by-chance",
        ),
        pytest.param(
            replace(SHIFTED, pooled=replace(ROSY, n=29)), LABELS, NOTHING, "watch", ["0.880"],
            id="too-few-labels-to-correct",
        ),
        pytest.param(
            replace(QUIET, pooled=ROSY), LABELS, NOTHING, "none", ["looks like"],
            id="what-rang-tells-nothing-of-a-quiet-batch",
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


@pytest.mark.parametrize(("known", "action"), [(0, "retrain"), (100, "watch"), (5000, "retrain")])
def test_a_small_reference_is_not_exact(known: int, action: str) -> None:
    """.82 on 100 labels is no fall from 90 of 100, by chance, and one from 4,500 of 5,000."""
    own = replace(SHIFTED, settled=0.82, settled_n=100, settled_high=0.89, reference_n=known)
    pooled = replace(
        SHIFTED,
        estimated_high=0.95,
        pooled=replace(ROSY, n=100, accuracy=0.82, high=0.89, estimated=0.82),
        reference_n=known,
    )
    for evidence in (own, pooled):
        assert decide(evidence, LABELS, NOTHING, NOW, SETTINGS).action == action


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
        {"cooldown_hours": float("inf")},
        {"max_retrains": -1},
        {"budget_days": 0},
        {"probation_days": -1},
        {"rollback_alpha": 1},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    """A value that cannot be meant is an error that names it."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        PolicySettings(**settings)  # type: ignore[arg-type]


def retraining(when: str, **settings: Any) -> PolicySettings:
    """Settings with `retrain_when` as TOML has it, validated as the shell does it."""
    value = tomllib.loads(f"value = {when}")["value"]
    return TypeAdapter(PolicySettings).validate_python({"retrain_when": value, **settings})


LATELY = History(
    last_training=ago(8 * 24),
    trainings=(ago(20 * 24), ago(8 * 24)),
    last_training_seconds=34.2,
    batches_since_training=18,
    samples_since_training=2400,
)
SEEN = replace(HURT, settled=0.8, settled_n=300, settled_high=0.845)
TWO_OF_THREE = """{{ at_least = 2, of = [
    "damage", {{ fresh_labels = {} }}, {{ days_since_training = 7 }}
] }}"""
FOREIGN = replace(SHIFTED, novelty=0.6, believable=False)
FAR = replace(QUIET, distance=0.3, distance_rank=0.8)


@pytest.mark.parametrize(
    ("when", "evidence", "action", "words"),
    [
        ('"drift"', QUIET, "none", []),
        ('"drift"', SHIFTED, "retrain", ["not shown to hurt", "due: the change is enough"]),
        ('"drift"', HURT, "retrain", ["it hurts"]),
        ('"damage"', SHIFTED, "watch", ["not shown to hurt"]),
        ('"damage"', replace(HURT, alarm=False), "retrain", ["looks like", "but accuracy prob"]),
        ('"damage"', FOREIGN, "ask_for_labels", ["only labels can tell", "60%"]),
        ('"estimated_damage"', HURT, "retrain", ["probably fell"]),
        ('"estimated_damage"', replace(SEEN, estimated=0.9), "watch", ["the estimate shows no"]),
        ('"true_damage"', SEEN, "retrain", ["300 labels"]),
        ('"true_damage"', HURT, "ask_for_labels", ["only labels can tell", "probably fell by"]),
        (
            '"true_damage"', replace(HURT, settled=0.85, settled_n=60, settled_high=0.93), "watch",
            ["Not due: labels show no fall"],
        ),
        ('"always"', QUIET, "retrain", ["looks like", "due: at every check"]),
        ('"never"', SEEN, "watch", ["it hurts", "the settings never retrain"]),
        ('"never"', QUIET, "none", []),
        ("{ fresh_labels = 150 }", QUIET, "retrain", ["due: 150 fresh labels (limit 150)"]),
        ("{ fresh_labels = 151 }", QUIET, "none", ["Not due: 150 fresh labels (limit 151)"]),
        ("{ fresh_labels = 151 }", SHIFTED, "watch", ["Not due: 150 fresh"]),
        ("{ fresh_labels = 151 }", HURT, "ask_for_labels", ["it hurts", "1 label is missing"]),
        ("{ days_since_training = 8 }", QUIET, "retrain", ["8.0 days since", "(limit 8)"]),
        ("{ days_since_training = 8.1 }", QUIET, "none", ["Not due: 8.0 days since"]),
        ("{ batches_since_training = 18 }", QUIET, "retrain", ["18 batches", "(limit 18)"]),
        ("{ batches_since_training = 19 }", QUIET, "none", ["Not due: 18 batches"]),
        ("{ samples_since_training = 2400 }", QUIET, "retrain", ["(limit 2,400)"]),
        ("{ samples_since_training = 2401 }", QUIET, "none", ["Not due: 2400 samples"]),
        ("{ accuracy_below = 0.71 }", HURT, "retrain", ["accuracy 0.700 by estimate"]),
        ("{ accuracy_below = 0.7 }", HURT, "watch", ["it hurts", "(limit 0.7)"]),
        ("{ accuracy_below = 0.75 }", SEEN, "watch", ["accuracy 0.800 on 300 labels"]),
        ("{ accuracy_below = 0.85 }", FOREIGN, "ask_for_labels", ["only labels can tell"]),
        ("{ drift_distance_above = 0.3 }", FAR, "retrain", ["drift distance 0.300 (limit 0.3)"]),
        ("{ drift_distance_above = 0.31 }", FAR, "none", ["Not due: drift distance 0.300 (limit"]),
        ("{ drift_distance_above = 0.3 }", HURT, "watch", ["no drift distance is on record"]),
        ("{ drift_distance_quantile = 0.8 }", FAR, "retrain", ["0.300, above 80% of the last 15"]),
        ("{ drift_distance_quantile = 0.81 }", FAR, "none", ["(limit 0.81)"]),
        (
            "{ drift_distance_quantile = 0.8 }", replace(FAR, distance_rank=None), "none",
            ["Not due: drift distance 0.300, with fewer than 5 earlier ones"],
        ),
        # NOW is a Saturday noon; the last training was on Friday the 13th at noon
        ('{ schedule = "0 3 * * 0" }', QUIET, "retrain", ["scheduled for 2026-11-15 03:00 UTC"]),
        ('{ schedule = "0 12 13,21 * *" }', QUIET, "retrain", ["for 2026-11-21 12:00 UTC"]),
        ('{ schedule = "1 12 21 * *" }', QUIET, "none", ["next scheduled for 2026-11-21 12:01"]),
        (
            '{ schedule = "0 13 21 * *", timezone = "Europe/Berlin" }', QUIET, "retrain",
            ["2026-11-21 13:00 Europe/Berlin"],
        ),
        (
            '{ schedule = "1 13 21 * *", timezone = "Europe/Berlin" }', QUIET, "none",
            ["next scheduled for 2026-11-21 13:01 Europe/Berlin"],
        ),
        (
            '{ all = ["drift", { any = ["estimated_damage", "true_damage"] }] }', HURT, "retrain",
            [],
        ),
        ('{ all = ["drift", { days_since_training = 7 }] }', QUIET, "none", []),
        ('{ all = ["drift", "damage"] }', replace(FOREIGN, alarm=False), "none", ["looks like"]),
        (
            '{ all = ["drift", { days_since_training = 7 }] }', SHIFTED, "retrain",
            ["due: the change is enough, 8.0 days since"],
        ),
        ('{ any = ["damage", { days_since_training = 9 }] }', SHIFTED, "watch", ["(limit 9)"]),
        ('{ any = ["damage", { days_since_training = 7 }] }', FOREIGN, "retrain", ["8.0 days"]),
        (
            TWO_OF_THREE.format(500),
            QUIET, "none", ["Not due: 150 fresh labels (limit 500)."],
        ),
        (
            TWO_OF_THREE.format(100),
            QUIET, "retrain", ["due: 150 fresh labels (limit 100), 8.0 days"],
        ),
        (
            TWO_OF_THREE.format(500),
            FOREIGN, "ask_for_labels", ["only labels can tell"],
        ),
    ],
)  # fmt: skip
def test_triggers(when: str, evidence: Evidence, action: str, words: list[str]) -> None:
    """Each trigger, alone or composed, is met at its limit, and the reason says why or why not."""
    decision = decide(evidence, LABELS, LATELY, NOW, retraining(when))
    assert decision.action == Action(action), decision.reason
    for word in words:
        assert word in decision.reason


def test_a_distance_is_ranked_among_the_last_ones() -> None:
    """Of 20 distances the last 15 count; four are too few, and one that ties exceeds none."""
    rising = [0.01 * place for place in range(20)]
    assert rank_of(0.105, rising) == pytest.approx(6 / 15)
    assert rank_of(1.0, rising[:5]) == 1
    assert rank_of(1.0, rising[:4]) is None
    assert rank_of(0.1, [0.1] * 15) == 0


def test_what_a_trigger_looks_at_is_found_within_it() -> None:
    """However deep a limit lies; a sign and a schedule have none."""
    deep = {"any": ["drift", {"all": [{"fresh_labels": 1}, {"drift_distance_above": 0.3}]}]}
    assert measures(parse_trigger(deep)) == {Measure.FRESH_LABELS, Measure.DISTANCE}
    assert measures(parse_trigger({"schedule": "0 3 * * 0"})) == frozenset()


@pytest.mark.parametrize("when", ["{ days_since_training = 7 }", '{ schedule = "0 3 * * 0" }'])
@pytest.mark.parametrize(
    ("history", "action", "words"),
    [
        (NOTHING, "retrain", "no training is on record"),
        (History(last_promotion=ago(24)), "none", "Not due"),
        (History(trainings=(ago(24),)), "none", "Not due"),
        (History(last_promotion=ago(24), last_training=ago(9 * 24)), "retrain", "is due"),
    ],
)
def test_time_counts_from_the_last_training(
    when: str, history: History, action: str, words: str
) -> None:
    """From the promotion if no training is known; if nothing is, a retraining is due."""
    decision = decide(QUIET, LABELS, history, NOW, retraining(when))
    assert (decision.action, words in decision.reason) == (Action(action), True)


def test_a_schedule_keeps_its_hour_when_clocks_change() -> None:
    """3:00 in Berlin is 1:00 UTC in summer and 2:00 in winter."""
    settings = retraining('{ schedule = "0 3 * * *", timezone = "Europe/Berlin" }')
    for day, hour in (
        (datetime(2026, 10, 24, tzinfo=UTC), 1),
        (datetime(2026, 10, 26, tzinfo=UTC), 2),
    ):
        history = History(last_training=day)
        before, due = day + timedelta(hours=hour, minutes=-1), day + timedelta(hours=hour)
        assert decide(QUIET, LABELS, history, before, settings).action is Action.NONE
        assert decide(QUIET, LABELS, history, due, settings).action is Action.RETRAIN


def test_obstacles_hold_for_every_trigger() -> None:
    """What is due without drift still needs labels."""
    decision = decide(QUIET, FreshLabels(40, 10), LATELY, NOW, retraining('"always"'))
    assert decision.action is Action.ASK_FOR_LABELS
    assert decision.reason.endswith(
        "is due: at every check. 60 labels are missing: 40 of 100 are here."
    )


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ('"drfit"', "'drfit' is no trigger .did you mean 'drift'.*'true_damage'"),
        ("3", "3 is no trigger; allowed: 'drift'"),
        ('["drift"]', "is no trigger; allowed"),
        ("{}", "make no one trigger; allowed"),
        ('{ all = ["drift"], any = ["drift"] }', "make no one trigger; allowed"),
        ('{ all = ["drift", { any = ["estimated"] }] }', r"all\[1\].any\[0\] = 'estimated' is no"),
        ("{ all = [] }", "all = .*at least one trigger is needed"),
        ('{ any = "drift" }', "any = 'drift': a list"),
        ('{ at_least = 3, of = ["drift", "damage"] }', "at_least = 3: .* 1 to 2 is needed"),
        ('{ at_least = 0, of = ["drift"] }', "at_least = 0"),
        ('{ at_least = true, of = ["drift"] }', "at_least = True"),
        ("{ fresh_lables = 500 }", "no trigger 'fresh_lables' .did you mean 'fresh_labels'"),
        ("{ fresh_labels = 0 }", "fresh_labels = 0: a whole number from 1 on"),
        ("{ batches_since_training = 1.5 }", "batches_since_training = 1.5: a whole number"),
        ('{ samples_since_training = "many" }', "samples_since_training = 'many'"),
        ("{ days_since_training = nan }", "days_since_training = nan: a number of days over 0"),
        ("{ accuracy_below = 80 }", "accuracy_below = 80: a share between 0 and 1"),
        ("{ drift_distance_above = 2 }", "drift_distance_above = 2: a distance over 0"),
        ("{ drift_distance_quantile = 95 }", "drift_distance_quantile = 95: a share between"),
        ('{ any = [{ schedule = "0 3 * *" }] }', r"any\[0\].schedule = .*five fields"),
        ('{ schedule = "0 25 * * *" }', "no crontab line .Bad hour"),
        ('{ schedule = "0 0 31 2 *" }', "schedule = '0 0 31 2"),
        ('{ schedule = "0 0 */30 2 5#5" }', "a day that never comes"),
        ('{ schedule = "0 3 * * 0", timezone = "Europe/Berln" }', "did you mean 'Europe/Berlin'"),
        ('{ schedule = "0 3 * * 0", timezone = "/etc/passwd" }', "no time zone"),
    ],
)
def test_wrong_triggers_are_named(when: str, message: str) -> None:
    """An error names the place, what is there, and what is allowed."""
    with pytest.raises(ValidationError, match=message):
        retraining(when)


def test_the_default_is_drift_and_damage() -> None:
    """As TOML would have it, and one plain sentence says it."""
    toml = '{ all = ["drift", { any = ["estimated_damage", "true_damage"] }] }'
    assert retraining(toml) == PolicySettings()
    again = {"retrain_when": PolicySettings().retrain_when}
    assert TypeAdapter(PolicySettings).validate_python(again) == PolicySettings()
    assert "(after" not in describe(PolicySettings(fresh_from=FreshFrom.ALL))
    assert describe(PolicySettings()) == (
        "Retrains when the data changed and (accuracy is estimated to have fallen by 0.05 or more "
        "or labels show accuracy to have fallen by 0.05 or more), on at least 100 fresh labels of "
        "2 classes (after an alarm those of batches from the first that rang on); rolls back "
        "within 14 days of a promotion when the version before is shown to be better by 0.025 or "
        "more (p at most 0.01)."
    )


def test_describe_says_every_limit() -> None:
    """Cool-down, budget and a composed trigger are in the sentence; so is what never happens."""
    said = describe(
        retraining(
            '{ at_least = 2, of = ["damage", { fresh_labels = 500 }, { schedule = "0 3 * * 0" }] }',
            cooldown_hours=24, max_retrains=3, probation_days=0,
        )
    )  # fmt: skip
    for words in (
        "at least 2 of these hold: ", "there are 500 fresh labels", '"0 3 * * 0" (UTC)',
        "not within 24 hours", "at most 3 times in 30 days", "never rolls back by itself",
    ):  # fmt: skip
        assert words in said
    far = "{ any = [{ drift_distance_above = 0.3 }, { drift_distance_quantile = 0.95 }] }"
    assert (
        "the drift distance is 0.3 or more or the drift distance is above the quantile 0.95 of the "
        "last 15 checks'"
    ) in describe(retraining(far))
    assert describe(retraining('"never"')).startswith("Never retrains; rolls back within 14 days")


@pytest.mark.parametrize(
    ("trainings", "action", "words"),
    [
        ((ago(29 * 24), ago(10 * 24)), "watch", ["2 trainings in the last 30 days", "1.0 days"]),
        ((ago(30 * 24), ago(10 * 24)), "retrain", []),
        ((ago(50), ago(40), ago(30)), "watch", ["3 trainings", "another 28.3 days"]),
        ((), "retrain", []),
    ],
)
def test_budget(trainings: tuple[datetime, ...], action: str, words: list[str]) -> None:
    """Two in thirty days: the third waits until one of them is thirty days old."""
    settings = PolicySettings(max_retrains=2)
    decision = decide(HURT, LABELS, History(trainings=trainings), NOW, settings)
    assert decision.action == Action(action)
    for word in words:
        assert word in decision.reason


@pytest.mark.parametrize(
    ("evidence", "settings", "suppressed", "saved"),
    [
        (QUIET, PolicySettings(), None, ""),
        (HURT, PolicySettings(), None, ""),
        (FOREIGN, PolicySettings(), None, ""),
        (
            SHIFTED, PolicySettings(), "not shown to hurt",
            "a retraining of about 34 s and 150 labels was not needed",
        ),
        (
            HURT, PolicySettings(cooldown_hours=200),
            "cool-down of 200 hours after the last training",
            "a retraining of about 34 s and 150 labels was put off",
        ),
        (
            HURT, PolicySettings(max_retrains=2), "budget of 2 trainings in 30 days",
            "a retraining of about 34 s and 150 labels was put off",
        ),
        (
            HURT, PolicySettings(max_retrains=2, cooldown_hours=1000),
            "cool-down of 1000 hours after the last training",
            "a retraining of about 34 s and 150 labels was put off",
        ),
        (
            HURT, retraining("{ batches_since_training = 20 }"),
            "18 batches since the last training (limit 20)",
            "a retraining of about 34 s and 150 labels was put off",
        ),
    ],
)  # fmt: skip
def test_suppressed(
    evidence: Evidence, settings: PolicySettings, suppressed: str | None, saved: str
) -> None:
    """A change that is not answered says why, and what was saved; the longest wait is named."""
    decision = decide(evidence, LABELS, LATELY, NOW, settings)
    assert (decision.suppressed, decision.saved) == (suppressed, saved)


def test_what_was_saved_when_little_is_known() -> None:
    """Without a training to go by no time is told, and the labels are those it would have taken."""
    decision = decide(SHIFTED, FreshLabels(0, 0), NOTHING, NOW, SETTINGS)
    assert decision.saved == "a retraining of 100 labels was not needed"


@pytest.mark.parametrize(
    ("evidence", "words"),
    [
        (HURT, "The stream of batches changed (this batch: p under .0001; one in 1,000), and it"),
        (
            replace(QUIET, p_value=0.003),
            "The stream of batches looks like the reference (this batc",
        ),
    ],
)
def test_the_stream_rings_and_not_the_batch(evidence: Evidence, words: str) -> None:
    """With control over the stream the words claim nothing about the batch's alpha."""
    decision = decide(replace(evidence, stream="one in 1,000"), LABELS, NOTHING, NOW, SETTINGS)
    assert decision.reason.startswith(words)
    assert "alpha" not in decision.reason


WORSE = Comparison(version=2, n=120, right_now=96, right_before=110, p_value=0.004)
PROMOTED = History(last_promotion=ago(3 * 24))


@pytest.mark.parametrize(
    ("before", "history", "settings", "back"),
    [
        pytest.param(WORSE, PROMOTED, SETTINGS, True, id="worse"),
        pytest.param(None, PROMOTED, SETTINGS, False, id="nothing-to-compare"),
        pytest.param(WORSE, NOTHING, SETTINGS, False, id="never-promoted"),
        pytest.param(WORSE, History(last_promotion=ago(14 * 24)), SETTINGS, True, id="last-hour"),
        pytest.param(WORSE, History(last_promotion=ago(337)), SETTINGS, False, id="over"),
        pytest.param(WORSE, History(last_promotion=ago(-2)), SETTINGS, True, id="clock-ahead"),
        pytest.param(
            WORSE, PROMOTED, replace(SETTINGS, probation_days=0), False, id="turned-off"
        ),
        pytest.param(
            WORSE, replace(PROMOTED, last_rollback=ago(3 * 24)), SETTINGS, False,
            id="came-by-a-rollback",
        ),
        pytest.param(
            WORSE, replace(PROMOTED, last_rollback=ago(4 * 24)), SETTINGS, True,
            id="rolled-back-before-that",
        ),
        pytest.param(replace(WORSE, p_value=0.01), PROMOTED, SETTINGS, True, id="just-enough"),
        pytest.param(replace(WORSE, p_value=0.011), PROMOTED, SETTINGS, False, id="by-chance"),
        pytest.param(
            replace(WORSE, n=29, right_now=9, right_before=29), PROMOTED, SETTINGS, False,
            id="too-few",
        ),
        pytest.param(
            replace(WORSE, n=1000, right_now=875, right_before=900), PROMOTED, SETTINGS, True,
            id="half-of-min-drop",
        ),
        pytest.param(
            replace(WORSE, n=1000, right_now=876, right_before=900), PROMOTED, SETTINGS, False,
            id="certain-but-small",
        ),
        pytest.param(
            replace(WORSE, right_now=110, right_before=96), PROMOTED, SETTINGS, False, id="better"
        ),
    ],
)  # fmt: skip
def test_rollback(
    before: Comparison | None, history: History, settings: PolicySettings, back: bool
) -> None:
    """A champion on probation that is shown worse goes back, and no other."""
    decision = decide(replace(QUIET, before=before), LABELS, history, NOW, settings)
    assert decision.action is (Action.ROLLBACK if back else Action.NONE)
    assert (decide_rollback(before, history, NOW, settings) is not None) is back


def test_rollback_beats_all() -> None:
    """Also a retraining that is due; the figures are in the reason."""
    evidence = replace(HURT, before=WORSE)
    decision = decide(evidence, LABELS, PROMOTED, NOW, PolicySettings())
    assert decision.action is Action.ROLLBACK
    for words in ("version 2", "120 samples", "96 right", "110", "p = 0.004", "3.0 days ago"):
        assert words in decision.reason


def test_probation_ends_by_itself() -> None:
    """So that the flow can say that a version held."""
    assert on_probation(PROMOTED, NOW, SETTINGS)
    assert not on_probation(PROMOTED, NOW + timedelta(days=12), SETTINGS)


@pytest.mark.parametrize(
    ("only_before", "only_now", "e_value"),
    [
        (0, 0, 1.0),
        (1, 0, 2 * 0.6875),  # twice the mean of a Beta(2, 2) above 1/2
        (0, 1, 2 * 0.3125),
        (14, 0, 2**15 * 6 / 272 * (1 - 9 / 2**16)),  # B(16, 2) = 1/272, B(2, 2) = 1/6
        (0, 3000, 0.0),
    ],
)
def test_e_value(only_before: int, only_now: int, e_value: float) -> None:
    """Bets are neutral at first, double by the mean of the prior, and die when the other wins."""
    assert paired_e_value(only_before, only_now) == pytest.approx(e_value, abs=1e-9)


def test_e_value_is_a_fair_bet() -> None:
    """Between equal models its expectation after one more sample is what it was, or less."""
    for b in range(12):
        for c in range(12):
            after = (paired_e_value(b + 1, c) + paired_e_value(b, c + 1)) / 2
            assert after == pytest.approx(paired_e_value(b, c))


def test_e_value_of_many() -> None:
    """Thousands of labels overflow nothing."""
    assert paired_e_value(100_000, 0) > 1e200
    assert paired_e_value(5000, 5000) < 1


def test_looking_after_every_label_keeps_the_level() -> None:
    """Of 400 pairs of equal models at most alpha are called worse; McNemar's test calls many."""
    bet = functools.cache(paired_e_value)
    mcnemar = functools.cache(
        lambda b, c: stats.binomtest(b, b + c, alternative="greater").pvalue if b + c else 1.0
    )
    rng = random.Random(3)
    rung = {0.01: 0, 0.05: 0}
    naive = 0
    for _ in range(400):
        counts = [(0, 0)]
        for _ in range(100):
            b, c = counts[-1]
            counts.append((b + 1, c) if rng.random() < 0.5 else (b, c + 1))
        best = max(bet(*count) for count in counts)
        for alpha in rung:
            rung[alpha] += best >= 1 / alpha
        naive += min(mcnemar(*count) for count in counts) <= 0.05
    assert rung[0.01] <= 4
    assert rung[0.05] <= 20
    assert naive > 60


def test_compare_paired() -> None:
    """Counts and the p-value come from the pairs, whatever their order."""
    now = [True] * 60 + [False] * 20 + [True] * 2 + [False] * 18
    before = [True] * 60 + [True] * 20 + [False] * 2 + [False] * 18
    result = compare_paired(7, now, before)
    assert (result.version, result.n, result.right_now, result.right_before) == (7, 100, 62, 80)
    assert result.p_value == pytest.approx(1 / paired_e_value(20, 2))
    assert compare_paired(7, now[::-1], before[::-1]) == result
    assert compare_paired(7, before, now).p_value == 1
    with pytest.raises(ValueError, match="100 answers of the champion and 3 of version 7"):
        compare_paired(7, now, [True] * 3)


@pytest.mark.parametrize(
    ("ahead", "action", "words"),
    [
        (timedelta(seconds=30), "watch", "another 24.0 hours."),
        (timedelta(hours=5), "watch", "dated 5.0 hours in the future, so it counts as now"),
        (timedelta(days=400), "retrain", "dated 9600.0 hours in the future, so it is left out"),
    ],
)
@pytest.mark.parametrize("field", ["last_training", "last_promotion", "last_rollback"])
def test_clock_skew(ahead: timedelta, action: str, words: str, field: str) -> None:
    """A time in the future never makes a cool-down longer, and the reason says so."""
    history = History(**{field: NOW + ahead})
    decision = decide(HURT, LABELS, history, NOW, SETTINGS)
    assert decision.action == Action(action)
    assert words in decision.reason
    assert ("in the future" in decision.reason) is (ahead > timedelta(minutes=1))
    assert "another 24.0 hours" in decision.reason or action == "retrain"


@pytest.mark.parametrize("field", ["now", "last_training", "last_promotion", "last_rollback"])
def test_a_time_without_a_zone_is_refused(field: str) -> None:
    """It could mean any of 24 hours, so it is an error that names it."""
    naive = NOW.replace(tzinfo=None)
    history = NOTHING if field == "now" else History(**{field: naive})
    with pytest.raises(ValueError, match=f"{field} = 2026-11-21T12:00:00 has no time zone"):
        decide(QUIET, LABELS, history, naive if field == "now" else NOW, SETTINGS)
    with pytest.raises(ValueError, match="trainings = "):
        decide(QUIET, LABELS, History(trainings=(naive,)), NOW, SETTINGS)


def test_any_zone_will_do() -> None:
    """Times of different zones are the moments that they name."""
    tokyo = NOW.astimezone(ZoneInfo("Asia/Tokyo"))
    history = History(last_training=ago(2))
    assert decide(HURT, LABELS, history, tokyo, SETTINGS) == decide(
        HURT, LABELS, history, NOW, SETTINGS
    )


def test_decisions_are_in_order_of_weight() -> None:
    """The flow names the weightiest of several by this order."""
    assert list(Action) == ["none", "watch", "ask_for_labels", "retrain", "rollback"]
    assert Decision(Action.NONE, "r") == Decision(Action.NONE, "r", suppressed=None, saved="")


@pytest.mark.parametrize(("reference", "n"), [(0.8, 40), (0.8, 123), (0.95, 250), (0.6, 2000)])
def test_the_smallest_fall_that_labels_can_show(reference: float, n: int) -> None:
    """Half a point more is damage to `decide`, and half a point less is not."""
    least = smallest_fall(reference, n)
    normal = 1.96 * (reference * (1 - reference) / n) ** 0.5  # of the reference alone
    assert abs(least - normal) < 0.1 * normal + 1 / n
    settings = replace(SETTINGS, min_drop=0.01)
    for more, shown in ((0.005, True), (-0.005, False)):
        settled = reference - least - more
        evidence = replace(
            QUIET, reference=reference, estimated=reference, estimated_high=reference,
            reference_n=n, settled=settled, settled_n=100_000, settled_high=settled + 0.001,
        )  # fmt: skip
        reason = decide(evidence, LABELS, NOTHING, NOW, settings).reason
        assert ("accuracy on 100000 labels of it is" in reason) == shown, reason


def test_a_reference_that_suffices_for_a_fall() -> None:
    """With so many labels it can be shown, with a tenth fewer not."""
    for reference, drop in ((0.8, 0.05), (0.95, 0.02), (0.5, 0.002)):
        n = reference_needed(reference, drop)
        assert smallest_fall(reference, n) <= drop < smallest_fall(reference, int(0.85 * n))
    assert smallest_fall(0.0, 100) == 1
    assert reference_needed(0.9, 1e-9) > 10**9  # a fall that nobody can look for ends the search
