"""The command line: ``fednorm`` and a command: demo, federated, continual, compare, recipes, report, export, and more.

Results go to standard output, all else to standard error; with ``--json`` standard output holds one JSON document. A
user's mistake ends with exit code 2 and a sentence, never with a traceback.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

from fednorm.signals import raising, starting, unblock

try:
    import typer

    from fednorm.cards import FAMILIES
    from fednorm.cli.command import command_of
    from fednorm.cli.console import fail, of_the_system, show_warnings
    from fednorm.cli.deploying import Target, deploy_app, new
    from fednorm.cli.measuring import analyse, bench_app, verify_app
    from fednorm.cli.of_data import data_app
    from fednorm.cli.parameters import (
        KINDS,
        AmpOption,
        AugmentOption,
        CohortSizeOption,
        CompileOption,
        DataDirOption,
        DataOption,
        DetailsOption,
        DeviceOption,
        EngineOption,
        InsecureOption,
        JsonOption,
        LearnerOption,
        LogDirOption,
        LogOption,
        MemoryOption,
        ModelOption,
        NormOption,
        NotesOption,
        OptimizerOption,
        RateOption,
        ReduceOption,
        RootsOption,
        RunsOption,
        RuntimeOption,
        ScenarioOption,
        ScheduleOption,
        SetOption,
        StrategyOption,
        StudyArgument,
        SuperlinkOption,
        WorkersOption,
        names,
        whole,
    )
    from fednorm.cli.welcome import root
    from fednorm.errors import ConfigError, FedNormError
except KeyboardInterrupt:  # before anything has begun there is nothing to tell
    raise SystemExit(130) from None

app = typer.Typer(
    callback=root,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    help="What should a network's normalization do when its data is not one distribution? Simulate federated clients "
    "on Flower and continual streams with Avalanche, and compare.",
)
for name, group in (("bench", bench_app), ("verify", verify_app), ("deploy", deploy_app), ("data", data_app)):
    app.add_typer(group, name=name)
for command in (analyse, new):
    app.command()(command)


@app.command()
def demo(
    runs: RunsOption = Path("runs/demo"),
    rounds: Annotated[int, typer.Option(help="Rounds of each strategy.")] = 20,
    images: Annotated[int, typer.Option(help="Training images of an experience of the streams; 0 for all.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of every random stream.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Strategies on embedded multi-domain digits, then norms on streams of them: no data folder, no network."""
    with starting():
        from fednorm.cli.demo import run_demo

    run_demo(runs=runs, rounds=rounds, images=images, seed=seed, as_json=as_json)


