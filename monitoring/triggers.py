"""What may call for a retraining, and how it composes: any, all, k of n."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TypeGuard
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

from monitoring.words import count, number

MAX_DAYS = 36_500
CRON_FIELDS = 5
MAX_DISTANCE = math.sqrt(2)
"""No discrepancy by a Gaussian kernel is larger."""
LAST_CHECKS = 15
"""Checks whose distances a rolling threshold is taken from; the smaller of Modyn's two numbers."""
LEAST_CHECKS = 5
"""With fewer there is no threshold: of five the next is the farthest once in six by chance."""


class Sign(StrEnum):
    """A trigger without a parameter."""

    DRIFT = "drift"
    ESTIMATED_DAMAGE = "estimated_damage"
    TRUE_DAMAGE = "true_damage"
    DAMAGE = "damage"
    ALWAYS = "always"
    NEVER = "never"


class Measure(StrEnum):
    """What a trigger with a limit looks at."""

    FRESH_LABELS = "fresh_labels"
    DAYS = "days_since_training"
    BATCHES = "batches_since_training"
    SAMPLES = "samples_since_training"
    ACCURACY = "accuracy_below"
    DISTANCE = "drift_distance_above"
    DISTANCE_RANK = "drift_distance_quantile"


@dataclass(frozen=True)
class Limit:
    """Met from `value` on; an accuracy, below it.

    The distance's rank among the last checks is met from the quantile `value` of these on.
    """

    measure: Measure
    value: float


@dataclass(frozen=True)
class Schedule:
    """Met once a time of the crontab line lies after the last training, and not in the future."""

    cron: str
    timezone: str = "UTC"

    def after(self, moment: datetime) -> datetime:
        """Return the first scheduled time after a moment."""
        return next(CronSim(self.cron, moment.astimezone(ZoneInfo(self.timezone))))


@dataclass(frozen=True)
class AtLeast:
    """Met when `n` of some triggers are: all of them for "all", 1 for "any"."""

    n: int
    of: tuple[Trigger, ...]


Trigger = Sign | Limit | Schedule | AtLeast
FORMS = (
    f"{', '.join(repr(s.value) for s in Sign)}, a table of one of "
    f"{', '.join(m.value for m in Measure)} and its limit, "
    '{ schedule = "0 3 * * 0", timezone = "Europe/Berlin" }, { all = [...] }, { any = [...] } or '
    "{ at_least = 2, of = [...] }"
)


def parse_trigger(value: object, where: str = "") -> Trigger:
    """Read a trigger as TOML has it: a string, or a table that may hold further ones.

    Args:
        value: what TOML gives, or a trigger, which stays as it is.
        where: its place in a larger trigger, such as "all[1].any[0]", for messages.

    Raises:
        ValueError: names the place, what is there and what is allowed.

    """
    if isinstance(value, Sign | Limit | Schedule | AtLeast):
        return value
    if isinstance(value, str) and value in set(Sign):
        return Sign(value)
    if isinstance(value, Mapping):
        return _table(value, where)
    near = _did_you_mean(value, [*Sign]) if isinstance(value, str) else ""
    raise ValueError(f"{_stated(where, value)} is no trigger{near}; allowed: {FORMS}")


def _table(value: Mapping[str, object], where: str) -> Trigger:
    keys = set(value)
    if keys in ({"schedule"}, {"schedule", "timezone"}):
        names = (_below(where, "schedule"), _below(where, "timezone"))
        return read_schedule(value["schedule"], value.get("timezone", "UTC"), names)
    if keys == {"at_least", "of"}:
        of, n = _list(value["of"], _below(where, "of")), value["at_least"]
        if not (_whole(n) and 1 <= n <= len(of)):
            raise ValueError(
                f"{_stated(_below(where, 'at_least'), n)}: `of` has {count(len(of), 'trigger')}, "
                f"so a whole number from 1 to {len(of)} is needed"
            )
        return AtLeast(n, of)
    if keys in ({"all"}, {"any"}):
        how = keys.pop()
        of = _list(value[how], _below(where, how))
        return AtLeast(len(of) if how == "all" else 1, of)
    if len(keys) == 1 and keys <= set(Measure):
        measure = Measure(keys.pop())
        return _limit(measure, value[measure.value], where)
    known = [*Measure, "schedule", "timezone", "all", "any", "at_least", "of"]
    unknown = [f"{key!r}{_did_you_mean(str(key), known)}" for key in value if key not in known]
    said = f"there is no trigger {unknown[0]}" if unknown else "these keys make no one trigger"
    raise ValueError(f"{_stated(where, dict(value))}: {said}; allowed: {FORMS}")


def _list(value: object, where: str) -> tuple[Trigger, ...]:
    if not (isinstance(value, Sequence) and not isinstance(value, str) and value):
        raise ValueError(f"{_stated(where, value)}: a list of at least one trigger is needed")
    return tuple(parse_trigger(one, f"{where}[{place}]") for place, one in enumerate(value))


