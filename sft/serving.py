"""A saved network as a service: pictures in, answers by name out.

MLflow calls `_load_pyfunc` when a version is loaded through `mlflow.pyfunc`; nothing here imports
MLflow. Loading runs no code of the model's files.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from sft import models
from sft.models import Network
from sft.pictures import BadPicture, decode, encode_png

ALLOWED = "SUSTAIN_MODEL_ARCHITECTURE"
"""The environment variable that sets `architecture` of the settings, too."""


class Classifier:
    """Answers pictures; every form of input that `predict` names gives the same answers.

    The network is put into evaluation mode, so that several requests may be answered at once.
    """

    def __init__(self, network: Network) -> None:
        self.network = network.eval()

    def predict(
        self,
        model_input: pd.DataFrame | np.ndarray[Any, Any] | Sequence[str | bytes],
        params: Mapping[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Answer each picture.

        Args:
            model_input: a frame with one column `image` (or its first column) or a list, of
                base64-encoded or raw JPEG or PNG; or a uint8 array of pictures, (n, H, W) or
                (n, H, W, C), or of one in colours, (H, W, 3) or (H, W, 4).
            params: taken for MLflow's sake; there are none.

        Returns:
            A frame with a row a picture: `class`, `confidence`, and `probabilities` (class name to
            probability); with several labels, `labels` (a list) and `probabilities`; of a
            regression, `values` (target name to value).

        Raises:
            ValueError: names the first picture that cannot be read, by its place.
        """
        del params
        pixels = self._pixels(model_input)
        config = self.network.config
        answers = torch.cat([self.network.answers(chunk) for chunk in pixels.split(256)])
        return pd.DataFrame(config.task.served(answers, config.classes))

    def _pixels(
        self, model_input: pd.DataFrame | np.ndarray[Any, Any] | Sequence[str | bytes]
    ) -> Tensor:
        if isinstance(model_input, pd.DataFrame):
            names = list(model_input.columns)
            if not names:
                raise ValueError("there is no column of pictures")
            place = names.index("image") if "image" in names else 0
            model_input = model_input.iloc[:, place].tolist()
        if isinstance(model_input, np.ndarray) and model_input.dtype.kind in "USO":
            model_input = model_input.ravel().tolist()
        if isinstance(model_input, np.ndarray):
            encoded: list[bytes] = [_as_png(array) for array in _as_pictures(model_input)]
        else:
            encoded = [_as_bytes(item, place) for place, item in enumerate(model_input)]
        if not encoded:
            raise ValueError("there is no picture to answer")
        decoded = []
        for place, item in enumerate(encoded):
            try:
                decoded.append(decode(item, self.network.config.preprocessing).pixels)
            except BadPicture as error:
                raise ValueError(f"picture {place} cannot be read: {error}") from error
        return torch.stack(decoded)


def _load_pyfunc(data_path: str, model_config: Mapping[str, Any] | None = None) -> Classifier:
    """Load for `mlflow.pyfunc.load_model` and `mlflow models serve`.

    A model on a factory of the user's own needs `SUSTAIN_MODEL_ARCHITECTURE=package.module:f` in
    the environment: the process that serves allows it, never the files. MLflow reads
    `model_config` from the files, so it is not used.
    """
    del model_config
    allowed = os.environ.get(ALLOWED)
    network = models.load(Path(data_path), allowed_factories=[allowed] if allowed else [])
    return Classifier(network)


def _as_bytes(item: str | bytes, place: int) -> bytes:
    if isinstance(item, bytes):
        return item
    try:
        return base64.b64decode(item, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ValueError(f"picture {place} is not base64: {error}") from error


def _as_pictures(array: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    if array.dtype != np.uint8:
        # whole numbers come from JSON; a float of 1.0 may mean white or nearly black
        whole = array.dtype.kind in "iu"
        if not whole or (array.size and (array.min() < 0 or array.max() > 255)):  # noqa: PLR2004 - a byte
            raise ValueError(f"an array of pictures must be uint8 (0 to 255), got {array.dtype}")
        array = array.astype(np.uint8)
    if array.ndim == 3 and array.shape[2] in (3, 4):  # noqa: PLR2004 - no grey ones are so narrow
        array = array[None]
    if array.ndim != 3 and (array.ndim != 4 or array.shape[3] not in (1, 3, 4)):  # noqa: PLR2004
        raise ValueError(f"an array of pictures is (n, H, W) or (n, H, W, C), got {array.shape}")
    return list(array)


def _as_png(array: np.ndarray[Any, Any]) -> bytes:
    """Encode one picture without loss, so that arrays take the same way as files do."""
    if array.ndim == 3 and array.shape[2] == 1:  # noqa: PLR2004 - a channel axis
        array = array[:, :, 0]
    tensor = torch.from_numpy(np.asarray(Image.fromarray(array).convert("RGB")).copy())
    return encode_png(tensor.permute(2, 0, 1))
