"""Names things by what they are made of."""

from __future__ import annotations

import hashlib
import json


def digest(value: object) -> str:
    """Return the SHA-256 of what JSON holds, 64 hexadecimal digits; keys in any order are alike.

    What JSON has no form for, such as a path, counts by its text.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
