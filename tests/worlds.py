"""Small models of digits, made by the real flows in seconds, for tests that need a whole world."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flows.settings import Settings

SETTINGS = """\
[model]
name = "{name}"
architecture = "small_cnn"
channels = 1

[bootstrap]
epochs = 40

[training]
epochs = 40

[policy]
min_labels = 30

[noise]  # labels of so few digits look wrong to a champion that knows little
max_wrong_share = 0.99

[gate]  # some 80 old and 40 fresh held-out digits cannot carry the strict limits
min_fresh = 10
max_drop = 0.2
max_drop_bound = 0.4
max_class_drop = 0.9
"""


@dataclass(frozen=True)
class World:
    """A model folder whose version 1 learned 400 MNIST digits.

    `sustain.toml` is at `path`; batches of optical digits, which it does not know, arrive in feed/.
    """

    path: Path

    @property
    def settings(self) -> Settings:
        """Read the settings."""
        from flows.settings import load_settings

        return load_settings(self.path, environ={})

    def arrive(
        self, *numbers: int, labelled: bool = False, label: Callable[[int], str] = str
    ) -> list[str]:
        """Let batches of 100 optical digits arrive, with labels if wanted; return their ids.

        `label` writes the label of a digit.
        """
        from flows import demo

        digits = demo._optical()
        feed = self.path.parent / "feed"
        ids = demo._arrive(feed, "optical", digits, numbers)
        if labelled:
            path = self.path.parent / "labels" / f"{'-'.join(ids)}.csv"
            demo._label_late(path, feed, digits, ids)
            header, *rows = path.read_text().splitlines()
            cut = (row.rpartition(",") for row in rows)
            text = [f"{sample},{label(int(digit))}" for sample, _, digit in cut]
            path.write_text("\n".join([header, *text, ""]))
        return ids


def make_world(
    root: Path,
    name: str,
    extra: str = "",
    *,
    model: str = "",
    change: tuple[str, str] = ("", ""),
    label: Callable[[int], str] | None = None,
) -> World:
    """Make a model folder by the real `bootstrap` flow; `extra` is more TOML.

    With `label`, which writes the label of a digit, labels come in a metadata file; `model` is
    more of the section [model], and `change` what is replaced in the settings, and by what.
    """
    from flows.bootstrap import bootstrap

    path = lay_out(root, name, extra, model=model, change=change, label=label)
    bootstrap(str(path), data=str(root / "first"))
    return World(path)


def lay_out(
    root: Path,
    name: str,
    extra: str = "",
    *,
    model: str = "",
    change: tuple[str, str] = ("", ""),
    label: Callable[[int], str] | None = None,
) -> Path:
    """Write what `make_world` starts from: settings, an empty feed, and labelled digits."""
    from flows import demo

    (root / "feed").mkdir(parents=True)
    (root / "labels").mkdir()
    path = root / "sustain.toml"
    text = SETTINGS.format(name=name).replace(*change) + extra
    path.write_text(text.replace("[bootstrap]", f"{model}\n[bootstrap]", 1))
    digits = demo._mnist()[:400]
    demo._write_class_folders(root / "first", digits)
    if label is not None:
        rows = [f"{d}/{i:05d}.png,{label(int(d))}" for i, d in enumerate(digits.labels)]
        text = "\n".join(["file_name,label", *rows, ""])
        (root / "first" / "metadata.csv").write_text(text)
    return path


def free() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
