"""Which labels are fresh follows from the labels, the feed and the lineage."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from flows.feed import list_batches
from flows.fresh import (
    FreshSet,
    Labels,
    fresh_set,
    gather_labels,
    held_out_labels,
    labels_needed,
    retrain_key,
)
from flows.settings import Settings, load_settings
from sft.dataset import Role, role_of
from sft.tasks import MultiLabel, Regression


def labels(**pairs: str) -> Labels:
    ids = sorted(pairs)
    table = pd.DataFrame({"sample_id": [f"b/{i}" for i in ids], "label": [pairs[i] for i in ids]})
    return Labels(table, ())


def learned(*rows: tuple[str, str]) -> pd.DataFrame:
    return pd.DataFrame([(f"b/{i}", label) for i, label in rows], columns=["sample_id", "label"])


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    path = tmp_path / "sustain.toml"
    path.write_text('[model]\nname = "m"\n')
    for name in ("x", "y"):
        folder = tmp_path / "feed" / "b1" / name
        folder.mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / "1.png")
    (tmp_path / "labels").mkdir()
    return load_settings(path, environ={})


def test_learned_labels_are_not_fresh() -> None:
    """A label is fresh until the lineage has learned it."""
    fresh = fresh_set(labels(a="x", b="y"), learned(("a", "x")))
    assert list(fresh.table["sample_id"]) == ["b/b"]


def test_the_more_accuracy_fell_the_fewer_labels_show_that_it_is_regained(
    settings: Settings,
) -> None:
    """Never more than without knowing the fall, and never fewer than the gate and policy ask."""
    new = FreshSet(labels(**{f"n{i}": "x" for i in range(120)}).table)
    all_ = FreshSet(labels(**{f"n{i}": "x" for i in range(600)}).table)
    needed = [labels_needed(all_, settings, new, fall) for fall in (0.0, 0.05, 0.3, 0.4, 0.6)]
    assert needed == sorted(needed, reverse=True)
    assert needed[0] == needed[1] == labels_needed(new, settings) > needed[2] > needed[3]
    assert needed[-1] == len(new), "120 labels show that half of .6 was regained"
    assert labels_needed(new, settings, new, 0.6) > len(new), "the gate holds out 100 in all"
    few = FreshSet(new.table[:50])
    assert labels_needed(all_, settings, few, 0.9) == settings.policy.min_labels


def test_a_corrected_label_is_fresh() -> None:
    """The same sample with another label has to be learned again."""
    fresh = fresh_set(labels(a="y"), learned(("a", "x")))
    assert list(fresh.table["label"]) == ["y"]


def test_the_newest_lesson_counts() -> None:
    """A label that was corrected, learned, and stays is not fresh because of the older lesson."""
    assert len(fresh_set(labels(a="y"), learned(("a", "y"), ("a", "x")))) == 0


def test_nothing_learned_and_nothing_labelled() -> None:
    """Empty tables have no fresh labels and no classes."""
    fresh = fresh_set(labels(), learned())
    assert (len(fresh), fresh.classes) == (0, 0)


def test_labels_that_came_with_the_batch_count(settings: Settings) -> None:
    """Class folders are labels that came at once."""
    batches = list_batches(settings.feed, settings.root)
    found = gather_labels(settings, batches, ("x", "y"))
    assert found.of_batch("b1") == {"b1/x/1.png": "x", "b1/y/1.png": "y"}


def test_a_late_label_corrects_an_early_one(settings: Settings) -> None:
    """The labels folder wins over the class folder."""
    (settings.root / "labels" / "1.csv").write_text("sample_id,label\nb1/x/1.png,y\n")
    batches = list_batches(settings.feed, settings.root)
    assert gather_labels(settings, batches, ("x", "y")).of_batch("b1")["b1/x/1.png"] == "y"


def test_late_labels_that_contradict_one_another_leave_no_label(settings: Settings) -> None:
    """Neither one of them nor the class folder's, which they deny; a later correction counts."""
    file = settings.root / "labels" / "1.csv"
    file.write_text("sample_id,label\nb1/x/1.png,y\nb1/x/1.png,z\n")
    batches = list_batches(settings.feed, settings.root)
    found = gather_labels(settings, batches, ("x", "y", "z"))
    assert found.of_batch("b1") == {"b1/y/1.png": "y"}
    assert "left out: b1/x/1.png ('y' or 'z')" in found.problems[0]
    (settings.root / "labels" / "2.csv").write_text("sample_id,label\nb1/x/1.png,z\n")
    corrected = gather_labels(settings, batches, ("x", "y", "z"))
    assert corrected.of_batch("b1") == {"b1/x/1.png": "z", "b1/y/1.png": "y"}


@pytest.mark.parametrize("name", ["gone/1.png", "b1/x/2.png"])
def test_labels_for_nothing_are_reported(settings: Settings, name: str) -> None:
    """A label for a batch or a picture that the feed does not hold is told, and left out."""
    (settings.root / "labels" / "1.csv").write_text(f"sample_id,label\n{name},x\n")
    found = gather_labels(settings, list_batches(settings.feed, settings.root), ("x", "y"))
    assert name not in set(found.table["sample_id"])
    assert any("1 labels are for samples that the feed does not hold" in p
               for p in found.problems)  # fmt: skip


