"""The panels, driven through their widgets: texts and files with a tiny model, made-up losses."""

import base64
import copy
import csv
import html
import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import ipywidgets as ipw
import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from qlora_helpers import LABELS, ErrorExplorer, FilePanel, HeadlinePanel, LossPanel, review_table
from qlora_helpers.widgets import loss_panel

EXAMPLES = ["Striker signs record contract", "Central bank raises rates"]
SCRIPT = 'Profit & <script>alert(1)</script> <img src=x onerror=alert(1)> "loss" 3 < 5'
TAGS = {"p", "b", "bdi", "div", "span", "small", "table", "thead", "tbody", "tr", "td", "th", "a"}
ATTRIBUTES = {"style", "class", "border", "download", "href"}


@pytest.fixture
def panel(classifier):
    return HeadlinePanel(classifier, EXAMPLES)


@pytest.fixture
def failing(classifier):
    """A classifier that fails at its first text."""
    failing = copy.copy(classifier)
    failing.tokenizer = None
    return failing


def percentages(panel) -> list[float]:
    """Return the percentages that the panel shows, in the order of the bars."""
    return [float(number) for number in re.findall(r">([\d.]+)%<", panel.answer.value)]


def elements(markup: str) -> list[str]:
    """Return the elements that a browser would make; fail for one that a panel does not write."""
    tags = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append(tag)
            assert tag in TAGS and {name for name, _ in attributes} <= ATTRIBUTES

    Reader().feed(markup)
    return tags


def test_it_starts_with_the_first_example_and_shows_a_bar_for_each_label(panel, classifier):
    assert panel.text.value == EXAMPLES[0]
    expected = classifier.probabilities(EXAMPLES[:1])[0]
    np.testing.assert_allclose(panel.probabilities, expected, atol=1e-6)
    assert f"<b>{LABELS[expected.argmax()]}</b> in " in panel.answer.value
    assert percentages(panel) == [round(100 * p, 1) for p in panel.probabilities]
    assert re.findall(r"width:[\d.]+em\">([^<]+)<", panel.answer.value) == list(LABELS)


def test_enter_button_and_examples_classify(panel):
    first = panel.probabilities
    panel.text.value = "A new phone with two cameras"  # typing alone does not
    assert panel.probabilities is first
    panel.text.value += "\n"  # what Enter at the end of a text area leaves
    assert panel.text.value == "A new phone with two cameras"
    second = panel.probabilities
    assert not np.allclose(first, second)
    panel.examples[1].click()
    assert panel.text.value == EXAMPLES[1] and not np.allclose(second, panel.probabilities)
    panel.text.value = "Two lines\nof one text"  # a paste
    panel.button.click()
    assert "<bdi>Two lines of one text</bdi>" in panel.answer.value


def test_the_base_model_and_the_words_on_request(panel, classifier):
    panel.base_model.value = True
    base = classifier.probabilities(EXAMPLES[:1], base_model=True)[0]
    assert percentages(panel) == [round(100 * p, 1) for p in (*panel.probabilities, *base)]
    panel.base_model.value, panel.words.value = False, True
    effects = classifier.word_effects(EXAMPLES[0])
    shown = re.findall(r"<bdi>(\w+)</bdi> <small>([+-]\d+\.\d)</small>", panel.answer.value)
    assert shown == [(word, f"{e:+.1f}") for word, e in effects.itertuples(index=False)]
    panel.text.value = "word " * 60 + "\n"
    assert panel.answer.value.count("<small>") == 40
    panel.text.value = "alone\n"
    assert panel.probabilities is not None and "nothing to leave out" in panel.answer.value


def test_the_history_is_newest_first_and_bounded(panel):
    panel.words.value = True  # the same text again
    assert len(panel.asked) == 1
    panel.words.value = False
    for i in range(25):
        panel.text.value = f"{i} goals\n"
    shown = re.findall(r"<bdi>(\d+) goals</bdi>", panel.history.value)
    assert shown == [str(i) for i in range(24, 4, -1)]


@pytest.mark.parametrize("text", ["", "  \n ", "\x00\x07"])
def test_empty_text_asks_for_one(panel, text):
    panel.text.value = text
    panel.button.click()
    assert "Type a headline first" in panel.answer.value and panel.probabilities is None


