"""The page's text and its document: numbers against the results, escapes, sizes, and what is said of what is absent."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fednorm.config import RunConfig
from fednorm.errors import RecordError, UnknownNameError
from fednorm.records.results import Loaded
from fednorm.report import page_data
from fednorm.report.page import SCRIPTS, embeddable, page, write_page
from fednorm.report.page_data import document
from fednorm.report.page_size import number
from fednorm.report.sections import sections

LAYERS = ("norm1", "norm2")
TENSORS = [
    {"key": "conv.weight", "layer": "conv", "norm": "", "kind": "weight", "role": "shared", "shape": [4], "bytes": 16},
    {"key": "norm1.running_mean", "layer": "norm1", "norm": "batch_norm", "kind": "mean", "role": "local",
     "shape": [4], "bytes": 16},
]  # fmt: skip


def federated(
    strategy: str = "fedavg",
    seed: int = 1,
    scores: Mapping[str, float] | None = None,
    *,
    rounds: int = 3,
    diagnostics: bool = True,
    tensors: bool = True,
    layers: Sequence[str] = LAYERS,
    title: str = "two domains",
    digest: str = "d",
) -> dict[str, Any]:
    """A federated result whose accuracy grows in proportion to the round, and whose drift is round + layer + domain."""
    scores = scores or {"mnist": 0.9, "usps": 0.6}
    config: dict[str, Any] = {**RunConfig.defaults("federated").to_dict(), "seed": seed, "strategy": {"name": strategy}}
    config["norm"] = {"name": "batch_norm"}
    lines: list[dict[str, Any]] = []
    for count in range(1, rounds + 1):
        per_domain = {domain: value * count / rounds for domain, value in scores.items()}
        line = {
            "round": count,
            "train_loss": 1 / count,
            "train_accuracy": 0.5,
            "bytes_down": 100,
            "bytes_up": 100,
            "per_domain": per_domain,
            "mean": sum(per_domain.values()) / len(per_domain),
            "worst": min(per_domain.values()),
        }
        if diagnostics:
            line["diagnostics"] = {
                "drift": {
                    domain: {layer: count + 0.1 * i + 0.01 * j + seed for i, layer in enumerate(layers)}
                    for j, domain in enumerate(scores)
                },
                "weight_norm": dict.fromkeys(layers, 2.0 * count),
                "effective_learning_rate": dict.fromkeys(layers, 0.1 / count**2),
            }
        lines.append(line)
    final = {key: lines[-1][key] for key in ("per_domain", "mean", "worst")}
    return {
        "kind": "federated",
        "hash": hashlib.sha256(f"{strategy} {seed} {title}".encode()).hexdigest()[:12],
        "config": config,
        "norm": {"name": "batch_norm"},
        "strategy": {"name": strategy},
        "parameters": 1234,
        "plan": {"shared": 1, "local": 1, "pooled": 0, "reset": 0, "bytes_per_round": 200}
        | ({"bytes": {"shared": 16, "local": 16, "pooled": 0, "reset": 0}, "tensors": TENSORS} if tensors else {}),
        "data": {"title": title, "notes": ["Made up."], "clients": [], "digest": digest},
        "rounds": lines,
        "final": {**final, "round": rounds, "selection": "last round, test images"},
        "evaluation": {"own": final},
        "seconds": 12.5,
    }


def loaded(*results: dict[str, Any], studies: Sequence[dict[str, Any]] = (), problems: Sequence[str] = ()) -> Loaded:
    return Loaded(list(results), list(problems), list(studies))


def made(of: Loaded) -> dict[str, Any]:
    """The document of some results, as the page's scripts read it."""
    return dict(json.loads(embeddable(document(of, sections(of)))))


