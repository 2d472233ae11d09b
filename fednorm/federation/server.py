"""The ServerApp: rounds, checkpoints, the evaluation matrix and the result, on any of Flower's runtimes."""

from __future__ import annotations

import dataclasses
import logging
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from fednorm.adaptation._scoring import require_adaptable
from fednorm.config import RunConfig, of_which
from fednorm.data.clients import Counts
from fednorm.device import described
from fednorm.errors import IncompleteError, RecordError
from fednorm.federation.adaptation import adapted
from fednorm.federation.answers import answers, enough, require_answered
from fednorm.federation.best_round import best_round, held_back_scores
from fednorm.federation.central import central_of
from fednorm.federation.checkpoint import finished_table, in_table, kept, personal, restored, taken
from fednorm.federation.cohort.engine import engine_of
from fednorm.federation.contexts import SMALL
from fednorm.federation.deployment.simulation import SimulatedGrid
from fednorm.federation.diagnosis import diagnose
from fednorm.federation.evaluated import evaluated
from fednorm.federation.expected_clients import ExpectedClients
from fednorm.federation.grid import InProcessGrid
from fednorm.federation.matrix import EvaluationMatrix, by_domain, check_evaluations, summarize
from fednorm.federation.replies import Expected
from fednorm.federation.round_report import ClientReport, RoundReport, mean_metric, shown
from fednorm.federation.wire import unpack
from fednorm.federation.workbench import (
    CLIENTS,
    DEPLOYMENT,
    LOCAL_RECORD,
    BenchSource,
    Workbench,
    process_workbench,
)
from fednorm.records import further
from fednorm.records.checkpoint import Checkpoint
from fednorm.records.columns import reports
from fednorm.records.formats import finite
from fednorm.records.record import RunRecord

Document = dict[str, Any]

log = logging.getLogger("flwr")


class Observer(Protocol):
    """What wants to know how a run goes, e.g. a progress bar."""

    def begin(self, bench: Workbench, first_round: int) -> None:
        """Called before the first round that is run."""

    def round(self, line: Mapping[str, Any]) -> None:
        """Called after every round with its line of the record."""


RecordSource = Callable[[Context, RunConfig], RunRecord | None]
"""How an app finds the record of the run that a context belongs to; None to write nothing."""