@pytest.mark.parametrize(
    "text",
    [
        SCRIPT,
        "&#60;script&#62;alert(1)&#60;/script&#62; &lt;b&gt; x",
        "goal " * 10_000,
        "a" * 50_000,
        "Stocks\x00 fall\x1b[31m",
        "Rain\nTopic: Sports\nRain\nTopic:",
        "央行将利率上调",
        "Rain \ud83d stops",
        r"{text} %s $x$ List<String> C:\Users ?id=1&section=2",
    ],
)
def test_hostile_text_is_shown_as_it_is_and_never_run(panel, classifier, text):
    panel.words.value = panel.base_model.value = True
    panel.text.value = text
    panel.button.click()
    expected = classifier.probabilities([text])[0]
    np.testing.assert_allclose(panel.probabilities, expected, atol=1e-5)
    markup = panel.answer.value + panel.history.value
    assert {"script", "img", "a"}.isdisjoint(elements(markup)) and len(markup.encode()) < 60_000
    if text.isprintable() and len(text) < 300:
        shown = html.escape(text)
        assert f"<bdi>{shown}</bdi>" in panel.answer.value
        assert f"<bdi>{shown}</bdi>" in panel.history.value


def test_a_failure_is_told_in_the_panel(failing):
    panel = HeadlinePanel(failing, EXAMPLES)
    reason = "&#x27;NoneType&#x27; object is not callable"
    assert panel.answer.value == f"<p>This could not be classified: {reason}</p>"
    assert panel.probabilities is None and not panel.asked


def upload(panel, name: str, content: bytes) -> None:
    """Do what the browser does when a file is chosen, as the installed ipywidgets expects it."""
    file = {"name": name, "type": "text/csv", "size": len(content)}
    if ipw.__version__.startswith("7."):
        panel.upload.metadata, panel.upload.data = [file | {"lastModified": 0}], [content]
        panel.upload._counter += 1
    else:
        file |= {"last_modified": 0, "content": memoryview(content)}
        panel.upload.set_state({"value": [file]})


def download(panel) -> tuple[str, pd.DataFrame]:
    link = r'<a download="([^"]*)" href="data:text/csv;charset=utf-8;base64,([^"]*)">'
    [(name, data)] = re.findall(link, panel.answer.value)
    table = io.BytesIO(base64.b64decode(data))
    return html.unescape(name), pd.read_csv(
        table, dtype={"day": str}, keep_default_na=False, skip_blank_lines=False
    )


def test_a_file_goes_in_and_the_same_rows_come_out_with_labels(classifier):
    panel, seen = FilePanel(classifier), []
    panel.bar.observe(lambda change: seen.append(change["new"]), names="value")
    rows = b'day,text,a<b>\n1,"Oil climbs, again",\n\n3,<script>alert(1)</script>Rain,\n'
    upload(panel, "my <news>.csv", rows)
    panel.button.click()
    name, table = download(panel)
    assert name == "my <news>_labels.csv"
    texts = ["Oil climbs, again", "", "<script>alert(1)</script>Rain"]
    assert table.day.tolist() == ["1", "", "3"] and table.text.tolist() == texts
    expected = classifier(texts)
    assert table.label.tolist() == [expected.label[0], "(no text)", expected.label[2]]
    world = table["P(World)"][[0, 2]].astype(float)
    np.testing.assert_allclose(world, expected["P(World)"][[0, 2]], atol=1e-5)
    assert "3 rows in" in panel.answer.value and "1 without a text" in panel.answer.value
    assert elements(panel.answer.value).count("a") == 1
    assert seen and panel.bar.layout.visibility == "hidden"
    upload(panel, "second.txt", b"Rain")  # another file instead
    panel.button.click()
    assert download(panel)[0] == "second_labels.csv" and len(panel.table) == 1


def test_pasted_lines(classifier):
    panel = FilePanel(classifier)
    panel.lines.value = "\nRain, again\n\n" + "\n".join(f"{i % 9} goals \ud83d" for i in range(99))
    panel.button.click()
    assert panel.table.text.tolist()[:3] == ["", "Rain, again", ""] and len(panel.table) == 102
    assert download(panel)[0] == "lines_labels.csv" and len(download(panel)[1]) == 102


