"""Any labelled CSV: read, split and drawn. test_notebooks.py takes one through the notebooks."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from qlora_helpers.config import RunConfig
from qlora_helpers.data import SPLITS, draw_subset, load_rows, text_rules
from qlora_helpers.errors import DataError
from qlora_helpers.texts import read_labelled_csv


@pytest.fixture
def write(tmp_path):
    def write(rows, header=("text", "label")) -> Path:
        with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        return tmp_path / "rows.csv"

    return write


def test_labels_texts_and_what_was_left_out(write):
    rows = read_labelled_csv(
        write(
            [
                ('Rain, "heavy"\nall day', "weather"),
                ("", "weather"),
                ('rain,  "HEAVY" all day', "weather"),
                ("Goal", " sport "),
                ("\x00 \t", "sport"),
                (),
                ("Sun", "weather"),
                ("Save", "sport"),
                ("GOAL", "weather"),
            ]
        )
    )
    assert rows.attrs == {
        "labels": ("sport", "weather"),
        "left_out": {"without a text": 2, "copies": 2},
        "contradictions": ["'GOAL' is 'sport' in row 5, which is kept, and 'weather' in row 10"],
    }
    assert rows.to_numpy().tolist() == [
        ['Rain, "heavy"\nall day', 1],
        ["Goal", 0],
        ["Sun", 1],
        ["Save", 0],
    ]


_OWN = (
    "order #4521; refund|John <john@x.com>|List<String>|?id=1&section=2|C:\\Users|AT&amp;T|"
    "costs \\$5|:)|:(|\U0001f44d|\U0001f44e|C++|C#|-5|5|Ma\u00dfe|Masse|<b>bold</b>|?!|"
    "काम|कम|कमी|किताब|कितना|दिन|दीन|दाना|दान|बाल|बल|बोल|मेल|मिल"
)
OWN = _OWN.split("|")


def test_texts_of_the_readers_own_stay_as_they_are_and_are_no_copies(write):
    """Through the file, the draw and the check of 04; they differ by more than case and space."""
    path = write([(text, "ab"[i % 2]) for i, text in enumerate(OWN)])
    config = RunConfig.from_environment(data=str(path))
    subset = draw_subset(load_rows(config), config)
    assert sorted(text for split in SPLITS for text in subset[split].text) == sorted(OWN)
    assert subset["train"].attrs["copies_dropped"] == 0
    _, copy_key = text_rules(config)
    assert len({copy_key(text) for text in OWN}) == len(OWN) == 33


def test_columns_may_stand_in_any_order_beside_others_and_a_label_keeps_its_signs(write):
    rows = [(1, "C++", "one"), (2, "<b>", "two"), (3, "<b>", "three"), (4, "C++", "four"), ()]
    rows += [(5, "a  b", "five"), (6, "C#", "six"), (7, "C#", "seven"), (8, "a b", "eight")]
    table = read_labelled_csv(write(rows, header=("id", "Label", " TEXT")))
    assert table.attrs["labels"] == ("<b>", "C#", "C++", "a b")
    assert table.raw.tolist() == ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    assert table.label.tolist() == [2, 0, 0, 2, 3, 1, 1, 3]


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([], "text,label", r"has 0 different labels, such as \[\]"),
        (
            [(f"text {i}", f"label {i // 2}") for i in range(54)],
            "text,label",
            r"has 27 different labels, such as \['label 0', 'label 1', 'label 10'\]: 2 to 26 can",
        ),
        (["ax", "bx", "cy"], "text,label", "'y' has a single row .* Add rows of it, or remove"),
        ([("a", "x"), ("b", "")], "text,label", "row 3: there is no label"),
        (["ax", "bxc"], "text,label", "row 3: the number of columns is 3, not 2. Commas separate"),
        (["ax"], "headline,label", "row is 'headline,label' and does not name one column 'text'"),
        (["axb"], "text,label,text", "does not name one column 'text'. A labelled CSV begins"),
        (["a"], "text;label", "does not name one column 'text'.* Commas separate the columns"),
        ([("text", "label"), *["ax"] * 9], "sep=,", "first line is 'sep=,'.* Remove that line"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_remedy(write, rows, header, message):
    path = write(rows, header.split(","))
    with pytest.raises(DataError, match=message) as error:  # before anything else is done
        RunConfig.from_environment(data=str(path))
    assert str(path) in str(error.value)


def sizes_of(path: Path, **choices) -> tuple[int, int, int]:
    config = RunConfig.from_environment(data=str(path), **choices)
    return config.train_size, config.validation_size, config.test_size


def test_the_sizes_are_what_the_file_can_fill(write):
    path = write([(f"{label} {i}", label) for i in range(12) for label in "abcdefghij"])
    assert sizes_of(path) == (84, 12, 24)
    assert sizes_of(path, train_size=30, test_size=40) == (30, 12, 40)
    config = RunConfig.from_environment(data=str(path), train_size=80, test_size=40)
    assert config.labels == tuple("abcdefghij")
    with pytest.raises(
        DataError, match="train_size=80 and validation_size=12 need .*: lower QLORA"
    ):
        draw_subset(load_rows(config), config)
    path = write([(f"{label} {i}", label) for i in range(500) for label in "ab"])
    assert sizes_of(path) == (280, 40, 80)


def test_the_splits_share_no_row_and_keep_the_frequencies(write):
    counts = {"common": 60, "less": 28, "rare": 2}
    rows = [(f"{label} {i}", label) for label, n in counts.items() for i in range(n)]
    path = write(rows)
    assert sizes_of(path) == (63, 9, 18)
    config = RunConfig.from_environment(data=str(path))
    subset = draw_subset(load_rows(config), config)
    texts = [text for split in SPLITS for text in subset[split].text]
    assert sorted(texts) == sorted(text for text, _ in rows)  # each once
    assert {split: Counter(text.split()[0] for text in subset[split].text) for split in SPLITS} == {
        "test": {"common": 12, "less": 5, "rare": 1},
        "validation": {"common": 6, "less": 3},
        "train": {"common": 42, "less": 20, "rare": 1},
    }
    again = draw_subset(load_rows(config), config)
    for split in SPLITS:
        assert subset[split].equals(again[split])
        for text, label in subset[split].itertuples(index=False):
            assert text.startswith(config.labels[label])


def test_other_labels_than_at_setup_are_refused(write):
    config = RunConfig.from_environment(data=str(write(["ax", "bx", "cy", "dy"])))
    write(["ax", "bx", "cz", "dz"])
    with pytest.raises(DataError, match="labels x, z now, .* run notebooks/01_setup.ipynb again"):
        load_rows(config)


def test_two_rows_of_each_label_leave_none_to_validate_on(write):
    path = write([(f"{label} {i}", label) for label in ("sport", "weather") for i in range(2)])
    config = RunConfig.from_environment(data=str(path))
    with pytest.raises(DataError, match="or no row to validate on: set larger ones, or add rows"):
        draw_subset(load_rows(config), config)