def test_labels_of_unknown_classes_are_reported(settings: Settings) -> None:
    """A class that nobody named is told with the way out, never guessed."""
    (settings.root / "labels" / "1.csv").write_text("sample_id,label\nb1/x/1.png,zebra\n")
    found = gather_labels(settings, list_batches(settings.feed, settings.root), ("x", "y"))
    assert "b1/x/1.png" not in found.of_batch("b1")
    assert any("zebra" in p and "add these to classes" in p for p in found.problems)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("[training]\nafter = 'ensemble'", True),
        ("[search]\nenabled = true", True),
        ("[search]\nfolds = 3", False),  # it is not asked for
        ("[adaptation]\nmethod = 'reestimate'", False),  # a retraining does not adapt
    ],
)
def test_the_key_follows_what_changes_the_result(
    settings: Settings, tmp_path: Path, text: str, changes: bool
) -> None:
    """What follows and a search that runs change it; a search that does not run leaves it."""
    fresh = fresh_set(labels(a="x"), learned())
    path = tmp_path / "other.toml"
    path.write_text(f'[model]\nname = "m"\n{text}\n')
    key = retrain_key(1, fresh, load_settings(path, environ={}))
    assert (key != retrain_key(1, fresh, settings)) is changes


def test_only_held_out_labels_judge_what_was_made_without_labels() -> None:
    """Of a hundred labels about thirty have that role, for ever."""
    held = held_out_labels(labels(**{str(i): "x" for i in range(100)}))
    assert 20 < len(held) < 40
    assert {role_of(name) for name in held} == {Role.HOLDOUT}


def test_the_key_follows_champion_labels_and_settings(settings: Settings, tmp_path: Path) -> None:
    """Same champion, labels and settings: same key; any of them changed: another."""
    one, other = fresh_set(labels(a="x"), learned()), fresh_set(labels(a="y"), learned())
    key = retrain_key(1, one, settings)
    assert key == retrain_key(1, fresh_set(labels(a="x"), learned()), settings)
    path = tmp_path / "other.toml"
    path.write_text('[model]\nname = "m"\n[training]\nepochs = 99\n')
    changed = load_settings(path, environ={})
    assert len({key, retrain_key(2, one, settings), retrain_key(1, other, settings),
                retrain_key(1, one, changed)}) == 4  # fmt: skip


def test_labels_of_a_task_are_written_in_one_form(settings: Settings) -> None:
    """Order, space and zeros make no other label, so what was learned is not fresh again."""
    rows = "sample_id,label\nb1/x/1.png,y| x\nb1/y/1.png,|\n"
    (settings.root / "labels" / "1.csv").write_text(rows)
    batches = list_batches(settings.feed, settings.root)
    found = gather_labels(settings, batches, ("x", "y"), MultiLabel())
    assert found.of_batch("b1") == {"b1/x/1.png": "x|y", "b1/y/1.png": "|"}
    (settings.root / "labels" / "1.csv").write_text(rows.replace("y| x", "7.50").replace("|", "8"))
    found = gather_labels(settings, batches, ("ink",), Regression())
    assert found.of_batch("b1") == {"b1/x/1.png": "7.5", "b1/y/1.png": "8"}


def test_what_cannot_be_a_label_of_a_task_is_reported(settings: Settings) -> None:
    """With the reason of the first; names are no numbers."""
    (settings.root / "labels" / "1.csv").write_text("sample_id,label\nb1/x/1.png,x|zebra\n")
    batches = list_batches(settings.feed, settings.root)
    found = gather_labels(settings, batches, ("x", "y"), MultiLabel())
    assert found.of_batch("b1") == {"b1/y/1.png": "y"}
    assert "1 labels cannot be used (first: 'zebra' in 'x|zebra' is none of the labels x, y)" in (
        found.problems
    )
    found = gather_labels(settings, batches, ("ink",), Regression())
    assert found.table.empty
    assert any("2 labels cannot be used (first: 'x|zebra' holds 2" in p for p in found.problems)


def test_a_split_sample_may_be_called_by_its_path(settings: Settings) -> None:
    """A late label that names the file reaches the sample, whose id names the split."""
    for name in ("train", "test"):
        folder = settings.root / "feed" / "b2" / name
        folder.mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / "1.png")
    late = "sample_id,label\nb2/test/1.png,x\nb2/train+val//1.png,y\nb1/x/1.png,y\n"
    (settings.root / "labels" / "late.csv").write_text(late)
    batches = list_batches(settings.feed, settings.root)
    found = gather_labels(settings, batches, ["x", "y"])
    assert found.problems == ()
    assert found.of_batch("b2") == {"b2/test//1.png": "x", "b2/train+val//1.png": "y"}
    assert found.of_batch("b1") == {"b1/x/1.png": "y", "b1/y/1.png": "y"}
