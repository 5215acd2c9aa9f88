"""Nothing that a guarded command starts outlives it, whichever of its processes is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Linux hands over orphans"),
]

COMMAND = """
import subprocess, sys, time
from flows import guard
from flows.guard import guarded

guard.GRACE_SECONDS = 0.5

def run():
    # a child in a session of its own, which starts another one and does not mind SIGTERM
    child = ("import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
             "subprocess.Popen(['sleep', '600'], start_new_session=True); time.sleep(600)")
    subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
    print("started", flush=True)
    END

sys.exit(guarded(run))
"""


def family(mark: str) -> dict[int, str]:
    """Find the living processes that inherited the mark, with their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


def wait_for(count: int, mark: str) -> dict[int, str]:
    """Wait until so many processes carry the mark."""
    end = time.monotonic() + 30
    while len(found := family(mark)) != count:
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def start(mark: str, end: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND.replace("END", end)],
        env={**os.environ, "GUARD_TEST": mark},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process.stdout as said:  # type: ignore[union-attr]  # it is piped
        assert said.readline() == "started\n"
    return process


@pytest.mark.parametrize(
    ("who", "number", "code"),
    [
        ("seen", signal.SIGINT, 1),  # the work ends with a KeyboardInterrupt
        ("seen", signal.SIGTERM, 1),
        ("seen", signal.SIGKILL, -signal.SIGKILL),
        ("forked", signal.SIGKILL, 128 + signal.SIGKILL),
    ],
)
def test_killed_it_takes_all_along(
    who: str, number: signal.Signals, code: int, tmp_path: Path
) -> None:
    """Command, its child and its grandchild in sessions of their own: all of them end."""
    mark = str(tmp_path)
    process = start(mark, "time.sleep(600)")
    there = wait_for(4, mark)
    (forked,) = (p for p, line in there.items() if "guarded" in line and p != process.pid)
    os.kill(process.pid if who == "seen" else forked, number)
    assert process.wait(timeout=30) == code
    assert not wait_for(0, mark)


@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("sys.exit(3)", 3), ("1 / 0", 1)])
def test_it_ends_as_its_work_ends(end: str, code: int, tmp_path: Path) -> None:
    """The exit code is passed on, and what was started ends then too."""
    process = start(str(tmp_path), end)
    assert process.wait(timeout=30) == code
    assert not wait_for(0, str(tmp_path))
