"""Does one check ring when it should, and only then? Level, power and known regimes."""

from __future__ import annotations

import statistics

import numpy as np
import peers_elsewhere
import realdata
from realdata import MILD
from results import Figure
from scipy import stats
from trials import (
    ALPHA,
    DIGITS,
    DIGITS_128,
    LARGE,
    PACS_REFERENCE,
    PAPER_SHIFTS,
    PAPER_SIZES,
    PUBLISHED_BBSD,
    QUICK_TESTS,
    SIZES,
    TESTS,
    Held,
    Runner,
    answers,
    by_test,
    generator,
    mixed,
    our_p,
    pool,
    rate,
    reference_of,
    regime,
    shifted,
    without_ours,
)

from monitoring.features import concatenate
from monitoring.reference import Regime

LEVEL_POOLS = {
    DIGITS: LARGE,
    DIGITS_128: LARGE,
    "art-squeezenet": 1048,
    "art-lite0": 1048,
}
"""Pools of 64, 128, 512 and 1280 dimensions; of PACS's 2,048 art pictures a batch of 1,000 leaves
1,048 for the large reference."""
ASKED_OF_EVIDENTLY = (DIGITS, "art-squeezenet")


def level_trial(task: tuple[str, int, bool]) -> dict[tuple[int, int], dict[str, float]]:
    """Give p-values by (reference, batch) size; the preset only where it was asked for."""
    name, i, preset = task
    rng = generator("level", name, i)
    large = LEVEL_POOLS[name]
    order = rng.permutation(len(pool(name)))
    shared = Held(reference_of(regime(name, order[-large:])))
    found = {}
    for n in SIZES:
        batch = pool(name).features.take(order[:n])
        same = Held(reference_of(regime(name, order[n : 2 * n])))
        found[n, n] = answers(same, batch, ("ours", "BBSD"), rng)
        tests = ("ours", "BBSD", *(("Evidently preset",) if preset and n in {50, 100} else ()))
        found[large, n] = answers(shared, batch, tests, rng)
    return found


def level(run: Runner) -> list[Figure]:
    """False alarms of one check in every cell of pool, reference and batch size."""
    trials = run.effort.level
    tasks = [
        (name, i, i < run.effort.level_evidently and name in ASKED_OF_EVIDENTLY)
        for i in range(trials)
        for name in LEVEL_POOLS
    ]
    found = run.map("level", level_trial, tasks)
    cells: dict[tuple[str, int, int], list[dict[str, float]]] = {}
    for (name, _, _), by_size in zip(tasks, found, strict=True):
        for size, p_values in by_size.items():
            cells.setdefault((name, *size), []).append(p_values)
    rates = {cell: by_test(values) for cell, values in cells.items()}
    ours = {cell: value["ours"] for cell, value in rates.items()}
    limit = float(stats.binom.ppf(1 - 0.05 / len(ours), trials, ALPHA)) / trials
    worst = max(ours, key=lambda cell: ours[cell])
    mean = statistics.mean(ours.values())
    preset = {cell: value["Evidently preset"] for cell, value in rates.items() if len(value) > 2}
    bbsd = [value["BBSD"] for value in rates.values()]
    refused = [c for c, v in cells.items() if np.isnan([p["ours"] for p in v]).any()]
    for cell in sorted(ours, key=lambda cell: -ours[cell])[:5]:
        run.console.print(f"  {cell[0]}, reference {cell[1]}, batch {cell[2]}: {ours[cell]:.4f}")
    if refused:
        run.console.print(f"  refused as too small, counted as no alarm: {refused}")
    over = sum(
        value > ALPHA + 1.64 * np.sqrt(ALPHA * (1 - ALPHA) / trials) for value in ours.values()
    )
    return [
        Figure(
            f"false-alarm rate at .05, worst of {len(ours)} cells ({trials} trials each; "
            f"{worst[0]}, reference {worst[1]}, n = {worst[2]})",
            ours[worst],
            f"≤ {limit:.3f}, .05 within the binomial error of the worst of {len(ours)}",
            ours[worst] <= limit,
            {
                "Evidently preset, worst of n = 50 and 100": max(preset.values()),
                "BBSD, worst": max(bbsd),
                "cells over .05 + 1.64 se (by chance 2.4)": over,
            },
        ),
        Figure(
            "false-alarm rate, mean over the cells",
            mean,
            "≤ .05",
            mean <= ALPHA,
            {
                "Evidently preset": statistics.mean(preset.values()),
                "BBSD": statistics.mean(bbsd),
            },
        ),
    ]


# --- power


POWER_TARGETS = {100: 0.40, 500: 0.76}


