"""Alarms over a stream: evidence on record, the fold over it, and bets on rare things."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from monitoring.features import FeatureTable, concatenate
from monitoring.reference import Reference, Regime
from monitoring.sequential import (
    Running,
    StreamEvidence,
    StreamSettings,
    StreamState,
    _baseline,
    _cell,
    _cusum_threshold,
    bets,
    fold,
    step,
)

E_DETECTOR = StreamSettings()
CUSUM = StreamSettings(method="cusum")
METHODS = [E_DETECTOR, CUSUM, StreamSettings(method="per_batch")]


def stream(*p_values: float, **log_e: float) -> list[StreamEvidence]:
    named = {name.replace("_", " "): value for name, value in log_e.items()}
    return [StreamEvidence(p, named) for p in p_values]


def alarms(states: tuple[StreamState, ...]) -> list[int]:
    return [i for i, state in enumerate(states, start=1) if state.alarm]


def table(
    rng: np.random.Generator,
    n: int,
    *,
    d: int = 8,
    shares: tuple[float, ...] = (0.5, 0.3, 0.2),
    world: float = 0.0,
) -> FeatureTable:
    """Rows of classes that lie 6 apart on axes of their own, answered with little doubt."""
    k = len(shares)
    label = rng.choice(k, size=n, p=shares)
    embedding = rng.standard_normal((n, d)).astype(np.float32) + 4
    embedding[np.arange(n), label % d] += 6
    embedding[:, -1] += world
    logits = rng.standard_normal((n, k))
    logits[np.arange(n), label] += 8
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return FeatureTable(
        tuple(f"b/{i}" for i in range(n)),
        embedding,
        p.astype(np.float32),
        pd.DataFrame(index=range(n)),
    )


def foreign(rng: np.random.Generator, n: int) -> FeatureTable:
    """Rows of a class that the model never saw: between the others, answered with doubt."""
    rows = table(rng, n)
    rows.embedding[:] = rng.standard_normal(rows.embedding.shape) + 4
    rows.embedding[:, 5] += 6
    rows.probabilities[:] = rng.dirichlet([5, 5, 1], size=n)
    return rows


def reference_of(features: FeatureTable, *, classes: int = 3) -> Reference:
    labels = np.full(len(features), -1)
    return Reference((Regime("first", features, labels),), tuple(f"c{i}" for i in range(classes)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "sprt"}, "choose one of e_detector, cusum, per_batch"),
        ({"run_length": 5}, "run_length=5 batches"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, object], words: str) -> None:
    """A wrong setting is named with what is allowed."""
    with pytest.raises(ValueError, match=words):
        StreamSettings(**values)  # type: ignore[arg-type]


def test_evidence_survives_its_tag() -> None:
    """What is written is read back, and writing it again gives the same text."""
    evidence = StreamEvidence(0.123456789, {"novelty": -0.56789, "class 'é' rarer": 2.0})
    text = evidence.to_json()
    again = StreamEvidence.from_json(text)
    assert again.p_value == pytest.approx(0.123457)
    assert again.log_e == {"novelty": -0.568, "class 'é' rarer": 2.0}
    assert again.to_json() == text
    assert StreamEvidence.from_json(StreamEvidence(1e-280, {}).to_json()).p_value == 1e-280


@pytest.mark.parametrize("text", ["", "[]", '{"p": 2, "log_e": {}}', '{"p": 0.5}', "null"])
def test_text_that_is_no_evidence_is_refused(text: str) -> None:
    """A damaged tag is named together with the way out."""
    with pytest.raises(ValueError, match="check the batch again"):
        StreamEvidence.from_json(text)


@pytest.mark.parametrize(("p", "log_e"), [(1.5, 0.0), (math.nan, 0.0), (0.5, math.inf)])
def test_evidence_that_cannot_be_added_up_is_refused(p: float, log_e: float) -> None:
    """Neither a p outside 0 to 1 nor an infinite logarithm gets on record."""
    with pytest.raises(ValueError, match=r"no probability|not finite"):
        StreamEvidence(p, {"novelty": log_e})


@pytest.mark.parametrize("settings", METHODS)
def test_no_checks_no_states(settings: StreamSettings) -> None:
    """A new champion starts afresh: its list is empty."""
    assert fold([], settings, 0.01) == ()


@pytest.mark.parametrize("settings", METHODS)
def test_the_state_after_a_batch_does_not_depend_on_later_ones(settings: StreamSettings) -> None:
    """Folding more checks leaves the earlier states as they were."""
    rng = np.random.default_rng(0)
    evidence = stream(*rng.random(40) ** 3)
    assert fold(evidence, settings, 0.05)[:25] == fold(evidence[:25], settings, 0.05)


@pytest.mark.parametrize("settings", METHODS)
def test_a_quiet_batch_after_a_loud_one_does_not_ring_and_going_on_does(
    settings: StreamSettings,
) -> None:
    """After an alarm the process starts at zero, and drift that goes on rings again."""
    assert alarms(fold(stream(0.5, 1e-9, 0.5, 0.5, 1e-9, 1e-9), settings, 0.01)) == [2, 5, 6]


def test_the_e_detector_is_the_textbook_recursion() -> None:
    """On p-values alone it is .4 times R = (1 + R) kappa p^(kappa - 1), restarted at 1,000."""
    p_values = [0.5, 0.2, 0.04, 0.9, 0.01, 0.002, 0.003, 0.3]
    states = fold(stream(*p_values), E_DETECTOR, 0.01)
    r = 0.0
    for p, state in zip(p_values, states, strict=True):
        r = (1 + r) * 0.25 * p**-0.75
        assert state.value == pytest.approx(math.log10(0.4 * r))
        assert state.alarm == (0.4 * r >= 1000)
        r = 0.0 if state.alarm else r
    assert alarms(states) == [7]
    assert [state.since for state in states] == [1, 2, 3, 4, 5, 6, 7, 1]
    assert states[0].threshold == pytest.approx(3)


def test_weak_evidence_adds_up_and_names_its_source() -> None:
    """Half a unit a batch rings after 14 batches that none of them would ring alone."""
    states = fold(stream(*[0.6] * 30, novelty=0.5), E_DETECTOR, 0.01)
    assert alarms(states)[0] == 14
    assert states[13].leading == "novelty"
    states = fold([StreamEvidence(0.6, {"class 'cat' rarer": 4.0})] * 9, E_DETECTOR, 0.01)
    assert states[alarms(states)[0] - 1].leading == "class 'cat' rarer"


def test_one_bet_that_loses_does_not_hold_back_another() -> None:
    """Each component keeps its own process, so only their sum rings."""
    states = fold([StreamEvidence(1e-3, {"novelty": -9.0})] * 6, E_DETECTOR, 0.01)
    assert alarms(states) == alarms(fold(stream(*[1e-3] * 6), E_DETECTOR, 0.01))


def test_evidence_that_one_batch_lacks_is_kept() -> None:
    """A component that a batch says nothing of goes on as it was, and may ring with the next."""
    before = Running({"novelty": 5.0}, 3)
    after, _ = step(before, StreamEvidence(0.5, {}), E_DETECTOR, 0.01)
    assert after.sums["novelty"] == pytest.approx(math.log(1 + math.exp(5)))


def test_an_unknown_component_carries_nothing() -> None:
    """Evidence of a later release under another name cannot break the declared rate."""
    assert alarms(fold(stream(*[0.5] * 5, later_idea=99.0), E_DETECTOR, 0.01)) == []


@pytest.mark.parametrize("settings", METHODS)
def test_extreme_p_values_have_an_answer(settings: StreamSettings) -> None:
    """A p of 0 rings at once, one of 1 never; the values stay finite."""
    states = fold(stream(*[1.0] * 400, 0.0), settings, 0.01)
    assert alarms(states) == [401]
    assert all(math.isfinite(state.value) for state in states)


def test_quiet_p_values_ring_no_more_often_than_declared() -> None:
    """6,000 uniform p-values and fair bets ring at most as often as run_length says."""
    rng = np.random.default_rng(3)
    z = rng.standard_normal((6000, 2))
    evidence = [
        StreamEvidence(p, {"novelty": 0.8 * a - 0.32, "class 'a' rarer": b - 0.5})
        for p, (a, b) in zip(rng.random(6000).tolist(), z.tolist(), strict=True)
    ]
    for run_length in (50, 500):
        settings = StreamSettings(run_length=run_length)
        rung = len(alarms(fold(evidence, settings, 0.01)))
        assert 0 < rung <= 6000 / run_length
    rung = len(alarms(fold(evidence, StreamSettings(method="cusum", run_length=200), 0.01)))
    assert 15 <= rung <= 45  # 30 are expected


def test_cusum_is_pages_sum() -> None:
    """It adds z - 1/2 and never falls below zero; its limit is 5.07 for a run of 1,000."""
    assert _cusum_threshold(1000) == pytest.approx(5.07, abs=0.02)
    states = fold(stream(0.5, 0.0227501, 0.0227501), CUSUM, 0.01)
    assert [state.value for state in states] == pytest.approx([0, 1.5, 3], abs=1e-4)
    assert states[0].threshold == _cusum_threshold(1000)


def test_per_batch_rings_at_the_level() -> None:
    """It rings if and only if p is at most alpha."""
    states = fold(stream(0.011, 0.01, 0.5), StreamSettings(method="per_batch"), 0.01)
    assert alarms(states) == [2]
    assert states[1].value == pytest.approx(states[1].threshold)


def test_quiet_batches_lose_their_bets() -> None:
    """Over 60 quiet batches every bet falls, none rises by more than the rate allows."""
    rng = np.random.default_rng(4)
    reference = reference_of(table(rng, 1000))
    found = [bets(reference, table(rng, 100)) for _ in range(60)]
    assert list(found[0]) == [
        "novelty",
        *(f"class 'c{i}' {way}" for way in ("rarer", "more common") for i in range(3)),
    ]
    for name in found[0]:
        values = np.array([log_e[name] for log_e in found])
        assert values.sum() < 0, name
        assert np.exp(values).mean() < 1.2, name
    evidence = [StreamEvidence(1.0, log_e) for log_e in found]
    assert alarms(fold(evidence, E_DETECTOR, 0.01)) == []


def test_rounding_does_not_make_a_picture_that_recurs_novel() -> None:
    """Three in ten rows are one and the same picture; its last bits differ, the bets do not."""
    rng = np.random.default_rng(5)
    same = foreign(rng, 1)

    def novelty(error: float) -> float:
        sides = [table(np.random.default_rng(n), n) for n in (1000, 100)]
        for side, sign in zip(sides, (-1, 1), strict=True):
            rows = range(3 * len(side) // 10)
            off = 1 + sign * error * rng.uniform(0.5, 1, (len(rows), 1))
            side.embedding[rows] = same.embedding * off
            side.probabilities[rows] = same.probabilities * off
        return bets(reference_of(sides[0]), sides[1])["novelty"]

    exact = novelty(0)
    assert exact < 0
    assert [novelty(-3e-6), novelty(3e-6)] == pytest.approx([exact, exact], abs=0.05)


def test_a_foreign_class_of_a_twentieth_is_found() -> None:
    """Five foreign rows in each hundred ring within 20 batches, and novelty is named."""
    rng = np.random.default_rng(5)
    reference = reference_of(table(rng, 1000))
    evidence = [
        StreamEvidence(0.5, bets(reference, concatenate([table(rng, 95), foreign(rng, 5)])))
        for _ in range(20)
    ]
    states = fold(evidence, E_DETECTOR, 0.01)
    assert 1 < alarms(states)[0] <= 20
    assert states[alarms(states)[0] - 1].leading == "novelty"


def test_a_class_that_drops_out_is_found() -> None:
    """A class of a fifth that comes no more rings within 5 batches by its name."""
    rng = np.random.default_rng(6)
    reference = reference_of(table(rng, 1000))
    batches = [table(rng, 100, shares=(0.625, 0.375, 0.0)) for _ in range(5)]
    states = fold([StreamEvidence(0.5, bets(reference, b)) for b in batches], E_DETECTOR, 0.01)
    assert states[alarms(states)[0] - 1].leading == "class 'c2' rarer"


def test_mixtures_of_known_worlds_lose_their_bets() -> None:
    """Two worlds with shares of classes of their own, in any mixture, win no bet."""
    rng = np.random.default_rng(7)
    other = (0.1, 0.1, 0.8)
    labels = np.full(600, -1)
    regimes = (
        Regime("photo", table(rng, 600), labels),
        Regime("sketch", table(rng, 600, world=15.0, shares=other), labels),
    )
    reference = Reference(regimes, ("c0", "c1", "c2"))
    assert len(reference.worlds) == 2
    for sketches in (0, 10, 50, 100):
        total = dict.fromkeys(bets(reference, table(rng, 10)), 0.0)
        for _ in range(10):
            parts = [
                table(rng, 100 - sketches),
                table(rng, sketches, world=15.0, shares=other),
            ]
            batch = concatenate([part for part in parts if len(part)])
            for name, value in bets(reference, batch).items():
                total[name] += value
        assert max(total.values()) < 3, sketches


def test_worlds_that_differ_by_their_classes_alone_lose_their_bets() -> None:
    """Both mixes are known, so a batch of either, or of both, is quiet; a third mix is not."""
    rng = np.random.default_rng(8)
    mixes = ((0.6, 0.3, 0.1), (0.1, 0.3, 0.6))
    regimes = tuple(
        Regime(str(mix), table(rng, 600, shares=mix), np.full(600, -1)) for mix in mixes
    )
    reference = Reference(regimes, ("c0", "c1", "c2"))
    assert len(reference.worlds) == 2
    for mix in (*mixes, (0.35, 0.3, 0.35)):
        found = [bets(reference, table(rng, 100, shares=mix)) for _ in range(20)]
        assert max(sum(one[name] for one in found) for name in found[0]) < 3, mix
    third = bets(reference, table(rng, 100, shares=(0.2, 0.8, 0.0)))
    assert max(third.values()) > 5


def test_of_regimes_of_one_look_the_widest_bounds_hold() -> None:
    """Two mixes of classes that look alike: a share is bet on beyond what either may have."""
    rng = np.random.default_rng(8)
    names = ("c0", "c1", "c2")
    regimes = tuple(
        Regime(name, table(rng, 600, shares=shares), np.full(600, -1))
        for name, shares in (("summer", (0.5, 0.3, 0.2)), ("winter", (0.4, 0.3, 0.3)))
    )
    (both,) = _baseline(Reference(regimes, names)).cells
    alone = [_baseline(Reference((regime,), names)).cells[0] for regime in regimes]
    assert both.lower.tolist() == np.min([cell.lower for cell in alone], axis=0).tolist()
    assert both.upper.tolist() == np.max([cell.upper for cell in alone], axis=0).tolist()
    assert alone[0].lower[0] > alone[1].lower[0]
    assert alone[0].upper[2] < alone[1].upper[2]


@pytest.mark.parametrize("n", [1, 2, 9])
def test_the_smallest_batches_have_an_answer(n: int) -> None:
    """Batches of a few rows get finite bets whose mean e is about 1 or less."""
    rng = np.random.default_rng(8)
    reference = reference_of(table(rng, 400))
    found = [bets(reference, table(rng, n)) for _ in range(100)]
    for name in found[0]:
        values = np.array([log_e[name] for log_e in found])
        assert np.isfinite(values).all()
        assert np.exp(values).mean() < 1.2, name


def test_the_smallest_reference_has_an_answer() -> None:
    """Twenty rows win nothing on quiet batches."""
    rng = np.random.default_rng(9)
    reference = reference_of(table(rng, 20))
    totals = np.sum([list(bets(reference, table(rng, 50)).values()) for _ in range(20)], axis=0)
    assert totals.max() < 3


def test_constant_embeddings_win_nothing() -> None:
    """A network that always answers the same has batches that are no news; others are."""
    rng = np.random.default_rng(10)
    features, batch = table(rng, 100), table(rng, 30)
    for rows in (features, batch):
        rows.embedding[:] = 0.3
        rows.probabilities[:] = np.array([0.2, 0.5, 0.3])
    reference = reference_of(features)
    assert max(bets(reference, batch).values()) <= 0
    assert max(bets(reference, batch.take([0])).values()) <= 0
    batch.embedding[:, 0] = 0.9
    assert bets(reference, batch)["novelty"] > 3


def test_all_zero_embeddings_win_nothing() -> None:
    """Dead embeddings have no direction, and still an answer."""
    rng = np.random.default_rng(11)
    features, batch = table(rng, 100), table(rng, 30)
    features.embedding[:] = batch.embedding[:] = 0
    assert math.isfinite(bets(reference_of(features), batch)["novelty"])


@pytest.mark.parametrize("classes", [1, 2, 32, 33, 1000])
def test_any_number_of_classes_fits_into_a_tag(classes: int) -> None:
    """One class to 1,000, with long and odd names: at most 64 bets, 4,000 characters, no alarm."""
    rng = np.random.default_rng(12)
    shares = tuple(np.full(classes, 1 / classes))
    features = table(rng, 300, shares=shares)
    odd = ('"\\\n\t', "<script>alert(1)</script>", "a name that is quite long ")
    names = tuple(f"{odd[i % 3]}{i}" for i in range(classes))
    reference = Reference((Regime("first", features, np.full(300, -1)),), names)
    found = [bets(reference, table(rng, 100, shares=shares)) for _ in range(10)]
    assert len(found[0]) == 1 + 2 * min(classes, 32)
    text = StreamEvidence(0.5, dict.fromkeys(found[0], -123456.789)).to_json()
    assert len(text) <= 4000
    assert json.loads(text)["log_e"].keys() == found[0].keys()
    assert alarms(fold([StreamEvidence(0.5, one) for one in found], E_DETECTOR, 0.01)) == []


def test_bets_do_not_depend_on_the_order_of_rows() -> None:
    """A batch's rows in another order win the same."""
    rng = np.random.default_rng(13)
    reference = reference_of(table(rng, 300))
    batch = table(rng, 50)
    turned = bets(reference, batch.take(list(range(49, -1, -1))))
    assert turned == pytest.approx(bets(reference, batch), abs=1e-3)


