"""The command line: `sustain …`, one command a verb. Slow imports wait until they are needed."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps
from getpass import getuser
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

import click
from rich.console import Console

if TYPE_CHECKING:
    from flows.settings import Settings

P = ParamSpec("P")
console = Console(emoji=False)  # a batch may be called a:car:b
settings_option = click.option(
    "--settings",
    "-s",
    "settings_file",
    default="sustain.toml",
    show_default=True,
    type=click.Path(path_type=Path),
    help="The model's TOML file.",
)

models_option = click.option(
    "--settings",
    "-s",
    "settings_files",
    multiple=True,
    default=("sustain.toml",),
    show_default=True,
    type=click.Path(path_type=Path),
    help="A model's TOML file; again for each further model.",
)


PORT = click.IntRange(1, 65_535)


def ports(command: Callable[P, None]) -> Callable[P, None]:
    """Let a command take the ports of both servers."""
    for server, port in (("prefect", 4200), ("mlflow", 5000)):
        command = click.option(f"--{server}-port", type=PORT, default=port, show_default=True)(
            command
        )
    return command


def told_plainly(command: Callable[P, None]) -> Callable[P, None]:
    """Show this package's errors as one line; anything else is a bug and keeps its traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            console.print("stopped; run the same command again to go on")
            sys.exit(130)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise
            _fail(f"{error.strerror}: {error.filename or 'a file'}; nothing is lost, make room (or"
                  " give the right to write) and run the same command again")  # fmt: skip
        except (ValueError, RuntimeError) as error:
            if not _is_ours(error):
                raise
            _fail(str(error))

    return run


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sustain")
def main() -> None:
    """Keep a production model healthy: watch, fine-tune, judge, promote, roll back.

    Start with `sustain demo` to see it on real digits, or with `sustain init NAME` for a model of
    yours.
    """


@main.command()
@click.argument("name")
@settings_option
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="Start from these settings, such as one of deployments/recipes/.",
)
@told_plainly
def init(name: str, settings_file: Path, recipe: Path | None) -> None:
    """Write commented settings for a model called NAME."""
    from flows.settings import write_template

    write_template(settings_file, name, recipe)
    first = "" if recipe else " set architecture under [model] in it, then"
    console.print(f"wrote {settings_file}; next:{first} sustain bootstrap --data FOLDER")


@main.command()
@settings_option
@click.option("--data", required=True, help="Folder or URL of labelled pictures.")
@click.option("--labels", help="CSV or Parquet with sample_id,label, if the data has no labels.")
@click.option("--adopt", help="A state dict that becomes champion as it is.")
@told_plainly
def bootstrap(settings_file: Path, data: str, labels: str | None, adopt: str | None) -> None:
    """Make the first champion: train it on labelled data, or adopt your own."""
    from flows.preflight import refuse_bootstrap

    refuse_bootstrap(settings_file, data, labels, adopt)
    settings = _begin(settings_file)
    from sft.models import require_known

    require_known(settings.model.architecture)
    from flows.bootstrap import bootstrap as flow
    from flows.words import shown_uri

    made = flow(str(settings.path), data=data, labels=labels, adopt=adopt)
    for note in made.notes[:10]:
        console.print(f"  {note}", style="dim", markup=False)
    before = "" if made.made_now else " (made before from the same: nothing was trained)"
    console.print(
        f"version {made.version} is champion: accuracy {made.accuracy:.3f} on {made.holdout}"
        f" held-out samples{before}"
    )
    if made.warning:
        console.print(f"warning: {made.warning}", markup=False, style="yellow")
    console.print(
        f"next: let batches arrive in {shown_uri(settings.feed.url)}, labels in"
        f" {shown_uri(settings.feed.labels)}, and run `sustain watch`, or `sustain up`",
        markup=False,
        soft_wrap=True,
    )


@main.command()
@settings_option
@told_plainly
def watch(settings_file: Path) -> None:
    """Check the batches that are new, decide, and retrain if it is due."""
    settings = _begin(settings_file, needs_prefect=False)
    from flows.registry import Registry
    from flows.watch import make_plan

    registry = Registry(settings)
    plan = make_plan(registry, settings, datetime.now(UTC))
    if plan.idle:
        from flows.show import idle

        console.print(idle(plan), markup=False)
        for problem in plan.labels.problems:
            console.print(f"not used: {problem}", markup=False)
        return
    _check_prefect(settings)
    from flows.show import show_watched
    from flows.watch import watch as flow

    show_watched(console, flow(str(settings.path)))


