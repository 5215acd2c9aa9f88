"""The shell: Prefect flows, the feed, the registry and the command line."""

import os

# OpenMP reads it while torch loads, which every module here does: with threads that spin, a forward
# pass beside two other busy processes on two cores took 37 s instead of 3
os.environ.setdefault("GOMP_SPINCOUNT", "0")
