"""The panels, driven through their widgets: texts and files with a tiny model, losses with histories on disk."""

import base64
import copy
import html
import io
import json
import re
from functools import partial
from html.parser import HTMLParser
from types import SimpleNamespace

import ipywidgets as ipw
import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from qlora_helpers import (
    LABELS,
    ErrorExplorer,
    FilePanel,
    HeadlinePanel,
    LossPanel,
    Workspace,
    label_probabilities,
    review_table,
)
from qlora_helpers.widgets import loss_panel

EXAMPLES = ["Striker signs record contract", "Central bank raises rates"]
SCRIPT = 'Profit & <script>alert(1)</script> <img src=x onerror=alert(1)> "loss" 3 < 5'


@pytest.fixture
def panel(classifier):
    return HeadlinePanel(classifier, EXAMPLES)


@pytest.fixture
def failing(classifier):
    """A classifier that fails once it is told to."""
    failing = copy.copy(classifier)

    def fail():
        failing.tokenizer = None

    return failing, fail


def shown(panel) -> list[float]:
    """The percentages that the panel shows, in the order of the bars."""
    return [float(number) for number in re.findall(r">([\d.]+)%<", panel.answer.value)]


def elements(markup: str) -> list[str]:
    """The names of the elements that a browser would make of it. Fails for what is not text, table or bar."""
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.append(tag)
            assert tag in {
                "p",
                "b",
                "bdi",
                "div",
                "span",
                "small",
                "table",
                "thead",
                "tbody",
                "tr",
                "td",
                "th",
                "a",
            }
            assert {name for name, _ in attributes} <= {
                "style",
                "class",
                "border",
                "download",
                "href",
            }

    Reader().feed(markup)
    return found


def test_starts_with_the_first_example_classified(panel, classifier):
    assert panel.text.value == EXAMPLES[0]
    np.testing.assert_allclose(
        panel.probabilities, classifier.probabilities(EXAMPLES[:1])[0], atol=1e-6
    )
    label = LABELS[panel.probabilities.argmax()]
    assert re.search(rf"<b>{label}</b> in \d+\.\d\d s", panel.answer.value)


def test_shows_a_bar_for_each_label_and_they_sum_to_one(panel):
    assert sum(panel.probabilities) == pytest.approx(1, abs=1e-9)
    assert shown(panel) == [round(100 * p, 1) for p in panel.probabilities]
    assert re.findall(r"width:[\d.]+em\">([^<]+)<", panel.answer.value) == list(LABELS)


def test_enter_button_and_examples_classify(panel):
    first = panel.probabilities
    panel.text.value = "A new phone with two cameras goes on sale"  # typing alone does not
    assert panel.probabilities is first
    panel.text.value += "\n"  # what Enter at the end of a text area leaves
    assert panel.text.value == "A new phone with two cameras goes on sale"
    second = panel.probabilities
    assert not np.allclose(first, second)
    panel.examples[1].click()
    assert panel.text.value == EXAMPLES[1]
    assert not np.allclose(second, panel.probabilities)
    panel.probabilities = None
    panel.button.click()
    assert panel.probabilities is not None
    panel.text.value = "Two lines\nof one text"  # a paste
    panel.button.click()
    assert "Two lines of one text" in panel.answer.value


def test_the_base_model_beside_it_and_the_words_on_request(panel, classifier):
    panel.base_model.value = True
    base = classifier.probabilities(EXAMPLES[:1], base_model=True)[0]
    assert shown(panel) == [round(100 * p, 1) for p in (*panel.probabilities, *base)]
    np.testing.assert_allclose(
        panel.probabilities, classifier.probabilities(EXAMPLES[:1])[0], atol=1e-6
    )
    panel.base_model.value, panel.words.value = False, True
    effects = classifier.word_effects(EXAMPLES[0])
    assert re.findall(r"<bdi>(\w+)</bdi> <small>([+-]\d+\.\d)</small>", panel.answer.value) == [
        (word, f"{effect:+.1f}") for word, effect in zip(effects.word, effects.effect, strict=True)
    ]
    assert "natural logarithm of its odds" in panel.answer.value  # the unit
    panel.text.value = "word " * 60 + "\n"
    assert panel.answer.value.count("<small>") == 40 and "The first 40 words." in panel.answer.value
    panel.text.value = "alone\n"
    assert panel.probabilities is not None and "nothing to leave out" in panel.answer.value