@main.command()
@settings_option
@click.option(
    "--to",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("label_requests"),
    show_default=True,
    help="Folder for the list and a page with thumbnails.",
)
@told_plainly
def ask(settings_file: Path, to: Path) -> None:
    """List the samples of drifted batches that are worth labelling next."""
    settings = _begin(settings_file, needs_prefect=False)
    from flows.ask import write_list
    from flows.registry import Registry
    from flows.watch import make_plan
    from flows.words import shown_uri

    registry = Registry(settings)
    plan = make_plan(registry, settings, datetime.now(UTC))
    fresh = plan.decider.counted(alarm=True)
    requests = write_list(
        registry, settings, plan.champion, plan.batches, plan.finished, plan.labels, fresh, to
    )
    if not requests:
        console.print("nothing to label: no batch rang, or every sample of those has its label")
        return
    console.print(
        f"{len(requests)} samples are worth labelling: fill in {to / 'label_requests.csv'} and drop"
        f" it into {shown_uri(settings.feed.labels)}; {to / 'label_requests.html'} shows them",
        markup=False,
        soft_wrap=True,
    )


@main.command()
@settings_option
@click.option("--why", default="asked for by a person", help="For the record.")
@told_plainly
def retrain(settings_file: Path, why: str) -> None:
    """Fine-tune the champion on the fresh labels, and let the gate judge the result."""
    settings = _begin(settings_file)
    from flows.retrain import retrain as flow

    made = flow(str(settings.path), cause=why)
    console.print(made.words, markup=False)
    if made.worst:
        console.print(f"worst classes: {made.worst}", markup=False)


@main.command()
@settings_option
@click.option("--why", default="asked for by a person", help="For the record.")
@told_plainly
def adapt(settings_file: Path, why: str) -> None:
    """Make a challenger without labels, from the batches that rang, and let the gate judge it.

    The champion keeps its weights and gets batch-norm statistics of the new pictures, as
    [adaptation] says. Without labels it waits for a verdict; `sustain promote --why` promotes it
    before one.
    """
    settings = _begin(settings_file)
    from flows.adapt import adapt as flow

    console.print(flow(str(settings.path), cause=why).words, markup=False)


@main.command()
@settings_option
@click.option("--version", type=int, help="By default the one with the alias challenger.")
@click.option("--why", help="Promote whatever the gate says, for this reason.")
@told_plainly
def promote(settings_file: Path, version: int | None, why: str | None) -> None:
    """Judge a version against the champion of now, and promote it if it is better.

    Ends with the exit code 1 if the version does not become champion.
    """
    settings = _begin(settings_file)
    _require_candidate(settings, version)
    from flows.promote import promote as flow

    done = flow(str(settings.path), version=version, why=why, who=getuser())
    if not done.promoted:  # a script must not go on to serve it
        _fail(done.words)
    console.print(done.words, markup=False)


@main.command()
@settings_option
@click.option("--to", type=int, help="By default the version before the champion.")
@click.option("--why", default="no reason given", help="For the record.")
@told_plainly
def rollback(settings_file: Path, to: int | None, why: str) -> None:
    """Give the alias champion back to an earlier version, after a load test."""
    settings = _begin(settings_file)
    if to is not None:
        _require_version(settings, to)
    from flows.rollback import rollback as flow

    done = flow(str(settings.path), to=to, why=why, who=getuser())
    console.print(done.words, markup=False)


@main.command()
@settings_option
@click.option("--at", help="Who was champion then: an ISO date or time, UTC without an offset.")
@told_plainly
def history(settings_file: Path, at: str | None) -> None:
    """Show who was champion when, moved by whom, why, and instead of which version."""
    settings = _begin(settings_file, needs_prefect=False)
    from flows.history import champion_at, read_history, unrecorded
    from flows.registry import Registry
    from flows.screen import print_table
    from flows.times import read_moment

    registry = Registry(settings)
    tenures = read_history(registry)
    if at is not None:
        when = read_moment(at)
        then = champion_at(tenures, when)
        said = "there was no champion" if then is None else then.words
        console.print(f"at {when:%Y-%m-%d %H:%M} UTC: {said}", markup=False, soft_wrap=True)
        return
    print_table(
        console,
        f"champions of {registry.name}",
        ("version", "since (UTC)", "until", "by", "instead of", "why"),
        [tenure.cells for tenure in tenures],
        whole=("since (UTC)", "until"),
    )
    if words := unrecorded(registry, tenures):
        console.print(words, markup=False)