def _limit(measure: Measure, number: object, where: str) -> Limit:
    real = float(number) if isinstance(number, float) or _whole(number) else math.nan
    if measure in {Measure.ACCURACY, Measure.DISTANCE_RANK}:
        allowed, needed = 0 < real < 1, "a share between 0 and 1"
    elif measure is Measure.DISTANCE:
        allowed, needed = 0 < real < MAX_DISTANCE, "a distance over 0 and under 1.414"
    elif measure is Measure.DAYS:
        allowed, needed = 0 < real <= MAX_DAYS, f"a number of days over 0 and up to {MAX_DAYS:,}"
    else:
        allowed, needed = _whole(number) and real >= 1, "a whole number from 1 on"
    if not allowed:
        raise ValueError(f"{_stated(_below(where, measure.value), number)}: {needed} is needed")
    return Limit(measure, real)


def read_schedule(cron: object, timezone: object, names: tuple[str, str]) -> Schedule:
    """Read a crontab line and its time zone; `names` are what the user calls the two.

    Raises:
        ValueError: it is none, or never comes; the message says what is needed.
    """
    try:
        ZoneInfo(str(timezone))
    except (KeyError, ValueError, OSError):
        raise ValueError(
            f"{_stated(names[1], timezone)} is no time zone"
            f"{_did_you_mean(str(timezone), sorted(available_timezones()))}; allowed: names such "
            "as 'UTC' or 'Europe/Berlin'"
        ) from None
    form = "minute, hour, day of month, month, day of week, such as '0 3 * * 0' for Sundays at 3:00"
    said = _stated(names[0], cron)
    if not (isinstance(cron, str) and len(cron.split()) == CRON_FIELDS):
        raise ValueError(f"{said} is no crontab line: five fields are needed: {form}")
    schedule = Schedule(cron, str(timezone))
    try:
        schedule.after(datetime(2000, 1, 1, tzinfo=UTC))
    except CronSimError as error:
        raise ValueError(f"{said} is no crontab line ({error}): {form}") from None
    except StopIteration:
        raise ValueError(f"{said} names a day that never comes: {form}") from None
    return schedule


def _below(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _stated(where: str, value: object) -> str:
    return f"{where} = {value!r}" if where else repr(value)


def _whole(number: object) -> TypeGuard[int]:
    return isinstance(number, int) and not isinstance(number, bool)


def _did_you_mean(word: str, among: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, among, n=1)
    return f" (did you mean {str(near[0])!r}?)" if near else ""


def rank_of(distance: float, before: Sequence[float]) -> float | None:
    """Give the share of the last distances that one exceeds, None if there are too few of them.

    Args:
        distance: of a check.
        before: of the checks before it against the same version, oldest first.

    """
    last = before[-LAST_CHECKS:]
    return sum(one < distance for one in last) / len(last) if len(last) >= LEAST_CHECKS else None


def measures(trigger: Trigger) -> frozenset[Measure]:
    """Name what the limits within a trigger look at."""
    match trigger:
        case Limit(measure, _):
            return frozenset({measure})
        case AtLeast(_, of):
            return frozenset[Measure]().union(*map(measures, of))
        case _:
            return frozenset()


DEFAULT_TRIGGER = parse_trigger({"all": ["drift", {"any": ["estimated_damage", "true_damage"]}]})


def clause(trigger: Trigger, fell: str) -> str:
    """Say in words when a trigger is met; `fell` is what counts as a fall, as "fallen by .05"."""
    match trigger:
        case Sign():
            return {
                Sign.DRIFT: "the data changed",
                Sign.ESTIMATED_DAMAGE: f"accuracy is estimated to have {fell}",
                Sign.TRUE_DAMAGE: f"labels show accuracy to have {fell}",
                Sign.DAMAGE: f"accuracy is estimated or shown by labels to have {fell}",
                Sign.ALWAYS: "a batch was checked",
                Sign.NEVER: "a person says so",
            }[trigger]
        case Limit(measure, limit):
            least = number(limit)
            return {
                Measure.FRESH_LABELS: f"there are {least} fresh labels",
                Measure.DAYS: f"the last training is {least} days ago",
                Measure.BATCHES: f"{least} batches came since the last training",
                Measure.SAMPLES: f"{least} samples came since the last training",
                Measure.ACCURACY: f"accuracy is below {least}",
                Measure.DISTANCE: f"the drift distance is {least} or more",
                Measure.DISTANCE_RANK: (
                    f"the drift distance is above the quantile {least} of the last "
                    f"{LAST_CHECKS} checks'"
                ),
            }[measure]
        case Schedule(cron, timezone):
            return f'a time of the schedule "{cron}" ({timezone}) came since the last training'
        case AtLeast(n, of):
            clauses = [
                f"({said})" if isinstance(one, AtLeast) and len(one.of) > 1 < len(of) else said
                for one, said in ((one, clause(one, fell)) for one in of)
            ]
            if 1 < n < len(of):
                return f"at least {n} of these hold: {'; '.join(clauses)}"
            return (" or " if n == 1 else " and ").join(clauses)
