"""The page in a real browser, headless Chromium: it opens without an error, sorts, filters, switches."""

from __future__ import annotations

import colorsys
import hashlib
import html
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from urllib.parse import unquote

import pytest

import fednorm
from fednorm.config import RunConfig
from fednorm.records.results import Loaded
from fednorm.report.page import write_page

EVIL = "<script>window.hacked=1</script><img src=x onerror='window.hacked=2'>&amp;"
METHODS = {"fedavg": 0.70, "fedbn": 0.80, EVIL: 0.75}
DOMAINS = {"mnist": 0.1, "usps": -0.1, "a < b & c": 0.0}
SEEDS = (1, 2, 3)
ROUNDS = 4
TENSORS = [
    {"key": f"{key}", "layer": "norm1", "norm": "batch_norm", "kind": kind, "role": role, "shape": [4], "bytes": 16}
    for key, kind, role in [("norm1.weight", "scale", "shared"), ("norm1.running_mean", "mean", "local")]
]
GAIN = {**TENSORS[0], "key": "norm1.gain"}


def accuracy(strategy: str, domain: str, seed: int, number: int = ROUNDS) -> float:
    return (METHODS[strategy] + DOMAINS[domain] + seed / 100) * number / ROUNDS


def drift(domain: str, layer: int, seed: int, number: int) -> float:
    return number + layer / 10 + list(DOMAINS).index(domain) / 100 + seed


def federated(strategy: str, seed: int) -> dict[str, Any]:
    config = {
        **RunConfig.defaults("federated").to_dict(),
        "seed": seed,
        "strategy": {"name": strategy},
        "norm": {"name": "batch_norm"},
    }
    lines: list[dict[str, Any]] = []
    for number in range(1, ROUNDS + 1):
        scores = {domain: accuracy(strategy, domain, seed, number) for domain in DOMAINS}
        measured = {
            "drift": {d: {f"norm{i}": drift(d, i, seed, number) for i in (1, 2)} for d in DOMAINS},
            "weight_norm": {"conv1": 2.0 * number, "conv2": 8.0 * number},
            "effective_learning_rate": {"conv1": 0.1 / number, "conv2": 0.4 / number},
        }
        line = {"round": number, "train_loss": 1 / number, "bytes_down": 100, "bytes_up": 100, "per_domain": scores}
        lines.append({**line, "mean": mean(scores.values()), "worst": min(scores.values()), "diagnostics": measured})
    final = {key: lines[-1][key] for key in ("per_domain", "mean", "worst")}
    return {
        "kind": "federated",
        "hash": hashlib.sha256(f"{strategy} {seed}".encode()).hexdigest()[:12],
        "config": config,
        "parameters": 1234,
        "plan": {"shared": 1, "local": 1, "bytes_per_round": 200, "bytes": {"shared": 16, "local": 16},
                 "tensors": [TENSORS[0], GAIN] if strategy == "fedbn" else TENSORS},
        "data": {"title": f"Three domains {EVIL}", "notes": [EVIL], "clients": []},
        "rounds": lines,
        "final": {**final, "round": ROUNDS, "selection": "last round, test images"},
        "evaluation": {"own": final, EVIL: final},
        "seconds": 12.5,
        "run": f"runs/{EVIL}",
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, stream_result: Callable[..., dict[str, Any]]) -> Path:
    """A page of two comparisons: a federated study, and two runs of a stream, one without running statistics."""
    study = [federated(strategy, seed) for strategy in METHODS for seed in SEEDS]
    inside = {"dead_units": {"act1": 0.25}, "weight_norm": {"conv1": 2.0}, "effective_learning_rate": {"conv1": 0.1}}
    streams = [
        stream_result(diagnostics=[{**inside, "drift": {"norm1": 0.1}}, {**inside, "drift": {"norm1": 0.2}}]),
        stream_result(norm={"name": "group_norm"}, diagnostics=[{**inside, "drift": {}}] * 2),
    ]
    manifest = {
        "study": "study", "title": f"A study {EVIL}", "about": EVIL, "baseline": {"strategy": {"name": "fedavg"}},
        "paper": [], "selection": None, "runs": [result["hash"] for result in study], "selection_runs": [],
    }  # fmt: skip
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(path, Loaded([*study, *streams], [f"damaged.json was left out: {EVIL}"], [manifest]))
    return path


