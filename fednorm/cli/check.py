"""``fednorm check``: a model's report as tables, as JSON, or a table of many models in Markdown."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from fednorm.cli.console import err, out, print_json
from fednorm.errors import ConfigError
from fednorm.inspection.model import ModelReport, NormVerdict, Step, StrategyVerdict, check
from fednorm.inspection.norm_survey import norm_page, norm_survey
from fednorm.inspection.survey import markdown_page, survey


def run_check(model: str | None, *, every: bool, norms: bool, markdown: bool, as_json: bool) -> None:
    """Check one model and show the report, or check the models of a survey: few norms on many, or all norms on some."""
    if (model is not None) + every + norms != 1:
        raise ConfigError(
            "Name a model, e.g. fednorm check torchvision:resnet18; or give --all for the survey of models, or --norms "
            "for that of norms."
        )
    if every or norms:
        rows = []
        for row in norm_survey() if norms else survey():
            rows.append(row)
            err().print(f"{len(rows)}: {row['model']}", markup=False)
        if as_json:
            return print_json({"models": rows})
        return out().print(norm_page(rows) if norms else markdown_page(rows), markup=False, soft_wrap=True)
    if markdown:
        raise ConfigError("--markdown is the form of the surveys: give it with --all or --norms.")
    assert model is not None
    report = check(model)
    if as_json:
        return print_json(report.to_dict())
    return show(report)


def show(report: ModelReport) -> None:
    """Print a report."""
    console = out()
    shape = "no input found" if report.input_shape is None else f"input (N, {', '.join(map(str, report.input_shape))})"
    console.print(f"{report.model}: {report.parameters:,} parameters, {shape}", markup=False)
    for kind, (count, norm) in report.layers.items():
        console.print(f"  {count} {kind} (norm {norm})", markup=False)
    if not report.step.ok:
        console.print(f"  one step of it fails: {report.step.failure}", markup=False, soft_wrap=True)
    console.print(_strategies(report.strategies))
    console.print(_norms(report.norms))


def _strategies(verdicts: tuple[StrategyVerdict, ...]) -> Table:
    table = Table("strategy", "state entries by role", "one round")
    for verdict in verdicts:
        plan = verdict.refusal
        if verdict.plan is not None:
            counts = {role: count for role, count in verdict.plan.items() if role != "bytes_per_round" and count}
            roles = ", ".join(f"{count} {role}" for role, count in counts.items())
            plan = f"{roles}; {verdict.plan['bytes_per_round'] / 1e6:.2f} MB a client and round"
        table.add_row(verdict.name, escape(plan), escape(_step(verdict.step)))
    return table


def _norms(verdicts: tuple[NormVerdict, ...]) -> Table:
    table = Table("convert to", "what it does", "one step")
    for verdict in verdicts:
        lines = [verdict.refusal] if verdict.refusal else [_done(verdict), *verdict.notes]
        table.add_row(verdict.name, escape("\n".join(lines)), escape(_step(verdict.step)))
    return table


def _done(verdict: NormVerdict) -> str:
    parts = {
        "layers replaced": len(verdict.layers),
        "inserted": len(verdict.inserted),
        "convolutions rebuilt": verdict.convolutions,
        "left": len(verdict.left),
    }
    return ", ".join(f"{count} {what}" for what, count in parts.items() if count)


def _step(step: Step) -> str:
    return step.failure or ("works" if step.loss is None else f"loss {step.loss:.3g}")