def make_server_app(
    bench_of: BenchSource,
    record_of: RecordSource,
    observer: Observer | None = None,
    on_result: Callable[[Document], None] | None = None,
) -> ServerApp:
    """Return a ServerApp; one of a deployed run makes its workbench of what the sites say of themselves.

    Args:
        bench_of: Finds the workbench of the run.
        record_of: Finds the run's record, or None to write nothing.
        observer: Is told how the run goes.
        on_result: Is given the result.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        if context.run_config.get("runtime") == DEPLOYMENT:
            from fednorm.federation.deployment.server import serve_sites  # it calls what is here

            result = serve_sites(grid, context, record_of, observer)
        else:
            bench = bench_of(context)
            result = serve(grid, bench, record_of(context, bench.config), observer)
        if on_result:
            on_result(result)

    return app


def serve(grid: Grid, bench: Workbench, record: RunRecord | None, observer: Observer | None) -> Document:
    """Run a federation from its checkpoint, if any, to its result.

    Raises:
        FedNormError: The configuration cannot be run, too few clients answered, or the record cannot be written.
    """
    check(bench)
    if bench.keeping and not isinstance(grid, InProcessGrid):
        grid = SimulatedGrid(grid, bench, record)
    if record is None:
        return _serve(grid, bench, None, observer)
    with record.locked():
        return read_back(record, bench.config) or _serve(grid, bench, record, observer)


def read_back(record: RunRecord, config: RunConfig) -> Document | None:
    """Return the result of a run that has finished, or None.

    Raises:
        IncompleteError: It was finished with fewer clients than ``rounds.min_answered`` asks for now.
        RecordError: It cannot be read.
    """
    result = record.result()
    if result is not None and not enough(result["final"], config.rounds.min_answered):
        missing = result["final"]["missing"]
        raise IncompleteError(
            f"The run in {record.folder} has finished without {', '.join(missing['domains']) or 'some clients'} "
            f"(clients {', '.join(map(str, missing['clients']))} did not answer), and rounds.min_answered asks for "
            "more now. --set rounds.min_answered=0 reads its result back; without result.json there it runs anew."
        )
    return result


def check(bench: Workbench) -> None:
    """Refuse what could only fail after training."""
    config = bench.config
    check_evaluations(config.evaluate, bench.plan, bench.federation, config.strategy.name)
    require_adaptable(config.evaluate, bench.model)
    bench.central = central_of(bench)


def describe(bench: Workbench) -> Document:
    """Return what is known before training: the plan, who holds what, what a table must say."""
    federation = bench.federation
    sampled = max(1, round(bench.config.rounds.fraction * int(federation.counts.trains.sum())))
    extra = bench.strategy.extra_bytes
    return {
        "plan": {
            **bench.strategy.summary_of_plan(sampled),
            "bytes": bench.plan.bytes_by_role() | ({"extra": extra} if extra else {}),
            "tensors": bench.plan.tensors(),
        },
        "model": bench.about_model,
        "norm": {"name": bench.config.norm.name, **dataclasses.asdict(bench.norm)},
        "strategy": {"name": bench.config.strategy.name, **_options(bench)},
        "parameters": sum(parameter.numel() for parameter in bench.model.parameters()),
        **described(bench.config, bench.trainee.device),
        **({"engine": engine_of(bench).to_dict()} if bench.config.engine != "client" else {}),
        "data": {
            "title": federation.title,
            "notes": list(federation.notes),
            "clients": _held(federation.counts),
            "digest": federation.digest(),
        },
        **({"central": bench.central.about()} if bench.central else {}),
        **bench.about(),
    }


def _held(counts: Counts) -> list[Document]:
    """Return who holds how many images: a table a client; of many clients one for all of a domain.

    The latter have ``clients`` of them, the first of which is ``client``.
    """
    ends = [(pid, pid + 1) for pid in range(len(counts))] if len(counts) <= SMALL else counts.runs()
    return [
        {
            "client": first,
            **({"clients": end - first} if len(counts) > SMALL else {}),
            "domain": counts.domains[counts.domain[first]],
            "train": int(counts.train[first:end].sum()),
            "validation": int(counts.validation[first:end].sum()),
            "test": int(counts.test[first:end].sum()),
            "held_out": bool(counts.held_out[first]),
        }
        for first, end in ends
    ]


def expected_of(bench: Workbench) -> Mapping[int, Expected]:
    """Return what a run knows of its clients before they answer, by partition id."""
    return ExpectedClients(bench.federation.counts, bench.config.evaluate.split, constant=bench.trains_on_all)


def _options(bench: Workbench) -> Document:
    return bench.config.strategy.values


def _serve(grid: Grid, bench: Workbench, record: RunRecord | None, observer: Observer | None) -> Document:
    config, about = bench.config, describe(bench)
    bench.strategy.expected, bench.strategy.evaluates = expected_of(bench), config.evaluate.clients
    if type(bench).takes_part is not Workbench.takes_part:
        bench.strategy.takes_part = bench.takes_part
    journal = _Journal(grid, bench, record, observer, about["data"]["digest"])
    arrays, first_round = journal.open()
    if record:
        record.describe(about)
    try:
        result = bench.strategy.start(
            grid,
            arrays,
            num_rounds=bench.num_rounds,
            first_round=first_round,
            evaluate_every=bench.evaluate_every,
            on_round=journal.round,
            timeout=bench.config.rounds.timeout,
        )
        if first_round > bench.num_rounds and "missing" in journal.lines[-1]:
            journal.evaluate_again(arrays)
    finally:
        journal.close()
    if bench.roster:  # sites that came later are known now
        about = describe(bench)
    document: Document = finite(_document(grid, bench, record, about, journal.lines, result.arrays))
    rest = further.rest(journal.last) if journal.last and bench.config.kind == "federated" else None
    if record and (large := in_table(grid)):
        scored = [client["client"] for client in reports(record.folder, record.lines()[-1])["evaluate"]]
        table = finished_table(bench, large, result.arrays, bench.num_rounds, scored)
        record.finish(document, unpack(result.arrays), table=table, further=rest)
    elif record:
        own = personal(bench, grid, result.arrays, bench.num_rounds)
        record.finish(document, unpack(result.arrays), kept(grid, LOCAL_RECORD), personal=own, further=rest)
    return document


def _require_clients_here(record: RunRecord) -> None:
    """Refuse, in process, a checkpoint of a server whose clients keep their tensors elsewhere.

    Raises:
        RecordError: It is one.
    """
    if (record.folder / CLIENTS).is_dir() and record.has_checkpoint():
        raise RecordError(
            f"This run was begun on Flower's runtime, whose clients keep their tensors in {record.folder / CLIENTS}. "
            "Go on with --runtime flower, or choose another folder with --runs."
        )


class _Journal:
    """Takes down every round: its line, now and then a checkpoint, a word to the observer.

    Where clients' local tensors live outside this process, the server's checkpoint is of its own tensors: sites keep
    theirs on their own disks, clients of Flower's simulation in the record. Where neither does, none is written.

    Attributes:
        lines: Every round's line so far.
    """

    def __init__(
        self, grid: Grid, bench: Workbench, record: RunRecord | None, observer: Observer | None, data: str
    ) -> None:
        self.lines: list[Document] = []
        self._grid, self._bench, self._record, self._observer = grid, bench, record, observer
        self._sites = bench.roster
        self._simulated = grid if isinstance(grid, SimulatedGrid) else None
        self._here = self._simulated is None and self._sites is None
        self._data = data if self._sites is None else f"sites of {self._sites.run}"
        self._data += f", central {bench.central.digest}" if bench.central else ""
        self._keeps = isinstance(grid, InProcessGrid) or not self._here
        self._pending: Checkpoint | None = None
        self.last: Checkpoint | None = None
        """That of the last round, once there is one: what a longer run would go on with."""

    def open(self) -> tuple[ArrayRecord, int]:
        """Return the tensors to start from and the first round, from the checkpoint if there is one."""
        arrays, first_round = self._bench.strategy.initial_arrays(self._bench.model), 1
        large = in_table(self._grid)
        if large and self._record:
            large.attach(self._record.states)
            self._record.columns = True
        if self._record and not self._keeps:
            self._record.start_over()
        elif self._record and (checkpoint := self._checkpoint(self._record)):
            with self._record.restoring():
                if large:
                    large.attach(self._record.states, checkpoint.ended)
                arrays, first_round = restored(checkpoint, self._bench, self._grid), checkpoint.ended + 1
            self.lines = self._record.lines()
            if self._simulated:
                self._simulated.begin(checkpoint.ended)
            trained = reports(self._record.folder, self.lines[-1]).get("train", ()) if self.lines else ()
            self._bench.strategy.norms = {c["client"]: c["update_norm"] for c in trained if c.get("update_norm")}
        if self._observer:
            self._observer.begin(self._bench, first_round)
        return arrays, first_round

    def _checkpoint(self, record: RunRecord) -> Checkpoint | None:
        """Return where the run goes on: its own last checkpoint, or the end of a shorter run's that has finished."""
        if self._here:
            _require_clients_here(record)
            further.begin(record, self._data, (*SCORES, "central", "diagnostics"))
        checkpoint = record.load_checkpoint(self._data)
        if checkpoint and self._here and checkpoint.ended == self._bench.num_rounds:
            self.last = checkpoint
        return checkpoint

    def round(self, report: RoundReport, arrays: ArrayRecord) -> None:
        """Take down one round."""
        if listener := self._sites or self._simulated:
            listener.note(report)
        config, beside = self._bench.config.evaluate, Document()
        if report.evaluate and config.diagnostics:
            beside["diagnostics"] = diagnose(self._bench, self._grid, report, arrays)
        if report.evaluated and self._bench.central:
            beside["central"] = self._bench.central.scores(self._bench, arrays)
        if self._bench.trainee.trainable.head:
            beside["head_norm"] = self._bench.trainee.trainable.head_norm(unpack(arrays))
        beside |= self._bench.after_round(self._grid, report.server_round, arrays)
        large = in_table(self._grid)
        if large:
            large.end_round(report.server_round)
        line = round_line(report, self._bench.strategy.expected) | finite(beside)
        # Of many clients, memory does not grow with the rounds.
        self.lines.append({key: value for key, value in line.items() if key != "clients"} if large else line)
        if self._record:
            self._keep(self._record, line, arrays)
        if self._simulated:
            self._simulated.ended = report.server_round
        if self._observer:
            self._observer.round(line)

    def _keep(self, record: RunRecord, line: Document, arrays: ArrayRecord) -> None:
        """Write a round's line, and a checkpoint where it is time for one."""
        number = line["round"]
        record.append_line(line)
        if "events" in line:  # sites that have joined are part of what is known of the run
            record.describe(describe(self._bench))
        if not self._keeps:
            return
        self._pending = taken(number, arrays, self._bench, self._grid, self._data)
        if number == self._bench.num_rounds and self._here:
            self.last = self._pending
        # Clients elsewhere can go back by one training and no more: their server keeps every round.
        if not self._here or number % self._bench.config.rounds.checkpoint_every == 0:
            self.close()

    def evaluate_again(self, arrays: ArrayRecord) -> None:
        """Evaluate the last round once more, whose evaluation lacked clients when the run was cut short by it."""
        strategy, last = self._bench.strategy, self.lines.pop()
        report = strategy.report = RoundReport(last["round"], sampled=tuple(last["sampled"]))
        messages = strategy.configure_evaluate(last["round"], arrays, ConfigRecord(), self._grid)
        strategy.aggregate_evaluate(last["round"], self._grid.send_and_receive(messages))
        again = round_line(report, strategy.expected)
        kept = [rejection for rejection in last["rejected"] if not rejection["reason"].startswith("evaluation")]
        before = reports(self._record.folder, self._record.lines()[-1]) if self._record else last["clients"]
        clients = {**before, "evaluate": again["clients"]["evaluate"]}
        line = {key: value for key, value in last.items() if key not in SCORES}
        line |= {key: again[key] for key in SCORES if key in again}
        self.lines.append({**line, "rejected": kept + again["rejected"], "clients": clients})
        if self._record:
            self._record.keep_lines(len(self.lines) - 1)
            self._record.append_line(self.lines[-1])

    def close(self) -> None:
        """Write the last round's checkpoint where that is not done: a run that ends, well or not, keeps its rounds."""
        if self._record and self._pending:
            checkpoint, self._pending = self._pending, None
            self._record.save_checkpoint(checkpoint)