def power_mnist_trial(task: tuple[int, int, bool]) -> list[dict[str, float]]:
    """Ask the tests about the 21 shifts of one draw."""
    n, i, preset = task
    rng = generator("power-mnist", n, i)
    order = rng.permutation(len(pool(DIGITS)))
    held = Held(reference_of(regime(DIGITS, order[:LARGE])))
    names = tuple(TESTS) if preset else QUICK_TESTS
    return [
        answers(held, shifted(order[LARGE:], n, name, share, rng).features, names, rng)
        for name, share in PAPER_SHIFTS
    ]


def power_mnist(run: Runner) -> list[Figure]:
    """Mean power over the shifts of Failing Loudly, reference 2,000."""
    figures, effort, alibi = [], run.effort, _alibi_power(run)
    for n, target in POWER_TARGETS.items():
        tasks = [(n, i, i < effort.power_mnist_evidently) for i in range(effort.power_mnist)]
        found = run.map(f"power on MNIST, n = {n}", power_mnist_trial, tasks)
        rates = by_test(one for draw in found for one in draw)
        for place, (name, share) in enumerate(PAPER_SHIFTS):
            ours = rate(draw[place]["ours"] for draw in found)
            run.console.print(f"  n = {n}, {name} {share:.0%}: {ours:.2f}")
        figures.append(
            Figure(
                f"mean power on MNIST's {len(PAPER_SHIFTS)} shifts, n = {n} ({len(tasks)} draws)",
                rates["ours"],
                f"≥ {target:.2f}",
                rates["ours"] >= target,
                without_ours(rates) | alibi[n],
            )
        )
    return figures


def alibi_trial(task: tuple[int, int]) -> dict[str, list[bool]]:
    """Ask alibi-detect about the first draws of n; its MMD takes seconds a batch."""
    n, draws = task
    references, batches = [], []
    for i in range(draws):
        rng = generator("power-mnist", n, i)
        order = rng.permutation(len(pool(DIGITS)))
        references.append(pool(DIGITS).features.embedding[order[:LARGE]])
        drawn = [shifted(order[LARGE:], n, name, share, rng) for name, share in PAPER_SHIFTS]
        batches.append([batch.features.embedding for batch in drawn])
    rang: dict[str, list[bool]] = peers_elsewhere.ask(
        "detect", reference=np.stack(references), batches=np.array(batches)
    )
    return rang


def _alibi_power(run: Runner) -> dict[int, dict[str, float]]:
    draws = run.effort.power_mnist_elsewhere
    sizes = tuple(POWER_TARGETS)
    if run.elsewhere is not None or not draws:
        return {n: {} for n in sizes}
    found = run.map("alibi-detect", alibi_trial, [(n, draws) for n in sizes])
    return {
        n: {
            f"alibi-detect {name} ({len(rang)} batches)": statistics.mean(map(float, rang))
            for name, rang in by_name.items()
        }
        for n, by_name in zip(sizes, found, strict=True)
    }


def power_pacs_trial(task: tuple[int, bool]) -> list[tuple[str, dict[str, float]]]:
    """Ask the tests about quarter, half and mild corruption of one draw of photos."""
    i, preset = task
    rng = generator("power-pacs", i)
    photos = "photo-squeezenet"
    order = rng.permutation(len(pool(photos)))
    held = Held(reference_of(regime(photos, order[:PACS_REFERENCE])))
    rest = order[PACS_REFERENCE:]
    names = tuple(TESTS) if preset else QUICK_TESTS
    batches = []
    for foreign in ("art-squeezenet", "sketch-squeezenet"):
        other = pool(foreign)
        strangers = rng.permutation(len(other))
        for what, k in (("a quarter foreign", 25), ("half foreign", 50)):
            batch = mixed((other, strangers[:k]), (pool(photos), rest[: 100 - k]))
            batches.append((what, batch))
    batches += [("mild corruption", mixed((pool(photos, shift), rest[:100]))) for shift in MILD]
    batches.append(("no shift", mixed((pool(photos), rest[:100]))))
    return [(what, answers(held, batch.features, names, rng)) for what, batch in batches]


def power_pacs(run: Runner) -> list[Figure]:
    """Power against foreign pictures and mild corruptions, n = 100, reference 1,100 photos."""
    effort = run.effort
    tasks = [(i, i < effort.power_pacs_evidently) for i in range(effort.power_pacs)]
    found = [one for draw in run.map("power on PACS", power_pacs_trial, tasks) for one in draw]
    rates = {
        what: by_test(p_values for its, p_values in found if its == what) for what in dict(found)
    }
    quiet = rates.pop("no shift")
    run.console.print("  no shift: " + ", ".join(f"{k} {v:.2f}" for k, v in quiet.items()))
    targets = {"a quarter foreign": 0.98, "half foreign": 1.0, "mild corruption": 0.87}
    return [
        Figure(
            f"power on PACS, n = 100, {what} ({sum(its == what for its, _ in found)} draws)",
            rates[what]["ours"],
            f"≥ {target:.2f}",
            rates[what]["ours"] >= target,
            without_ours(rates[what])
            | {"Evidently preset without any shift": quiet["Evidently preset"]},
        )
        for what, target in targets.items()
    ]


