import csv
import dataclasses
import hashlib
import itertools
import os
import re
from collections import Counter
from importlib import resources
from pathlib import Path

import pandas as pd
import pytest

from qlora_helpers.config import LABELS, RunConfig
from qlora_helpers.data import SPLITS, draw_subset, load_rows
from qlora_helpers.errors import DataError
from qlora_helpers.texts import clean_text, normalised, tidy_text

# read when the tests are collected: each of them runs without QLORA_ variables
AG_NEWS_FOLDER = Path(
    os.environ.get("AG_NEWS_FOLDER") or Path(__file__).parents[2] / "shared" / "ag_news"
)


# cleaning


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Ferry firm #39;s profit falls", "Ferry firm's profit falls"),
        (
            "They don #39;t expect rain;  #39;none, #39; he said",
            "They don't expect rain; 'none,' he said",
        ),
        (
            "The mayor called it  quot;a good day quot; and left",
            'The mayor called it "a good day" and left',
        ),
        ("quot;Enough, quot; says keeper", '"Enough," says keeper'),
        (
            "Harbour bridge reopens &lt;b&gt;...&lt;/b&gt; after ten months",
            "Harbour bridge reopens ... after ten months",
        ),
        (
            'Chip maker Orvel Inc. &lt;A HREF="http://www.reuters.example/quote.aspx?ticker=ORVL.O target=/stocks/full"&gt;ORVL.O&lt;/A&gt; cut',  # noqa: E501
            "Chip maker Orvel Inc. ORVL.O cut",
        ),
        (
            '&lt;FONT face="verdana" size="-2"&gt;&lt;B&gt;The Harbour Post&lt;/B&gt;&lt;/FONT&gt;',
            "The Harbour Post",
        ),
        (r"Sold for \$48-billion in cash", "Sold for $48-billion in cash"),
        (r"Storm warnings\for the coming\\days", "Storm warnings for the coming days"),
        (" #36;600,000 raised", "$600,000 raised"),
        ("AT amp;T and Standard  amp; Poor #39;s", "AT&T and Standard & Poor's"),
        ("The vote #151; a close one #151; stands", "The vote— a close one— stands"),
        ("12 nbsp;percent,&nbsp;up", "12 percent, up"),
        ("Fish &amp; chips, 5 &lt; 6", "Fish & chips, 5 < 6"),
        ("Fish &amp;amp; chips &amp;lt;b&amp;gt;fried&amp;lt;/b&amp;gt;", "Fish & chips fried"),
        ("Sports India: Cricket  gt; Kanpur", "Sports India: Cricket > Kanpur"),
        (
            "She played the part; and the lamp; then left",
            "She played the part; and the lamp; then left",
        ),
        ("No. #39 wins; lot #151 sold", "No. #39 wins; lot #151 sold"),
        ("one\x00two\x07three\tfour\r\nfive\x85six", "one two three four five six"),
        ("  spaces   all\u00a0over ", "spaces all over"),
        ("Kénitra: already clean, at $5 & 'quoted'.", "Kénitra: already clean, at $5 & 'quoted'."),
    ],
)
def test_clean_text(raw, clean):
    assert clean_text(raw) == clean


def test_control_characters_and_runs_of_spaces_alone_are_tidied():
    assert tidy_text("  a\x00b\tc \r\n d\u2003e\x1b[31m ") == "a b c d e [31m"
    # the last has a zero-width joiner
    text = "order #4521; <john@x.com> List<String> ?id=1&section=2 C:\\Users &amp; क्‍ष"
    assert tidy_text(text) == text


@pytest.mark.parametrize(
    "raw", ["&#" + "1" * 4301 + ";", "&amp;#" + "7" * 4301 + ";", "&#" + "0" * 5000]
)
def test_an_entity_of_thousands_of_digits_is_one_unknown_character(raw):
    assert clean_text(f"Oil {raw} climbs") == "Oil \ufffd climbs"
    assert normalised(f"Oil {raw} climbs") == "oil climbs"


def test_cleaning_the_sample_changes_nothing(config):
    for rows in load_rows(config).values():
        assert [clean_text(raw) for raw in rows.raw] == rows.raw.tolist()


# reading

GOOD = '"1","Title","Description"\n'


