"""Keeps numpy, scipy and torch to one thread; only if it is imported before them."""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.setdefault("DO_NOT_TRACK", "true")