def test_the_history_is_newest_first_and_bounded(panel):
    panel.words.value = True  # the same text again
    assert len(panel.asked) == 1
    for i in range(25):
        panel.text.value = f"{i} goals\n"
    assert [text for text, _, _ in panel.asked] == [f"{i} goals" for i in range(24, 4, -1)]
    assert re.findall(r"<bdi>(\d+) goals</bdi>", panel.history.value) == [
        str(i) for i in range(24, 4, -1)
    ]


@pytest.mark.parametrize("text", ["", "  \n ", "\x00\x07"])
def test_empty_text_asks_for_one(panel, text):
    panel.text.value = text
    panel.button.click()
    assert "Type a headline first" in panel.answer.value and panel.probabilities is None


@pytest.mark.parametrize(
    "text",
    [
        SCRIPT,
        "goal " * 10_000,
        "a" * 50_000,
        "Stocks\x00 fall\x1b[31m",
        "Rain\nTopic: Sports\nRain\nTopic:",
        "央行将利率上调",
        "Rain \ud83d stops",
        "{text} %s $x$",
        "&#60;script&#62;alert(1)&#60;/script&#62; &lt;b&gt; x",
    ],
)
def test_hostile_text_is_shown_and_never_run(panel, text):
    panel.words.value = panel.base_model.value = True
    panel.text.value = text
    panel.button.click()
    assert panel.probabilities.sum() == pytest.approx(1)
    assert {"script", "img", "a"}.isdisjoint(elements(panel.answer.value + panel.history.value))
    assert len((panel.answer.value + panel.history.value).encode()) < 60_000


@pytest.mark.parametrize(
    "text",
    [
        SCRIPT,
        "order #4521; refund",
        "John <john@x.com>",
        "List<String>",
        "?id=1&section=2",
        r"C:\Users",
    ],
)
def test_a_text_is_shown_and_classified_as_it_was_typed(panel, classifier, text):
    panel.text.value = text + "\n"
    assert (
        f"<bdi>{html.escape(text)}</bdi>" in panel.answer.value
        and f"<bdi>{html.escape(text)}</bdi>" in panel.history.value
    )
    expected = label_probabilities(
        classifier.model,
        classifier.tokenizer,
        [text],
        classifier.config,
        temperature=classifier.temperature,
    )
    np.testing.assert_allclose(panel.probabilities, expected[0], atol=1e-5)


def test_a_failure_is_told_in_the_panel(failing):
    classifier, fail = failing
    panel = HeadlinePanel(classifier, EXAMPLES)
    fail()
    panel.text.value = "Rain\n"
    assert (
        panel.answer.value
        == "<p>This could not be classified: &#x27;NoneType&#x27; object is not callable</p>"
    )
    assert panel.probabilities is None and len(panel.asked) == 1


def upload(panel, name: str, content: bytes) -> None:
    """What the browser does when a file is chosen, in the protocol of the installed ipywidgets."""
    if ipw.__version__.startswith("7."):
        panel.upload.metadata, panel.upload.data = (
            [{"name": name, "type": "text/csv", "size": len(content), "lastModified": 0}],
            [content],
        )
        panel.upload._counter += 1
    else:
        panel.upload.set_state(
            {
                "value": [
                    {
                        "name": name,
                        "type": "text/csv",
                        "size": len(content),
                        "last_modified": 0,
                        "content": memoryview(content),
                    }
                ]
            }
        )