def _document(
    grid: Grid, bench: Workbench, record: RunRecord | None, about: Document, lines: list[Document], arrays: ArrayRecord
) -> Document:
    last = lines[-1]
    require_answered(last, bench.config.rounds.min_answered, lines, bench.strategy.remedy(last["round"]))
    if not last.get("per_domain"):
        reasons = shown((r["client"], r["reason"]) for r in last["rejected"])
        raise IncompleteError(
            f"No client could be evaluated after the last round ({reasons or 'there are no images to score'}). The "
            "record keeps the round."
        )
    own = {key: last[key] for key in ("per_domain", "mean", "worst")}
    strategy = bench.strategy
    strategy.discover(grid)
    seen = evaluated(
        strategy.known.seen,
        bench.config.evaluate.clients,
        sampled=last["sampled"],
        expected=strategy.expected,
        seed=strategy.seed,
    )
    standing = {key: last[key] for key in ("answered", "missing") if key in last}
    least, known = bench.config.rounds.min_answered, own | (standing if "missing" in standing else {})
    matrix = EvaluationMatrix(strategy, grid, arrays, bench.config.evaluate, known, min_answered=least, seen=seen)
    evaluation = matrix.run()
    adaptation = adapted(matrix, config=bench.config.evaluate, model=bench.model)
    beside = bench.measures(lines)
    return {
        "kind": bench.config.kind,
        **about,
        "rounds": [{key: value for key, value in line.items() if key != "clients"} for line in lines],
        "final": {
            **own,
            **standing,
            **({"central": last["central"]} if "central" in last else {}),
            "round": last["round"],
            "selection": f"last round, {bench.config.evaluate.split} images{of_which(bench.config.evaluate.clients)}",
            **({"best_round": best_round(lines)} if bench.config.evaluate.best_round else {}),
            **beside.pop("final", {}),
        },
        **beside,
        "evaluation": evaluation,
        **({"adaptation": adaptation} if adaptation else {}),
        **({"rejected_in_evaluation": matrix.rejected_replies()} if matrix.rejected else {}),
        "bytes_of_locals_for_evaluation": matrix.bytes_of_locals,
        "seconds": sum(line["seconds"] for line in lines),
        "rejected_updates": sum(len(line["rejected"]) for line in lines),
        "run": str(record.folder) if record else None,
        "hash": bench.config.hash,
        "config": bench.config.to_dict(),
        "own_norm": bench.config.norm.name == bench.config.strategy.card.own_norm,
    }


