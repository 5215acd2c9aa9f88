"""A retraining by several processes: the real flow, deaths, and torchrun on two machines."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from samples import optical_digits
from stores import wait_for
from worlds import free

from flows.registry import Registry
from flows.retrain import retrain
from sft import processes
from sft.after import tune
from sft.distributed import Team
from sft.models import ModelConfig, Network, build
from sft.pictures import Preprocessing
from sft.speed import ComputeSettings, Device
from sft.train import Epoch, FineTuned, TrainingSettings

if TYPE_CHECKING:
    from worlds import World

TWO = ComputeSettings(device=Device.CPU, processes=2)


def network() -> Network:
    preprocessing = Preprocessing(8, channels=1)
    config = ModelConfig("small_cnn", tuple("0123456789"), preprocessing, (0.3,), (0.35,))
    return build(config)


def others() -> list[psutil.Process]:
    """The processes that share this one's fine-tuning."""
    return [one for one in psutil.Process().children() if "sft.processes" in one.cmdline()]


@pytest.mark.nightly
def test_the_flow_retrains_by_two_processes(
    small_world: Callable[[str], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`[compute] processes = 2` changes nothing but who computes; nobody is left behind."""
    world = small_world("by-two")
    with world.path.open("a") as file:
        file.write("\n[compute]\nprocesses = 2\n")
    world.arrive(0, labelled=True)
    sizes = []

    def seen(*given: Any, team: Team, **more: Any) -> FineTuned:
        sizes.append((team.size, len(others())))
        return tune(*given, team=team, **more)

    monkeypatch.setattr(processes, "tune_here", seen)
    made = retrain(str(world.path))
    assert (made.version, made.made_now) == (2, True)
    assert sizes == [(2, 1)]
    assert others() == []
    assert Registry(world.settings).version(2).tags["verdict"]


def test_a_process_that_dies_is_named_and_none_is_left() -> None:
    """The last of three is killed: the error names it, not the one that only missed it."""
    gone: list[psutil.Process] = []

    def kill(epoch: Epoch) -> None:
        if epoch.number == 1:
            gone.extend(others())
            next(one for one in gone if one.cmdline()[-2:] == ["2", "3"]).kill()

    compute = ComputeSettings(device=Device.CPU, processes=3)
    with pytest.raises(processes.ProcessError, match=r"process 2 of 0 to 2, .* killed by signal 9"):
        processes.tune(
            network(),
            optical_digits().take(range(200)),
            TrainingSettings(epochs=50),
            compute=compute,
            on_epoch=kill,
        )
    assert len(gone) == 2
    assert others() == []
    assert not torch.distributed.is_initialized()


def test_when_the_leader_is_killed_the_others_end(tmp_path: Path) -> None:
    """Nobody tells them: the connection is closed."""
    script = tmp_path / "leader.py"
    script.write_text(
        "import psutil, time\n"
        "from test_processes import *\n"
        "def told(epoch):\n"
        "    print(others()[0].pid, flush=True)\n"
        "    time.sleep(600)\n"
        "processes.tune(network(), optical_digits().take(range(50)), TrainingSettings(epochs=9),"
        " compute=TWO, on_epoch=told)\n"
    )
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), *filter(None, sys.path)])
    leader = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert leader.stdout is not None
    with leader.stdout:
        other = psutil.Process(int(leader.stdout.readline()))
        leader.send_signal(signal.SIGKILL)
        leader.wait()
    wait_for("end of the other process", lambda: not other.is_running())


@pytest.mark.nightly
def test_torchrun_retrains_on_two_machines(
    small_world: Callable[[str], World], tmp_path: Path, prefect_server: str
) -> None:
    """The second has a folder with the settings alone: it computes, and writes nothing anywhere."""
    world = small_world("two")
    world.arrive(0, labelled=True)
    second = tmp_path / "second"
    second.mkdir()
    shutil.copy(world.path, second)
    where = ["--master-addr", "127.0.0.1", "--master-port", str(free())]
    sustain = str(Path(sys.executable).parent / "sustain")
    machines = []
    for rank, folder in enumerate((world.path.parent, second)):
        home = tmp_path / f"home-{rank}"
        home.mkdir()
        machines.append(
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
                    *("--node-rank", str(rank), "--nproc-per-node", "1", *where),
                    *("--no-python", sustain, "retrain", "-s", "sustain.toml"),
                ],
                cwd=folder,
                env={**os.environ, "HOME": str(home), "PREFECT_API_URL": prefect_server},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    told = [machine.communicate(timeout=300) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], told
    assert "version 2" in told[0][0]
    assert told[1][0] == ""
    assert Registry(world.settings).version(2).tags["verdict"]
    assert [path.name for path in second.iterdir()] == ["sustain.toml"]
