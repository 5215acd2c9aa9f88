"""The shell: Prefect flows, the feed, the registry and the command line."""

import os

# What torch, MLflow and Prefect read while they load, which every module here makes them do; so it
# cannot wait for the settings, and a worker that imports a flow needs it as much as a command does.
for _name, _value in {
    # with threads that spin, a forward pass beside two busy processes took 37 s instead of 3
    "GOMP_SPINCOUNT": "0",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # with 7, the default, a call hangs for 248 s
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}.items():
    os.environ.setdefault(_name, _value)
