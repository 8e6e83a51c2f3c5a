"""The report: statistics against other computations, and a page that is complete and refers to nothing outside."""

import csv
import html
import itertools
import re
import shutil
import statistics
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from scipy.stats import f, t, ttest_rel

from sapwood import files
from sapwood.errors import listed
from sapwood.experiments import store
from sapwood.experiments.compare import Outcome, run_folder
from sapwood.experiments.config import CONTROLS, RunConfig
from sapwood.experiments.looks import looks
from sapwood.experiments.pairs import differences
from sapwood.experiments.report import sentence, write_report
from sapwood.experiments.store import RunResult
from sapwood.experiments.summary import frame, summarise
from sapwood.experiments.tables import problems, unequal
from sapwood.training import TrainConfig

COMMAND = "sapwood compare --out 'a b' --methods '<x>'"
ACCURACIES = {
    ("dense", 0.0): (98.1, 98.4, 97.9),
    ("ntk-sap", 0.9): (96.0, 96.5, 95.8),
    ("snip", 0.9): (95.5, 96.6, 95.0),
    ("a<b>&co", 0.9): (90.0, 91.0, 90.4),
    ("ntk-sap", 0.98): (88.0, 90.0, 89.0),
    ("snip", 0.98): (80.0, 83.0, 81.0),
    ("a<b>&co", 0.98): (10.0, 12.5, 11.0),
}
VOID = {"meta", "br", "img", "link", "hr", "input", "wbr"}
EXPECTED = {("ntk-sap", 0.9001): 95.25, ("snip", 0.98): 79.5, ("dense", 0.0): 97.75, ("snip", 0.5): 77.3}


def outcome(method, sparsity, seed, accuracy):
    config = RunConfig("digits", "mlp", method, round(1 - sparsity, 12), seed=seed, train=TrainConfig(epochs=2))
    layers = {"first.weight": (round(100 * (1 - sparsity)), 100), "last.weight": (0 if accuracy == 10.0 else 5, 50)}
    collapsed = ("last.weight",) if accuracy == 10.0 else ()
    where = {"torch": "2.x", "device": "cpu"}
    later = {
        "prune_memory": None if method == "dense" else 3 * 2**20,
        "train_memory": 2**30,
        "flops": (round(1000 * (1.5 - sparsity)), 2000),
        "effective": 3 if accuracy == 10.0 else 6,
        "init_hash": f"weights {seed}",
        "order_hash": f"order {seed}",
        "settings": {"rounds": 20, "epsilon": 1e-4} if method == "ntk-sap" else {},
    }
    return Outcome(config, RunResult(accuracy, None, False, 2, 0.5, 1.5, layers, collapsed, where, **later))


@pytest.fixture(scope="module")
def outcomes():
    found = [outcome(m, s, seed, a) for (m, s), all_seeds in ACCURACIES.items() for seed, a in enumerate(all_seeds)]
    broken = RunConfig("digits", "mlp", "grasp", 0.02, seed=0, train=TrainConfig(epochs=2))
    return [*found, Outcome(broken, None, "It did <not> work.")]


