"""`kill -9` at every write of every flow, then the same command again; and two commands at once.

A command that was killed and run again must leave what the command leaves when it runs undisturbed,
once or (killed after its work was done) twice: the same versions with the same keys, files,
parents and verdicts, the same aliases, each check once with the same decision, no training run left
open, the same fresh labels. kill_driver.py, beside this file, says how it is done and compared.

The state on disk "just after" a write is the one "just before" the next: unless KILL_ALL is
set (`make test-nightly` sets it), one of the two is tried, what bootstrap, watch and retrain share
is tried in the longest chain only, and of the writes but those that DECIDE every fourth is tried,
of the chain every eighth, so that 2 cores need minutes, not half an hour. Drift reports are
replaced by a short file, but for one chain, since Evidently takes seconds for each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from faults import count
from kills import Cases, Drivers, complaint, lost, report
from stores import SQLITE

pytestmark = pytest.mark.timeout(
    1800
)  # of the first test: it waits for its cases on a busy machine
EVERYTHING = bool(os.environ.get("KILL_ALL"))
DECIDE = ("create_model_version", " verdict)", "champion", "alias", "terminated")
"""What is in the names of writes that others act on."""


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Iterator[Drivers]:
    folder = tmp_path_factory.mktemp("kill")
    found = Drivers(folder, prefect_server)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def cases(drivers: Drivers) -> dict[str, Cases]:
    """Ask for every case at once, so that no driver waits for another between tests."""
    names = ("chain", "retrain", "refused", "bootstrap", "check", "moved", "rollback")
    calm = {name: drivers.ask("undisturbed", name) for name in names}
    for name, undisturbed in calm.items():
        assert "boundaries" in undisturbed.result(), (name, undisturbed.result())
    return {
        name: Cases(
            undisturbed=(found := undisturbed.result()),
            kills={
                where: drivers.ask("killed", name, at=at)
                for at, where in chosen(name, found["boundaries"])
            },
            overtakings={
                where: drivers.ask("overtaken", name, at=at)
                for at, where in held(name, found["boundaries"])
            },
        )
        for name, undisturbed in calm.items()
    }


def chosen(scenario: str, boundaries: list[str]) -> list[tuple[int, str]]:
    """Choose the boundaries to kill at: of those of `distinct`, what DECIDEs and a share."""
    if EVERYTHING:
        return list(enumerate(boundaries))
    every, last = 16 if scenario == "chain" else 8, len(boundaries) - 1
    return [
        (at, where)
        for at, where in distinct(scenario, boundaries)
        if at % every == 0 or at == last or any(kind in where for kind in DECIDE)
    ]


def distinct(scenario: str, boundaries: list[str]) -> list[tuple[int, str]]:
    """Choose the boundaries that leave another state than those before, and than the chain's."""
    numbered, last = list(enumerate(boundaries)), len(boundaries) - 1
    numbered = [
        (at, where) for at, where in numbered if not where.startswith("after write") or at == last
    ]
    if scenario in ("bootstrap", "retrain", "refused"):  # the chain trains as these do
        version = next(n for n, where in numbered if "create_model_version" in where)
        first = ("(create_experiment", "(create_run", "(log_artifacts model", "first file")
        return [
            (at, where)
            for at, where in numbered
            if at >= version or (scenario == "bootstrap" and any(kind in where for kind in first))
        ]
    if scenario == "moved":  # then it checks, as above
        return [
            (at, where)
            for at, where in numbered
            if at <= next(n for n, w in numbered if "create_run" in w)
        ]
    return numbered


def held(scenario: str, boundaries: list[str]) -> list[tuple[int, str]]:
    """Choose the boundaries at which a retraining is held while another overtakes it."""
    if scenario != "retrain":
        return []
    found = [(at, where) for at, where in enumerate(boundaries) if where.startswith("before")]
    if EVERYTHING:
        return found
    kinds = ("create_run", "log_artifacts model", "create_model_version", " verdict)", "moving {")
    kinds += ("alias",)
    return [(at, where) for at, where in found if any(kind in where for kind in kinds)]