@pytest.fixture
def read(tmp_path, config):
    """Reads a train.csv with the given content, beside a test.csv that is fine."""

    def read(content: str | bytes):
        (tmp_path / "train.csv").write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
        (tmp_path / "test.csv").write_text(GOOD)
        return load_rows(dataclasses.replace(config, data=str(tmp_path)))["train"]

    return read


def test_csv_as_it_comes(read):
    rows = read(
        b"\xef\xbb\xbf"
        + '"3","Café","He said ""no"", then left"\r\n\r\n4,Two\nlines,"a\nb, c"\r\n 2 ,"",only\n'.replace(
            "Two\nlines", '"Two\nlines"'
        ).encode()
    )
    assert rows.to_dict("list") == {
        "raw": ['Café He said "no", then left', "Two\nlines a\nb, c", " only"],
        "label": [2, 3, 1],
    }


LAYOUT = "class (1 to 4), title, description, without a header"


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("", ["has no rows", LAYOUT]),
        ("\n\n", ["has no rows", LAYOUT]),
        (GOOD + '"1","a","b","c"\n', ["row 2: 4 columns instead of 3", LAYOUT]),
        (GOOD + '"1","a"\n', ["row 2: 2 columns instead of 3", LAYOUT]),
        (GOOD + "text\n", ["row 2: 1 column instead of 3", LAYOUT]),
        (
            GOOD + GOOD + '"5","a","b"\n',
            ["row 3: class '5' is not 1 (World), 2 (Sports), 3 (Business) or 4 (Sci/Tech)"],
        ),
        ("class,title,description\n" + GOOD, ["row 1: class 'class' is not 1 (World)"]),
        (
            GOOD + '"1"," "," #39;"\n' + '"2","&lt;b&gt;"," "\n',
            ["row 3: title and description are both empty", "Remove the row"],
        ),
        (GOOD + '"1","a","never closed\n', ["after row 1: not valid CSV", LAYOUT]),
        (GOOD + '"1","a","b" c\n', ["after row 1: not valid CSV", LAYOUT]),
        (
            GOOD.encode() * 3 + b'"1","caf\xe9","b"\n',
            ["not UTF-8 (byte 86)", "iconv -f latin1 -t utf-8"],
        ),
        (
            GOOD.encode() * 5000 + b'"1","caf\xe9","b"\n',
            ["not UTF-8 (byte 130008)", "iconv -f latin1 -t utf-8"],
        ),
    ],
)
def test_a_bad_csv_is_named_with_row_and_remedy(read, tmp_path, content, names):
    with pytest.raises(DataError) as caught:
        read(content)
    for name in [str(tmp_path / "train.csv"), *names]:
        assert name in str(caught.value)


@pytest.mark.parametrize("missing", ["train.csv", "test.csv"])
def test_a_missing_csv_is_named_with_the_layout(read, tmp_path, config, missing):
    read(GOOD)
    (tmp_path / missing).unlink()
    with pytest.raises(
        DataError,
        match=f"{re.escape(str(tmp_path / missing))} is not there. QLORA_DATA names a folder with train.csv",
    ):
        load_rows(dataclasses.replace(config, data=str(tmp_path)))


def test_a_folder_in_place_of_a_csv(read, tmp_path, config):
    read(GOOD)
    (tmp_path / "train.csv").unlink()
    (tmp_path / "train.csv").mkdir()
    with pytest.raises(DataError, match="train.csv cannot be read: Is a directory"):
        load_rows(dataclasses.replace(config, data=str(tmp_path)))


# drawing


def _rows(counts: list[int], split: str = "train") -> pd.DataFrame:
    return pd.DataFrame(
        [
            (f"{split} {LABELS[label]} {i}", label)
            for label, n in enumerate(counts)
            for i in range(n)
        ],
        columns=["raw", "label"],
    )


def _counts(split: pd.DataFrame) -> list[int]:
    return [int((split.label == label).sum()) for label in range(len(LABELS))]


def _draw(config, train=(50, 50, 50, 50), test=(50, 30, 15, 5), **sizes):
    return draw_subset(
        {"train": _rows(train), "test": _rows(test, "test")}, dataclasses.replace(config, **sizes)
    )


