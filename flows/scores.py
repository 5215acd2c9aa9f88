"""How each class is answered before and after, and which are answered worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from sft.evaluate import ClassScore
from sft.gate import Pair

WORST = 3
"""Classes that are named for each hold-out."""
NOTHING = ClassScore(0, float("nan"), float("nan"))


def per_class(pairs: Mapping[str, Pair], classes: Sequence[str]) -> pd.DataFrame:
    """Score champion and challenger on every class that a hold-out has or that either answers.

    Returns:
        Columns `holdout`, `class`, `support`, and `recall_*` and `precision_*` of `champion` and
        `challenger`; NaN where there is nothing to count.
    """
    rows = []
    for holdout, pair in pairs.items():
        before, after = (one.per_class(classes) for one in (pair.champion, pair.challenger))
        for name in (one for one in classes if one in before or one in after):
            then, now = before.get(name, NOTHING), after.get(name, NOTHING)
            rows.append(
                {
                    "holdout": holdout,
                    "class": name,
                    "support": max(then.support, now.support),
                    "recall_champion": then.recall,
                    "recall_challenger": now.recall,
                    "precision_champion": then.precision,
                    "precision_challenger": now.precision,
                }
            )
    columns = [f"{score}_{who}" for score in ("recall", "precision")
               for who in ("champion", "challenger")]  # fmt: skip
    return pd.DataFrame(rows, columns=["holdout", "class", "support", *columns])


def worst_classes(table: pd.DataFrame) -> str:
    """Name the classes of each hold-out that the challenger answers worst; "" if all is right."""
    told = []
    wrong = table[table["recall_challenger"] < 1]
    for holdout, rows in wrong.groupby("holdout", sort=False):
        worst = rows.sort_values(["recall_challenger", "support"], ascending=[True, False])
        words = [
            f"{row['class']} {row['recall_challenger']:.0%} of {row['support']}"
            f" (champion {row['recall_champion']:.0%}), precision {row['precision_challenger']:.0%}"
            for row in worst.head(WORST).to_dict("records")
        ]
        told.append(f"{holdout} hold-out: {'; '.join(words)}")
    return " | ".join(told)
