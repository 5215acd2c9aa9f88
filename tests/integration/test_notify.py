"""People are told what needs them, each thing once, by messengers that really carry it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from flows.notify import send
from flows.promote import promote
from flows.registry import Registry
from flows.rollback import rollback
from flows.settings import NotifySettings, Settings
from flows.watch import watch

if TYPE_CHECKING:
    from pathlib import Path

    from worlds import World


class Inbox:
    """Somebody's chat: what was posted to it, and whether it takes anything at present."""

    def __init__(self) -> None:
        self.open = True
        self.messages: list[dict[str, Any]] = []
        inbox = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if inbox.open:
                    inbox.messages.append(json.loads(body))
                self.send_response(200 if inbox.open else 503)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def titles(self) -> list[str]:
        """Give what came since it was last asked."""
        titles = [str(one["title"]) for one in self.messages]
        self.messages.clear()
        return titles


@pytest.fixture
def inbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Inbox]:
    """Open an inbox, whose address is in TEAM_CHAT."""
    inbox = Inbox()
    monkeypatch.setenv("TEAM_CHAT", f"json://127.0.0.1:{inbox.port}/")
    yield inbox
    inbox.server.shutdown()
    inbox.server.server_close()


def told(world: World) -> None:
    """Let the model's settings name the inbox."""
    with world.path.open("a") as file:
        file.write('\n[notify]\nto = ["env:TEAM_CHAT"]\n')


def test_a_message_is_text_where_messengers_write_html(
    tmp_path: Path, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands in it was in the data: it is shown, and draws no picture from elsewhere."""
    monkeypatch.setenv("TEAM_CHAT", f"json://127.0.0.1:{inbox.port}/?format=html")
    team = Settings(tmp_path / "sustain.toml", notify=NotifySettings(to=("env:TEAM_CHAT",)))
    assert send(team, "drift", "camera <img src=http://evil/x.png>\nhttp://mlflow") == []
    (message,) = inbox.messages
    assert "<img" not in message["message"]
    assert "&lt;img" in message["message"]
    assert "<br" in message["message"]


def test_each_thing_is_told_once(small_world: Callable[[str], World], inbox: Inbox) -> None:
    """Drift, a promotion and a rollback, in their order; nothing twice, and nothing lost."""
    world = small_world("told")
    told(world)
    world.arrive(0, 1)
    inbox.open = False
    watched = watch(str(world.path))
    assert any("did not take the message" in problem for problem in watched.problems)
    inbox.open = True
    watch(str(world.path))  # what nobody could be told is told now
    first = inbox.titles()
    assert first
    assert all(title.startswith("told: ") for title in first)
    assert sum("drift that hurts" in title for title in first) <= 1
    world.arrive(2, 3, 4, labelled=True)
    watch(str(world.path))
    titles = inbox.titles()
    assert any("version 2 is champion" in title for title in titles)
    assert not any("approval" in title for title in titles)
    rollback(str(world.path), why="to see")
    assert inbox.titles() == ["told: version 2 was rolled back"]
    watch(str(world.path))
    assert not [title for title in inbox.titles() if "version" in title]


def test_approval_is_wanted_once_and_only_of_a_person(
    small_world: Callable[[str], World], inbox: Inbox
) -> None:
    """A challenger that waits is told of once, and once more when it is champion."""
    world = small_world("asked")
    told(world)
    world.path.write_text(
        world.path.read_text().replace("[gate]", '[gate]\napproval = "manual"', 1)
    )
    world.arrive(0, labelled=True)
    for _ in range(2):
        watch(str(world.path))
    titles = inbox.titles()
    assert titles.count("asked: version 2 waits for approval") == 1
    assert not any("is champion" in title for title in titles)
    promote(str(world.path))
    for _ in range(2):
        watch(str(world.path))
    titles = inbox.titles()
    assert titles.count("asked: version 2 is champion") == 1
    assert not any("approval" in title for title in titles)


def test_a_flow_that_goes_on_failing_is_told_once(
    small_world: Callable[[str], World], inbox: Inbox
) -> None:
    """The alias is gone: the first failing watch is told, the second one not, and another is."""
    world = small_world("failing")
    told(world)
    registry = Registry(world.settings)
    registry.client.delete_registered_model_alias("failing", "champion")
    for _ in range(2):
        with pytest.raises(Exception, match="has no champion"):
            watch(str(world.path))
    assert inbox.titles() == ["failing: watch failed"]


def test_a_block_of_prefects_carries_messages(
    small_world: Callable[[str], World], inbox: Inbox
) -> None:
    """A notification block is told by its name; one that there is not stops nothing."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    CustomWebhookNotificationBlock(
        name="team",
        url=f"http://127.0.0.1:{inbox.port}/",
        json_data={"title": "{{subject}}", "body": "{{body}}"},
    ).save("team", overwrite=True)
    world = small_world("block")
    with world.path.open("a") as file:
        file.write(
            '\n[notify]\nto = ["block:custom-webhook/team", "block:custom-webhook/nobody"]\n'
        )
    world.arrive(0, 1, 2, labelled=True)
    watch(str(world.path))
    (problem,) = send(world.settings, "title", "body")
    assert "no block custom-webhook/nobody" in problem
    assert any("version 2 is champion" in title for title in inbox.titles())