def test_the_draw_is_stratified(config):
    drawn = _draw(config, train_size=120, validation_size=20, test_size=20)
    assert {split: _counts(drawn[split]) for split in drawn} == {
        "train": [30, 30, 30, 30],
        "validation": [5, 5, 5, 5],
        "test": [10, 6, 3, 1],
    }
    assert list(drawn) == SPLITS
    texts = [text for split in drawn.values() for text in split.text]
    assert len(set(texts)) == 160
    for split, source in [("train", "train"), ("validation", "train"), ("test", "test")]:
        assert all(
            text.startswith(f"{source} {LABELS[label]} ")
            for text, label in zip(drawn[split].text, drawn[split].label, strict=True)
        )


def test_sizes_that_four_does_not_divide_are_met_exactly(config):
    drawn = _draw(config, train_size=10, validation_size=7, test_size=9)
    assert {split: _counts(drawn[split]) for split in drawn} == {
        "train": [3, 3, 2, 2],
        "validation": [2, 2, 2, 1],
        "test": [5, 3, 1, 0],
    }  # 4.5, 2.7, 1.35, 0.45: largest remainders first


def test_rows_are_shuffled(config):
    for split in _draw(config, train_size=120, validation_size=40, test_size=60).values():
        assert (
            len([1 for _ in itertools.groupby(split.label)]) > 20
        )  # runs of equal labels; 4 where they stand in blocks


def test_a_smaller_training_split_is_a_part_of_a_larger_one(config):
    small, large = (
        _draw(config, train_size=size, validation_size=20, test_size=20) for size in (30, 90)
    )
    assert set(small["train"].text) < set(large["train"].text)
    pd.testing.assert_frame_equal(small["validation"], large["validation"])
    pd.testing.assert_frame_equal(small["test"], large["test"])


def _nested_and_apart(runs: dict[int, dict[str, pd.DataFrame]]):
    """Each training split holds the smaller ones, and no row is in two splits of one run."""
    for smaller, larger in itertools.pairwise(sorted(runs)):
        assert set(runs[smaller]["train"].text) < set(runs[larger]["train"].text)
        pd.testing.assert_frame_equal(runs[smaller]["test"], runs[larger]["test"])
    for size, run in runs.items():
        texts = [text for split in SPLITS for text in run[split].text]
        assert len(run["train"]) == size and len(set(texts)) == len(texts)


SIZES = (280, 1000, 2000, 4000, 10_000)


def test_training_splits_are_nested_with_the_default_validation_sizes(tmp_path):
    """At these sizes a seventh validates: 40, 142, 285, 571 and 1,428 rows."""
    rows = {"train": _rows([3000, 3100, 2900, 3300]), "test": _rows([30, 40, 20, 10], "test")}
    configs = {size: RunConfig.from_environment(train_size=size) for size in SIZES}
    assert [configs[size].validation_size for size in SIZES] == [40, 142, 285, 571, 1428]
    runs = {size: draw_subset(rows, configs[size]) for size in SIZES}
    _nested_and_apart(runs)
    assert [len(runs[size]["validation"]) for size in SIZES] == [40, 142, 285, 571, 1428]


def test_training_splits_of_a_labelled_csv_are_nested_too(tmp_path):
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [("text", "label")]
            + [
                (f"{label} {i}", label)
                for label, n in (("rare", 37), ("less", 4211), ("common", 9001))
                for i in range(n)
            ]
        )
    runs, whole = {}, 37 + 4211 + 9001
    for size in SIZES:
        config = RunConfig.from_environment(data=str(path), train_size=size)
        runs[size] = draw_subset(load_rows(config), config)
        for split in (
            SPLITS
        ):  # each label's share, but for the rounding and the one row that each label has at least
            for label, n in enumerate((9001, 4211, 37)):
                rows = len(runs[size][split])
                assert abs((runs[size][split].label == label).sum() - rows * n / whole) < 2, (
                    size,
                    split,
                    label,
                )
    _nested_and_apart(runs)


def test_the_seed_alone_decides(config):
    sizes = {"train_size": 40, "validation_size": 20, "test_size": 20}
    one, again, other = (
        _draw(config, **sizes),
        _draw(config, **sizes),
        _draw(config, seed=43, **sizes),
    )
    for split in SPLITS:
        pd.testing.assert_frame_equal(one[split], again[split])
        assert set(one[split].text) != set(other[split].text)


