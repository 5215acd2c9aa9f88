"""The report's figures: gaps where nothing was measured, safe labels, small pictures."""

import base64
import io
import json
import math
from datetime import UTC, datetime

import numpy as np
import pytest
from PIL import Image

from monitoring.figures import Past, clip, history, label, pairs, thumbnail

EVIL = "<script>alert(1)</script>"


def check(i: int, **more: object) -> Past:
    values = {
        "batch_id": f"b{i}",
        "at": datetime(2026, 11, 22, tzinfo=UTC),
        "p_value": 0.5,
        "stream": 0.1,
        "alarm": False,
        "estimated": 0.9,
        "low": 0.8,
        "high": 0.95,
        "settled": None,
    }
    return Past(**{**values, **more})  # type: ignore[arg-type]


def encoded(size: tuple[int, int], mode: str = "RGB", kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new(mode, size).save(data, kind)
    return data.getvalue()


def decoded(uri: str) -> Image.Image:
    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_history_leaves_gaps_and_floors_p_values() -> None:
    """NaN, infinity and None are gaps that JSON knows; a p of 0 has a place on a log axis."""
    checks = [
        check(0, p_value=0.0, stream=-math.inf, settled=0.7),
        check(1, p_value=math.nan, low=math.nan, alarm=True),
        check(2, estimated=None),
    ]
    traces, layout = history(checks, alpha=0.01, threshold=3.0, reference=0.9)
    p, stream, low, high, estimated, settled = (trace["y"] for trace in traces)
    assert p == [1e-12, None, 0.5]
    assert stream == [None, 0.1, 0.1]
    assert low == [0.8, None, 0.8]
    assert high == [0.95, 0.95, 0.95]
    assert estimated == [0.9, 0.9, None]
    assert settled == [0.7, None, None]
    red, grey = traces[0]["marker"]["color"][1::-1]
    assert red != grey
    assert traces[0]["marker"]["color"] == [grey, red, grey]
    json.dumps([traces, layout], allow_nan=False)
    limits = {(line["yref"], line["y0"]) for line in layout["shapes"]}
    assert limits == {("y", 0.01), ("y2", 3.0), ("y3", 0.9)}
    assert len(history(checks, alpha=0.01, threshold=None, reference=0.9)[1]["shapes"]) == 2


@pytest.mark.parametrize("n", [1, 2, 6, 7, 200])
def test_the_newest_check_has_a_tick(n: int) -> None:
    """Up to six ticks, the last at the newest check, whatever their number."""
    _, layout = history([check(i) for i in range(n)], alpha=0.01, threshold=3.0, reference=0.9)
    ticks = layout["xaxis"]["ticktext"]
    assert ticks[-1] == f"b{n - 1}"
    assert min(n, 4) <= len(ticks) <= 6


def test_labels_of_figures_are_escaped() -> None:
    """No tag of a batch's or a sample's name reaches plotly; a long name keeps its end."""
    drawn = json.dumps(
        [
            history([check(0, batch_id=EVIL)], alpha=0.01, threshold=3.0, reference=0.9),
            pairs([(f"{EVIL}/end.jpg", b"", EVIL, b"", 2.0)]),
        ]
    )
    assert "<script" not in drawn
    assert label(EVIL) in drawn
    assert "end.jpg" in drawn
    assert clip("abcdef", 4) == "abc…"


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (encoded((28, 28), "L"), (84, 84)),
        (encoded((1, 1)), (96, 96)),
        (encoded((96, 40), "RGBA"), (96, 40)),
        (encoded((4000, 1000), kind="JPEG"), (96, 24)),
        (encoded((9000, 1), "P"), (96, 1)),
    ],
)
def test_thumbnails_are_at_most_96_pixels(data: bytes, size: tuple[int, int]) -> None:
    """Any mode and shape becomes a small JPEG; tiny ones grow by whole factors."""
    assert decoded(thumbnail(data)).size == size


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no picture",
        b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
        encoded((8, 8), kind="GIF"),
        encoded((64, 64))[:60],
    ],
)
def test_what_is_no_picture_is_shown_as_gone(data: bytes) -> None:
    """Neither a script in a drawing nor half a file becomes an image, and nothing is raised."""
    assert thumbnail(data) == ""
    layout = pairs([("far", data, "near", encoded((8, 8)), 1.0)])
    assert len(layout["images"]) == 1
    assert "picture is gone" in layout["annotations"][0]["text"]


def test_twelve_pairs_have_places_of_their_own() -> None:
    """No two pictures start at the same place, and all stay on the figure."""
    picture = encoded((32, 32))
    layout = pairs([(f"f{i}", picture, f"n{i}", picture, 1.0) for i in range(12)])
    places = np.array([(image["x"], image["y"]) for image in layout["images"]])
    sizes = np.array([(image["sizex"], image["sizey"]) for image in layout["images"]])
    assert len(np.unique(places.round(6), axis=0)) == 24
    assert (places[:, 0] + sizes[:, 0] <= 1).all()
    assert (places[:, 1] - sizes[:, 1] >= 0).all()