class Page(HTMLParser):
    """What a browser's parser makes of a page: the tags with their attributes, and the scripts' texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.shown = ""
        self._within = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._within = tag if tag in ("script", "style") else ""
        if self._within:
            (self.scripts if tag == "script" else self.styles).append("")

    def handle_endtag(self, tag: str) -> None:
        self._within = "" if tag == self._within else self._within

    def handle_data(self, data: str) -> None:
        if self._within:
            (self.scripts if self._within == "script" else self.styles)[-1] += data
        else:
            self.shown += data


def written(path: Path, of: Loaded, **arguments: Any) -> Page:
    write_page(path / "page.html", of, **arguments)
    return Page((path / "page.html").read_text(encoding="utf-8"))


def test_scores_and_curves_are_those_of_the_results() -> None:
    second = federated("fedavg", 2, {"mnist": 0.8, "usps": 0.4})
    found = made(loaded(federated("fedavg", 1), second, federated("fedbn")))
    (section,) = found["sections"]
    assert (section["kind"], section["headline"], section["split"]) == ("federated", "mean", "test")
    assert [method["label"] for method in section["methods"]] == ["fedavg", "fedbn"]
    n, mean, std, low, high = section["methods"][0]["scores"]["mean"]
    assert (n, mean) == (2, 0.675)  # of (0.9 + 0.6) / 2 and (0.8 + 0.4) / 2
    assert std == pytest.approx(0.15 / math.sqrt(2), rel=1e-3)
    half = 12.7062 * std / math.sqrt(2)  # Student's t, 1 degree of freedom, 97.5 %
    assert 0.675 - half < 0
    assert 0.675 + half > 1
    assert (low, high) == (0, 1)  # no mean of accuracies lies beyond
    assert section["methods"][1]["scores"]["mean"][2:] == [None, None, None]
    run = section["runs"][1]
    assert (run["method"], run["seed"], run["final"]["per_domain.usps"], run["bytes"]) == (0, 2, 0.4, 200)
    grid, values = run["series"]["per_domain.mnist"]
    assert found["grids"][grid] == [1, 2, 3]
    assert values == pytest.approx([0.8 / 3, 1.6 / 3, 0.8], rel=1e-11)
    assert {quantity["key"]: quantity["label"] for quantity in section["quantities"]}["per_domain.mnist"] == "mnist"


def test_drift_is_kept_by_domain_layer_and_round() -> None:
    found = made(loaded(federated("fedbn", 3)))
    drift = found["sections"][0]["runs"][0]["layers"]["drift"]
    assert (drift["domains"], found["layers"][drift["layers"]]) == (["mnist", "usps"], ["norm1", "norm2"])
    assert found["times"][drift["times"]] == [1, 2, 3]
    assert drift["values"][1][0] == [4.01, 5.01, 6.01]  # usps, norm1: round + 0.01 + seed
    assert drift["values"][0][1] == [4.1, 5.1, 6.1]  # mnist, norm2
    norms = found["sections"][0]["runs"][0]["layers"]["weight_norm"]
    assert "domains" not in norms
    assert norms["values"] == [[2.0, 4.0, 6.0]] * 2


def test_what_runs_share_is_stored_once() -> None:
    results = [federated(strategy, seed) for strategy in ("fedavg", "fedbn") for seed in (1, 2, 3)]
    found = made(loaded(*results))
    assert (len(found["configs"]), len(found["plans"]), len(found["layers"])) == (2, 1, 1)
    assert (len(found["grids"]), len(found["times"])) == (1, 1)
    config = {key: (text, default) for key, text, default in map(found["settings"].__getitem__, found["configs"][1])}
    assert config["strategy.name"] == ("fedbn", False)
    assert config["train.batch_size"][1] is True
    assert config.keys().isdisjoint({"seed", "data.dir"})


def test_a_stream_has_its_matrix_and_averages_over_what_was_seen(stream_result: Callable[..., dict[str, Any]]) -> None:
    matrix = [[0.9, 0.1, None], [0.5, 0.8, None], [0.3, 0.6, 0.9]]
    diagnostics = [{"dead_units": {"a": 0.1, "b": 0.3}, "entropy_rank": 7.25, "drift": {}}] * 3
    found = made(loaded(stream_result(matrix=matrix, diagnostics=diagnostics)))
    run = found["sections"][0]["runs"][0]
    assert run["matrix"] == matrix
    assert run["series"]["average"][1] == [0.9, 0.65, 0.6]
    grid, values = run["series"]["experience.1"]
    assert (found["grids"][grid], values) == ([1, 2, 3], [0.1, 0.8, 0.6])
    assert run["series"]["plasticity.dead_units"][1] == [0.2, 0.2, 0.2]
    assert run["series"]["plasticity.entropy_rank"][1] == [7.25] * 3
    assert run["layers"] == {}


def test_a_memorization_stream_is_about_plasticity(memorized: Callable[..., dict[str, Any]]) -> None:
    (section,) = made(loaded(memorized([0.9, 0.8, 0.7])))["sections"]
    assert (section["kind"], section["headline"]) == ("memorization", "plasticity")
    assert section["runs"][0]["series"]["plasticity.train_accuracy"][1] == [0.9, 0.8, 0.7]
    assert not [key for key in section["runs"][0]["series"] if key.startswith(("average", "experience"))]


def test_a_summary_makes_a_page_too(tmp_path: Path) -> None:
    small = federated(diagnostics=False, tensors=False)
    small["rounds"] = [{k: line[k] for k in ("round", "mean", "bytes_down", "bytes_up")} for line in small["rounds"]]
    run = made(loaded(small))["sections"][0]["runs"][0]
    assert (list(run["series"]), run["layers"], "evaluation" in run) == (["mean"], {}, False)
    written(tmp_path, loaded(small))


def test_differences_papers_and_titles_come_from_the_study() -> None:
    results = [federated("fedavg", 1), federated("fedbn", 1, {"mnist": 0.8, "usps": 0.8})]
    study = {
        "study": "s", "title": "A study", "about": "About it.", "baseline": {"strategy": {"name": "fedavg"}},
        "paper": [{"match": {"strategy": {"name": "fedbn"}}, "score": "mean", "value": 0.85, "source": "Table 1"}],
        "selection": None, "runs": [result["hash"] for result in results], "selection_runs": [],
    }  # fmt: skip
    found = made(loaded(*results, studies=[study], problems=["x was left out."]))
    assert (found["title"], found["sections"][0]["about"]) == ("A study", "About it.")
    assert found["problems"] == ["x was left out."]
    assert found["sections"][0]["verdict"] == "fedbn +5.0 over fedavg, one seed: no interval; 5.0 below the paper"
    (section,) = found["sections"]
    fedbn = section["methods"][1]
    assert (section["baseline"], fedbn["baseline"]) == ("fedavg", "fedavg")
    assert fedbn["differences"]["mean"] == [1, 0.05, None, None, 1, 0, 0]
    assert fedbn["paper"]["mean"] == {"value": 0.85, "std": None, "source": "Table 1", "deviation": -0.05, "mark": ""}
    assert section["methods"][0]["differences"] == {}


def test_the_evaluation_matrix_is_flat() -> None:
    result = federated()
    own = {"mnist": 0.9, "usps": 0.6}
    result["evaluation"] = {
        "own": {"per_domain": own, "mean": 0.75},
        "cross": {"under": {"mnist (client 0)": {"per_domain": {"mnist": 0.9, "usps": 0.123456}, "mean": 0.5}}},
        "averaged": {"not_applicable": "no running statistics"},
    }
    run = made(loaded(result))["sections"][0]["runs"][0]
    assert run["evaluation"] == [
        ["own", own],
        ["cross, statistics of mnist (client 0)", {"mnist": 0.9, "usps": 0.123456}],
    ]


@given(st.floats(-1e300, 1e300) | st.sampled_from([math.nan, math.inf, -math.inf]))
def test_numbers_have_the_digits_that_texts_round_from_or_are_null(value: float) -> None:
    found = number(value)
    if math.isfinite(value):
        assert found == pytest.approx(value, rel=5e-12)
        assert float(f"{found:.11e}") == found
    else:
        assert found is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@given(st.recursive(st.text() | st.none() | st.booleans() | st.integers(), lambda x: st.dictionaries(st.text(), x)))
def test_embedded_json_is_the_same_document_and_no_markup(value: Any) -> None:
    text = embeddable({"value": value, "evil": "</script><!--<script>"})
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text)["value"] == value


def test_embedding_refuses_what_json_has_not() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        embeddable({"value": math.nan})


def test_the_page_is_whole_and_asks_for_nothing(tmp_path: Path) -> None:
    of = loaded(federated("fedavg", 1), federated("fedavg", 2), federated("fedbn", 1))
    found = written(tmp_path / "new" / "folder", of)
    asked = [attributes for _, attributes in found.tags if {"src", "srcset", "action", "data"} & set(attributes)]
    links = [attributes["href"] for tag, attributes in found.tags if tag == "link"]
    assert (asked, links) == ([], ["data:,"])
    assert "url(" not in found.styles[0]
    assert "@import" not in found.styles[0]
    policy = next(a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    types = [attributes.get("type") for tag, attributes in found.tags if tag == "script"]
    assert types == ["application/json", None, "text/plain"]
    assert json.loads(found.scripts[0])["count"] == 3
    assert "Plotly" in found.scripts[2]
    assert "fedbn" in found.shown  # the table for readers without scripts


EVIL = "</script><script>alert('&1')</script><!--<img src=x onerror=alert(2)>"


def test_text_of_records_is_never_markup(tmp_path: Path) -> None:
    result = federated(EVIL, 1, {EVIL: 0.5, "usps": 0.6}, title=EVIL)
    result["data"]["notes"] = [EVIL]
    study = {"study": "s", "title": EVIL, "about": EVIL, "paper": [], "runs": [result["hash"]], "selection_runs": []}
    plain = written(tmp_path, loaded(federated()))
    found = written(tmp_path, loaded(result, studies=[study], problems=[EVIL]))
    assert len(found.scripts) == len(plain.scripts) == 3
    assert [tag for tag, _ in found.tags if tag == "img"] == []
    assert EVIL in found.shown
    data = json.loads(found.scripts[0])
    assert data["title"] == EVIL
    assert data["sections"][0]["methods"][0]["label"] == EVIL


def test_scripts_never_read_text_as_markup() -> None:
    assets = Path(page_data.__file__).parent / "assets"
    assert {path.name for path in assets.glob("*.js")} == set(SCRIPTS)
    for name in SCRIPTS:
        text = (assets / name).read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
        assert not re.search(r"fetch\(|XMLHttpRequest|https?://", text), name
        assert "</script" not in text
        assert "<!--" not in text
        assert len(text.splitlines()) <= 300


def test_runs_are_linked_from_where_the_page_lies(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a run"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    there, gone = federated("fedavg", 1), federated("fedavg", 2)
    there["run"], gone["run"] = str(folder), str(tmp_path / "runs" / "gone")
    found = written(tmp_path / "pages", loaded(there, gone))
    runs = json.loads(found.scripts[0])["sections"][0]["runs"]
    assert [(run["folder"], run["link"]) for run in runs] == [("a run", "../runs/a run"), ("gone", None)]
    assert str(tmp_path) not in "".join(found.scripts[:2])


def test_several_comparisons_are_sections_of_one_page(stream_result: Callable[..., dict[str, Any]]) -> None:
    found = made(loaded(federated(title="one"), federated(title="two"), stream_result()))
    assert [section["title"] for section in found["sections"]] == ["one", "two", "Split CIFAR-10 (5×2)"]
    assert [section["id"] for section in found["sections"]] == ["one", "two", "split-cifar-10"]
    assert [section["name"] for section in found["sections"]] == ["one", "two", "Split CIFAR-10"]
    assert found["title"] == "one, two and 1 more"


def test_each_study_has_a_section_of_its_own_and_what_is_of_none_comes_last() -> None:
    results = [federated(strategy, seed) for strategy in ("fedavg", "fedbn", "silobn") for seed in (1, 2)]
    of = {name: [r["hash"] for r in results if r["strategy"]["name"] in names] for name, names in
          {"first": ("fedavg", "fedbn"), "second_study": ("fedavg",)}.items()}  # fmt: skip
    studies = [
        {"study": name, "title": f"Study {name}", "about": f"{name}.", "paper": [], "runs": runs, "selection_runs": [],
         "baseline": {"strategy": {"name": "fedavg"}}} for name, runs in of.items()
    ]  # fmt: skip
    found = made(loaded(*results, studies=studies))
    assert [section["id"] for section in found["sections"]] == ["first", "second-study", "two-domains"]
    assert [section["name"] for section in found["sections"]] == ["Study first", "Study second_study", "two domains"]
    assert [[method["label"] for method in section["methods"]] for section in found["sections"]] == [
        ["fedavg", "fedbn"], ["fedavg"], ["silobn"],
    ]  # fmt: skip
    names = [run["id"] for section in found["sections"] for run in section["runs"]]
    assert len(set(names)) == len(names) == 8
    assert found["count"] == 6
    assert names[0] == f"run-{results[0]['hash']}"


def test_a_baseline_that_no_study_has_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="baseline"):
        sections(loaded(federated()), baseline="nobody")


def test_only_a_best_mean_that_seeds_tell_from_all_others_is_bold() -> None:
    seeds = (1, 2, 3)
    first = [federated("fedavg", seed, {"mnist": 0.5 + seed / 100, "usps": 0.6}) for seed in seeds]
    second = [federated("fedbn", s, {"mnist": 0.7 + s / 90, "usps": 0.6 + (-1) ** s / 50}) for s in seeds]
    (section,) = made(loaded(*first, *second))["sections"]
    best = {score["key"]: score["best"] for score in section["scores"]}
    assert (best["per_domain.mnist"], best["per_domain.usps"]) == (1, None)
    (section,) = made(loaded(federated("fedavg"), federated("fedbn", 1, {"mnist": 1.0, "usps": 1.0})))["sections"]
    assert {score["best"] for score in section["scores"]} == {None}  # one seed tells nothing


@pytest.mark.slow
def test_500_runs_stay_below_10_megabytes_and_say_what_was_thinned(tmp_path: Path) -> None:
    layers = [f"layer{i}.norm" for i in range(10)]
    long = federated(rounds=25, layers=layers, scores={f"domain {i}": 0.5 + i / 100 for i in range(5)})
    configs = [
        {**long["config"], "seed": seed, "strategy": {"name": f"method{i}"}} for i in range(100) for seed in range(5)
    ]
    results = [{**long, "hash": f"{i:012x}", "config": config} for i, config in enumerate(configs)]
    of = loaded(*results)
    parts = sections(of)
    found = document(of, parts)
    text = page(found, [part.comparison for part in parts], folder=tmp_path)
    assert 5_000_000 < len(text.encode()) < 10_000_000
    assert {run["hash"] for run in found["sections"][0]["runs"]} == {result["hash"] for result in results}
    assert len(found["sections"][0]["methods"]) == 100
    run = found["sections"][0]["runs"][-1]
    assert run["final"]["per_domain.domain 4"] == 0.54
    rounds = found["times"][run["layers"]["drift"]["times"]]
    assert (rounds[0], rounds[-1]) == (1, 25)
    drift = run["layers"]["drift"]["values"][2][3]
    assert (len(drift), drift[0], drift[-1]) == (len(rounds), 2.32, 26.32)  # round + layer + domain + seed 1
    assert f"at most {len(rounds)}" in found["thinned"]


def test_nothing_is_said_of_thinning_where_there_is_none() -> None:
    assert made(loaded(federated()))["thinned"] is None


def test_a_page_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="at least one finished run"):
        write_page(tmp_path / "page.html", loaded())


def test_a_page_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match=r"Cannot write .*page.html"):
        write_page(tmp_path / "file" / "page.html", loaded(federated()))