def test_wide_embeddings_are_searched_in_fewer_dimensions() -> None:
    """With 600 dimensions, beyond those that are kept, foreign rows still win."""
    rng = np.random.default_rng(14)
    reference = reference_of(table(rng, 400, d=600))
    batch = table(rng, 50, d=600)
    quiet = bets(reference, batch)["novelty"]
    batch.embedding[:10, 300:320] += 8
    assert bets(reference, batch)["novelty"] > max(quiet, 0) + 3


def test_a_batch_of_another_version_is_refused() -> None:
    """Other widths or an empty batch are an error that says so."""
    rng = np.random.default_rng(15)
    reference = reference_of(table(rng, 100))
    with pytest.raises(ValueError, match="different versions"):
        bets(reference, table(rng, 10, d=9))
    with pytest.raises(ValueError, match="no rows"):
        bets(reference, table(rng, 1).take([]))


def test_novelty_is_bet_on_beyond_what_either_regime_looks_like() -> None:
    """One regime of a world lies farther out than the other, and its rows win nothing either."""
    rng = np.random.default_rng(3)
    near, far = rng.uniform(0, 1, (300, 3)), rng.uniform(0.5, 3, (300, 3))
    regime = np.repeat([0, 1], 300)
    scores, said = np.concatenate([near, far]), np.ones((600, 1), dtype=np.bool_)
    cell = _cell(scores, said, np.ones(600, dtype=np.bool_), regime)
    mean_near, mean_far = (cell.bet(rows).mean() for rows in (near, far))
    assert mean_near < mean_far < math.exp(cell.log_bound) < mean_far * 1.1


def test_a_rare_class_is_bet_on_as_soon_as_a_few_come() -> None:
    """Of a class of .2 % five in a hundred count much; half as many again would say little."""
    rng = np.random.default_rng(4)
    rare = (0.598, 0.4, 0.002)
    reference = reference_of(table(rng, 2000, shares=rare))
    batch = concatenate([table(rng, 95, shares=rare), table(rng, 5, shares=(0.0, 0.0, 1.0))])
    assert bets(reference, batch)["class 'c2' more common"] > 4
