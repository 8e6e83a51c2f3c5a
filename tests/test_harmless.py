"""Names from outside, and other people's sentences, in terminals, pages and figures."""

import csv
import io
import json
import sys
import warnings
import xml.dom.minidom

import pytest
import torch
from torch import nn

from sapwood import Masks
from sapwood.cli import main
from sapwood.experiments.pages import templates
from sapwood.text import one_line, text_table, visible

EVIL = "fc\x1b[31m\x07<b>&|[/x]$y$\u202e\u2028\n`"
SHOWN = r"fc\x1b[31m\x07<b>&|[/x]$y$\u202e\u2028\n`"


def hostile() -> nn.Module:
    """A network of digits, one of whose layers has a name that nobody should have."""
    model = nn.Sequential(nn.Flatten())
    model.add_module(EVIL, nn.Linear(64, 16))
    model.add_module("out", nn.Linear(16, 10))
    return model


def failing() -> nn.Module:
    raise RuntimeError("two\nlines\x1b[0m [/x]")


def harmless(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.trap(87)
def test_what_does_not_print_is_escaped():
    assert visible(EVIL) == SHOWN
    assert visible("é 漢 🌲 \ud800") == "é 漢 🌲 \\ud800"
    assert one_line(" two\n  lines\t\x1b") == "two lines \\x1b"
    assert text_table(("a", "b"), [(EVIL, "x")]).splitlines()[1] == f"{SHOWN}  x"
    assert harmless(Masks({EVIL: torch.tensor([True])}).table())


@pytest.mark.trap(87)
def test_a_comparison_of_a_hostile_model(tmp_path, capsys):
    out = tmp_path / "out"
    typed = ["compare", "--model", f"{__name__}:hostile", "--methods", "random", "--sparsities", "0.5", "--seeds", "0"]
    typed += ["--epochs", "1", "--milestones", "--workers", "1", "--out", str(out)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a figure at one sparsity gave one of matplotlib's
        assert main(typed) == 0
    said = capsys.readouterr()
    assert harmless(said.out) and said.err == ""
    for page in ("report.html", "report.md", "results.csv"):
        assert harmless((out / page).read_text()), page
    for figure in out.glob("figures/*.svg"):
        xml.dom.minidom.parse(str(figure))
    assert SHOWN.split("<")[0] in (out / "figures/layers.svg").read_text()

    file = next(iter(out.glob("runs/*/masks.safetensors")))
    for more in ([], ["--csv"], ["--model", f"{__name__}:hostile", "--data", "digits"]):
        assert main(["show", str(file), *more]) == 0
        said = capsys.readouterr()
        assert harmless(said.out) and SHOWN in said.out and said.err == ""
        if more == ["--csv"]:
            assert next(row for row in list(csv.reader(io.StringIO(said.out)))[1:])[0] == f"{SHOWN}.weight"


def test_titles_and_settings_of_the_markdown_page():
    page = templates().overlay(autoescape=False).from_string("{{ text | plain }} {{ text }}")
    assert page.render(text="a|b<i>[x](y)\n\x1b") == r"a\|b&lt;i>\[x](y) \x1b a|b<i>[x](y)\n\x1b"
    html = templates().from_string("{{ text }}{{ text | e }}")
    assert "<i>" not in html.render(text="<i>")


@pytest.mark.trap(87)
def test_provenance_is_shown_escaped(tmp_path, capsys):
    Masks({"a": torch.tensor([True])}, {"method": "\x1b]0;title\x07", EVIL: {"x": EVIL}}).save(tmp_path / "m\x1b")
    assert main(["show", str(tmp_path / "m\x1b")]) == 0
    assert harmless(capsys.readouterr().out)
    (tmp_path / "m\x1b").write_bytes(b"no masks")
    assert main(["show", str(tmp_path / "m\x1b")]) == 2
    assert harmless(capsys.readouterr().err)


def test_other_peoples_sentences_are_one_line(tmp_path, capsys):
    typed = ["prune", f"{__name__}:failing", "--density", "0.5", "--input-shape", "4", "--out", str(tmp_path / "m")]
    assert main(typed) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "RuntimeError: two lines\\x1b[0m [/x] (" in line and "line " in line


def test_a_pipe_that_knows_few_characters(tmp_path, monkeypatch):
    Masks({"漢≈": torch.tensor([True])}).save(tmp_path / "m")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["show", str(tmp_path / "m"), "--csv"]) == 0
    sys.stdout.flush()
    assert rb"\u6f22" in raw.getvalue() and raw.getvalue().isascii()


@pytest.mark.trap(84)
@pytest.mark.parametrize("wrong", [{"seconds": "x"}, {"seconds": None}, {"method": 3}, {"fields": [1]}])
def test_masks_of_a_wrong_provenance_are_refused_before_training(tmp_path, capsys, monkeypatch, wrong):
    from test_mask_files import forged, header_of

    file = tmp_path / "m"
    assert main(["prune", "mlp", "--data", "digits", "--method", "random", "--density", "0.5", "--out", str(file)]) == 0
    header, body = header_of(file.read_bytes())
    provenance = {**json.loads(header["__metadata__"]["provenance"]), **wrong}
    header["__metadata__"]["provenance"] = json.dumps(provenance)
    file.write_bytes(forged(header, body))
    capsys.readouterr()
    monkeypatch.setattr("sapwood.cli.train.run", lambda *_, **__: pytest.fail("it began"))
    assert (
        main(["train", "mlp", "--masks", str(file), "--epochs", "1", "--milestones", "--out", str(tmp_path / "run")])
        == 2
    )
    assert next(iter(wrong)) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_show_refuses_flags_that_it_would_ignore(tmp_path, capsys):
    Masks({"a": torch.tensor([True])}).save(tmp_path / "m")
    for ignored in (["--data", "digits"], ["--num-classes", "3"]):
        assert main(["show", str(tmp_path / "m"), *ignored]) == 2
        assert "--model" in capsys.readouterr().err


def test_a_sparsity_that_the_comparison_lacks_is_noticed_before_it(tmp_path, capsys):
    assert main(["compare", "--ntk", "0.7", "--out", str(tmp_path / "out")]) == 2
    assert "--ntk 0.7 is none of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_parameter_whose_name_looks_like_a_glob():
    from sapwood import prunable

    model = nn.Sequential()
    model.add_module("a[0]*", nn.Linear(2, 2))
    assert list(prunable(model, include="a[0]*.bias")) == ["a[0]*.weight", "a[0]*.bias"]
