"""Which samples to label next, and the list that goes out and comes back."""

import base64
import csv
import hashlib
import io
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats

from flows.labels import read_label_file
from flows.storage import FeedError
from monitoring.features import FeatureTable
from monitoring.labelling import Request, _spread, choose, read_id, write_requests
from monitoring.reference import Reference, Regime

CLASSES = ("dog", "elephant", "giraffe")
EMPTY = pd.DataFrame(index=pd.RangeIndex(0))
SIZES = (120, 60, 30, 20, 14, 10)


def table(name: str, embedding: np.ndarray, seed: int = 0) -> FeatureTable:
    probabilities = np.random.default_rng(seed).dirichlet((9, 3, 1), len(embedding))
    return FeatureTable(
        tuple(f"{name}/{i:04d}.png" for i in range(len(embedding))),
        embedding.astype(np.float32),
        probabilities.astype(np.float32),
        pd.DataFrame(index=pd.RangeIndex(len(embedding))),
    )


def reference() -> Reference:
    embedding = np.random.default_rng(9).normal(size=(200, 12))
    return Reference((Regime("first", table("old", embedding), np.zeros(200, np.int64)),), CLASSES)


def held_out(sample_id: str) -> bool:
    """Hold out two of five by a hash, as the product does."""
    return hashlib.sha256(sample_id.encode()).digest()[0] < 102


def clusters(name: str = "new", seed: int = 1) -> tuple[FeatureTable, np.ndarray]:
    """Make six clusters of very different sizes, and tell whose each row is."""
    rng = np.random.default_rng(seed)
    of = np.repeat(np.arange(len(SIZES)), SIZES)
    rng.shuffle(of)
    centres = np.eye(12)[: len(SIZES)] * 8
    return table(name, centres[of] + rng.normal(scale=0.3, size=(len(of), 12)), seed), of


def ids(requests: tuple[Request, ...], *, held: bool) -> list[str]:
    return [r.sample_id for r in requests if held_out(r.sample_id) is held]


def test_one_sample_of_each_cluster_is_chosen_to_learn_from() -> None:
    """Six clusters of 10 to 120 samples and six samples to learn from: one of each."""
    batch, of = clusters()
    asked = choose(reference(), [batch], 10, holdout=held_out)
    where = dict(zip(batch.sample_ids, of.tolist(), strict=True))
    assert sorted(where[name] for name in ids(asked, held=False)) == [0, 1, 2, 3, 4, 5]


def test_what_is_chosen_lies_in_the_middle_of_its_cluster() -> None:
    """Of points on a line the mean one, wherever it stands; it speaks for all others."""
    points = np.array([[3.0], [0.0], [1.0], [2.0], [-1.0]])
    assert _spread(points, np.ones(5), np.empty((0, 1)), 1, seed=0) == [(2, 4)]


def test_of_a_sample_that_comes_twice_the_first_one_counts() -> None:
    """A batch that was checked twice is asked about once, with its first answers."""
    first, _ = clusters()
    again = replace(first, probabilities=first.probabilities[:, ::-1].copy())
    once = choose(reference(), [first], 10, holdout=held_out)
    assert choose(reference(), [first, again], 10, holdout=held_out) == once


def test_a_cluster_with_a_label_gives_way_to_one_without() -> None:
    """With one label in each of four clusters, two more samples come from the other two."""
    batch, of = clusters()
    free = [i for i, name in enumerate(batch.sample_ids) if not held_out(name)]
    known = [batch.sample_ids[next(i for i in free if of[i] == c)] for c in range(4)]
    asked = choose(reference(), [batch], 2, holdout=held_out, labelled=known, share=0)
    where = dict(zip(batch.sample_ids, of.tolist(), strict=True))
    assert sorted(where[r.sample_id] for r in asked) == [4, 5]


def test_the_held_out_part_is_a_uniform_random_sample() -> None:
    """Over 200 seeds every held-out sample is drawn equally often, whatever cluster it is in."""
    batch, _ = clusters()
    batch = batch.take(range(60))
    drawn = Counter[str]()
    for seed in range(200):
        drawn.update(ids(choose(reference(), [batch], 12, holdout=held_out, seed=seed), held=True))
    pool = [name for name in batch.sample_ids if held_out(name)]
    assert stats.chisquare([drawn[name] for name in pool]).pvalue > 0.01


def test_the_held_out_part_does_not_look_at_the_pictures() -> None:
    """Other embeddings and probabilities, the same samples to judge on."""
    batch, _ = clusters()
    other = replace(batch, embedding=batch.embedding[::-1], probabilities=batch.probabilities[::-1])
    one, two = (choose(reference(), [b], 40, holdout=held_out) for b in (batch, other))
    assert ids(one, held=True) == ids(two, held=True)
    assert ids(one, held=False) != ids(two, held=False)