@main.command()
@models_option
@click.option("--port", type=PORT, default=4280, show_default=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--register", default="", help="This receiver's address, as MLflow's server sees it.")
@click.option("--ask", is_flag=True, help="/metrics asks for credentials on loopback, too.")
def webhook(
    settings_files: tuple[Path, ...], port: int, host: str, register: str, *, ask: bool
) -> None:
    """Take MLflow's signed messages, so that a moved alias takes effect in seconds.

    It also tells Prometheus what is on record, under /metrics.
    """
    from flows.guard import guarded

    @told_plainly
    def run() -> None:
        models = _begin_all(settings_files)
        from flows.webhook import serve

        console.print(f"listening on http://{host}:{port}/mlflow; Ctrl-C stops it", markup=False)
        serve(models, port, host=host, register=register, asks=ask)

    sys.exit(guarded(run))


@main.command()
@models_option
@told_plainly
def metrics(settings_files: tuple[Path, ...]) -> None:
    """Print what is on record as Prometheus's text, as for its textfile collector."""
    models = _begin_all(settings_files, needs_prefect=False)
    from flows.metrics import Exporter
    from flows.registry import Registry

    click.echo(Exporter([Registry(one) for one in models]).text().decode(), nl=False)


@main.command()
@models_option
@click.option("--pool", default="sustain", show_default=True, help="Prefect's work pool.")
@told_plainly
def deploy(settings_files: tuple[Path, ...], pool: str) -> None:
    """Register the scheduled and the startable flows of these models, and no others.

    What was deployed before and is unchanged stays as it is. A model whose settings are not named
    any more loses its deployments and schedules.
    """
    models = _begin_all(settings_files)
    from flows.deploy import deploy as register

    console.print(register(models, pool).words, markup=False, soft_wrap=True)


@main.command()
@settings_option
@told_plainly
def reconcile(settings_file: Path) -> None:
    """End what dead processes left running, in Prefect and in MLflow."""
    settings = _begin(settings_file)
    from flows.reconcile import reconcile as flow

    console.print(flow(str(settings.path)).words, markup=False)


@main.command()
@settings_option
@click.option("--dry-run", is_flag=True, help="Only tell what would go.")
@told_plainly
def prune(settings_file: Path, *, dry_run: bool) -> None:
    """Delete, or archive, versions and reports that nothing needs any more."""
    settings = _begin(settings_file)
    from flows.prune import prune as flow

    console.print(flow(str(settings.path), dry_run=dry_run).words, markup=False)


@main.command()
@settings_option
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A TOML file with the settings to change; a list of values is a grid. Repeatable.",
)
@click.option(
    "--since", help="Replay from then on, with the champion of then: an ISO date or time."
)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes.")
@click.option("--floor", type=float, help="Count the days below this accuracy.")
@click.option(
    "--retrain-cost",
    default=20.0,
    show_default=True,
    help="What a retraining costs, in wrong answers; for the regret.",
)
@click.option("--page", type=click.Path(path_type=Path), help="By default backtest/backtest.html.")
@click.option("--emit", type=click.Path(path_type=Path), help="Write the chosen policy's settings.")
@click.option("--choose", default="", help="The policy to emit; else the best on the frontier.")
@click.option("--suggest", is_flag=True, help="Search thresholds for the cheapest above --floor.")
@click.option("--trials", default=30, show_default=True, help="Policies that --suggest may try.")
@click.option(
    "--oracle-times",
    default=8,
    show_default=True,
    help="Moments at most at which the oracle trains by itself.",
)
@click.option("--yes", is_flag=True, help="Replay a large grid without being told its cost first.")
@told_plainly
def backtest(
    settings_file: Path,
    policies: tuple[Path, ...],
    since: str | None,
    jobs: int,
    floor: float | None,
    retrain_cost: float,
    page: Path | None,
    emit: Path | None,
    choose: str,
    trials: int,
    oracle_times: int,
    *,
    suggest: bool,
    yes: bool,
) -> None:
    """Replay policies on the feed's own history: what would each have brought, and cost?"""
    settings = _begin(settings_file, needs_prefect=False)
    from flows.backtest import Asked, tell

    asked = Asked(
        policies=policies,
        since=since,
        jobs=jobs,
        floor=floor,
        cost=retrain_cost,
        page=page,
        emit=emit,
        choose=choose,
        suggest=suggest,
        trials=trials,
        oracle_times=oracle_times,
        yes=yes,
    )
    tell(settings, asked, console)