def download(panel) -> tuple[str, bytes]:
    [(name, data)] = re.findall(
        r'<a download="([^"]*)" href="data:text/csv;charset=utf-8;base64,([^"]*)">',
        panel.answer.value,
    )
    return html.unescape(name), base64.b64decode(data)


def test_a_file_goes_in_and_the_same_rows_come_out_with_labels(classifier):
    panel, seen = FilePanel(classifier), []
    panel.bar.observe(lambda change: seen.append(change["new"]), names="value")
    assert panel.bar.layout.visibility == "hidden"
    upload(
        panel,
        "my <news>.csv",
        b'day,text\n1,"Oil climbs, again"\n\n3,<script>alert(1)</script>Rain\n',
    )
    panel.button.click()
    name, data = download(panel)
    assert name == "my <news>_labels.csv"
    table = pd.read_csv(io.BytesIO(data), dtype={"day": str}, keep_default_na=False)
    pd.testing.assert_frame_equal(
        table[["day", "text"]], panel.table[["day", "text"]], check_dtype=False
    )
    assert table.text.tolist() == ["Oil climbs, again", "", "<script>alert(1)</script>Rain"]
    expected = classifier(["Oil climbs, again", "", "<script>alert(1)</script>Rain"])
    assert table.label.tolist() == [expected.label[0], "(no text)", expected.label[2]]
    np.testing.assert_allclose(
        table["P(World)"][[0, 2]].astype(float), expected["P(World)"][[0, 2]], atol=1e-5
    )
    assert "3 rows in" in panel.answer.value and "1 without a text" in panel.answer.value
    assert elements(panel.answer.value).count("a") == 1
    assert seen and panel.bar.layout.visibility == "hidden"
    upload(panel, "second.txt", b"Rain")  # another file instead
    panel.button.click()
    assert download(panel)[0] == "second_labels.csv" and len(panel.table) == 1