def test_the_first_rows_of_the_sample_for_the_default_seed(config):
    drawn = draw_subset(load_rows(config), config)
    assert {
        split: [
            (text[:40], LABELS[label])
            for text, label in zip(drawn[split].text[:3], drawn[split].label[:3], strict=True)
        ]
        for split in SPLITS
    } == {
        "train": [
            ("Poland rally from two sets down in volle", "Sports"),
            ("Nigeria's Central Bank Raises Rates to 1", "Business"),
            ("Six-week ban for Dunedin prop Tama Pohat", "Sports"),
        ],
        "validation": [
            ("Durban Dockworkers Return, but Backlog R", "Business"),
            ("Bidding War for an Afghan Seamer MUMBAI ", "Sports"),
            ("Chile draw level with Croatia on Antofag", "Sports"),
        ],
        "test": [
            ("Tajikistan Frees Kyrgyz Shepherds but Ke", "World"),
            ("Irish Whiskey Distiller Toasts Record Ye", "Business"),
            ("Vanuatu Sisters Reach Beach Worlds Lini ", "Sports"),
        ],
    }


def test_normalised_is_what_a_copy_keeps():
    assert (
        normalised("Oil  Climbs 3%, again!")
        == normalised("OIL CLIMBS: 3 % - AGAIN")
        == "oil climbs 3 again"
    )
    assert (
        normalised("Fujita #39;s caf\u00e9")
        == normalised("FUJITA'S CAFE\u0301")
        != normalised("Fujita's cafe")
    )
    assert normalised("?!") == "?!" != normalised("...")


def test_planted_leaks_are_found_and_dropped_all_of_them(config):
    """Test rows copied into the training rows with other case and punctuation, under any label."""
    rows = load_rows(config)
    clean = draw_subset(rows, config)
    assert clean["train"].attrs["copies_dropped"] == 0
    planted = clean["test"].head(60)
    leaks = pd.DataFrame(
        {
            "raw": [
                text.upper().replace(".", " ...").replace(",", " -") + "!" for text in planted.text
            ],
            "label": [i % 4 for i in range(60)],
        }
    )
    assert not set(leaks.raw) & set(planted.text)
    leaky = draw_subset(
        rows | {"train": pd.concat([leaks, rows["train"]], ignore_index=True)}, config
    )
    assert leaky["train"].attrs["copies_dropped"] == 60
    tested = set(leaky["test"].text.map(normalised))
    for split in ("train", "validation"):
        assert not tested & set(leaky[split].text.map(normalised))
        assert len(leaky[split]) == len(clean[split])


@pytest.mark.parametrize("change", [str.upper, str.lower, str.swapcase, str.title])
def test_a_copy_in_another_case_is_found_in_text_as_it_was_crawled(change):
    raw = "Profit \\$5 a share at AT amp;T, says the  quot;chief quot; &lt;b&gt;...&lt;/b&gt; It #39;s\\a record &hellip; in Z&uuml;rich"
    assert (
        normalised(change(raw).replace(",", ";") + " ?!")
        == normalised(raw)
        == ("profit 5 a share at at t says the chief it s a record in zürich")
    )


def test_training_rows_that_repeat_one_another_are_drawn_once(config):
    rows = load_rows(config)
    twice = pd.concat(
        [rows["train"], rows["train"].assign(raw=rows["train"].raw.str.upper())], ignore_index=True
    )
    subset = draw_subset(rows | {"train": twice}, config)
    assert subset["train"].attrs["copies_dropped"] == 320
    words = pd.concat([subset["train"], subset["validation"]]).text.map(normalised)
    assert len(words) == 320 and words.is_unique


def test_texts_are_drawn_clean(config):  # of AG News' layout
    rows = pd.DataFrame(
        {
            "raw": [f"Firm #39;s  quot;best quot;\\year {i}" for i in range(12)],
            "label": [0, 1, 2, 3] * 3,
        }
    )
    drawn = draw_subset(
        {"train": rows[:8], "test": rows[8:].reset_index(drop=True)},
        dataclasses.replace(config, train_size=4, validation_size=4, test_size=4),
    )
    assert {text for split in drawn.values() for text in split.text} == {
        f'Firm\'s "best" year {i}' for i in range(12)
    }