@main.command()
@settings_option
@told_plainly
def status(settings_file: Path) -> None:
    """Show the versions, the newest checks, and what waits to be done."""
    settings = _begin(settings_file, needs_prefect=False)
    from flows.registry import Registry
    from flows.show import show_checks, show_status, show_versions
    from flows.storage import FeedError
    from flows.watch import make_plan

    registry = Registry(settings)
    try:
        plan = make_plan(registry, settings, datetime.now(UTC))
    except FeedError as error:  # what is on record is there all the same
        champion = registry.champion().number
        show_versions(console, registry)
        show_checks(console, champion, registry.newest_checks(champion))
        console.print(f"{error}; what waits to be done is not known", markup=False, soft_wrap=True)
        return
    show_status(console, registry, plan)


@main.command()
@models_option
@ports
@click.option("--webhook-port", type=PORT, default=4280, show_default=True)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; any other, or a --name, needs credentials in the environment.",
)
@click.option(
    "--name",
    "names",
    multiple=True,
    help="A host by which others call, or https://HOST[:PORT] of a proxy; again for more.",
)
def up(
    settings_files: tuple[Path, ...],
    mlflow_port: int,
    prefect_port: int,
    webhook_port: int,
    host: str,
    names: tuple[str, ...],
) -> None:
    """Run it all on this machine until Ctrl-C: servers, schedules and a worker."""
    from flows.guard import guarded

    @told_plainly
    def run() -> None:
        from flows.preflight import read_toml

        for path in settings_files:
            read_toml(path)
        from flows.settings import load_settings
        from flows.up import Place
        from flows.up import up as serve

        models = [load_settings(path) for path in settings_files]
        serve(models, Place(host, mlflow_port, prefect_port, webhook_port, names))

    sys.exit(guarded(run))


@main.command()
@settings_option
@ports
def ui(settings_file: Path, mlflow_port: int, prefect_port: int) -> None:
    """Show what is on record in MLflow's and Prefect's UIs, until Ctrl-C."""
    from flows.guard import guarded

    @told_plainly
    def run() -> None:
        from flows.preflight import read_toml

        read_toml(settings_file)
        from flows.settings import load_settings
        from flows.up import Place, show

        show(load_settings(settings_file), Place(mlflow=mlflow_port, prefect=prefect_port))

    sys.exit(guarded(run))


@main.command()
@click.option(
    "--folder",
    default="demo",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Everything the demo makes goes here; an earlier demo's folder is made anew.",
)
@told_plainly
def demo(folder: Path) -> None:
    """Show the whole loop on real digits, in under three minutes."""
    from flows.demo import run

    run(folder)


def _begin(settings_file: Path, *, needs_prefect: bool = True) -> Settings:
    """Read the settings and prepare the environment, before Prefect or torch is imported."""
    from flows.preflight import read_toml

    read_toml(settings_file)  # without torch, where there are none
    from flows.settings import export_to_environment, load_settings, under_torchrun

    settings = load_settings(settings_file)
    export_to_environment(settings)
    if under_torchrun():
        _share(settings)
    if needs_prefect:
        _check_prefect(settings)
    return settings


def _require_version(settings: Settings, number: int) -> None:
    """Refuse a version that there is not, before Prefect is started for it."""
    from flows.registry import Registry

    Registry(settings).version(number)


def _require_candidate(settings: Settings, number: int | None) -> None:
    """Refuse to judge what there is not, or against nothing, before Prefect is started for it."""
    from flows.registry import Registry

    registry = Registry(settings)
    registry.champion()
    if number is None:
        registry.challenger()
    else:
        registry.version(number)


def _share(settings: Settings) -> None:
    """Go on as the one process that does what the command says; let the others help it."""
    from sft import processes

    if processes.join():
        click.get_current_context().call_on_close(processes.leave)
    else:
        processes.help_out(settings.allowed_factories)
        sys.exit(0)


def _begin_all(files: tuple[Path, ...], *, needs_prefect: bool = True) -> list[Settings]:
    """Read the settings of several models; the first ones' servers are everybody's."""
    first = _begin(files[0], needs_prefect=needs_prefect)
    from flows.settings import load_settings

    return [first, *(load_settings(path) for path in files[1:])]


def _check_prefect(settings: Settings) -> None:
    from flows.servers import require_prefect

    require_prefect(settings)


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised the error itself, so that its message is meant for a person."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return str(raised_in).split(".")[0] in ("flows", "sft", "monitoring")


def _fail(message: str) -> None:
    Console(stderr=True, emoji=False).print(
        f"[bold red]error:[/] {_escaped(message)}", soft_wrap=True
    )
    sys.exit(1)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
