"""Any labelled CSV: read, split and drawn. test_notebooks.py takes one through the notebooks."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from qlora_helpers.config import RunConfig
from qlora_helpers.data import SPLITS, draw_subset, load_rows, text_rules
from qlora_helpers.errors import ConfigError, DataError
from qlora_helpers.texts import read_labelled_csv

TEN = [
    "sci.space",
    "sci.med",
    "sci.crypt",
    "talk.guns",
    "talk.religion",
    "rec.autos",
    "rec.hockey",
    "comp.windows",
    "comp.mac",
    "alt.misc",
]


@pytest.fixture
def write(tmp_path):
    def write(rows, header=("text", "label"), name="rows.csv") -> Path:
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        return tmp_path / name

    return write


def ten_labels(each: int = 12) -> list[tuple[str, str]]:
    return [
        (f"{label.replace('.', ' ')} story {i} about {'very ' * (i % 4)}many things", label)
        for i in range(each)
        for label in TEN
    ]


def test_labels_texts_and_what_was_left_out(write):
    rows = read_labelled_csv(
        write(
            [
                ('Rain, "heavy"\nall day', "weather"),
                ("", "weather"),
                ('rain,  "HEAVY" all day', "weather"),
                ("Goal", " sport "),
                ("\x00 \t", "sport"),
                ("Sun", "weather"),
                ("Save", "sport"),
                ("GOAL", "weather"),
            ]
        )
    )
    assert rows.attrs == {
        "labels": ("sport", "weather"),
        "left_out": {"without a text": 2, "copies": 1, "copies with another label": 1},
        "contradictions": ["'GOAL' is 'sport' in row 5, which is kept, and 'weather' in row 9"],
    }
    assert rows.to_numpy().tolist() == [
        ['Rain, "heavy"\nall day', 1],
        ["Goal", 0],
        ["Sun", 1],
        ["Save", 0],
    ]


OWN = [
    "order #4521; refund",
    "John <john@x.com>",
    "List<String>",
    "?id=1&section=2",
    r"C:\Users",
    "AT&amp;T",
    r"costs \$5",
    ":)",
    ":(",
    "\U0001f44d",
    "\U0001f44e",
    "C++",
    "C#",
    "-5",
    "5",
    "Ma\u00dfe",
    "Masse",
    "<b>bold</b>",
    "?!",
]
HINDI = [
    "काम",
    "कम",
    "कमी",
    "किताब",
    "कितना",
    "दिन",
    "दीन",
    "दाना",
    "दान",
    "बाल",
    "बल",
    "बोल",
    "मेल",
    "मिल",
]


def test_texts_of_the_readers_own_stay_as_they_are_and_are_no_copies(write):
    """Through the file, the draw and the check of 04; they differ by more than case and space."""
    texts = OWN + HINDI
    path = write([(text, "ab"[i % 2]) for i, text in enumerate(texts)])
    config = RunConfig.from_environment(data=str(path))
    subset = draw_subset(load_rows(config), config)
    assert sorted(text for split in SPLITS for text in subset[split].text) == sorted(texts)
    assert subset["train"].attrs["copies_dropped"] == 0
    _, copy_key = text_rules(config)
    assert len({copy_key(text) for text in texts}) == len(texts) == 33


def test_a_label_keeps_its_signs(write):
    labels = ["<none>", "C++", "C#", "a  b"] * 2
    rows = read_labelled_csv(write([(f"text {i}", label) for i, label in enumerate(labels)]))
    assert rows.attrs["labels"] == ("<none>", "C#", "C++", "a b")


def test_columns_may_stand_in_any_order_beside_others(write):
    rows = read_labelled_csv(
        write(
            [(1, "b", "one"), (2, "a", "two"), (3, "a", "three"), (4, "b", "four")],
            header=("id", "Label", "TEXT"),
        )
    )
    assert rows.to_numpy().tolist() == [["one", 1], ["two", 0], ["three", 0], ["four", 1]]


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([], ("text", "label"), "has 0 labels"),
        (
            [("a", "x"), ("b", "x")],
            ("text", "label"),
            r"has 1 label \('x'\): 2 to 26 can be told apart",
        ),
        (
            [(f"text {i}", f"label {i // 2}") for i in range(54)],
            ("text", "label"),
            r"has 27 labels \('label 0', 'label 1', 'label 10', ...\)",
        ),
        (
            [("a", "x"), ("b", "x"), ("c", "y")],
            ("text", "label"),
            "'y' has a single row .* Add rows of it, or remove it",
        ),
        (
            [("a", "x"), ("b", "x"), ("c", "y"), ("C ", "y"), ("d", "z")],
            ("text", "label"),
            "'y', 'z' have a single row",
        ),
        ([("a", "x"), ("b", "")], ("text", "label"), "row 3: there is no label"),
        (
            [("a", "x"), ("b", "x", "c")],
            ("text", "label"),
            "row 3: 3 columns, but the header names 2. Put double quotes",
        ),
        (
            [("a", "x")],
            ("headline", "label"),
            "the first row is 'headline,label' and does not name one column 'text'. A labelled",
        ),
        ([("a", "x", "b")], ("text", "label", "text"), "does not name one column 'text'"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_remedy(write, rows, header, message):
    path = write(rows, header)
    with pytest.raises(DataError, match=message) as error:
        read_labelled_csv(path)
    assert str(path) in str(error.value)
    with pytest.raises(DataError, match=message):  # before anything else is done
        RunConfig.from_environment(data=str(path))


def test_a_file_that_is_not_utf8_or_not_there(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("text,label\ncaf\u00e9,x\n".encode("latin1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        RunConfig.from_environment(data=str(path))
    with pytest.raises(
        ConfigError, match="is not here. Give a folder .* or a CSV file with the header text,label"
    ):
        RunConfig.from_environment(data=str(tmp_path / "none.csv"))


def test_the_sizes_are_what_the_file_can_fill(write):
    config = RunConfig.from_environment(data=str(write(ten_labels())))
    assert config.labels == tuple(sorted(TEN))
    assert (config.train_size, config.validation_size, config.test_size) == (84, 12, 24)
    large = RunConfig.from_environment(data=str(write(ten_labels(100))))
    assert (large.train_size, large.validation_size, large.test_size) == (280, 40, 80)
    chosen = RunConfig.from_environment(data=str(write(ten_labels())), train_size=30, test_size=40)
    assert (chosen.train_size, chosen.validation_size, chosen.test_size) == (30, 12, 40)
    with pytest.raises(
        DataError, match="has 120 rows to use .* ask for 132: lower QLORA_TRAIN_SIZE"
    ):
        load_rows(
            RunConfig.from_environment(data=str(write(ten_labels())), train_size=80, test_size=40)
        )


def test_the_splits_share_no_row_and_keep_the_frequencies(write):
    rows = [
        (f"{label} {i}", label)
        for label, count in (("common", 60), ("less", 28), ("rare", 2))
        for i in range(count)
    ]
    config = RunConfig.from_environment(data=str(write(rows)))
    assert (config.train_size, config.validation_size, config.test_size) == (63, 9, 18)
    subset = draw_subset(load_rows(config), config)
    texts = [text for split in SPLITS for text in subset[split].text]
    assert sorted(texts) == sorted(text for text, _ in rows)  # each once
    counts = {
        split: Counter(config.labels[label] for label in subset[split].label) for split in SPLITS
    }
    assert counts == {
        "test": {"common": 12, "less": 5, "rare": 1},
        "validation": {"common": 6, "less": 3},
        "train": {"common": 42, "less": 20, "rare": 1},
    }
    for split in SPLITS:
        assert all(
            text.startswith(config.labels[label])
            for text, label in subset[split].itertuples(index=False)
        )
    again = draw_subset(load_rows(config), config)
    assert all(subset[split].equals(again[split]) for split in SPLITS)


def test_other_labels_than_at_setup_are_refused(write):
    config = RunConfig.from_environment(
        data=str(write([("a", "x"), ("b", "x"), ("c", "y"), ("d", "y")]))
    )
    write([("a", "x"), ("b", "x"), ("c", "z"), ("d", "z")])
    with pytest.raises(DataError, match="labels x, z now, .* run notebooks/01_setup.ipynb again"):
        load_rows(config)