class Reader:
    """A reader of the page: looks, clicks and types; every test starts with the page as it opens."""

    def __init__(self, driver: Any, path: Path) -> None:
        self.driver = driver
        driver.get("about:blank")
        driver.get(path.as_uri())

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, 20, poll_frequency=0.05).until(lambda _: condition(), message=what)

    def draw_all(self) -> None:
        """Scroll past every chart of the panel in view."""
        for number in range(len(self.all("[role=tabpanel]:not([hidden]) figure"))):
            figure = f"document.querySelectorAll('[role=tabpanel]:not([hidden]) figure')[{number}]"
            self.js(f"{figure}.scrollIntoView()")
            self.until(partial(self.js, f"return {figure}.dataset.drawn"), "a chart")

    def choose(self, selector: str, value: str) -> None:
        self.js(
            "const s = document.querySelector(arguments[0]); s.value = arguments[1];"
            "s.dispatchEvent(new Event('change', {bubbles: true}))",
            selector,
            value,
        )

    def rows(self) -> list[str]:
        """The methods of the visible table, from top to bottom."""
        code = (
            "return [...document.querySelectorAll('[role=tabpanel]:not([hidden]) .comparison tbody:not([hidden])')]"
            ".map((body) => body.querySelector('.name > span:last-child').textContent)"
        )
        return list(self.js(code))

    def traces(self, block: str, number: int = 0) -> list[dict[str, Any]]:
        """What the chart in a block draws, once it is drawn as it should be by now."""
        figure = f"document.querySelectorAll('{block} figure')[{number}]"
        self.js(f"{figure}.scrollIntoView()")
        self.until(lambda: self.js(f"const c = {figure}; return c.dataset.drawn && !c.chart.stale"), "a chart")
        read = "return {x: t.x, y: t.y, z: t.z, name: t.name, meta: t.meta, colour: t.line?.color}"
        code = f"return ({figure}.querySelector('.plot').data ?? []).map((t) => {{ {read} }})"

        def settled() -> Any:
            before = self.js(code)
            self.driver.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 30))")
            return [before] if before == self.js(code) else None

        return list(self.until(settled, "a chart that stands still")[0])

    def means(self, block: str, number: int = 0) -> dict[str, list[float]]:
        return {trace["name"]: trace["y"] for trace in self.traces(block, number) if trace["meta"] == "mean"}


@pytest.fixture
def reader(chromium: Any, page: Path) -> Iterator[Reader]:
    yield Reader(chromium, page)
    log = [entry for entry in chromium.get_log("browser") if entry["level"] != "INFO"]
    assert log == []  # of whatever the test did


