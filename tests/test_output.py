"""Output that nobody reads, or that cannot be written: the work is done all the same, and the exit code is its own."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from processes import PATH
from sapwood.cli import main

COMPARISON = "compare --model mlp --methods random snip --per-class 1 --seeds 0 --epochs 1 --milestones --workers 1"


def program(typed, tmp_path, **environment):
    """A process of the program, in a folder."""
    command = [sys.executable, "-m", "sapwood", *typed]
    variables = {**os.environ, "PYTHONPATH": PATH, **environment}
    return subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_reader_that_has_left_costs_neither_the_report_nor_the_exit_code(tmp_path, monkeypatch):
    """The short form of the next test, in this process."""
    reports, (reader, writer) = [], os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    monkeypatch.setattr("sapwood.experiments.report.write_report", lambda outcomes, out, *_, **__: reports.append(out))
    assert main([*COMPARISON.split(), "--sparsities", "0.5", "0.9999999", "--out", str(tmp_path)]) == 1
    assert reports == [tmp_path]
    sys.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("both", [False, True])
def test_a_reader_that_leaves_costs_neither_the_report_nor_the_exit_code(tmp_path, both):
    typed = [*COMPARISON.split(), "--sparsities", "0.5", "0.9999999", "--out", "out"]
    with program(typed, tmp_path) as process:
        process.stdout.close()
        if both:  # as with 2>&1
            process.stderr.close()
        said = "" if both else process.stderr.read().decode()
    assert process.returncode == 1  # there are runs that failed
    assert (tmp_path / "out/report.html").is_file() and (tmp_path / "out/figures/accuracy.svg").is_file()
    assert "Traceback" not in said and "BrokenPipe" not in said


def test_a_stream_without_the_characters_of_the_table_gets_others(tmp_path, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr("sapwood.experiments.report.write_report", lambda outcomes, out, *_, **__: out / "report.html")
    assert main([*COMPARISON.split(), "--sparsities", "0.5", "--out", str(tmp_path)]) == 0
    text = shown.buffer.getvalue().decode("ascii")
    assert "mean +/- std" in text and "marked ~" in text and text.splitlines()[-1] == str(tmp_path / "report.html")
    assert shown.errors == "strict"


@pytest.mark.slow
def test_a_pipe_without_the_characters_of_the_table_gets_others(tmp_path):
    typed = [*COMPARISON.split(), "--sparsities", "0.5", "--out", "out"]
    process = program(typed, tmp_path, PYTHONIOENCODING="ascii")
    out, err = process.communicate()
    assert process.returncode == 0 and b"Traceback" not in err
    assert b"mean +/- std" in out and b"marked ~" in out and out.splitlines()[-1] == b"out/report.html"
    assert (tmp_path / "out/report.html").is_file()


@pytest.mark.slow
def test_a_name_that_utf8_lacks_is_escaped(tmp_path, capsys):
    out = tmp_path / os.fsdecode(b"\xff")
    assert main([*COMPARISON.split(), "--sparsities", "0.5", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "\\udcff/report.html")
    assert (out / "report.html").is_file() and sys.stdout.errors != "spelled"


@pytest.mark.slow
def test_a_full_device_for_output_is_one_line(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    typed = [sys.executable, "-m", "sapwood", *COMPARISON.split(), "--sparsities", "0.5", "--out", "out"]
    variables = {**os.environ, "PYTHONPATH": PATH}
    with open("/dev/full", "w") as full:
        ended = subprocess.run(typed, cwd=tmp_path, env=variables, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2 and "No space left on device" in ended.stderr.splitlines()[-1]
    assert (tmp_path / "out/report.html").is_file()
