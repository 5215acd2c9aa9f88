"""Nothing that a command starts outlives it, however it ends.

The process that a person sees only waits. The one that it forked does the work, is told by the
kernel when the first one dies, and is where the kernel hands over what its own children leave; if
it is killed itself, the first one inherits, and ends, all of it. Without Linux only what stays in
its process group is ended.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Of prctl(2)."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 5.0
"""From SIGTERM to SIGKILL."""


def guarded(run: Callable[[], None]) -> int:
    """Run in a process of its own, end all that it started, and return its exit code.

    SIGINT, SIGTERM and SIGHUP are passed on to it, and are a KeyboardInterrupt there.
    """
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    parent = os.getpid()
    sys.stdout.flush()  # or what waits in its buffer is written twice
    child = os.fork()
    if child == 0:
        os._exit(_work(run, parent))

    def pass_on(number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    _, status = os.waitpid(child, 0)
    end_descendants()
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def end_descendants() -> None:
    """End every process below this one, kindly at first, and collect them."""
    end = time.monotonic() + GRACE_SECONDS
    asked: set[int] = set()
    while below := _descendants(os.getpid()):
        late = time.monotonic() > end
        for pid in below:
            if late or pid not in asked:
                asked.add(pid)
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
        _collect()
        time.sleep(0.05)


def _work(run: Callable[[], None], parent: int) -> int:
    os.setsid()  # Ctrl-C reaches the first process alone, which passes it on, once
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died in between
        return 1
    for number in SIGNALS:  # a shell that starts a command in the background ignores Ctrl-C for it
        signal.signal(number, signal.default_int_handler)
    code = 1
    try:
        run()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does at the end of a process
        sys.excepthook(*sys.exc_info())
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        end_descendants()
        with suppress(OSError):
            sys.stdout.flush()
    return code


def _descendants(root: int) -> list[int]:
    """List the processes below one, those excepted that ended and are only to be collected."""
    children: dict[int, list[int]] = {}
    ended = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "pid (name) state parent ...", where the name may hold anything
            state, parent = entry.read_text(errors="replace").rpartition(")")[2].split()[:2]
        except (OSError, ValueError):  # it ended meanwhile
            continue
        pid = int(entry.parent.name)
        children.setdefault(int(parent), []).append(pid)
        if state == "Z":
            ended.add(pid)
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return [pid for pid in found if pid not in ended]


def _collect() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