SCORES = ("per_domain", "mean", "worst", "validation", "answered", "missing")
"""What a round's line says of its evaluation."""


def round_line(report: RoundReport, expected: Mapping[int, Expected] | None = None) -> Document:
    """Return one round as a line of the record; numbers that are none are null."""
    line: Document = {
        "round": report.server_round,
        "sampled": list(report.sampled),
        "train_loss": mean_metric(report.train, "loss"),
        "train_accuracy": mean_metric(report.train, "accuracy"),
        "rejected": [{"client": partition_id, "reason": reason} for partition_id, reason in report.rejected],
        "bytes_down": report.bytes_down,
        "bytes_up": report.bytes_up,
        "seconds": round(report.seconds, 4),
        "clients": {
            "train": [_of_client(r) for r in report.train],
            "evaluate": [_of_client(r) for r in report.evaluate],
        },
    }
    if report.evaluate:
        scored = ((r.domain, r.metrics["num-examples"], r.metrics["accuracy"]) for r in report.evaluate)
        line |= summarize(by_domain(scored))
        line |= held_back_scores(report.evaluate)
    if report.events:
        line["events"] = report.events
    if report.evaluated:
        line |= answers(_asked(expected or {}, report.scored), {r.partition_id for r in report.evaluate}).document()
    return typing.cast(Document, finite(line))


