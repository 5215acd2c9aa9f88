"""A saved network as a service: every form of a picture gets the same answer."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sft.averaging import ensemble
from sft.models import ModelConfig, ModelError, Network, build, save
from sft.pictures import Preprocessing
from sft.serving import Classifier, _load_pyfunc

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def text(array: np.ndarray) -> str:
    return base64.b64encode(png(array)).decode()


def network(channels: int = 3) -> Network:
    half = (0.5,) * channels
    preprocessing = Preprocessing(16, channels=channels)
    return build(ModelConfig("small_cnn", ("cat", "dog", "eel"), preprocessing, half, half))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "form",
    [
        pytest.param(lambda p: pd.DataFrame({"image": list(map(text, p))}), id="base64-frame"),
        pytest.param(lambda p: pd.DataFrame({"x": list(map(text, p))}), id="first-column"),
        pytest.param(
            lambda p: pd.DataFrame({"id": [1, 2, 3], "image": list(map(png, p))}), id="raw-frame"
        ),
        pytest.param(lambda p: list(map(text, p)), id="list-of-str"),
        pytest.param(lambda p: list(map(png, p)), id="list-of-bytes"),
        pytest.param(lambda p: np.array(list(map(text, p))), id="array-of-str"),
        pytest.param(lambda p: np.array([[text(q)] for q in p], dtype=object), id="column-of-str"),
        pytest.param(lambda p: p, id="uint8"),
        pytest.param(lambda p: p.astype(np.int64), id="whole-numbers-from-json"),
    ],
)
@pytest.mark.parametrize("shown", [PICTURES, PICTURES[:, :, :, 0]], ids=["colour-HWC", "grey-HW"])
def test_every_form_gets_the_same_answers(channels: int, form: object, shown: np.ndarray) -> None:
    """Base64, bytes and arrays of the same pictures are answered bit for bit alike."""
    classifier = Classifier(network(channels))
    expected = classifier.predict([png(picture) for picture in shown])
    pd.testing.assert_frame_equal(classifier.predict(form(shown)), expected)  # type: ignore[operator]


def test_one_picture_in_colours_is_one() -> None:
    """(H, W, 3) is no stack of grey pictures that are 3 pixels wide."""
    served = Classifier(network())
    one, all_of_them = served.predict(PICTURES[0]), served.predict(PICTURES)
    assert len(one) == 1
    assert one["class"][0] == all_of_them["class"][0]
    assert one["confidence"][0] == pytest.approx(all_of_them["confidence"][0])


def test_one_channel_and_no_channel_are_the_same() -> None:
    """(n, H, W, 1) is (n, H, W), and an alpha channel is dropped."""
    classifier = Classifier(network())
    grey = PICTURES[:, :, :, :1]
    pd.testing.assert_frame_equal(classifier.predict(grey), classifier.predict(grey[..., 0]))
    opaque = np.concatenate([PICTURES, np.full_like(grey, 255)], axis=3)
    pd.testing.assert_frame_equal(classifier.predict(opaque), classifier.predict(PICTURES))


def test_an_answer_is_a_class_its_confidence_and_all_probabilities() -> None:
    """The confidence is the highest probability, and its name is the class."""
    table = Classifier(network()).predict(PICTURES, {"anything": 1})
    assert list(table.columns) == ["class", "confidence", "probabilities"]
    assert len({tuple(p.values()) for p in table["probabilities"]}) == 3
    for _, row in table.iterrows():
        assert list(row["probabilities"]) == ["cat", "dog", "eel"]
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["confidence"] == max(row["probabilities"].values())
        assert row["probabilities"][row["class"]] == row["confidence"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("no base64!", "picture 1 is not base64"),
        ("ä", "picture 1 is not base64"),
        (None, "picture 1 is not base64"),
        (float("nan"), "picture 1 is not base64"),
        (base64.b64encode(b"a text").decode(), "picture 1 cannot be read: not a picture"),
        (b"a text", "picture 1 cannot be read: not a picture"),
        ("", "picture 1 cannot be read: empty"),
        (png(PICTURES[0])[:300], "picture 1 cannot be read: truncated"),
    ],
)
def test_a_bad_picture_is_named_by_its_place(bad: object, message: str) -> None:
    """The first one that cannot be read stops the request, in a list and in a frame."""
    classifier = Classifier(network())
    given = [text(PICTURES[0]), bad, text(PICTURES[2])]
    for form in (given, pd.DataFrame({"image": pd.Series(given, dtype="object")})):
        with pytest.raises(ValueError, match=message):
            classifier.predict(form)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (PICTURES / 255.0, "must be uint8 .* got float64"),
        (PICTURES.astype(np.float32), "must be uint8 .* got float32"),
        ((PICTURES > 127).astype(np.float32), "must be uint8 .* got float32"),
        (PICTURES > 127, "must be uint8 .* got bool"),
        (PICTURES.astype(np.int64) - 1, "must be uint8 .* got int64"),
        (PICTURES.astype(np.int64) + 1, "must be uint8 .* got int64"),
        (PICTURES[0, 0], r"\(n, H, W\) or \(n, H, W, C\), got \(24, 3\)"),
        (np.moveaxis(PICTURES, 3, 1), r"\(n, H, W\) or \(n, H, W, C\), got \(3, 3, 20, 24\)"),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray, message: str) -> None:
    """A float may be on any scale, and is not guessed at; nor is the place of the channels."""
    with pytest.raises(ValueError, match=message):
        Classifier(network()).predict(array)


@pytest.mark.parametrize("nothing", [[], pd.DataFrame({"image": []}), PICTURES[:0]])
def test_no_picture_is_no_question(nothing: object) -> None:
    """An empty request is refused."""
    with pytest.raises(ValueError, match="there is no picture to answer"):
        Classifier(network()).predict(nothing)  # type: ignore[arg-type]


def test_requests_that_overlap_get_their_own_answers() -> None:
    """Two threads meet in each member of an ensemble, with one picture and with two."""
    together = ensemble([network(), network(), network()])
    meeting = Barrier(2, timeout=10)
    asked = PICTURES[:1], PICTURES[1:]
    classifier = Classifier(together)
    expected = [classifier.predict(pictures) for pictures in asked]

    def meet(*_: object) -> None:
        meeting.wait()

    for body in together.bodies:
        list(body.modules())[-1].register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(classifier.predict, asked))
    for one, other in zip(found, expected, strict=True):
        pd.testing.assert_frame_equal(one, other)


def test_a_saved_network_is_served_as_it_was(tmp_path: Path) -> None:
    """MLflow's entry point answers like the network that was saved."""
    save(network(), tmp_path)
    served = _load_pyfunc(str(tmp_path)).predict(PICTURES)
    pd.testing.assert_frame_equal(served, Classifier(network()).predict(PICTURES))


def test_serving_calls_no_factory_that_the_process_did_not_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a model's files nor MLflow's can allow their own code; the environment can."""
    save(network(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("small_cnn", "antigravity:fly"))
    with pytest.raises(ModelError, match="antigravity:fly, which is not allowed"):
        _load_pyfunc(str(tmp_path))
    with pytest.raises(ModelError, match="antigravity:fly, which is not allowed"):
        _load_pyfunc(str(tmp_path), {"architecture": "antigravity:fly"})
    monkeypatch.setenv("SUSTAIN_MODEL_ARCHITECTURE", "another:one")
    with pytest.raises(ModelError, match="antigravity:fly, which is not allowed"):
        _load_pyfunc(str(tmp_path))
    path.write_text(path.read_text().replace("antigravity:fly", "no_such_package:fly"))
    monkeypatch.setenv("SUSTAIN_MODEL_ARCHITECTURE", "no_such_package:fly")
    with pytest.raises(ModelError, match="no_such_package:fly cannot be imported"):
        _load_pyfunc(str(tmp_path))
