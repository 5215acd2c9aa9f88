"""Settings that have to stand before torch is imported."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # busy processes starve each other otherwise
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks gain nothing from more