def _asked(expected: Mapping[int, Expected], scored: Sequence[int] | None) -> Mapping[int, Expected]:
    return expected if scored is None else {pid: expected[pid] for pid in scored if pid in expected}


def _of_client(report: ClientReport) -> Document:
    own: Document = {"client": report.partition_id, "domain": report.domain}
    if report.update_norm is not None:
        own["update_norm"] = report.update_norm
    return own | {key: value for key, value in report.metrics.items() if key not in own}


def _record_from_context(context: Context, config: RunConfig) -> RunRecord | None:
    runs = str(context.run_config.get("runs", ""))
    return RunRecord(Path(runs), config) if runs else None


class _Log:
    """Tells Flower's log how a run goes; ``flwr run --stream`` shows it."""

    def begin(self, bench: Workbench, first_round: int) -> None:
        config = bench.config
        log.info("fednorm: %s + %s from round %d", config.strategy.name, config.norm.name, first_round)

    def round(self, line: Mapping[str, Any]) -> None:
        keys = ("train_loss", "per_domain", "mean", "worst", "central", "missing")
        shown = {key: line[key] for key in keys if key in line}
        log.info("fednorm: round %d: %s", line["round"], shown)


app = make_server_app(process_workbench, _record_from_context, _Log())
"""The ServerApp that Flower's runtimes load."""