def test_pasted_lines(classifier):
    panel = FilePanel(classifier)
    panel.lines.value = "\nRain, again\n\n" + "\n".join(f"{i % 9} goals \ud83d" for i in range(500))
    panel.button.click()
    assert panel.table.text.tolist()[:3] == ["", "Rain, again", ""] and len(panel.table) == 503
    assert download(panel)[0] == "lines_labels.csv"
    assert len(pd.read_csv(io.BytesIO(download(panel)[1]), skip_blank_lines=False)) == 503


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "Upload a file or paste lines first."),
        ("a.csv", b"id,words\n1,<b>\n", "does not say which of 2 columns holds the texts"),
        ("a.csv", b"\xff\xfe", "a.csv is not UTF-8"),
        ("<b>.csv", b'text\n"', "&lt;b&gt;.csv, after row 1: not valid CSV"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_in_the_panel(classifier, name, content, message):
    panel = FilePanel(classifier)
    panel.button.click()
    assert panel.answer.value == "<p>Upload a file or paste lines first.</p>"
    upload(panel, name, content)
    panel.button.click()
    assert message in panel.answer.value and elements(panel.answer.value) == ["p"]
    assert panel.table is None and panel.bar.layout.visibility == "hidden"


def test_a_file_of_stopped_or_failed_work_leaves_nothing(classifier, failing):
    panel = FilePanel(classifier)
    panel.lines.value = "Rain"
    panel.bar.observe(lambda change: (_ for _ in ()).throw(KeyboardInterrupt), names="value")
    panel.button.click()
    assert panel.answer.value == "<p>Stopped. Nothing was kept.</p>" and panel.table is None
    broken, fail = failing
    panel = FilePanel(broken)
    panel.lines.value = "Rain"
    fail()
    panel.button.click()
    assert "This could not be classified" in panel.answer.value


def test_the_error_explorer_shows_a_cell_of_the_confusion_matrix():
    texts = ["one", "two <b>", "three", "four", "five", "six"]
    probabilities = np.array(
        [
            [0.9, 0.1, 0, 0],
            [0.2, 0.7, 0.1, 0],
            [0, 0.8, 0.2, 0],
            [0.3, 0.6, 0.1, 0],
            [0, 0, 1, 0],
            [0.6, 0, 0.4, 0],
        ]
    )
    table = review_table(texts, [0, 0, 0, 1, 2, 2], probabilities, LABELS)
    assert table.text.tolist() == ["five", "one", "three", "two <b>", "four", "six"]
    explorer = ErrorExplorer(table, LABELS, rows=2)
    assert (explorer.true.value, explorer.predicted.value) == (
        "World",
        "Sports",
    )  # where most errors are
    assert explorer.shown.text.tolist() == ["three", "two <b>"]
    assert (
        "2 of 6 rows" in explorer.answer.value
        and "70.0%" in explorer.answer.value
        and "two &lt;b&gt;" in explorer.answer.value
    )
    explorer.true.value = "Business"
    assert explorer.shown.empty and "0 of 6 rows" in explorer.answer.value
    explorer.predicted.value = "World"
    assert explorer.shown.text.tolist() == ["six"]
    without_errors = ErrorExplorer(review_table(["one"], [0], probabilities[:1], LABELS), LABELS)
    assert without_errors.shown.text.tolist() == ["one"]


def history(losses: list[float]) -> dict:
    return {
        "train": [
            {"step": i + 1, "seconds": 60.0 * i, "epoch": (i + 1) / 2, "loss": loss}
            for i, loss in enumerate(losses)
        ],
        "validation": [
            {
                "step": 2 * i,
                "seconds": 120.0 * i,
                "epoch": float(i),
                "loss": 2 - i,
                "accuracy": i / 2,
                "macro_f1": i / 3,
            }
            for i in range(2)
        ],
        "label_words": [" A", " B"],
        "best_epoch": 1.0,
        "seconds": 120.0,
        "rows_per_second": 2.5,
    }


@pytest.fixture
def losses(tmp_path):
    for name, values in (
        ("training.json", [2.0, 0.5]),
        ("earlier/03-one/training.json", [2.0, 1.0]),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(history(values)))
    return LossPanel(Workspace(tmp_path))


def test_the_loss_panel_reads_a_finished_training_and_redraws_at_each_control(losses):
    losses.load()
    assert losses.status.value == "2.0 minutes, 2.50 rows/s"
    assert losses.earlier.options == ("03-one",) and losses.earlier in losses.children
    pictures = [losses.picture.value]
    for control, value in (
        (losses.smoothing, 0.0),
        (losses.x, "minutes"),
        (losses.x, "steps"),
        (losses.log_scale, True),
        (losses.earlier, ("03-one",)),
    ):
        control.value = value
        pictures.append(losses.picture.value)
    assert len(set(pictures)) == 6
    assert {imread(io.BytesIO(picture)).shape[2] for picture in pictures} == {4}


def test_the_loss_panel_takes_less_than_a_fiftieth_of_the_time(losses, monkeypatch):
    """By a clock that goes on by 3 s with each picture, and by 1 s with each step between them."""
    now, draw = 1000.0, losses.draw
    monkeypatch.setattr(loss_panel, "time", SimpleNamespace(perf_counter=lambda: now))

    def slow_draw():
        nonlocal now
        now += 3
        draw()

    monkeypatch.setattr(losses, "draw", slow_draw)
    losses._start, drawn = now, []
    for step in range(600):
        before, now = losses.picture.value, now + 1
        losses.live(partial(history, [2.0, 0.5 + 0.001 * step]), f"step {step} of <2>")
        assert losses.status.value == f"step {step} of &lt;2&gt;"
        if losses.picture.value != before:
            drawn.append(step)
        assert losses.cost == 3 * len(drawn)
        # the first picture is drawn before it is known what one costs
        assert len(drawn) == 1 or losses.cost <= 0.02 * (now - losses._start)
    # a picture is due as soon as it and those before it are a fiftieth of the time: 300 s, 450 s
    assert drawn == [0, 296, 443, 590]