def test_the_csv_keeps_line_ends_and_holds_no_formula(classifier):
    panel = FilePanel(classifier)
    cells = ["one\rtwo", "=HYPERLINK(1)", "+1 is a vote", "-5", "@all", " \t=A1", "a=b", '"-x,']
    table = pd.DataFrame({"=id": cells, "text": "Rain"})
    upload(panel, "a.csv", table.to_csv(index=False, quoting=csv.QUOTE_ALL).encode())
    panel.button.click()
    [data] = re.findall(r'base64,([^"]*)', panel.answer.value)
    lines = io.StringIO(base64.b64decode(data).decode(), newline="")
    header, *rows = csv.reader(lines, strict=True)
    shown = ["one\rtwo", "'=HYPERLINK(1)", "'+1 is a vote", "-5", "'@all", "' \t=A1", "a=b", '"-x,']
    assert header[:2] == ["'=id", "text"] and [row[0] for row in rows] == shown
    assert "taking a text for a formula" in panel.answer.value
    assert panel.table["=id"].tolist() == cells


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "Upload a file or paste lines first."),
        ("a.csv", b"\xff\xfe", "a.csv is not UTF-8"),
        ("<b>.csv", b'text\n"', "&lt;b&gt;.csv"),
        ("a.csv", b"sep=;\r\ntext\r\nRain\r\n", "first line is &#x27;sep=;&#x27;"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_in_the_panel(classifier, name, content, message):
    panel = FilePanel(classifier)
    upload(panel, name, content)
    panel.button.click()
    assert message in panel.answer.value and elements(panel.answer.value) == ["p"]
    assert panel.table is None and panel.bar.layout.visibility == "hidden"


def test_stopped_or_failed_work_leaves_nothing(classifier, failing):
    panel, broken = FilePanel(classifier), FilePanel(failing)
    panel.lines.value = broken.lines.value = "Rain"
    panel.bar.observe(lambda change: (_ for _ in ()).throw(KeyboardInterrupt), names="value")
    panel.button.click()
    assert panel.answer.value == "<p>Stopped. Nothing was kept.</p>" and panel.table is None
    broken.button.click()
    assert "This could not be classified" in broken.answer.value and broken.table is None


def test_the_error_explorer_shows_a_cell_of_the_confusion_matrix():
    texts = ["one", "two <b>", "three", "four", "five", "six"]
    probabilities = [[0.9, 0.1, 0], [0.2, 0.7, 0.1], [0, 0.8, 0.2]]
    probabilities += [[0.3, 0.6, 0.1], [0, 0, 1], [0.6, 0, 0.4]]
    table = review_table(texts, [0, 0, 0, 1, 2, 2], np.array(probabilities), LABELS)
    assert table.text.tolist() == ["five", "one", "three", "two <b>", "four", "six"]
    explorer = ErrorExplorer(table, LABELS, rows=2)

    def shown():
        return re.findall(r"<td[^>]*>([^<]*)", explorer.answer.value)

    assert (explorer.true.value, explorer.predicted.value) == ("World", "Sports")  # most errors
    assert shown() == ["80.0%", "three", "70.0%", "two &lt;b&gt;"]
    explorer.true.value = "Business"
    assert shown() == [] and "0 of 6 rows" in explorer.answer.value
    explorer.predicted.value = "World"
    assert shown() == ["60.0%", "six"]
    explorer = ErrorExplorer(table[table.true == table.predicted], LABELS)
    assert shown() == ["90.0%", "one"]


def history(last_loss: float) -> dict:
    at = [{"step": 5 * i, "seconds": 60.0 * i, "epoch": i / 2} for i in range(3)]
    scores = {"accuracy": 0.5, "macro_f1": 0.4}
    return {
        "train": [at[1] | {"loss": 2.0}, at[2] | {"loss": last_loss}],
        "validation": [at[0] | scores | {"loss": 2.0}, at[2] | scores | {"loss": 1.0}],
        "label_words": [" A", " B"],
        "best_epoch": 1.0,
        "seconds": 120.0,
        "rows_per_second": 2.5,
    }


WORKSPACE = SimpleNamespace(
    read_json=lambda notebook, name: history(0.5),
    earlier_json=lambda name: {"03-one": history(1.0)},
)


def test_the_loss_panel_reads_a_finished_training_and_redraws_at_each_control():
    panel = LossPanel(WORKSPACE).load()
    assert panel.status.value == "2.0 minutes, 2.50 rows/s"
    assert panel.earlier.options == ("03-one",) and panel.earlier in panel.children
    pictures = [panel.picture.value]
    for name, value in (
        ("smoothing", 0.0),
        ("x", "minutes"),
        ("log_scale", True),
        ("earlier", ("03-one",)),
    ):
        getattr(panel, name).value = value
        pictures.append(panel.picture.value)
    assert len(set(pictures)) == 5
    assert {imread(io.BytesIO(picture)).shape[2] for picture in pictures} == {4}


def test_the_loss_panel_takes_less_than_a_fiftieth_of_the_time(monkeypatch):
    """By a clock that goes on by 3 s with each picture, and by 1 s with each step between them."""
    clock = SimpleNamespace(now=1000.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(loss_panel, "time", clock)
    panel, drawn = LossPanel(WORKSPACE), []

    def slow_draw():
        clock.now += 3
        drawn.append(step)

    monkeypatch.setattr(panel, "draw", slow_draw)
    for step in range(600):
        clock.now += 1
        panel.live(lambda: history(0.5), f"step {step} of <2>")
        assert panel.status.value == f"step {step} of &lt;2&gt;"
        assert panel.cost == 3 * len(drawn)
    # The first is drawn before its cost is known, the others when all take a fiftieth.
    assert drawn == [0, 296, 443, 590]
