"""The report: statistics against other computations, and a page that is complete and refers to nothing outside."""

import csv
import re
import statistics
from html.parser import HTMLParser
from itertools import product
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.stats import t, ttest_rel

from sapwood.experiments import store
from sapwood.experiments.compare import Outcome, run_folder
from sapwood.experiments.config import RunConfig
from sapwood.experiments.report import listed, sentence, write_report
from sapwood.experiments.store import RunResult
from sapwood.experiments.summary import frame, summarise
from sapwood.training import TrainConfig

ACCURACIES = {
    ("dense", 0.0): (98.1, 98.4, 97.9),
    ("ntk-sap", 0.9): (96.0, 96.5, 95.8),
    ("snip", 0.9): (95.5, 96.6, 95.0),
    ("a<b>&co", 0.9): (90.0, 91.0, 90.4),
    ("ntk-sap", 0.98): (88.0, 90.0, 89.0),
    ("snip", 0.98): (80.0, 83.0, 81.0),
    ("a<b>&co", 0.98): (10.0, 12.5, 11.0),
}
VOID = {"meta", "br", "img", "link", "hr", "input"}


def outcome(method, sparsity, seed, accuracy):
    config = RunConfig("digits", "mlp", method, round(1 - sparsity, 12), seed=seed, train=TrainConfig(epochs=2))
    layers = {"first.weight": (round(100 * (1 - sparsity)), 100), "last.weight": (0 if accuracy == 10.0 else 5, 50)}
    collapsed = ("last.weight",) if accuracy == 10.0 else ()
    where = {"torch": "2.x", "device": "cpu"}
    return Outcome(config, RunResult(accuracy, None, False, 2, 0.5, 1.5, layers, collapsed, where))


@pytest.fixture
def outcomes():
    found = [outcome(m, s, seed, a) for (m, s), all_seeds in ACCURACIES.items() for seed, a in enumerate(all_seeds)]
    broken = RunConfig("digits", "mlp", "grasp", 0.02, seed=0, train=TrainConfig(epochs=2))
    return [*found, Outcome(broken, None, "It did <not> work.")]


@pytest.fixture
def page(outcomes, tmp_path):
    for found in outcomes:
        if found.result is not None:
            folder = run_folder(tmp_path, found.config)
            folder.mkdir(parents=True)
            rows = [{"epoch": e, "train_loss": 1.0 / e, "test_accuracy": found.result.test_accuracy} for e in (1, 2)]
            store.write_rows(folder / store.METRICS, rows)
    path = write_report(outcomes, tmp_path, "sapwood compare --out 'a b' --methods '<x>'")
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Collects what the tests ask about, and fails where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.ids, self.text = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_cells_are_mean_and_standard_deviation_over_the_seeds(outcomes):
    summary = summarise(outcomes)
    assert summary.sparsities == (0.9, 0.98)
    for (method, sparsity), values in ACCURACIES.items():
        cell = summary.dense if method == "dense" else summary.cells[method][sparsity]
        assert (cell.n, cell.mean) == (3, pytest.approx(statistics.mean(values)))
        assert cell.std == pytest.approx(statistics.stdev(values))
    assert str(summary.cells["grasp"][0.98]) == "failed"
    assert str(summary.cells["grasp"][0.9]) == "-"


def least_significant_difference(rows):
    """From the residuals of a regression on dummies for methods and seeds."""
    methods, seeds = len(rows), len(rows[0])
    design = np.array(
        [[*(np.arange(methods) == m), *(np.arange(seeds) == s)] for m in range(methods) for s in range(seeds)]
    )
    fitted, _, rank, _ = np.linalg.lstsq(design.astype(float), np.ravel(rows))
    error, freedom = np.ravel(rows) - design @ fitted, methods * seeds - rank
    return t.ppf(0.975, freedom) * np.sqrt(2 / seeds * (error @ error) / freedom)


def test_best_and_tied_agree_with_a_regression_on_methods_and_seeds(outcomes):
    summary = summarise(outcomes)
    for sparsity in summary.sparsities:
        measured = {m: v for (m, s), v in ACCURACIES.items() if s == sparsity}
        margin = least_significant_difference(list(measured.values()))
        best = max(measured, key=lambda method: statistics.mean(measured[method]))
        assert summary.best(sparsity) == best
        for method, values in measured.items():
            expected = method != best and statistics.mean(measured[best]) - statistics.mean(values) <= margin
            assert summary.cells[method][sparsity].tied == expected, (method, sparsity)
    tied = [(m, s) for m, s in product(summary.methods, summary.sparsities) if summary.cells[m][s].tied]
    assert tied == [("snip", 0.9)]  # so that the comparison above has something to find


