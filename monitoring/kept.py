"""What is worked out once for an object, and kept as long as the object lives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

Key = TypeVar("Key")
Value = TypeVar("Value")


def kept_with(make: Callable[[Key], Value]) -> Callable[[Key], Value]:
    """Make once for each object, which is told from others by what it is and not by its contents.

    For tables that never change, such as a reference, and results that take long, such as all its
    neighbours.
    """
    made: WeakKeyDictionary[Key, Value] = WeakKeyDictionary()

    @functools.wraps(make)
    def kept(key: Key) -> Value:
        found = made.get(key)
        if found is None:
            found = made[key] = make(key)
        return found

    return kept