def failing_loudly_trial(task: tuple[int, int]) -> list[dict[str, float]]:
    """Ask ours and BBSD about the 21 shifts with a reference as small as the batch."""
    n, i = task
    rng = generator("failing-loudly", n, i)
    order = rng.permutation(len(pool(DIGITS)))
    held = Held(reference_of(regime(DIGITS, order[:n])))
    return [
        answers(held, shifted(order[LARGE:], n, name, share, rng).features, ("ours", "BBSD"), rng)
        for name, share in PAPER_SHIFTS
    ]


def failing_loudly(run: Runner) -> list[Figure]:
    """Failing Loudly's accuracy, reference = n."""
    tasks = [(n, i) for i in range(run.effort.failing_loudly) for n in PAPER_SIZES]
    found = run.map("Failing Loudly", failing_loudly_trial, tasks)
    figures = []
    for n in PAPER_SIZES:
        one = [p for (size, _), draw in zip(tasks, found, strict=True) if size == n for p in draw]
        rates = by_test(one)
        bar = max(rates["BBSD"], PUBLISHED_BBSD[n])
        figures.append(
            Figure(
                f"Failing Loudly's accuracy, reference = n = {n} ({len(one)} draws)",
                rates["ours"],
                "above BBSD",
                rates["ours"] > bar,
                {"BBSD": rates["BBSD"], "BBSD as published": PUBLISHED_BBSD[n]},
            )
        )
    return figures


# --- regimes

REGIME_ROWS = 900
MIXTURES = tuple(i / 10 for i in range(11))
PURE = (0.0, 1.0)
ART, HALF_ART = 2.0, 3.0
"""Not shares of photos, but a third world, alone and with as many photos."""


def regimes_trial(i: int) -> dict[str, dict[float, float]]:
    """Check photos and sketches mixed by every share, and art, by three kinds of reference."""
    rng = generator("regimes", i)
    photo, sketch, art = (f"{domain}-squeezenet" for domain in realdata.DOMAINS)
    of_photos, of_sketches = (rng.permutation(len(pool(name))) for name in (photo, sketch))
    first = regime(photo, of_photos[:REGIME_ROWS], "photo")
    newest = regime(sketch, of_sketches[:REGIME_ROWS], "sketch")
    both = concatenate([first.features, newest.features])
    references = {
        "ours": reference_of(first, newest),
        "one pooled reference": reference_of(
            Regime("pooled", both, np.concatenate([first.labels, newest.labels]))
        ),
        "the newest window alone": reference_of(newest),
    }
    batches = {}
    for share in MIXTURES:
        k = round(100 * share)
        batches[share] = mixed(
            (pool(photo), of_photos[REGIME_ROWS:][:k]),
            (pool(sketch), of_sketches[REGIME_ROWS:][: 100 - k]),
        )
    strangers = rng.permutation(len(pool(art)))
    batches[ART] = mixed((pool(art), strangers[:100]))
    batches[HALF_ART] = mixed(
        (pool(art), strangers[:50]), (pool(photo), of_photos[REGIME_ROWS:][:50])
    )
    return {
        name: {
            what: our_p(reference, batch.features)
            for what, batch in batches.items()
            if name == "ours" or what in PURE
        }
        for name, reference in references.items()
    }


def regimes(run: Runner) -> list[Figure]:
    """Alarms on known worlds, alone and mixed, and on one that is new."""
    found = run.map("regimes", regimes_trial, range(run.effort.regimes))
    rates = {
        name: {what: rate(draw[name][what] for draw in found) for what in found[0][name]}
        for name in found[0]
    }
    ours = rates["ours"]
    for share in MIXTURES:
        run.console.print(f"  {share:.0%} photos: {ours[share]:.3f}")
    limit = float(stats.binom.ppf(1 - 0.05 / len(MIXTURES), len(found), ALPHA)) / len(found)
    worst = max(MIXTURES, key=lambda share: ours[share])
    pure = max(ours[0.0], ours[1.0])
    return [
        Figure(
            f"alarms on known worlds of PACS, n = 100, worst of pure and 10-90 % mixtures "
            f"({worst:.0%} photos; {len(found)} draws)",
            ours[worst],
            f"≤ {limit:.3f}, .05 within the binomial error of the worst of {len(MIXTURES)}",
            ours[worst] <= limit,
            {"mean over the mixtures": statistics.mean(ours[share] for share in MIXTURES)}
            | {
                f"{name}, pure batches, worst": max(its[0.0], its[1.0])
                for name, its in rates.items()
                if name != "ours"
            }
            | {"pure batches, worst": pure},
        ),
        Figure(
            "alarms on a third world (art) beside two known ones",
            ours[ART],
            "1.00",
            ours[ART] == 1.0,
            {"half art, half photos": ours[HALF_ART]},
        ),
    ]
