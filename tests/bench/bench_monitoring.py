"""Monitoring on real data, beside what others do: `make bench-monitoring`, under 25 minutes.

Every trial draws its own reference and its own batches, without common rows, from a pool of real
pictures that the model never learned from; peers see the same draws. A test "rings" when its p is
at most .05, by whatever correction it needs for its own number of columns.

Pools
    MNIST: 12,000 digits, a CNN of 64 embedding dimensions trained on 3,000 others (and one of 128).
    PACS: 1,250 photos, 2,048 art pictures and 1,740 sketches; SqueezeNet (512) and EfficientNet-
    Lite0 (1280) with ImageNet's weights, under a linear head that learned from 420 other photos.
Shifts of "Failing Loudly" (Rabanser et al. 2019), 21 of them
    Gaussian noise (small, medium, large: 1, 10, 100 grey levels) and transformations of the picture
    (small, medium, large: `realdata.SHIFTS`), each on 10, 50 or 100 % of the samples; class
    knock-out (small, medium, large: 10, 50, 100 % of class 0 removed). "Accuracy" is the share of
    (reference, batch) draws that ring, mean over the 21.
Mild corruptions
    `realdata.MILD`: noise of 12 grey levels, 3x3 blur, contrast .7, brightness +25.
False-alarm rate
    Reference and batch are random splits of one pool. The target holds when no cell is over the
    binomial quantile at 1 - .05/cells (chance alone breaks it in 5 % of runs) and the mean over the
    cells is at most .05.
Streams
    Batches of 100 digits drawn anew at each check, reference 2,000; 20 clean batches come before a
    change. A delay of 1 is an alarm at the first changed batch; never is the limit plus one.
Estimated accuracy
    Held against the accuracy of that same batch. "Fell by over 3 points": under the reference's own
    accuracy by more than .03; the score is by how much the estimate is below it.

The file is not called monitoring.py because it would then hide the package of that name.
"""

from __future__ import annotations

import single_thread  # noqa: F401 - numpy and torch read what it sets when they are imported

# isort: split

import argparse
import sys
import time
import traceback
from collections.abc import Callable

import peers_elsewhere
from accuracy_trials import accuracy
from cost_trials import cost, report
from detection_trials import failing_loudly, level, power_mnist, power_pacs, regimes
from results import Figure, write
from rich.console import Console
from stream_trials import delays, false_alarms_stream
from trials import FULL, QUICK, Runner


def labelling(run: Runner) -> list[Figure]:
    """Labels saved by asking for the right ones; measured by `labelling.py` beside this file."""
    if run.effort is QUICK:
        run.console.print("  takes a minute whatever is asked: not in --quick")
        return []
    try:
        import labelling as measured
    except ModuleNotFoundError as error:
        if error.name != "labelling":
            raise
        run.console.print("  tests/bench/labelling.py is not there: left out")
        return []
    return [Figure(**row) for row in measured.run()]


SECTIONS: dict[str, Callable[[Runner], list[Figure]]] = {
    "level": level,
    "power_mnist": power_mnist,
    "power_pacs": power_pacs,
    "failing_loudly": failing_loudly,
    "false_alarms_stream": false_alarms_stream,
    "delays": delays,
    "regimes": regimes,
    "accuracy": accuracy,
    "cost": cost,
    "report": report,
    "labelling": labelling,
}


def main() -> None:
    """Measure, and write the table if all of it was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few draws; writes nothing")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="keeps the other figures")
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    console = Console()
    run = Runner(QUICK if asked.quick else FULL, asked.processes, console)
    with console.status("environment of the peers (some minutes, the first time)"):
        run.elsewhere = peers_elsewhere.make()
    if run.elsewhere is not None:
        console.print(f"alibi-detect, NannyML and ADWIN are left out: {run.elsewhere}")
    figures, failed, began = [], [], time.perf_counter()
    for name in asked.only or SECTIONS:
        console.print(f"[bold]{name}")
        started = time.perf_counter()
        try:
            found = SECTIONS[name](run)
        except Exception:  # noqa: BLE001 - the other sections are still worth their figures
            failed.append(name)
            console.print(traceback.format_exc(), markup=False, highlight=False)
            continue
        for figure in found:
            beside = ", ".join(f"{peer} {value:.3g}" for peer, value in figure.peers.items())
            mark = "met" if figure.met else "MISSED"
            console.print(
                f"  {mark}: {figure.figure}: {figure.value:.3g} ({figure.target}); {beside}",
                markup=False,
                highlight=False,
            )
        console.print(f"  {time.perf_counter() - started:.0f} s")
        figures += found
        if not asked.quick:  # what is measured is not lost if a later section fails
            write("monitoring", found, merge=True)
    run.close()
    console.print(f"{(time.perf_counter() - began) / 60:.1f} minutes")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; their old figures were kept")
    if not asked.quick and not asked.only:
        write("monitoring", figures)  # without what an earlier run measured and this one no more


if __name__ == "__main__":
    main()