@pytest.fixture(scope="module")
def out(outcomes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    rewritten(outcomes, folder, expected=EXPECTED)
    return folder


@pytest.fixture(scope="module")
def page(out):
    return (out / "report.html").read_text(encoding="utf-8")


def rewritten(outcomes, folder, **options):
    """A report on these outcomes in a new folder."""
    for found in outcomes:
        if found.result is not None:
            run = run_folder(folder, found.config)
            run.mkdir(parents=True)
            rows = [{"epoch": e, "train_loss": 1.0 / e, "test_accuracy": found.result.test_accuracy} for e in (1, 2)]
            files.write_rows(run / store.METRICS, rows)
    return write_report(outcomes, folder, COMMAND, **options).read_text(encoding="utf-8")


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


def test_one_method_at_one_sparsity_is_drawn_without_a_warning(tmp_path):
    assert "svg" in rewritten([outcome("dense", 0.0, 0, 98.0), outcome("snip", 0.9, 0, 80.0)], tmp_path)


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


def test_with_runs_missing_it_is_the_f_test_of_the_model_in_which_two_methods_are_one():
    accuracies = {"snip": (90.0, 92.5, 91.0, 95.0), "erk": (89.0, None, 90.5, 94.0), "random": (88.0, 90.0, None, 91.5)}
    accuracies["force"] = (None, 89.0, 91.0, 95.5)
    runs = [(m, s, a) for m, values in accuracies.items() for s, a in enumerate(values) if a is not None]

    def fit(names):
        """Residual sum of squares and degrees of freedom, methods under these names, in reference coding."""
        groups = sorted(set(names.values()))
        rows = [[1, *(names[m] == g for g in groups[1:]), *(s == other for other in (1, 2, 3))] for m, s, _ in runs]
        values = np.array([a for *_, a in runs])
        _, (rest,), rank, _ = np.linalg.lstsq(np.array(rows, float), values)
        return rest, len(runs) - rank

    summary = summarise([outcome(m, 0.9, s, a) for m, s, a in runs])
    rest, freedom = fit({m: m for m in accuracies})
    assert summary.best(0.9) == "snip"
    for method in ("erk", "random", "force"):
        merged, _ = fit({m: "snip" if m == method else m for m in accuracies})
        p = f.sf((merged - rest) / (rest / freedom), 1, freedom)
        assert summary.cells[method][0.9].tied == (p >= 0.05), (method, p)
    assert {method for method in accuracies if summary.cells[method][0.9].tied} == {"erk", "force"}


def test_methods_without_a_common_seed_are_not_judged():
    found = [
        outcome(m, 0.9, s, 90.0 + s)
        for m, seeds in (("snip", (2, 3)), ("erk", (2, 3)), ("random", (0, 1)))
        for s in seeds
    ]
    summary = summarise(found)
    assert summary.cells["erk"][0.9].tied and not summary.cells["random"][0.9].tied


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
    assert "ntk-saprounds 20, epsilon 0.0001" in text and "snip, a<b>&co, grasp (with the settings" in text
    assert "0, 1, 2 of the masks; + 10000 of the initial weights" in text


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


def test_figure_files_and_csv(out, outcomes):
    for name in ("accuracy", "layers", "training-loss", "training-accuracy"):
        assert (out / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        ElementTree.parse(out / f"figures/{name}.svg")
    with open(out / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(outcomes) == len(frame(outcomes))
    found = {(row["method"], float(row["sparsity"]), int(row["seed"])): row["test_accuracy"] for row in rows}
    assert float(found["snip", 0.98, 1]) == 83.0
    assert found["grasp", 0.98, 0] == ""
    assert [row["error"] for row in rows if row["error"]] == ["It did <not> work."]


def test_the_same_results_give_the_same_page(page, outcomes, tmp_path):
    assert rewritten(outcomes, tmp_path, expected=EXPECTED) == page


def rows_of(page):
    """The text of every table cell, by row."""
    rows = [
        re.findall(r"<t[hd].*?</t[hd]>", row, flags=re.DOTALL) for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL)
    ]
    return [[" ".join(re.sub(r"<.*?>", " ", cell).split()) for cell in row] for row in rows]


def test_what_is_left_and_what_it_cost(page):
    rows = rows_of(page)
    assert ["ntk-sap", "96.00 30.00", "96.00 26.00"] in rows  # 6 of 150 weights on a path; 600 and 520 of 2,000 FLOPs
    collapsed = 100 * (1 - (3 + 6 + 6) / 3 / 150)
    assert ["a&lt;b&gt;&amp;co", "96.00 30.00", f"{collapsed:.2f} 26.00"] in rows
    assert ["ntk-sap", "0.50", "3", "1.50", "1,024", "6"] in rows
    assert ["dense", "\N{EN DASH}", "\N{EN DASH}", "1.50", "1,024", "3"] in rows


def test_differences_from_the_first_method_are_paired_by_seed(outcomes, page, out):
    found = differences(summarise(outcomes))
    for (method, sparsity), values in ACCURACIES.items():
        if method not in ("dense", "ntk-sap"):
            test = ttest_rel(values, ACCURACIES["ntk-sap", sparsity])
            low, high = test.confidence_interval(0.95)
            cell = found[method][sparsity]
            assert cell.mean == pytest.approx((low + high) / 2)
            assert cell.half_width == pytest.approx((high - low) / 2)
            assert cell.clear == (test.pvalue < 0.05)
    assert found["grasp"][0.98] is None  # which has no result
    assert ["snip", "-0.4 \N{PLUS-MINUS SIGN} 1.1", "-7.7 \N{PLUS-MINUS SIGN} 1.4"] in rows_of(page)
    row = "| snip | -0.4 \N{PLUS-MINUS SIGN} 1.1 | **-7.7 \N{PLUS-MINUS SIGN} 1.4** |"
    assert row in (out / "report.md").read_text(encoding="utf-8")


def test_one_seed_gives_a_difference_without_an_interval():
    summary = summarise([outcome("snip", 0.9, 0, 90.0), outcome("random", 0.9, 0, 89.5)])
    (cell,) = differences(summary)["random"].values()
    assert (str(cell), cell.clear) == ("-0.5", False)
    assert differences(summarise([outcome("snip", 0.9, 0, 90.0)])) == {}


def test_published_numbers_stand_beside_the_measured_ones(page, out, outcomes, tmp_path):
    rows = rows_of(page)
    assert ["ntk-sap", "96.1 ± 0.4 95.2", "89.0 ± 1.0", "3"] in rows  # at a sparsity that was rounded otherwise
    assert ["snip", "95.7 ± 0.8 ≈", "81.3 ± 1.5 79.5", "3"] in rows
    assert ["dense", "with all weights: 98.1 ± 0.3 97.8", "3"] in rows
    assert "77.3" not in str(rows)  # which is of a sparsity that is not in this comparison
    assert "as published" in (out / "figures/accuracy.svg").read_text(encoding="utf-8")
    without = rewritten(outcomes, tmp_path)
    assert "published" not in without + (tmp_path / "figures/accuracy.svg").read_text(encoding="utf-8")


def test_markdown_holds_the_same(out):
    lines = (out / "report.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("|")]
    for method, _ in ACCURACIES:
        assert any(row.startswith(f"| {method.replace('<', '&lt;')}") for row in rows)
    assert "| snip | **95.7 ± 0.8** ≈ | 81.3 ± 1.5 (79.5) | 3 |" in rows
    assert "**89.0 ± 1.0**" in "".join(rows)
    assert lines[-1] == f"    {COMMAND}"
    for start in (i for i, line in enumerate(lines) if line.startswith("| :--")):
        table = itertools.takewhile(lambda line: line.startswith("|"), lines[start - 1 :])
        assert len({row.count("|") for row in table}) == 1
    for figure in re.findall(r"\]\((.*?)\)", "\n".join(lines)):
        assert (out / figure).is_file()


def test_results_from_before_costs_were_recorded_still_make_a_report(outcomes, tmp_path):
    unknown = {"prune_memory": None, "train_memory": None, "flops": None, "effective": None}
    unknown |= {"init_hash": "", "order_hash": ""}
    old = [o if o.result is None else replace(o, result=replace(o.result, **unknown)) for o in outcomes]
    text = rewritten(old, tmp_path)
    assert "What is left" not in text and "checked by hash" not in text


def test_unequal_starts_are_said(outcomes, page):
    assert "checked by hash" in page and unequal(outcomes) == []
    other = replace(outcomes[-2], result=replace(outcomes[-2].result, order_hash="another"))
    changed = [*outcomes[:-2], other, outcomes[-1]]
    assert unequal(changed) == [other.config.seed]
    assert ("seed 2", "the runs did not begin") in [(name, text[:22]) for name, text in problems(changed)]


def test_methods_are_told_apart_and_controls_belong_to_theirs():
    named = [f"method-{i}" for i in range(16)]
    shuffled = [f"{named[0]}@control=shuffle", "method-3@rounds=2,control=shuffle"]
    found = looks([*named, "method-3@rounds=2", "random", "erk", *shuffled])
    assert len({(v["color"], v["marker"], str(v["linestyle"]), v.get("markerfacecolor")) for v in found.values()}) == 21
    for control, subject in zip(shuffled, (named[0], "method-3@rounds=2"), strict=True):
        assert found[control]["color"] == found[subject]["color"]
        assert found[control]["marker"] == found[subject]["marker"]
        assert found[control]["linestyle"] == found["random"]["linestyle"] != found[subject]["linestyle"]
    assert len({str(v["linestyle"]) for v in found.values()}) == 3
    controls = looks([named[0], *(f"{named[0]}@rounds=2,control={control}" for control in CONTROLS)])
    del controls[named[0]]
    assert len({(v["color"], v["marker"]) for v in controls.values()}) == 1
    assert len({v["linestyle"] for v in controls.values()}) == len(CONTROLS)
    assert len({(v.get("markerfacecolor"), v.get("fillstyle")) for v in controls.values()}) == len(CONTROLS)
    assert {name: look for name, look in looks(named[:3]).items()} == {name: found[name] for name in named[:3]}


def test_controls_are_explained_and_reinitialised_runs_are_no_unequal_start(outcomes, tmp_path):
    runs = []
    for control in CONTROLS:
        for found in (o for o in outcomes if o.config.method == "snip"):
            begin = f"other {found.config.seed}" if control == "reinit" else found.result.init_hash
            config = replace(found.config, control=control)
            runs.append(Outcome(config, replace(found.result, init_hash=begin)))
    every = [*outcomes, *runs]
    assert unequal(every) == []
    wrong = replace(runs[-1], result=replace(runs[-1].result, init_hash="another"))
    assert unequal([*every, wrong]) == [wrong.config.seed]
    text = rewritten(every, tmp_path)
    for control, about in CONTROLS.items():
        assert f"{control}, {about}" in html.unescape(text)


# In a real browser.

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
PHONE = 390  # CSS pixels

# The page itself has no script; this one measures it in a frame as wide as a phone, and pushes the tables aside.
MEASURE = """<body style="margin: 0"><iframe width="%d" height="800" style="border: 0" srcdoc="%s"></iframe><script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, found = document.documentElement.dataset;
  const left = cell => Math.round(cell.getBoundingClientRect().left);
  const wide = [...page.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth);
  const firsts = wide.map(box => box.querySelector("tbody th")), before = firsts.map(left);
  wide.forEach(box => { box.scrollLeft = 1000; });
  found.width = page.documentElement.clientWidth;
  found.content = page.documentElement.scrollWidth;
  found.wide = wide.length;
  found.scrolled = wide.filter(box => box.scrollLeft > 0).length;
  found.stayed = firsts.filter((cell, i) => left(cell) === before[i]).length;
  found.figures = [...page.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().height > 100).length;
};
</script>"""


def browse(folder, file, *options, width=1000, height=1500):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--hide-scrollbars", f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
    done = subprocess.run([*command, *options, file.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@in_browser
def test_on_a_phone_tables_scroll_and_the_page_does_not(page, tmp_path):
    file = tmp_path / "phone.html"
    long_name = page.replace("a&lt;b&gt;&amp;co", "iter-snip@<wbr>rounds=100,<wbr>schedule=linear,<wbr>control=shuffle")
    file.write_text(MEASURE % (PHONE, html.escape(long_name)), encoding="utf-8")
    found = dict(re.findall(r'data-(\w+)="(\d+)"', browse(tmp_path, file, "--dump-dom")))
    assert found["width"] == found["content"] == str(PHONE)
    assert found["figures"] == "4"
    assert 1 <= int(found["wide"]) == int(found["scrolled"]) == int(found["stayed"])


@in_browser
def test_light_and_dark_are_drawn(out, tmp_path):
    pictures = []
    for number, scheme in (("1", "light"), ("0", "dark")):
        target = tmp_path / f"{scheme}.png"
        browse(
            tmp_path, out / "report.html", f"--blink-settings=preferredColorScheme={number}", f"--screenshot={target}"
        )
        pictures.append(np.asarray(Image.open(target).convert("RGB")).astype(int))
    light, dark = pictures
    assert light.shape == dark.shape == (1500, 1000, 3)
    assert light[5, 5].min() > 240 and dark[5, 5].max() < 50  # the paper
    for picture, series in ((light, (0, 114, 178)), (dark, (74, 159, 220))):
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
        assert (np.abs(picture - series).max(-1) < 8).sum() > 200  # a curve in its own colour