def test_undisturbed_runs_do_what_the_scenarios_say(cases: dict[str, Cases]) -> None:
    """The chain promotes, the refused challenger waits, the rollback goes one version back."""
    books = {name: case.undisturbed["books"] for name, case in cases.items()}
    assert all(not case.undisturbed["errors"][0] for case in cases.values())
    assert books["bootstrap"][0]["aliases"] == {"champion": 1, "challenger": None}
    assert len(books["check"][0]["checks"]) == 2
    for name in ("chain", "retrain"):
        assert books[name][0]["aliases"] == {"champion": 2, "challenger": None}
        assert books[name][0]["versions"]["2"]["tags"]["verdict"] == "promote"
    assert books["refused"][0]["aliases"] == {"champion": 1, "challenger": 2}
    assert books["refused"][0]["versions"]["2"]["tags"]["verdict"] == "inconclusive"
    assert books["rollback"][0]["aliases"]["champion"] == 2
    assert books["moved"][0]["aliases"]["champion"] == 1
    assert [v["rolled back"] for v in books["moved"][0]["versions"].values()] == [False, True, True]
    for name, (once, _) in books.items():
        assert all("verdict" in v["tags"] for v in once["versions"].values()), name
        assert not once["open runs"], name
        assert set(once["ended runs"].values()) == {1}, name


@pytest.mark.parametrize(
    "scenario", ["bootstrap", "check", "chain", "retrain", "refused", "rollback", "moved"]
)
def test_killed_anywhere_and_run_again(
    scenario: str, cases: dict[str, Cases], request: pytest.FixtureRequest
) -> None:
    """Killed at any write, or within training, the same command again ends the same."""
    case = cases[scenario]
    complaints, outcomes = {}, []
    for where, future in case.kills.items():
        answer = future.result()
        not_killed = "" if answer.get("killed", True) else "it was not killed"
        # a rollback run twice goes back twice, so a killed one must end as if it had run once
        done = where == case.undisturbed["boundaries"][-1]
        least = {"books": case.undisturbed["books"][:1]}
        wanted = least if scenario == "rollback" and not done else case.undisturbed
        complaints[where] = not_killed or complaint(answer, wanted)
        outcomes.append((not complaints[where], lost(answer, wanted)))
    count(request.node, "a flow is killed at a write", SQLITE, outcomes)
    assert not any(complaints.values()), report(complaints)


def test_killed_while_the_report_is_written(drivers: Drivers, cases: dict[str, Cases]) -> None:
    """Evidently's report, half of it on disk, is written again; the chain ends the same."""
    boundaries = cases["chain"].undisturbed["boundaries"]
    assert boundaries[1].startswith("after write 1 (create_run")
    answer = drivers.ask("killed", "chain", at=2, real_report=True).result()
    assert answer["killed"]
    assert not complaint(answer, cases["chain"].undisturbed)


def test_overtaken_at_any_write(cases: dict[str, Cases], request: pytest.FixtureRequest) -> None:
    """A retraining that stands still while another does it all adds nothing and breaks nothing."""
    case = cases["retrain"]
    complaints, outcomes = {}, []
    for where, future in case.overtakings.items():
        answer = future.result()
        not_held = "" if answer.get("held", True) else "it was not held"
        # two trainings may end; one version is made
        complaints[where] = not_held or complaint(answer, case.undisturbed, leave=("ended runs",))
        outcomes.append((not complaints[where], lost(answer, case.undisturbed)))
    count(request.node, "a retraining is overtaken", SQLITE, outcomes)
    assert not any(complaints.values()), report(complaints)


@pytest.mark.parametrize(
    ("scenario", "seconds"),
    [
        ("chain", 0.0),
        pytest.param("chain", 0.7, marks=pytest.mark.nightly),
        pytest.param("retrain", 0.0, marks=pytest.mark.nightly),
        ("retrain", 0.7),
    ],
)
def test_two_at_once(
    scenario: str,
    seconds: float,
    drivers: Drivers,
    cases: dict[str, Cases],
    request: pytest.FixtureRequest,
) -> None:
    """Two retrainings or two watchers at once end with one champion and one version for the key."""
    answer = drivers.ask("together", scenario, seconds=seconds).result()
    undisturbed = cases[scenario].undisturbed
    wrong = complaint(answer, undisturbed, leave=("ended runs",))
    outcome = (not wrong, lost(answer, undisturbed))
    count(request.node, "two commands at once", SQLITE, [outcome])
    assert not wrong, wrong