@app.command()
def federated(  # noqa: PLR0913 - one parameter an option
    config: Annotated[Path | None, typer.Option(help="Configuration file (TOML); options below override it.")] = None,
    data: DataOption = None,
    data_dir: DataDirOption = None,
    domains: Annotated[str | None, typer.Option(help="Domains to use, separated by commas.")] = None,
    held_out: Annotated[str | None, typer.Option(help="A domain no client trains on.")] = None,
    images: Annotated[int | None, typer.Option("--train-per-client", help="Most training images a client.")] = None,
    clients: Annotated[int | None, typer.Option("--clients-per-domain", help="Clients that share a domain.")] = None,
    partition: Annotated[str | None, typer.Option(help="iid, dirichlet or shards.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Concentration of the Dirichlet partition.")] = None,
    download: Annotated[bool | None, typer.Option("--download", help="Let torchvision download.")] = None,
    strategy: StrategyOption = None,
    scenario: ScenarioOption = None,
    learner: LearnerOption = None,
    memory_size: MemoryOption = None,
    num_clients: Annotated[int | None, typer.Option("--clients", help="Clients that share a scenario.")] = None,
    order: Annotated[str | None, typer.Option(help="Of each client's experiences: same, rotated or own.")] = None,
    per_experience: Annotated[
        int | None, typer.Option("--rounds-per-experience", help="Rounds of communication in each experience.")
    ] = None,
    norm: NormOption = None,
    model: ModelOption = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of communication.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Share of the clients sampled each round.")] = None,
    optimizer: OptimizerOption = None,
    learning_rate: RateOption = None,
    schedule: ScheduleOption = None,
    augment: AugmentOption = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a step.")] = None,
    local_epochs: Annotated[float | None, typer.Option(help="Epochs of a client a round; 0.5 is half of one.")] = None,
    evaluate: Annotated[
        str | None, typer.Option(help="Any of own,cross,averaged,pooled,reestimated,unseen; separated by commas.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random stream.")] = None,
    device: DeviceOption = None,
    amp: AmpOption = None,
    compiled: CompileOption = None,
    engine: EngineOption = None,
    cohort_size: CohortSizeOption = None,
    workers: WorkersOption = None,
    settings: SetOption = None,
    runs: RunsOption = Path("runs"),
    runtime: RuntimeOption = "in-process",
    superlink: SuperlinkOption = "",
    root_certificates: RootsOption = None,
    insecure: InsecureOption = False,
    log: LogOption = None,
    log_dir: LogDirOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop before training.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Show the plan entry by entry.")] = False,
    details: DetailsOption = False,
    notes: NotesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run one federation, or go on with one that was cut short."""
    with starting():
        from fednorm.cli.options import collect

    flags = {
        "data.name": data,
        "data.dir": None if data_dir is None else str(data_dir),
        "data.domains": domains,
        "data.held_out": held_out,
        "data.train_per_client": images,
        "data.clients_per_domain": clients,
        "data.partition": partition,
        "data.alpha": alpha,
        "data.download": download,
        "strategy.name": strategy,
        "scenario.name": scenario,
        "learner.name": learner,
        "learner.memory_size": memory_size,
        "grid.clients": num_clients,
        "grid.order": order,
        "rounds.per_experience": per_experience,
        "norm.name": norm,
        "model.name": model,
        "rounds.num_rounds": rounds,
        "rounds.fraction": fraction,
        "train.optimizer": optimizer,
        "train.learning_rate": learning_rate,
        "train.schedule": schedule,
        "train.augment": augment,
        "train.batch_size": batch_size,
        "train.local_epochs": whole(local_epochs),
        "evaluate.kinds": evaluate,
        "seed": seed,
        "device": device,
        "amp": amp,
        "compile": compiled,
        "engine": engine,
        "cohort_size": cohort_size,
        "workers": workers,
    }
    with starting():
        resolved = collect(config, flags, settings or [])  # first: what is misspelt is told before PyTorch is imported
        from fednorm.cli.answer import Depth
        from fednorm.cli.federated import run_federated
        from fednorm.report.live import Live

    target, shown = Target(superlink, root_certificates, insecure), {"dry_run": dry_run, "as_json": as_json}
    depth = Depth(details, notes)
    live = Live(log or (), log_dir)
    run_federated(resolved, runs=runs, runtime=runtime, target=target, layers=layers, depth=depth, live=live, **shown)


@app.command()
def continual(  # noqa: PLR0913 - one parameter an option
    config: Annotated[Path | None, typer.Option(help="Configuration file (TOML); options below override it.")] = None,
    scenario: ScenarioOption = None,
    data: Annotated[str | None, typer.Option(help="Data, where the scenario leaves a choice.")] = None,
    data_dir: DataDirOption = None,
    download: Annotated[bool | None, typer.Option("--download", help="Let torchvision download.")] = None,
    experiences: Annotated[int | None, typer.Option(help="Number of experiences.")] = None,
    learner: LearnerOption = None,
    memory_size: MemoryOption = None,
    norm: NormOption = None,
    model: ModelOption = None,
    online: Annotated[bool, typer.Option("--online", help="One pass over each experience, 10 images a step.")] = False,
    epochs: Annotated[int | None, typer.Option(help="Passes over each experience.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="New images a step.")] = None,
    optimizer: OptimizerOption = None,
    learning_rate: RateOption = None,
    schedule: ScheduleOption = None,
    augment: AugmentOption = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random stream.")] = None,
    device: DeviceOption = None,
    amp: AmpOption = None,
    compiled: CompileOption = None,
    workers: WorkersOption = None,
    settings: SetOption = None,
    runs: RunsOption = Path("runs"),
    log: LogOption = None,
    log_dir: LogDirOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the stream and stop before training.")] = False,
    details: DetailsOption = False,
    notes: NotesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a learner on a stream of experiences, or go on with a run that was cut short."""
    with starting():
        from fednorm.cli.options import collect_continual

    flags = {
        "scenario.name": scenario,
        "scenario.num_experiences": experiences,
        "data.name": data,
        "data.dir": None if data_dir is None else str(data_dir),
        "data.download": download,
        "learner.name": learner,
        "learner.memory_size": memory_size,
        "norm.name": norm,
        "model.name": model,
        "train.epochs": epochs,
        "train.batch_size": batch_size,
        "train.optimizer": optimizer,
        "train.learning_rate": learning_rate,
        "train.schedule": schedule,
        "train.augment": augment,
        "seed": seed,
        "device": device,
        "amp": amp,
        "compile": compiled,
        "workers": workers,
    }
    with starting():
        resolved = collect_continual(config, flags, settings or [], online=online)
        from fednorm.cli.answer import Depth
        from fednorm.cli.continual import run_continual
        from fednorm.report.live import Live

    live = Live(log or (), log_dir)
    run_continual(resolved, runs=runs, dry_run=dry_run, depth=Depth(details, notes), live=live, as_json=as_json)


@app.command()
def compare(  # noqa: PLR0913 - one parameter an option
    study: StudyArgument,
    data_dir: DataDirOption = None,
    runs: Annotated[Path | None, typer.Option("--out", "--runs", help="Folder of the records; runs/STUDY.")] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at a time, each in a process of its own; as many as there are cores.")
    ] = None,
    settings: SetOption = None,
    select_on_test: Annotated[
        bool, typer.Option("--select-on-test", help="Choose by test images; every table will say so.")
    ] = False,
    reduce: ReduceOption = None,
    log: LogOption = None,
    log_dir: LogDirOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs with their estimated time; stop.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables in Markdown.")] = False,
    details: DetailsOption = False,
    notes: NotesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a study: a grid of configurations; finished runs are read back, cut ones go on."""
    with starting():
        from fednorm.study.recipes import find_study

    find_study(study)  # a misspelt name is told before PyTorch is imported
    with starting():
        from fednorm.cli.answer import Depth
        from fednorm.cli.compare import run_compare

    run_compare(
        study,
        data_dir=data_dir,
        runs=runs,
        jobs=jobs,
        settings=settings or [],
        select_on_test=select_on_test,
        reduce=reduce,
        log=log or (),
        log_dir=log_dir,
        dry_run=dry_run,
        markdown=markdown,
        depth=Depth(details, notes),
        as_json=as_json,
    )


@app.command()
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(help="A study, for its protocol, data and papers' numbers.", autocompletion=names("studies")),
    ] = None,
    cost: Annotated[bool, typer.Option("--cost", help="Time a few steps of each method; say what it takes.")] = False,
    reduce: ReduceOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the studies that ship and the papers they follow, or say what one of them does."""
    with starting():
        from fednorm.study.recipes import find_study

    if name is not None:
        find_study(name)
    elif not (cost or as_json or reduce or data_dir):
        with starting():
            from fednorm.cli.recipe_list import run_list

        run_list()
        return
    with starting():
        from fednorm.cli.recipes import run_recipes

    run_recipes(name, data_dir, reduce=reduce, with_cost=cost, as_json=as_json)


@app.command()
def report(  # noqa: PLR0913 - one parameter an option
    runs: Annotated[list[Path], typer.Argument(help="Records, folders of records, or summaries (.json).")],
    page: Annotated[Path | None, typer.Option("--out", help="Write one self-contained page (.html).")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables in Markdown.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print the tables in LaTeX, for booktabs.")] = False,
    baseline: Annotated[str | None, typer.Option(help="The method that the others are compared with, by name.")] = None,
    interval: Annotated[str, typer.Option(help="95 % interval over seeds: t or bootstrap.")] = "t",
    select: Annotated[bool, typer.Option("--select", help="Show each method's best configuration only.")] = False,
    curve: Annotated[bool, typer.Option("--curve", help="Also show the accuracy after every evaluated round.")] = False,
    export: Annotated[
        list[Path] | None, typer.Option(help="Write all measured numbers to this .csv or .parquet; repeatable.")
    ] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Write TensorBoard event files to this folder.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Write figures to this folder.")] = None,
    figure_format: Annotated[str, typer.Option(help="pdf, svg or png.")] = "pdf",
    summary: Annotated[Path | None, typer.Option(help="Also write the results' small summaries to this file.")] = None,
    details: DetailsOption = False,
    notes: NotesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make tables, figures and one page from records."""
    with starting():
        from fednorm.cli.answer import Depth
        from fednorm.cli.report import run_report

    if markdown and latex:
        raise ConfigError("--markdown and --latex are two forms of the same tables: choose one.")
    run_report(
        runs,
        style="markdown" if markdown else "latex" if latex else "table",
        select=select,
        curve=curve,
        summary=summary,
        page=page,
        export=export or [],
        tensorboard=tensorboard,
        figures=figures,
        figure_format=figure_format,
        baseline=baseline,
        interval=interval,
        depth=Depth(details, notes),
        as_json=as_json,
    )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The record of a finished run.")],
    to: Annotated[Path, typer.Option(help="The file: .pt2 (torch.export), .safetensors or .pt (a state dict).")],
    client: Annotated[int | None, typer.Option(help="The client whose model it is; the server's by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a run's trained model to a file that plain PyTorch reads."""
    from fednorm.cli.export import run_export

    run_export(run, to=to, client=client, as_json=as_json)


@app.command("list")
def list_names(
    what: Annotated[
        str,
        typer.Argument(
            help="norms, strategies, models, data, scenarios, learners, optimizers, adaptations or studies.",
            autocompletion=lambda incomplete: [kind for kind in KINDS if kind.startswith(incomplete)],
        ),
    ] = "",
    every: Annotated[bool, typer.Option("--all", help="Everything, and what of the reading list is not here.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List what is there, a line each."""
    with starting():
        from fednorm.cli.listing import run_list

        run_list(what, every=every, as_json=as_json)


@app.command()
def explain(
    name: Annotated[
        str,
        typer.Argument(
            help="A norm, strategy, model, …; a section of the configuration (train), a key (train.lr), or config.",
            autocompletion=names(*FAMILIES),
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Print a method's identity card, or what a section or key of the configuration means."""
    with starting():
        from fednorm.cli.explain import explained

        if explained(name, as_json=as_json):
            return
        from fednorm.cli.catalogue import run_explain

        run_explain(name, as_json=as_json)


@app.command()
def check(
    model: Annotated[
        str | None, typer.Argument(help="torchvision:NAME, timm:NAME, a name of ours, or PACKAGE.MODULE:NAME.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Check torchvision's classifiers and many of timm's.")] = False,
    norms: Annotated[bool, typer.Option("--norms", help="Convert some of them to every norm there is.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="With these two: print the table in Markdown.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what every strategy and every conversion would make of a model, and try a training step of each."""
    with starting():
        from fednorm.cli.check import run_check

        run_check(model, every=every, norms=norms, markdown=markdown, as_json=as_json)


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    show_warnings()
    unblock()
    with raising():
        try:
            command_of(app)(standalone_mode=True)
        except FedNormError as error:
            message = str(error.args[0]) if error.args else type(error).__name__
            fail(message if not isinstance(error, ConfigError) else str(error))
        except KeyboardInterrupt:  # before a command begins
            raise SystemExit(128 + signal.SIGINT) from None
        except BrokenPipeError:
            sys.stderr.close()
            raise SystemExit(141) from None
        except OSError as error:
            if error.errno == errno.EIO and not sys.stderr.isatty():  # the terminal was closed under us
                raise SystemExit(128 + signal.SIGHUP) from None
            fail(of_the_system(error))
        except MemoryError:
            fail("This machine's memory does not suffice. Take fewer or smaller images, a smaller batch or model.")
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # PyTorch's, which is not imported for its name's sake
                raise
            fail("The device's memory does not suffice. Take a smaller batch or model, or device cpu.")


if __name__ == "__main__":
    main()
