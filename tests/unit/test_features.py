"""The feature table: what one pass over the pictures leaves."""

import dataclasses
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from monitoring.features import FeatureTable, concatenate, extract, picture_statistics, tidy


class Projection:
    """A linear model of random weights; remembers how it was called."""

    def __init__(self, pixels: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights = torch.randn(pixels, 16, generator=generator) / pixels**0.5
        self.batches: list[int] = []

    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        assert torch.is_inference_mode_enabled()
        assert pixels.is_contiguous(memory_format=torch.channels_last)
        self.batches.append(len(pixels))
        embedding = pixels.float().flatten(1) / 255 @ self.weights
        return embedding, embedding[:, :10].softmax(1)


def digits(n: int) -> Tensor:
    pictures = load_digits().images[:n] * (255 / 16)
    return torch.tensor(pictures, dtype=torch.uint8)[:, None]


def small_table(n: int = 5, seed: int = 0) -> FeatureTable:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(3), n).astype(np.float32)
    statistics = pd.DataFrame({"brightness": rng.random(n), "width": rng.integers(9, 99, n)})
    ids = tuple(f"b/é{seed}-{i}.png" for i in range(n))
    return FeatureTable(ids, rng.standard_normal((n, 4)).astype(np.float32), p, statistics)


def same(one: FeatureTable, other: FeatureTable) -> bool:
    pd.testing.assert_frame_equal(one.statistics, other.statistics, check_exact=True)
    return (
        one.sample_ids == other.sample_ids
        and one.embedding.dtype == other.embedding.dtype == np.float32
        and one.embedding.tobytes() == other.embedding.tobytes()
        and one.probabilities.tobytes() == other.probabilities.tobytes()
        and one.embedding.shape == other.embedding.shape
    )


def test_statistics_of_known_pictures() -> None:
    """Flat, half-and-half, checkered and coloured pictures have the figures one expects."""
    pictures = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    pictures[0] = 128
    pictures[1, :, :, 4:] = 255
    pictures[2, :, ::2, ::2] = pictures[2, :, 1::2, 1::2] = 255
    pictures[3, 0] = 255
    found = picture_statistics(pictures)
    assert found.shape == (4, 5)
    np.testing.assert_allclose(found["brightness"], [128 / 255, 0.5, 0.5, 0.299], atol=1e-5)
    np.testing.assert_allclose(found["contrast"], [0, 0.5, 0.5, 0], atol=1e-4)
    np.testing.assert_allclose(found["sharpness"], [0, 1 / 12, 1, 0], atol=1e-5)
    np.testing.assert_allclose(found["saturation"], [0, 0, 0, 1], atol=1e-6)


def test_faint_noise_shows_whatever_the_picture_shows() -> None:
    """Noise of 2, 5 and 12 grey levels is told within a tenth, on stripes as on a flat picture."""
    picture = torch.full((2, 1, 64, 64), 100.0)
    picture[1, :, :, ::8] = 200
    for sd in (2, 5, 12):
        added = torch.randn(picture.shape, generator=torch.Generator().manual_seed(sd)) * sd
        found = picture_statistics((picture + added).round().to(torch.uint8))["noise"] * 255
        assert abs(found[0] / sd - 1) < 0.1
        assert found[1] < 2 * sd


def test_one_channel_has_no_saturation() -> None:
    """Grey pictures, and ones too small for a Laplacian, have zeros and no NaN."""
    found = picture_statistics(torch.full((2, 1, 2, 9), 51, dtype=torch.uint8))
    np.testing.assert_allclose(found["brightness"], 0.2, atol=1e-6)
    assert (found[["contrast", "sharpness", "saturation"]].abs() < 1e-6).all(axis=None)


@pytest.mark.parametrize(
    "pixels",
    [torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4, 4, dtype=torch.uint8), torch.zeros(4).byte()],
)
def test_statistics_refuse_other_tensors(pixels: Tensor) -> None:
    """Floats, four channels and a missing axis are refused by name."""
    with pytest.raises(ValueError, match="uint8"):
        picture_statistics(pixels)


def test_extract_sees_every_picture_once() -> None:
    """One pass in batches gives what one big pass gives."""
    pixels, model = digits(50), Projection(64)
    ids = [f"b/{i}" for i in range(50)]
    sizes = [(20, 10, 3)] * 50
    some = extract(model, ids, pixels, sizes, batch_size=16)
    assert model.batches == [16, 16, 16, 2]
    whole = extract(Projection(64), ids, pixels, sizes)
    np.testing.assert_allclose(some.embedding, whole.embedding, atol=1e-5)
    assert some.embedding.shape == (50, 16)
    assert some.embedding.dtype == some.probabilities.dtype == np.float32
    assert list(some.statistics.columns) == [
        "brightness", "contrast", "sharpness", "noise", "saturation",
        "width", "height", "aspect", "channels",
    ]  # fmt: skip
    assert (some.statistics[["width", "height", "aspect"]] == [20, 10, 2]).all(axis=None)


