"""How long the commands take that a person waits for: `make bench-cli`.

Each figure is the median of several runs, with a ratio to something of the same run that cannot be
faster, so that it means the same on another machine.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import Figure, write


def seconds(*command: str, repeat: int = 3) -> tuple[float, str]:
    """Run a command several times; return the median wall time and its last output."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    took, output = [], ""
    for _ in range(repeat):
        began = time.perf_counter()
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        took.append(time.perf_counter() - began)
        output = run.stdout
    return statistics.median(took), output


def main() -> None:
    """Measure and write the table."""
    sustain = (sys.executable, "-m", "flows.cli")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "demo"
        bare, _ = seconds(sys.executable, "-c", "import click, rich.table", repeat=7)
        shown, _ = seconds(*sustain, "--help", repeat=7)
        demo, told = seconds(*sustain, "demo", "--folder", str(folder), repeat=1)
        imports, _ = seconds(sys.executable, "-c", "import flows.registry, flows.watch")
        idle, _ = seconds(*sustain, "watch", "-s", str(folder / "sustain.toml"))
    rows = re.findall(r"^│ \d\s+│ (0\.\d+)\s+│ (0\.\d+)", told, re.MULTILINE)
    (mnist, optical), (mnist_2, optical_2) = (tuple(map(float, row)) for row in rows)
    write(
        "cli",
        [
            Figure("sustain --help, s", shown, "≤ 1", shown <= 1, {"import click, rich": bare}),
            Figure(
                "sustain watch with nothing to do, s",
                idle,
                "≤ 10, most of it imports",
                idle <= 10 and imports > idle / 2,
                {"its imports alone": imports},
            ),
            Figure("sustain demo, s", demo, "≤ 180", demo <= 180, {}),
            Figure("optical digits, version 1", optical, "< .30", optical < 0.30, {}),
            Figure("optical digits, version 2", optical_2, "> .90", optical_2 > 0.90, {}),
            Figure(
                "MNIST, version 2",
                mnist_2,
                "≥ version 1 - .02",
                mnist_2 >= mnist - 0.02,
                {"version 1": mnist},
            ),
        ],
    )


if __name__ == "__main__":
    main()
