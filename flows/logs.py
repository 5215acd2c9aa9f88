"""Lines for machines: what happened, to which model, version and batch, as `[logs]` asks for."""

from __future__ import annotations

import json
import math
import os
import sys
from datetime import UTC, datetime

from flows.settings import Settings


def log(settings: Settings, event: str, **facts: object) -> None:
    """Write one line of JSON, if the settings ask for it; what is None or not a number is left out.

    Args:
        settings: of the model.
        event: what happened, as `batch.checked`.
        facts: `version`, `batch` and whatever else there is to say.
    """
    if settings.logs.format != "json":
        return
    told = {k: v for k, v in facts.items() if v is not None and not _is_nan(v)}
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = json.dumps({"time": at, "event": event, "model": settings.model.name, **told}) + "\n"
    if not settings.logs.file:
        sys.stderr.write(line)
        return
    path = settings.root / settings.logs.file
    path.parent.mkdir(parents=True, exist_ok=True)
    # one write of a line that is appended: those of several processes do not mix
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    try:
        os.write(opened, line.encode())
    finally:
        os.close(opened)


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