def test_without_sizes_there_are_no_columns_of_them() -> None:
    """Pictures whose sizes nobody knows have the other statistics."""
    table = extract(Projection(64), ["a", "b"], digits(2))
    assert list(table.statistics.columns) == [
        "brightness", "contrast", "sharpness", "noise", "saturation",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="2 pictures need as many ids"):
        extract(Projection(64), ["a"], digits(2))


def test_extract_refuses_nothing_and_mismatches() -> None:
    """No pictures, or ids that do not match them, are named errors."""
    with pytest.raises(ValueError, match="no pictures"):
        extract(Projection(64), [], digits(0), [])
    with pytest.raises(ValueError, match="3 pictures need as many ids and sizes, not 2 and 3"):
        extract(Projection(64), ["a", "b"], digits(3), [(8, 8)] * 3)


def test_predictions() -> None:
    """Confidence and prediction come from the probabilities, zeros included."""
    p = np.array([[1, 0, 0], [0.25, 0.5, 0.25]], dtype=np.float32)
    table = FeatureTable(("a", "b"), np.zeros((2, 1), np.float32), p, pd.DataFrame(index=range(2)))
    assert table.confidence.tolist() == [1, 0.5]
    assert table.predicted.tolist() == [0, 1]
    assert table.predicted.dtype == np.int64


@pytest.mark.parametrize("n", [0, 1, 5])
def test_parquet_round_trip_is_exact(tmp_path: Path, n: int) -> None:
    """What is saved is loaded bit for bit, non-finite values and empty tables included."""
    table = small_table(n)
    if n > 1:
        table.embedding[0, :3] = [np.nan, np.inf, -0.0]
    table.save(tmp_path / "new" / "features.parquet")
    assert same(FeatureTable.load(tmp_path / "new" / "features.parquet"), table)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["features.parquet"]


def test_a_slice_survives_the_round_trip(tmp_path: Path) -> None:
    """Views with strides of their own are written as they read."""
    table = small_table(6)
    view = FeatureTable(
        table.sample_ids[::2],
        table.embedding[::2],
        table.probabilities[::2],
        table.statistics.iloc[::2].reset_index(drop=True),
    )
    view.save(tmp_path / "view.parquet")
    assert same(FeatureTable.load(tmp_path / "view.parquet"), table.take([0, 2, 4]))


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    """Half a Parquet file is refused, not half read."""
    small_table().save(tmp_path / "f.parquet")
    whole = (tmp_path / "f.parquet").read_bytes()
    (tmp_path / "f.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"(?i)parquet"):
        FeatureTable.load(tmp_path / "f.parquet")


def test_take_and_concatenate_are_inverse() -> None:
    """Cutting a table up and putting it together gives the table; order is the index's."""
    table = small_table(7)
    assert same(concatenate([table.take([0, 1, 2]), table.take(range(3, 7))]), table)
    assert table.take([4, 2]).sample_ids == (table.sample_ids[4], table.sample_ids[2])
    assert len(table.take([])) == 0
    with pytest.raises(ValueError, match="no feature table"):
        concatenate([])
    other = small_table(2)
    other.statistics.columns = ["height", "brightness"]
    assert list(concatenate([table, other]).statistics.columns) == ["brightness"]


def test_parts_of_different_lengths_are_refused() -> None:
    """A table whose parts do not match is an error that names the numbers."""
    table = small_table(3)
    with pytest.raises(ValueError, match="'embedding': 2"):
        FeatureTable(table.sample_ids, table.embedding[:2], table.probabilities, table.statistics)


def test_tidy_columns_have_one_of_two_types() -> None:
    """Numbers stay numbers; a number among words is its exact text; nothing is too large."""
    columns = pd.DataFrame(
        {
            "hour": [1, 2.5, None],
            "mixed": [2, "x", True],
            "huge": [10**400, 1, None],
            "when": [datetime(2026, 1, 2, tzinfo=UTC), None, date(2026, 1, 3)],
            "list": [[1, {"a": 2}], None, {}],
            "empty": [None, None, None],
        },
        dtype="object",
    )
    found = tidy(columns)
    assert found["hour"].tolist()[:2] == [1.0, 2.5]
    assert found["mixed"].tolist() == ["2", "x", "True"]
    assert found["huge"].tolist()[1] == "1"
    assert found["when"].tolist() == ["2026-01-02T00:00:00+00:00", None, "2026-01-03"]
    assert found["list"].tolist() == ['[1, {"a": 2}]', None, "{}"]
    assert found["empty"].isna().all()
    table = dataclasses.replace(small_table(3), metadata=found)
    again = FeatureTable.from_arrow(table.to_arrow())
    pd.testing.assert_frame_equal(again.metadata, found)