@pytest.mark.parametrize(
    ("rows", "sizes", "message"),
    [
        (
            {"train": (50, 50, 9, 50)},
            {"train_size": 32, "validation_size": 8},
            "train.* of 'sample' h.* 9 .*of Business, but train_size=32 and validation_size=8 need 10.*QLORA_TRAIN_SIZE",
        ),
        ({"test": (50, 50, 0, 50)}, {"test_size": 20}, "test.* of 'sample' has no row of Business"),
        (
            {"test": (10, 10, 10, 10)},
            {"test_size": 41},
            "test.* of 'sample' has 40 rows, but test_size=41.*QLORA_TEST_SIZE",
        ),
    ],
)
def test_too_few_rows_are_named(config, rows, sizes, message):
    with pytest.raises(DataError, match=message):
        _draw(config, **({"train_size": 8, "validation_size": 8, "test_size": 20} | rows | sizes))


# the bundled sample


@pytest.fixture(scope="module")
def sample() -> dict[str, list[tuple[str, str, str]]]:
    folder = resources.files("qlora_helpers") / "sample"
    return {
        split: list(csv.reader((folder / f"{split}.csv").read_text(encoding="utf-8").splitlines()))
        for split in ("train", "test")
    }


def test_the_sample_has_80_training_and_20_test_rows_of_each_class(sample):
    assert {split: Counter(row[0] for row in rows) for split, rows in sample.items()} == {
        "train": dict.fromkeys("1234", 80),
        "test": dict.fromkeys("1234", 20),
    }


def test_the_sample_has_no_two_rows_alike(sample):
    """No title twice, and no two texts that share more than 15% of their words of four letters and more (Jaccard; the highest is 12%)."""
    rows = sample["train"] + sample["test"]
    assert len({title.casefold() for _, title, _ in rows}) == 400
    words = [
        (set(re.findall(r"\w{4,}", f"{title} {description}".casefold())), title)
        for _, title, description in rows
    ]
    alike = [
        (a, b)
        for (one, a), (two, b) in itertools.combinations(words, 2)
        if len(one & two) > 0.15 * len(one | two)
    ]
    assert alike == []


def test_the_sample_is_written_as_news_is(sample):
    for _, title, description in sample["train"] + sample["test"]:
        assert 2 <= len(title.split()) <= 14, title
        assert 9 <= len(description.split()) <= 48, title
        assert '"' not in title + description, title
        assert description[-1] in ".?!'", title


# real rows


@pytest.mark.skipif(
    not (AG_NEWS_FOLDER / "train.csv").is_file(),
    reason="no AG News rows in $AG_NEWS_FOLDER or ../shared/ag_news",
)
def test_real_rows_are_read_and_nothing_of_the_crawl_is_left(config):
    rows = load_rows(dataclasses.replace(config, data=str(AG_NEWS_FOLDER)))
    assert {split: len(table) for split, table in rows.items()} == {"train": 6000, "test": 1000}
    leftover = re.compile(
        r"#\d{2,5};|\b(?:quot|amp|lt|gt|nbsp|hellip|mdash|ndash|apos);|&\w+;|</?[A-Za-z]|\\|[\x00-\x1f\x7f-\x9f]|\s\s"
    )
    assert [
        text
        for table in rows.values()
        for text in table.raw.map(clean_text)
        if leftover.search(text)
    ] == []


@pytest.mark.skipif(
    not (AG_NEWS_FOLDER / "train.csv").is_file(),
    reason="no AG News rows in $AG_NEWS_FOLDER or ../shared/ag_news",
)
def test_real_rows_are_cleaned_as_they_always_were(config):
    """The digest was computed before texts of the reader's own got rules of their own."""
    rows = load_rows(dataclasses.replace(config, data=str(AG_NEWS_FOLDER)))
    cleaned = "".join(
        clean_text(raw) + "\n" for split in ("train", "test") for raw in rows[split].raw
    )
    assert (
        hashlib.sha256(cleaned.encode()).hexdigest()
        == "70a554bc8f07bbae51c56975e76f2cbf93948de0bf19945c7377b33927290ce0"
    )
