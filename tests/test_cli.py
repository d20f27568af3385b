"""The command line, in this process and, for what a shell sees, in one of its own."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_helpers import LABELS
from qlora_helpers.__main__ import main

ROOT = Path(__file__).parents[1]
TEXTS = ["Striker signs record contract", "Oil climbs, shares fall", "雨で試合中止"]


def expected(classifier, text: str) -> dict:
    row = classifier([text]).iloc[0]
    return {
        "text": text,
        "label": row.label,
        "confidence": pytest.approx(row.confidence, abs=1e-4),
        "probabilities": {label: pytest.approx(row[f"P({label})"], abs=1e-4) for label in LABELS},
    }


@pytest.fixture
def piped(monkeypatch, capsys):
    """main() with `data` on standard input: exit code, lines of stdout, stderr."""

    def call(data: bytes, *arguments: str):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        code = main(["classify", *arguments])
        out, err = capsys.readouterr()
        return code, [json.loads(line) for line in out.split("\n")[:-1]], err

    return call


def test_in_a_process_of_its_own_whose_reader_stops_early(tuned, classifier):
    """In a bare shell's encoding. `head` ends after the first lines; thousands are left, which the
    pipe cannot hold."""
    lines = "\n".join([*TEXTS, "", *["Rain stops play"] * 1000])
    command = [sys.executable, "-m", "qlora_helpers", "classify", "--workspace", str(tuned.path)]
    shell = ["bash", "-c", '"$@" | head -n 4; echo ${PIPESTATUS[0]}', "bash"]
    environment = {"PYTHONPATH": str(ROOT), "LANG": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*shell, *command],
        input=lines.encode(),
        capture_output=True,
        cwd=ROOT,
        timeout=600,
        env=os.environ | environment,
    )
    assert done.stderr == b""
    *rows, empty, code = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert rows == [expected(classifier, text) for text in TEXTS] and code == 0
    assert empty == {"text": "", "label": None, "confidence": None, "probabilities": None}


def test_lines_of_standard_input_one_for_one(piped, tuned, classifier):
    texts = [TEXTS[0], "", "  ", TEXTS[1] + "\u2028still\x0bthe same line"]
    texts += [f"{i % 9} goals" for i in range(1100)]  # more than are classified at once
    data = "\ufeff" + "\n".join(texts).replace("\n", "\r\n", 1)
    code, rows, err = piped(data.encode(), "--workspace", str(tuned.path))
    assert (code, err) == (0, "") and [row["text"] for row in rows] == texts
    assert [row["label"] is None for row in rows[:4]] == [False, True, True, False]
    assert rows[0] == expected(classifier, TEXTS[0]) and rows[-2] == expected(classifier, "0 goals")
    assert piped(b"", "--workspace", str(tuned.path)) == (0, [], "")


def test_headlines_as_arguments_for_an_adapter_alone(piped, tuned, classifier, tmp_path):
    shutil.copytree(tuned / "adapter", tmp_path / "a")
    code, rows, err = piped(b"", *TEXTS, "--adapter", str(tmp_path / "a"))
    assert (code, rows, err) == (0, [expected(classifier, text) for text in TEXTS], "")


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        (b"Rain\nf\xfcnf\n", (), "standard input is not UTF-8 (line 2)"),
        (b"Rain", ("--workspace", "no/such"), "no/such holds nothing from 01_setup yet. Run "),
        (b"Rain", ("--adapter", "no/such/folder"), "no adapter folder 'no/such/folder' here"),
        (b"Rain", ("--adapter", "."), "qlora_config.json is missing"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(piped, data, arguments, message):
    code, rows, err = piped(data, *arguments)
    assert (code, rows) == (2, [])
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["classify", "--adapter", "x", "--workspace", "y", "z"]])
def test_wrong_arguments_end_with_exit_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: " in capsys.readouterr().err
