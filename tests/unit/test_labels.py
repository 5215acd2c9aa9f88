"""Late labels: every form of a file, and which label is in force."""

import os
from pathlib import Path

import pytest
from samples import LENIENT, as_dict, parquet, tree, write

from flows.feed import FeedSettings
from flows.labels import LabelTable, read_label_file, read_labels
from flows.storage import FeedError


def labels(root: Path, settings: FeedSettings = LENIENT) -> LabelTable:
    before = tree(root)
    table = read_labels(settings, root)
    assert tree(root) == before
    return table


def test_late_labels_keep_their_text(root: Path) -> None:
    """Labels such as 007, NA and None stay text; integers of Parquet become text."""
    table = '\ufeffsample_id,label\nb/1,007\nb/2,NA\nb/3,None\nb/4,1\nb/5,"<script>, Ä"\n\n'
    write(root / "labels", {"a.csv": table, ".hidden.csv": "x", "w.tmp/x.csv": "x"})
    write(root / "labels", {"b.parquet": parquet(sample_id=["b/6", "b/7"], label=[7, None])})
    read_table = labels(root)
    assert as_dict(read_table) == {
        "b/1": "007",
        "b/2": "NA",
        "b/3": "None",
        "b/4": "1",
        "b/5": "<script>, Ä",
        "b/6": "7",
    }
    assert read_table.problems == ("labels/b.parquet: row 2 has no label and was skipped",)
    assert str(read_table.labels["labelled_at"].dtype) == "datetime64[us, UTC]"


def test_no_labels_yet(root: Path) -> None:
    """A missing folder is told; an empty one is not worth a word."""
    (problem,) = labels(root).problems
    assert "labels does not exist" in problem
    (root / "labels").touch()
    (problem,) = labels(root).problems
    assert "labels is a file, not a folder: no labels yet" in problem
    (root / "labels").unlink()
    (root / "labels").mkdir()
    table = labels(root)
    assert len(table.labels) == 0
    assert table.problems == ()


def test_a_correction_counts_whatever_its_name(root: Path) -> None:
    """The file that was written later corrects, also when its name sorts first."""
    row = "sample_id,label\nb/x,"
    write(root / "labels", {"b100.csv": row + "cat", "b100-corrected.csv": row + "dog"})
    os.utime(root / "labels" / "b100.csv", (1_000, 1_000))
    assert as_dict(labels(root)) == {"b/x": "dog"}
    os.utime(root / "labels" / "b100-corrected.csv", (1_000, 1_000))
    assert as_dict(labels(root)) == {"b/x": "cat"}, "of the same time, by name"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"1": "x,cat,", "2": "x,dog,"}, "dog"),  # a later file corrects
        ({"1": "x,cat,2026-02-01", "2": "x,dog,2026-01-01"}, "cat"),  # the newer time counts
        ({"1": "x,cat,2026-01-01", "2": "x,dog,2026-01-01"}, "dog"),  # no newer one: the file
        ({"1": "x,cat,2026-02-01", "2": "x,dog,"}, "dog"),  # not comparable: the file
        ({"1": "x,cat,2026-01-01\nx,dog,2026-02-01"}, "dog"),
        ({"1": "x,cat,2026-01-01T10:00+02:00\nx,dog,2026-01-01 09:00"}, "dog"),
        ({"1": "x,cat,\nx,cat,"}, "cat"),
        ({"1": "x,cat,\nx,dog,"}, None),
        ({"1": "x,cat,2026-01-01\nx,dog,2026-01-01"}, None),
        ({"1": "x,cat,2026-01-01\nx,dog,"}, None),
        ({"1": "x,cat,\nx,dog,", "2": "x,cat,"}, "cat"),  # a later file ends a conflict
        ({"1": "x,cat,", "2": "x,cat,\nx,dog,"}, None),  # and may begin one
    ],
)
def test_which_label_is_in_force(root: Path, files: dict[str, str], expected: str | None) -> None:
    """Corrections by file and by time, and conflicts that are left out with a word."""
    header = "sample_id,label,labelled_at\n"
    write(root / "labels", {f"{name}.csv": header + rows for name, rows in files.items()})
    table = labels(root)
    assert as_dict(table).get("x") == expected
    if expected is None:
        assert len(table.problems) == 1
        assert "1 sample with conflicting labels" in table.problems[0]
        assert "left out: x ('cat' or 'dog')" in table.problems[0]
    else:
        assert table.problems == ()


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("1.csv", "id,label\nx,cat\n", "it has no column sample_id (but: id, label)"),
        ("1.csv", "sample_id;label\nx;cat\n", "it has no column sample_id (but: sample_id;label)"),
        ("1.csv", "", "empty file; the file was passed over"),
        ("1.csv", b"\xff\xfes\x00", "it is not UTF-8 text"),
        ("1.csv", 'sample_id,label\nx,"cat', "unreadable CSV"),
        ("1.csv", "sample_id,label,label\nx,a,b\n", "a column occurs twice in its first line"),
        ("1.csv", "sample_id,label\nx,cat\ny\n", "line 3 has not as many fields"),
        ("1.csv", "sample_id,label\nx,\ny, \n", "2 lines have no label and were skipped (first:"),
        ("1.csv", "sample_id,label\n,cat\n", "line 2 has no sample_id and was skipped"),
        ("1.csv", "sample_id,label,who\nx,cat,me\n", "1 unknown column passed over: who"),
        ("1.csv", "sample_id,label,labelled_at\nx,cat,soon\n", "line 2 has a labelled_at that is"),
        ("1.parquet", parquet(sample_id=["x"], label=["y"])[:80], "unreadable Parquet"),
        ("1.xlsx", "whatever", "neither CSV nor Parquet"),
    ],
)
def test_label_problems_are_told(root: Path, file: str, content: bytes | str, problem: str) -> None:
    """A file or row that cannot be used is told by name, and the rest is used."""
    write(root / "labels", {file: content, "2.csv": "sample_id,label\ngood,dog\n"})
    table = labels(root)
    assert as_dict(table)["good"] == "dog"
    assert len(table.problems) == 1
    assert table.problems[0].startswith(f"labels/{file}: {problem}")


def test_label_links_do_not_lead_out(root: Path) -> None:
    """A link out of the labels folder is told, not followed."""
    write(root, {"secret.csv": "sample_id,label\nx,y\n", "labels/keep.csv": "sample_id,label\n"})
    (root / "labels/link.csv").symlink_to(root / "secret.csv")
    assert "labels/link.csv: path leaves" in labels(root).problems[0]


def test_one_file_of_labels(root: Path) -> None:
    """A single file is read by the same rules, and fails loudly where it cannot be used."""
    write(root, {"l.csv": "sample_id,label\nx,007\n", "bad.csv": "a,b\n"})
    assert as_dict(read_label_file("l.csv", root)) == {"x": "007"}
    with pytest.raises(FeedError, match=r"bad.csv: it has no column sample_id"):
        read_label_file("bad.csv", root)
    with pytest.raises(FeedError, match=r"none.csv cannot be read"):
        read_label_file("none.csv", root)


def test_a_clock_that_is_ahead_wins_nothing(root: Path) -> None:
    """A label from the future counts as one without a time, so it can be corrected."""
    write(root / "labels", {"1.csv": "sample_id,label,labelled_at\nx,cat,2999-01-01\n"})
    write(root / "labels", {"2.csv": "sample_id,label,labelled_at\nx,dog,2026-01-01\n"})
    table = labels(root)
    assert as_dict(table) == {"x": "dog"}
    (problem,) = table.problems
    assert problem.startswith("labels/1.csv: line 2 has a labelled_at in the future (whose clock")