@pytest.mark.parametrize(("share", "held"), [(0.4, 20), (0.0, 0), (1.0, 50)])
def test_the_share_says_how_many_are_held_out(share: float, held: int) -> None:
    """Of 50 samples, `share` are ones that are never trained on."""
    asked = choose(reference(), [clusters()[0]], 50, holdout=held_out, share=share)
    assert (len(asked), len(ids(asked, held=True))) == (50, held)


def test_where_one_part_has_too_few_the_other_fills_up() -> None:
    """All samples are asked for when n is their number, and nothing is asked for twice."""
    batch, _ = clusters()
    for share in (0.0, 1.0):
        asked = choose(reference(), [batch, batch], 1000, holdout=held_out, share=share)
        assert sorted(r.sample_id for r in asked) == sorted(batch.sample_ids)


def test_half_of_the_list_is_half_of_a_good_list() -> None:
    """Its first half holds half of the held-out ones, and the large clusters before the small."""
    batch, of = clusters()
    where = dict(zip(batch.sample_ids, of.tolist(), strict=True))
    asked = choose(reference(), [batch], 10, holdout=held_out)[:5]
    assert len(ids(asked, held=True)) == 2
    assert sorted(where[name] for name in ids(asked, held=False)) == [0, 1, 2]


def test_the_same_question_has_the_same_answer() -> None:
    """The list is repeatable; another seed draws and chooses others."""
    batch, _ = clusters()
    one, two, other = (
        choose(reference(), [batch], 30, holdout=held_out, seed=seed) for seed in (0, 0, 1)
    )
    assert one == two
    assert set(ids(one, held=True)) != set(ids(other, held=True))


def test_labelled_samples_are_not_asked_for_again() -> None:
    """A second list has none of the first one's samples; with everything labelled it is empty."""
    batch, _ = clusters()
    first = {r.sample_id for r in choose(reference(), [batch], 60, holdout=held_out)}
    second = choose(reference(), [batch], 60, holdout=held_out, labelled=first)
    assert len(second) == 60
    assert not first & {r.sample_id for r in second}
    assert not choose(reference(), [batch], 5, holdout=held_out, labelled=batch.sample_ids)


def test_constant_embeddings_give_a_list() -> None:
    """Where nothing tells samples apart, any of them are asked for."""
    batch = table("flat", np.ones((40, 12)))
    flat = replace(batch, probabilities=np.full((40, 3), 1 / 3, np.float32))
    dead = Reference((Regime("dead", flat, np.zeros(40, np.int64)),), CLASSES)
    for known in (reference(), dead):
        assert len({r.sample_id for r in choose(known, [flat], 20, holdout=held_out)}) == 20


@pytest.mark.parametrize(("middle", "scale"), [(3.0, 1.0), (0.8, 0.4)])
def test_samples_of_a_known_world_are_mostly_left_out(middle: float, scale: float) -> None:
    """Of a batch that is half old the new half is chosen, even if it lies nearer to the middle."""
    rng = np.random.default_rng(5)
    new = table("new", middle + rng.normal(scale=scale, size=(150, 12)))
    old = table("known", rng.normal(size=(150, 12)))
    asked = ids(choose(reference(), [old, new], 40, holdout=held_out), held=False)
    assert Counter(name.split("/")[0] for name in asked)["new"] >= 18


def test_a_list_from_a_handful_of_samples() -> None:
    """A batch too small to tell what is new in it gives its samples all the same."""
    batch, _ = clusters()
    assert len(choose(reference(), [batch.take(range(7))], 5, holdout=held_out)) == 5
    assert len(choose(reference(), [batch.take([0])], 5, holdout=held_out)) == 1


def test_a_request_says_what_the_model_thinks() -> None:
    """Class and confidence are the model's; novelty is high for samples far from the reference."""
    batch, _ = clusters()
    near = table("near", np.random.default_rng(3).normal(size=(100, 12)))
    asked = choose(reference(), [batch], 20, holdout=held_out)
    place = batch.sample_ids.index(asked[0].sample_id)
    assert asked[0].predicted == CLASSES[batch.probabilities[place].argmax()]
    assert asked[0].confidence == pytest.approx(batch.probabilities[place].max())
    assert min(r.novelty for r in asked) > 0.9
    close = choose(reference(), [near], 60, holdout=held_out)
    assert 0.3 < np.mean([r.novelty for r in close]) < 0.7


@pytest.mark.parametrize(
    ("n", "share", "words"),
    [(0, 0.4, "n=0: ask for at least one"), (5, 1.5, "share=1.5"), (5, -0.1, "share=-0.1")],
)
def test_senseless_questions_are_refused(n: int, share: float, words: str) -> None:
    """The message names the argument."""
    with pytest.raises(ValueError, match=words):
        choose(reference(), [clusters()[0]], n, holdout=held_out, share=share)