@pytest.mark.parametrize("gap", [0.5, 1.0, 2.0, 4.0])
def test_with_two_methods_it_is_the_paired_t_test(gap):
    best, other = (
        (90.0, 92.0, 91.0, 95.0),
        tuple(v - gap + d for v, d in zip((90.0, 92.0, 91.0, 95.0), (1, -1, 0.5, -0.5), strict=True)),
    )
    found = [outcome(m, 0.9, s, a) for m, values in (("snip", best), ("random", other)) for s, a in enumerate(values)]
    assert summarise(found).cells["random"][0.9].tied == (ttest_rel(best, other).pvalue >= 0.05)


def test_one_seed_says_nothing_about_ties():
    summary = summarise([outcome("snip", 0.9, 0, 90.0), outcome("random", 0.9, 0, 89.9)])
    assert not summary.cells["random"][0.9].tied
    assert str(summary.cells["random"][0.9]) == "89.9"


def test_seeds_are_paired_by_number_and_not_by_position():
    best = [outcome("snip", 0.9, seed, 90.0 + seed) for seed in (0, 1, 2)]
    other = [outcome("random", 0.9, seed, 89.0 + seed) for seed in (2, 1, 0)]  # exactly 1 point below in every seed
    assert not summarise(best + other).cells["random"][0.9].tied


def test_sentence_is_computed_from_the_results(outcomes):
    said = sentence(summarise(outcomes))
    assert "98 %" in said and "ntk-sap reaches 89.0 ± 1.0 %" in said and "98.1 ± 0.3 %" in said
    assert listed(["a"]) == "a" and listed(["a", "b", "c"]) == "a, b and c"


def test_page_is_well_formed_and_holds_everything(page):
    parsed = Page(page)
    assert parsed.open == []
    assert parsed.tags.count("svg") == 4
    text = " ".join("".join(parsed.text).split())
    for method, _ in ACCURACIES:
        assert method in text
    for values in ACCURACIES.values():
        assert f"{statistics.mean(values):.1f}" in text and f"± {statistics.stdev(values):.1f}" in text
    assert "It did <not> work." in text
    assert "no weight is kept in last.weight" in text
    assert "sapwood compare --out 'a b' --methods '<x>'" in text
    assert "torch2.x" in text  # a term and its description


def test_page_refers_to_nothing_outside(page):
    links = Page(page).links
    assert links and all(link.startswith("#") for link in links)
    assert re.findall(r"url\((?!#)|@import|<script", page) == []


def test_ids_are_unique_and_references_resolve(page):
    parsed = Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    wanted = {link[1:] for link in parsed.links} | set(re.findall(r"url\(#([^)]*)\)", page))
    assert wanted <= set(parsed.ids)


def test_figures_take_their_colours_from_the_page(page):
    svg = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert "var(--series-0)" in svg and "var(--muted)" in svg and "currentColor" in svg
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#000000"}  # the default of clip paths and the like
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", page))
    light, dark = re.findall(r":root \{(.*?)\}", page, flags=re.DOTALL)[:2]
    assert used <= set(re.findall(r"(--[a-z0-9-]+):", light))
    assert set(re.findall(r"(--[a-z0-9-]+):", light)) == set(re.findall(r"(--[a-z0-9-]+):", dark))


def test_figure_files_and_csv(page, outcomes, tmp_path):
    for name in ("accuracy", "layers", "training-loss", "training-accuracy"):
        assert (tmp_path / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        ElementTree.parse(tmp_path / f"figures/{name}.svg")
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(outcomes) == len(frame(outcomes))
    found = {(row["method"], float(row["sparsity"]), int(row["seed"])): row["test_accuracy"] for row in rows}
    assert float(found["snip", 0.98, 1]) == 83.0
    assert found["grasp", 0.98, 0] == ""
    assert [row["error"] for row in rows if row["error"]] == ["It did <not> work."]


def test_the_same_results_give_the_same_page(page, outcomes, tmp_path):
    command = "sapwood compare --out 'a b' --methods '<x>'"
    assert write_report(outcomes, tmp_path, command).read_text(encoding="utf-8") == page