@pytest.mark.slow
def test_it_opens_draws_every_chart_and_asks_the_network_for_nothing(reader: Reader) -> None:
    for tab in reader.all("[role=tab]"):
        tab.click()
        reader.draw_all()
    assert {figure.get_attribute("data-drawn") for figure in reader.all("figure")}.isdisjoint({None, "absent"})
    assert len(reader.all("figure .main-svg")) >= len(reader.all("figure"))
    assert reader.js("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []


@pytest.mark.slow
def test_it_sorts_by_any_column_either_way(reader: Reader) -> None:
    best_first = sorted(METHODS, key=lambda name: -METHODS[name])
    assert reader.rows() == best_first
    heads = reader.all(".comparison thead button")
    assert [head.text for head in heads[:2]] == ["method", "mean accuracy"]
    usps = next(head for head in heads if head.text == "usps")
    usps.click()
    assert reader.rows() == best_first
    usps.click()
    assert reader.rows() == best_first[::-1]
    sorts = [th.get_attribute("aria-sort") for th in reader.all("#study .comparison thead th")]
    assert sorts.count("none") == len(sorts) - 1
    assert sorts[[head.text for head in heads].index("usps")] == "ascending"
    heads[0].click()
    assert reader.rows() == [EVIL, "fedavg", "fedbn"]


@pytest.mark.slow
def test_it_filters_methods_and_runs(reader: Reader) -> None:
    field = reader.one("#study .comparing input[type=search]")
    field.send_keys("FED")
    assert sorted(reader.rows()) == ["fedavg", "fedbn"]
    assert reader.one("#study .comparing [role=status]").text == "2 of 3 methods"
    field.send_keys("bn")
    assert reader.rows() == ["fedbn"]
    reader.one("#study-runs input[type=search]").send_keys("fedavg seed 2")
    shown = [run.get_attribute("id") for run in reader.all("#study-runs .run") if run.is_displayed()]
    assert shown == [f"run-{federated('fedavg', 2)['hash']}"]


@pytest.mark.slow
def test_it_switches_domain_and_bands_are_students_interval(reader: Reader) -> None:
    over_domains = mean(DOMAINS.values())
    assert reader.means("#study-learning")["fedbn"][-1] == pytest.approx(100 * (0.8 + 0.02 + over_domains), abs=0.02)
    reader.choose("#study-learning select", "per_domain.usps")
    for number, value in enumerate(reader.means("#study-learning")["fedbn"], start=1):
        assert value == pytest.approx(100 * mean(accuracy("fedbn", "usps", s, number) for s in SEEDS), abs=0.02)
    band = next(trace for trace in reader.traces("#study-learning") if trace["meta"] == "band")
    values = [100 * accuracy("fedavg", "usps", seed) for seed in SEEDS]
    half = 4.302653 * stdev(values) / math.sqrt(3)  # Student's t, 2 degrees of freedom, 97.5 %
    ends = [mean(values) + half, mean(values) - half]
    assert [band["y"][ROUNDS - 1], band["y"][ROUNDS]] == pytest.approx(ends, abs=1e-4)
    note = reader.one("#study-learning figure .note").text
    assert "mean over n = 3 seeds; band: 95 % t interval." in note
    reader.choose("#study-learning .pick:nth-of-type(2) select", "bytes")
    assert reader.traces("#study-learning")[1]["x"] == [200, 400, 600, 800]


@pytest.mark.slow
def test_a_method_that_is_not_chosen_is_in_no_chart_and_stays_in_the_table(reader: Reader) -> None:
    assert set(reader.means("#study-learning")) == {"fedavg", "fedbn", html.escape(EVIL, quote=False)}
    reader.js("arguments[0].click()", next(chip for chip in reader.all("#study .chip") if chip.text.endswith("fedbn")))
    for block, number in (("#study-learning", 0), ("#study-layers", 0)):
        assert "fedbn" not in reader.means(block, number)
        assert "fedavg" in reader.means(block, number)
    assert "fedbn" in reader.rows()
    for chosen in reader.all("#study .chip input:checked"):
        reader.js("arguments[0].click()", chosen)
    assert reader.traces("#study-learning") == []
    assert "No method is chosen" in reader.one("#study-learning .note").text


@pytest.mark.slow
def test_every_number_leads_to_its_run(reader: Reader) -> None:
    body = next(b for b in reader.all("#study .comparison tbody") if b.text.startswith("■") or "fedbn" in b.text)
    button = body.find_element("css selector", ".seeds")
    assert button.get_attribute("aria-expanded") == "false"
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    run = federated("fedbn", 2)
    links = body.find_elements("css selector", f"a[href='#run-{run['hash']}']")
    assert [link.text for link in links[:2]] == ["seed 2", f"{100 * run['final']['mean']:.1f}"]
    assert len(links) == 1 + 2 + len(DOMAINS)  # the seed, the mean, the worst, every domain
    links[1].click()
    details = reader.one(f"#run-{run['hash']}")
    assert details.get_attribute("open") is not None
    reader.until(lambda: details.find_elements("css selector", "dl"), "the configuration")
    told = dict(
        zip(
            [term.get_attribute("textContent") for term in details.find_elements("css selector", "dt")],
            [text.get_attribute("textContent") for text in details.find_elements("css selector", "dd")],
            strict=True,
        )
    )
    assert (told["strategy.name"], told["seed"], told["parameters"]) == ("fedbn", "2", "1,234")
    assert told["train.batch_size"] == str(RunConfig.defaults("federated").train.batch_size)
    assert reader.js("return location.hash") == f"#run-{run['hash']}"


@pytest.mark.slow
def test_an_address_with_a_run_opens_that_run(reader: Reader, page: Path) -> None:
    run = federated(EVIL, 3)["hash"]
    reader.driver.get("about:blank")
    reader.driver.get(f"{page.as_uri()}#run-{run}")
    assert reader.one(f"#run-{run}").get_attribute("open") is not None


@pytest.mark.slow
def test_text_of_records_does_nothing(reader: Reader) -> None:
    for run in reader.all("#study-runs .run"):
        reader.js("arguments[0].open = true", run)
    reader.until(lambda: len(reader.all("#study-runs .run-body")) == 9, "configurations")
    reader.traces("#study-learning")
    reader.traces("#study-evaluation")
    assert reader.js("return window.hacked ?? null") is None
    assert reader.all("main script, main img") == []
    assert EVIL in reader.one("h1").text
    assert EVIL in reader.one(".problems").text
    assert reader.rows().count(EVIL) == 1
    reader.traces("#study .first")
    labels = reader.js("return [...document.querySelectorAll('#study .first .ytick text')].map((t) => t.textContent)")
    assert "<script>" in " ".join(labels)


@pytest.mark.slow
def test_the_normalization_view_shows_drift_by_layer_domain_and_round(reader: Reader) -> None:
    at = [mean(drift(d, i, s, 4) for d in DOMAINS for i in (1, 2) for s in SEEDS)]
    assert reader.means("#study-layers")["fedavg"][-1:] == pytest.approx(at, rel=2e-3)
    reader.choose("#study-layers [data-layer] select", "norm2")
    reader.choose("#study-layers .controls > .pick:nth-of-type(3) select", "usps")
    at = [mean(drift("usps", 2, s, number) for s in SEEDS) for number in range(1, ROUNDS + 1)]
    assert reader.means("#study-layers")["fedavg"] == pytest.approx(at, rel=2e-3)
    assert reader.traces("#study-layers", 1)[0]["z"][1] == pytest.approx(at, rel=2e-3)
    reader.choose("#study-layers .controls > .pick:nth-of-type(4) select", "domains")
    by_domain = [mean(drift(d, 1, s, 4) for s in SEEDS) for d in DOMAINS]
    assert reader.traces("#study-layers", 1)[0]["z"][0] == pytest.approx(by_domain, rel=2e-3)
    reader.choose("#study-layers .pick select", "weight_norm")
    assert reader.means("#study-layers")["fedavg"] == pytest.approx(
        [4.0, 8.0, 12.0, 16.0]
    )  # the geometric mean of 2, 8


@pytest.mark.slow
def test_roles_and_bytes_are_told_tensor_by_tensor(reader: Reader) -> None:
    assert reader.traces("#study-roles")[0]["z"] == [[0, None, 2], [0, 0, None], [0, None, 2]]  # in the network's order
    assert "1 tensor\n16 B" in reader.one("#study-roles table tbody td").text
    reader.one("#study-roles details summary").click()
    reader.until(lambda: reader.all("#study-roles details tbody tr"), "the tensors")
    rows = [row.text.split() for row in reader.all("#study-roles details tbody tr")]
    assert rows == [
        ["norm1.weight", "batch_norm", "scale", "shared", "4", "16", "B"],
        ["norm1.running_mean", "batch_norm", "mean", "local", "4", "16", "B"],
    ]


@pytest.mark.slow
def test_a_stream_has_its_matrix_and_says_what_was_not_measured(reader: Reader) -> None:
    from selenium.webdriver.common.keys import Keys

    first, second = reader.all("[role=tab]")
    first.send_keys(Keys.ARROW_RIGHT)
    assert second.get_attribute("aria-selected") == "true"
    assert [panel.is_displayed() for panel in reader.all("[role=tabpanel]")] == [False, True]
    assert reader.traces("#split-cifar-10-matrix")[0]["z"] == [[90, 0], pytest.approx([50, 58.2])]
    assert set(reader.means("#split-cifar-10-layers")) == {"er_ace + batch_norm"}
    note = reader.one("#split-cifar-10-layers figure .note").text
    assert "Not measured: er_ace + group_norm (no running statistics there)." in note
    assert "One seed a method: no band." in note
    reader.choose("#split-cifar-10-plasticity select", "plasticity.dead_units")
    assert reader.means("#split-cifar-10-plasticity")["er_ace + batch_norm"] == [25, 25]


@pytest.mark.slow
def test_dark_follows_the_system_and_the_button(reader: Reader, page: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    code = f"return [{background}, document.querySelector('#study-learning .plot').layout.font.color]"
    reader.traces("#study-learning")
    light = reader.js(code)
    reader.one("#theme").click()
    reader.traces("#study-learning")
    assert all(one != other for one, other in zip(reader.js(code), light, strict=True))
    assert reader.one("#theme").text == "Light theme"
    reader.one("#theme").click()
    reader.traces("#study-learning")
    assert reader.js(code) == light
    reader.js("localStorage.clear()")
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    reader.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        reader.driver.get(page.as_uri())
        assert reader.js("return document.documentElement.dataset.theme") == "dark"
    finally:
        reader.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.slow
def test_on_a_phone_nothing_scrolls_sideways_but_tables(reader: Reader) -> None:
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    reader.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        reader.driver.refresh()
        for tab in reader.all("[role=tab]"):
            reader.js("arguments[0].click()", tab)
            reader.draw_all()
            assert reader.js("return document.documentElement.scrollWidth") <= 390
        reader.js("arguments[0].click()", reader.one("[role=tab]"))
        assert reader.js("return document.querySelector('#study .scroll').scrollWidth") > 390
    finally:
        reader.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
def test_a_keyboard_reaches_everything(reader: Reader) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(key: str) -> None:
        ActionChains(reader.driver).send_keys(key).perform()

    focused = "return document.activeElement.matches(arguments[0])"
    press(Keys.TAB)
    assert reader.js(focused, ".skip")
    assert reader.js("return document.activeElement.getBoundingClientRect().left") >= 0
    press(Keys.ENTER)
    for _ in range(40):
        press(Keys.TAB)
        if reader.js(focused, ".comparison thead button"):
            break
    assert reader.js("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    press(Keys.ENTER)
    assert reader.rows() == [EVIL, "fedavg", "fedbn"]  # by name
    controls = (
        "[...document.querySelectorAll('#study input, #study select, #study button, #study .scroll, #study summary')]"
    )
    assert reader.js(f"return {controls}.every((control) => control.tabIndex >= 0)")
    unnamed = (
        "return [...document.querySelectorAll('#study :is(input, select, button, a, .plot)')].filter((e) => "
        "!e.textContent.trim() && !e.ariaLabel && !(e.labels?.length && e.labels[0].textContent.trim())).length"
    )
    assert reader.js(unnamed) == 0


@pytest.mark.slow
def test_tabs_have_addresses_and_the_back_button_goes_back(reader: Reader) -> None:
    shown = "return document.querySelector('[role=tab][aria-selected=true]').textContent"
    assert [tab.text for tab in reader.all("[role=tab]")][1] == "Split CIFAR-10"
    assert [link.get_attribute("hash") for link in reader.all(".answers a")] == ["#study", "#split-cifar-10"]
    assert reader.one(".answers li span").text.startswith("fedbn +10.0 [10.0, 10.0] over fedavg, 3 of 3 seeds")
    reader.all("[role=tab]")[1].click()
    assert reader.js("return location.hash") == "#split-cifar-10"
    assert reader.js(shown) == "Split CIFAR-10"
    reader.driver.back()
    reader.until(lambda: reader.js(shown).startswith("A study"), "the first tab")
    contents = {link.text: link.get_attribute("hash") for link in reader.all("#study .contents a")}
    assert contents["Learning curves"] == "#study-learning"
    reader.all(".answers a")[1].click()
    reader.until(lambda: reader.js(shown) == "Split CIFAR-10", "the second tab")
    matrix = next(link for link in reader.all("#split-cifar-10 .contents a") if link.text == "Accuracy matrix")
    reader.js("arguments[0].click()", matrix)
    below = "return document.querySelector('#split-cifar-10-matrix h3').getBoundingClientRect().top"
    bar = "return document.querySelector('#split-cifar-10 .methods').getBoundingClientRect().bottom"
    reader.until(lambda: reader.js(bar) - 1 <= reader.js(below) < 500, "the heading, under the bar")


@pytest.mark.slow
def test_tables_are_copied_and_downloaded_and_charts_are_pictures(reader: Reader) -> None:
    reader.js(
        "window.saved = []; HTMLAnchorElement.prototype.click = function () { saved.push([this.download, this.href]) }"
    )
    reader.js("window.copies = []; navigator.clipboard.writeText = async (text) => void copies.push(text)")
    for kind in ("csv", "md", "tex"):
        reader.js(f"document.querySelector('#study [data-copy={kind}]').click()")
        reader.js(f"document.querySelector('#study [data-download={kind}]').click()")
    reader.until(lambda: len(reader.js("return copies")) == 3, "three texts")
    texts = reader.js("return copies")
    assert texts[0].startswith("method,score,n,mean,std,low,high,baseline,difference,")
    assert "**Comparison (%):" in texts[1]
    assert "\\begin{tabular}" in texts[2]
    assert [name for name, _ in reader.js("return saved")] == ["study.csv", "study.md", "study.tex"]
    reader.traces("#study-learning")
    for kind in ("png", "svg"):
        reader.js(f"document.querySelector('#study-learning [data-picture={kind}]').click()")
    reader.until(lambda: len(reader.js("return saved")) == 5, "two pictures")
    pictures = dict(reader.js("return saved.slice(3)"))
    assert pictures["mean-accuracy-over-domains-by-round.png"].startswith("data:image/png;base64,")
    svg = unquote(pictures["mean-accuracy-over-domains-by-round.svg"])
    assert svg.startswith("data:image/svg+xml,<svg")
    assert "fedavg" in svg  # a picture says what its lines are


@pytest.mark.slow
def test_the_papers_column_follows_the_mean_and_a_table_says_that_it_scrolls(
    chromium: Any, stream_result: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    results = [
        stream_result(learner={"name": name}, config={"seed": seed, "train": {"learning_rate": rate}},
                      final={"average_accuracy": rate + seed / 100})
        for name in ("er_ace", "naive") for rate in (0.1, 0.3) for seed in (1, 2, 3)
    ]  # fmt: skip
    paper = {"match": {"learner": {"name": "er_ace"}}, "score": "average_accuracy", "value": 0.5, "source": "a paper"}
    study = {"study": "s", "title": "S", "about": "", "paper": [paper], "runs": [r["hash"] for r in results],
             "selection_runs": [], "selection": None, "baseline": None}  # fmt: skip
    write_page(tmp_path / "page.html", Loaded(results, [], [study]))
    reader = Reader(chromium, tmp_path / "page.html")
    heads = [head.text.split("\n")[0] for head in reader.all(".comparison thead button")]
    assert heads[:3] == ["method", "average accuracy", "paper"]
    box = "const b = document.querySelector('.scroll'); const cell = b.querySelector('thead th:nth-child(3)');"
    for width, height in ((390, 844), (1280, 900), (1920, 1000)):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert reader.js(f"{box} return cell.getBoundingClientRect().right") <= width
        scrolls = reader.js(f"{box} return b.scrollWidth - b.clientWidth > 1")
        reader.until(lambda: reader.js(f"{box} return b.classList.contains('more')") == scrolls, "the shadow")  # noqa: B023
        assert reader.one(".hint").is_displayed() == scrolls
        if width == 390:
            assert scrolls
            left = reader.js(f"{box} b.scrollLeft = 120; return b.getBoundingClientRect().left")
            assert reader.js(f"{box} return b.querySelector('tbody th').getBoundingClientRect().left") == left
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    lines = {trace["name"]: trace for trace in reader.traces("#s-sweep")}
    assert lines["er_ace + batch_norm"]["x"] == [0.1, 0.3]
    assert lines["er_ace + batch_norm"]["y"] == pytest.approx([12, 32])
    curves = [trace for trace in reader.traces("#s-learning") if trace["meta"] == "mean"]
    colours = [trace["colour"] for trace in curves]
    assert len(set(colours)) == 4
    assert colours[0] == lines["er_ace + batch_norm"]["colour"]  # the first row has its method's hue in full
    assert hue(colours[0]) == pytest.approx(hue(colours[1]), abs=0.02)
    assert hue(colours[2]) == pytest.approx(hue(colours[3]), abs=0.02)
    assert abs(hue(colours[0]) - hue(colours[2])) > 0.1
    reader.choose("#s-learning select", "forgetting")
    assert next(iter(reader.means("#s-learning").values())) == pytest.approx([40])


def hue(colour: str) -> float:
    return colorsys.rgb_to_hls(*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)))[0]


@pytest.mark.slow
def test_a_grid_s_clients_can_be_looked_at_one_by_one(chromium: Any, tmp_path: Path) -> None:
    """The heat map of a client and of the mean; spatial against temporal forgetting; drift by client."""
    small = {
        "scenario": {"num_experiences": 3, "train_per_experience": 24, "test_per_experience": 8},
        "model": {"width": 4},
        "rounds": {"per_experience": 1},
        "train": {"batch_size": 4},
    }
    result = fednorm.federated(strategy="fedavg", learner="naive", scenario="split_digits", clients=2, config=small)
    write_page(tmp_path / "page.html", Loaded([result], [], []))
    reader = Reader(chromium, tmp_path / "page.html")
    block = next(
        each.get_attribute("id") for each in reader.all("section") if each.get_attribute("id").endswith("-matrix")
    )
    section = block.removesuffix("-matrix")

    def shown() -> list[list[float | None]]:
        (trace,) = reader.traces(f"#{block}")
        return [[None if value is None else value / 100 for value in row] for row in trace["z"]]

    def expected(tensor: Any, clients: tuple[int, ...]) -> list[list[Any]]:
        rows = [[[rows[client][i] for client in clients] for i in range(3)] for rows in tensor]
        return [
            [None if None in cell else pytest.approx(sum(cell) / len(cell), abs=1e-4) for cell in row] for row in rows
        ]

    assert shown() == expected(result.accuracy_tensor, (0, 1))
    client, network = (
        f"#{block} .controls:nth-of-type(2) select",
        f"#{block} .controls:nth-of-type(2) label:last-child select",
    )
    reader.choose(client, "1")
    assert shown() == expected(result.accuracy_tensor, (1,))
    reader.choose(network, "own")
    assert shown() == expected(result.own_accuracy_tensor, (1,))
    reader.choose(client, "mean")
    assert shown() == expected(result.own_accuracy_tensor, (0, 1))
    (trace,) = reader.traces(f"#{section}-forgetting")
    assert trace["x"] == pytest.approx([100 * value for value in result["temporal_forgetting"][1:]], abs=1e-2)
    assert trace["y"] == pytest.approx([100 * line["spatial_forgetting"] for _, line in result.steps[1:]], abs=1e-2)
    reader.choose(f"#{section}-learning select", "drift.1")
    (curve,) = reader.means(f"#{section}-learning").values()
    assert curve == pytest.approx([row[1] for row in result["drift_tensor"]], rel=1e-3)
