"""Good samples are sorted from bad ones, and a batch with too few or too bad ones is refused."""

import os
from pathlib import Path

import pytest
import torch
from samples import bomb, names, parquet, picture, read, reasons, write

from flows.feed import BatchNotReady, FeedSettings
from flows.intake import BatchData, TooManyBad


def test_bad_samples_are_quarantined_with_their_reason(root: Path) -> None:
    """Each kind of bad file gets a reason, and the good ones are still read."""
    write(
        root / "feed",
        {
            "b/good.png": picture(1),
            "b/cut.jpg": picture(2, "JPEG")[:400],
            "b/text.png": "no picture at all",
            "b/bomb.png": bomb(),
            "b/empty.gif": b"",
            "b/large.bmp": picture(3, "BMP") + bytes(5000),
        },
    )
    os.mkfifo(root / "feed/b/pipe.png")
    data = read(root, FeedSettings(max_bad_share=0.9, max_bytes=4000))
    assert names(data) == ["b/good.png"]
    assert reasons(data) == {
        "b/cut.jpg": "truncated",
        "b/text.png": "not a picture",
        "b/bomb.png": "decompression bomb: 40000x40000 > max_pixels=50000000",
        "b/empty.gif": "empty file",
        "b/large.bmp": f"too large: {len(picture(3, 'BMP')) + 5000} bytes > max_bytes=4000",
        "b/pipe.png": "not a regular file",
    }


def test_what_was_read_comes_back_from_files(root: Path, tmp_path: Path) -> None:
    """The same samples, pictures and notes, and of them those that are wanted."""
    write(
        root / "feed/b",
        {
            **{f"{place}.png": picture(place) for place in range(3)},
            "cut.jpg": picture(3, "JPEG")[:400],
            "notes.txt": "x",
            "metadata.jsonl": "\n".join(
                f'{{"file_name": "{place}.png", "label": "cat", "camera": {camera}}}'
                for place, camera in enumerate(("1.5", "2", "null"))
            ),
        },
    )
    data = read(root)
    data.save(tmp_path / "kept")
    again = BatchData.load(tmp_path / "kept", data.batch)
    assert names(again) == names(data) == ["b/0.png", "b/1.png", "b/2.png"]
    assert torch.equal(again.pixels[:], data.pixels)
    assert (again.sizes, again.notes, again.about) == (data.sizes, data.notes, data.about)
    assert again.quarantined == data.quarantined
    assert again.samples["label"].tolist() == ["cat"] * 3
    one = again.of({"b/1.png", "b/other.png"})
    wanted = read(root, only={"b/1.png"})
    assert (names(one), one.sizes, one.about) == (names(wanted), wanted.sizes, wanted.about)
    assert torch.equal(one.pixels[:], wanted.pixels)


def test_too_few_samples_are_not_ready(root: Path) -> None:
    """Fewer usable pictures than min_samples put the batch off."""
    write(root / "feed", {"b/1.png": picture()})
    with pytest.raises(BatchNotReady, match="1 usable picture, fewer than min_samples=2"):
        read(root, FeedSettings(min_samples=2))


def test_too_many_bad_samples_fail_loudly(root: Path) -> None:
    """More than max_bad_share fails with figures, the first reason and the setting's name."""
    write(root / "feed", {f"2026-11-21T10/z{i}.png": picture(i) for i in range(6)})
    cut = picture(0, "JPEG")[:400]
    write(root / "feed", {f"2026-11-21T10/{c}.jpg": cut for c in "abcdefghijklmn"})
    with pytest.raises(TooManyBad) as caught:
        read(root, FeedSettings())
    assert str(caught.value) == (
        "batch 2026-11-21T10: 14 of 20 pictures could not be read (first: a.jpg: truncated); "
        "more than max_bad_share=0.2, so the batch was not checked"
    )
    assert len(read(root, FeedSettings(max_bad_share=0.7)).samples) == 6


def test_a_truncated_shard_is_quarantined_by_its_share_of_bytes(root: Path) -> None:
    """A lost shard weighs as much as its bytes, not as one sample of many."""
    whole = parquet(image=[picture(i) for i in range(9)])
    write(root / "feed", {"b/1.parquet": whole, "b/2.parquet": whole[: len(whole) // 2]})
    with pytest.raises(TooManyBad, match=r"batch b: 1 Parquet shard with .* bytes could not be"):
        read(root, FeedSettings())
    data = read(root, FeedSettings(max_bad_share=0.4))
    assert len(data.samples) == 9
    assert reasons(data)["b/2.parquet"].startswith("unreadable: ")