def test_unreadable_batches_are_refused() -> None:
    """No batch, one that is not finite and one of another version are errors by name."""
    batch, _ = clusters()
    spoilt = replace(batch, embedding=np.where(batch.embedding > 8, np.nan, batch.embedding))
    narrow = replace(batch, embedding=batch.embedding[:, :5])
    for given, words in (([], "no feature table"), ([spoilt], "finite"), ([narrow], "widths")):
        with pytest.raises(ValueError, match=words):
            choose(reference(), given, 5, holdout=held_out)


# --- the list as files


NASTY = "<script>alert(1)</script>"


def request(sample_id: str, predicted: str = "dog", reason: str = "why") -> Request:
    return Request(sample_id, predicted, 0.5, 0.25, reason)


def png() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(content, "PNG")
    return content.getvalue()


def rows_of(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))


def fill_in(path: Path, labels: list[str]) -> None:
    """Do what a person does, with what a spreadsheet writes."""
    first, *rest = rows_of(path)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [first, *([r[0], label, *r[2:]] for r, label in zip(rest, labels, strict=True))]
        )


def test_a_filled_list_reads_back(tmp_path: Path) -> None:
    """The reader of labels gets every filled row under its own id; an empty one is no label."""
    names = [
        "b1/a.png",
        'b1/with "quotes", comma.png',
        "b1/ü 犬.png",
        "b1/=x.png",
        "b1/two\nlines.png",
    ]
    path = write_requests(tmp_path, [request(name) for name in names], {})
    assert rows_of(path)[0][:2] == ["sample_id", "label"]
    assert read_label_file(str(path), tmp_path).labels.empty
    fill_in(path, ["dog", "", "007", "elephant", "dog"])
    labels = read_label_file(str(path), tmp_path).labels
    expected = {names[0]: "dog", names[2]: "007", names[3]: "elephant", names[4]: "dog"}
    assert dict(zip(labels["sample_id"], labels["label"], strict=True)) == expected


def test_a_list_that_is_filled_in_is_left_alone(tmp_path: Path) -> None:
    """A new list takes the place of an untouched one only, whatever a spreadsheet made of it."""
    asked = [request("b/1.png"), request("b/2.png")]
    path = write_requests(tmp_path, asked, {})
    write_requests(tmp_path, asked[:1], {})
    assert len(rows_of(path)) == 2
    fill_in(path, ["dog"])
    written = path.read_text("utf-8-sig")
    of_another = written.replace("sample_id", "picture").replace("dog", "")  # with no label yet
    for text in (written, written.replace(",", ";"), of_another, ""):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"label_requests\.csv has been filled in"):
            write_requests(tmp_path, asked, {})
        assert path.read_text() == text


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", " =", "\uff1d", "\r", "\n="])
def test_no_cell_is_a_formula(tmp_path: Path, start: str) -> None:
    """A cell never starts like a formula, and `read_id` gives the sample id back unchanged."""
    evil = f"{start}cmd|' /C calc'!A0"
    path = write_requests(tmp_path, [request(f"{evil}/a.png", evil, evil)], {})
    row = rows_of(path)[1]
    assert not [cell for cell in row if cell[:1] in set("=+-@\uff1d\t\r\n ")]
    assert read_id(row[0]) == f"{evil}/a.png"


def test_ordinary_ids_stand_as_they_are(tmp_path: Path) -> None:
    """Only what could be a formula is changed."""
    path = write_requests(tmp_path, [request("2026-11-21T10/a.png", "a class")], {})
    assert rows_of(path)[1] == ["2026-11-21T10/a.png", "", "1", "a class", "0.500", "0.250", "why"]


class Page(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_names_on_the_page_are_text(tmp_path: Path) -> None:
    """A class, a file or a reason called <script> is shown; the page may run and load nothing."""
    attack = f'"><img src=x onerror=alert(1)>{NASTY}'
    write_requests(tmp_path, [request(f"b/{attack}", attack, attack)], {f"b/{attack}": png()})
    page = Page(tmp_path / "label_requests.html")
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert [set(attrs) for tag, attrs in page.tags if tag == "img"] == [{"alt", "src"}]
    assert page.text.count(attack) == 3
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:")


def test_thumbnails_are_inside_the_page(tmp_path: Path) -> None:
    """A picture is embedded as it is; bytes of another kind (an SVG could run) are not shown."""
    asked = [request("b/1.png"), request("b/2.svg"), request("b/3.png")]
    write_requests(tmp_path, asked, {"b/1.png": png(), "b/2.svg": b"<svg onload='alert(1)'/>"})
    images = [
        attrs["src"] for tag, attrs in Page(tmp_path / "label_requests.html").tags if tag == "img"
    ]
    assert images == [f"data:image/png;base64,{base64.b64encode(png()).decode()}"]


def test_an_empty_list_is_written_and_read_as_no_labels(tmp_path: Path) -> None:
    """Nothing to ask for leaves a file with its first line only, which is not an error."""
    path = write_requests(tmp_path / "new", [], {})
    try:
        assert read_label_file(str(path), tmp_path).labels.empty
    except FeedError as error:  # pragma: no cover - says what the reader did not like
        pytest.fail(str(error))
