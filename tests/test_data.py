import csv
import dataclasses
import hashlib
import itertools
import os
import re
from collections import Counter
from importlib import resources

import pandas as pd
import pytest

from qlora_helpers import data
from qlora_helpers.config import AG_NEWS, LABELS, RunConfig
from qlora_helpers.data import SPLITS, draw_subset, load_rows
from qlora_helpers.errors import DataError
from qlora_helpers.texts import clean_text, normalised, tidy_text

# read when the tests are collected: each of them runs without QLORA_ variables
AG_NEWS_FOLDER = os.environ.get("AG_NEWS_FOLDER", "")


# cleaning


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("They don #39;t;  #39;none, #39; he said", "They don't; 'none,' he said"),
        ("quot;It is  quot;good quot;, quot; he said", '"It is "good"," he said'),
        ("Bridge reopens &lt;b&gt;...&lt;/b&gt; at last", "Bridge reopens ... at last"),
        (
            'Orvel &lt;A HREF="http://r.example/q?t=O /f"&gt;ORVL.O&lt;/A&gt; cut',
            "Orvel ORVL.O cut",
        ),
        ('&lt;FONT size="-2"&gt;&lt;B&gt;The Post&lt;/B&gt;&lt;/FONT&gt;', "The Post"),
        (r"Sold for \$48-billion in cash", "Sold for $48-billion in cash"),
        (r"Storm warnings\for the coming\\days", "Storm warnings for the coming days"),
        (" #36;600,000 raised", "$600,000 raised"),
        ("AT amp;T and Standard  amp; Poor #39;s", "AT&T and Standard & Poor's"),
        ("The vote #151; a close one #151; stands", "The vote— a close one— stands"),
        ("12 nbsp;percent,&nbsp;up", "12 percent, up"),
        ("Fish &amp;amp; chips &amp;lt;b&amp;gt;fried&amp;lt;/b&amp;gt;", "Fish & chips fried"),
        ("Sports India: Cricket  gt; Kanpur", "Sports India: Cricket > Kanpur"),
        ("She played the part; and the lamp; then", "She played the part; and the lamp; then"),
        ("No. #39 wins; lot #151 sold", "No. #39 wins; lot #151 sold"),
        ("one\x00two\x07three\tfour\r\nfive\x85six", "one two three four five six"),
        ("  spaces   all\u00a0over ", "spaces all over"),
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


def test_the_words_of_a_text_are_the_key_of_its_copies():
    assert normalised("Oil  Climbs 3%, again!") == "oil climbs 3 again"
    assert normalised("Fujita #39;s caf\u00e9") == normalised("FUJITA'S CAFE\u0301")
    assert normalised("Fujita #39;s caf\u00e9") != normalised("Fujita's cafe")
    assert normalised("?!") == "?!" != normalised("...")


@pytest.mark.parametrize("change", [str.upper, str.lower, str.swapcase, str.title])
def test_a_copy_in_another_case_has_the_same_key_in_text_as_it_was_crawled(change):
    raw = (
        "Profit \\$5 a share at AT amp;T, says the  quot;chief quot; &lt;b&gt;...&lt;/b&gt; "
        "It #39;s\\a record &hellip; in Z&uuml;rich"
    )
    expected = "profit 5 a share at at t says the chief it s a record in zürich"
    assert normalised(raw) == normalised(change(raw).replace(",", ";") + " ?!") == expected


# reading

GOOD = '"1","Title","Description"\n'
LAYOUT = "AG News' layout is class (1 World, 2 Sports, 3 Business, 4 Sci/Tech), title, description"


@pytest.fixture
def read(tmp_path, config):
    """Reads a train.csv with the given content, beside a test.csv that is fine."""

    def read(content: bytes | None):
        if content is not None:
            (tmp_path / "train.csv").write_bytes(content)
        (tmp_path / "test.csv").write_text(GOOD)
        return load_rows(dataclasses.replace(config, data=str(tmp_path)))["train"]

    return read


def test_csv_as_it_comes(read):
    rows = read(
        b'\xef\xbb\xbf"3","Caf\xc3\xa9","He said ""no"", then left"\r\n\r\n'
        b'4,"Two\nlines","a\nb, c"\r\n 2 ,"",only\n'
    )
    assert rows.to_dict("list") == {
        "raw": ['Café He said "no", then left', "Two\nlines a\nb, c", " only"],
        "label": [2, 3, 1],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n\n", f" has no rows. {LAYOUT}"),
        (GOOD + '\n"5","a","b"\n', f", row 3, '5,a,b': {LAYOUT}"),
        (GOOD + "1,a,b,c\n", ", row 2: the number of columns is 4, not 3. Commas separate the"),
        (GOOD + '1," "," #39;"\n2,"&lt;b&gt;"," "\n', ", row 3: there is no text. Remove"),
        (
            GOOD + '"1","a","never closed\n',
            ", after row 1: not valid CSV (unexpected end of data).",
        ),
        (GOOD * 5000 + '"1","caf\xe9","b"\n', " is not UTF-8 (line 5001). Save it as UTF-8"),
    ],
)
def test_a_bad_csv_is_named_with_row_and_remedy(read, tmp_path, content, message):
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'train.csv'}{message}")):
        read(content.encode("latin1"))


@pytest.mark.parametrize("kind", ["nothing", "folder", "fifo", "device", "sparse"])
def test_what_is_no_file_of_a_readable_size_is_refused_before_it_is_opened(read, tmp_path, kind):
    path = tmp_path / "train.csv"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 2**40)
    reason = (
        "cannot be read: No such" if kind == "nothing" else "is not an ordinary file of at most"
    )
    with pytest.raises(DataError, match=f"train.csv {reason} .* QLORA_DATA names a folder with"):
        read(None)


def test_the_parquet_files_of_the_hub_are_read(tmp_path, config, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, texts in (("train-0", ["a", "b"]), ("train-1", ["c"]), ("test-0", ["d"])):
        table = pd.DataFrame({"text": texts, "label": range(len(texts))})
        table.to_parquet(folder / f"{name}.parquet")
    monkeypatch.setattr(data, "fetch", lambda *asked: tmp_path)
    config = dataclasses.replace(config, data=AG_NEWS)
    rows = {split: table.to_dict("list") for split, table in load_rows(config).items()}
    assert rows == {
        "train": {"raw": ["a", "b", "c"], "label": [0, 1, 0]},
        "test": {"raw": ["d"], "label": [0]},
    }
    for change in (lambda: (folder / "test-0.parquet").write_bytes(b""), folder.rmdir):
        change()
        with pytest.raises(DataError, match="cannot be read .* remove that folder and run this"):
            load_rows(config)
        for file in folder.glob("*"):
            file.unlink()


# drawing


def _rows(counts: list[int], split: str = "train") -> pd.DataFrame:
    labels = [label for label, n in enumerate(counts) for _ in range(n)]
    texts = [f"{split} {LABELS[label]} {i}" for i, label in enumerate(labels)]
    return pd.DataFrame({"raw": texts, "label": labels})


def _counts(split: pd.DataFrame) -> list[int]:
    return [int((split.label == label).sum()) for label in range(len(LABELS))]


def _draw(config, train=(50, 50, 50, 50), test=(50, 30, 15, 5), **sizes):
    rows = {"train": _rows(train), "test": _rows(test, "test")}
    return draw_subset(rows, dataclasses.replace(config, **sizes))


def test_the_draw_is_stratified_and_shuffled(config):
    drawn = _draw(config, train_size=120, validation_size=20, test_size=60)
    assert list(drawn) == SPLITS
    assert {split: _counts(drawn[split]) for split in drawn} == {
        "train": [30, 30, 30, 30],
        "validation": [5, 5, 5, 5],
        "test": [30, 18, 9, 3],
    }
    assert len({text for split in drawn.values() for text in split.text}) == 200
    for split, table in drawn.items():
        source = "test" if split == "test" else "train"
        for text, label in zip(table.text, table.label, strict=True):
            assert text.startswith(f"{source} {LABELS[label]} ")
        # runs of equal labels: 4 where they stand in blocks
        assert len(list(itertools.groupby(table.label))) > 10


def test_sizes_that_four_does_not_divide_are_met_exactly(config):
    drawn = _draw(config, train_size=10, validation_size=7, test_size=9)
    # of the test rows 4.5, 2.7, 1.35, 0.45: largest remainders first
    assert [_counts(table) for table in drawn.values()] == [
        [3, 3, 2, 2],
        [2, 2, 2, 1],
        [5, 3, 1, 0],
    ]


def _check_nested_and_apart(runs: dict[int, dict[str, pd.DataFrame]]):
    """Each training split holds the smaller ones, and no row is in two splits of one run."""
    for smaller, larger in itertools.pairwise(sorted(runs)):
        assert set(runs[smaller]["train"].text) < set(runs[larger]["train"].text)
        pd.testing.assert_frame_equal(runs[smaller]["test"], runs[larger]["test"])
    for size, run in runs.items():
        texts = [text for split in SPLITS for text in run[split].text]
        assert len(run["train"]) == size and len(set(texts)) == len(texts)


SIZES = (280, 1000, 2000, 4000, 10_000)


def test_training_splits_are_nested_with_the_default_validation_sizes():
    """At these sizes a seventh validates."""
    rows = {"train": _rows([3000, 3100, 2900, 3300]), "test": _rows([30, 40, 20, 10], "test")}
    configs = {size: RunConfig.from_environment(train_size=size) for size in SIZES}
    runs = {size: draw_subset(rows, configs[size]) for size in SIZES}
    _check_nested_and_apart(runs)
    assert [len(runs[size]["validation"]) for size in SIZES] == [40, 142, 285, 571, 1428]


def test_training_splits_of_a_labelled_csv_are_nested_too(tmp_path):
    counts = {"common": 9001, "less": 4211, "rare": 37}
    rows = [(f"{label} {i}", label) for label, n in counts.items() for i in range(n)]
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(tmp_path / "rows.csv", index=False)
    runs = {}
    for size in SIZES:
        config = RunConfig.from_environment(data=str(tmp_path / "rows.csv"), train_size=size)
        runs[size] = draw_subset(load_rows(config), config)
        for split, label in itertools.product(SPLITS, range(3)):
            # but for the rounding, and the one row that each label has at least
            expected = len(runs[size][split]) * list(counts.values())[label] / len(rows)
            assert abs((runs[size][split].label == label).sum() - expected) < 2
    _check_nested_and_apart(runs)


def test_the_seed_alone_decides(config):
    sizes = {"train_size": 40, "validation_size": 20, "test_size": 20}
    one, again = _draw(config, **sizes), _draw(config, **sizes)
    other = _draw(config, seed=43, **sizes)
    for split in SPLITS:
        pd.testing.assert_frame_equal(one[split], again[split])
        assert set(one[split].text) != set(other[split].text)


def test_the_first_rows_of_the_sample_for_the_default_seed(config):
    drawn = draw_subset(load_rows(config), config)
    assert {split: [text[:30] for text in drawn[split].text[:2]] for split in SPLITS} == {
        "train": ["Poland rally from two sets dow", "Nigeria's Central Bank Raises "],
        "validation": ["Durban Dockworkers Return, but", "Bidding War for an Afghan Seam"],
        "test": ["Tajikistan Frees Kyrgyz Shephe", "Irish Whiskey Distiller Toasts"],
    }
    assert [LABELS[drawn[split].label[0]] for split in SPLITS] == ["Sports", "Business", "World"]


def test_copies_of_test_rows_and_of_one_another_are_dropped(config):
    """With other case and punctuation, under any label."""
    rows = load_rows(config)
    clean = draw_subset(rows, config)
    assert clean["train"].attrs["copies_dropped"] == 0
    leaked = clean["test"].text[:60].str.upper().str.replace(".", " ...").str.replace(",", " -")
    leaks = pd.DataFrame({"raw": leaked + "!", "label": [i % 4 for i in range(60)]})
    again = rows["train"].assign(raw=rows["train"].raw.str.upper())
    train = pd.concat([leaks, rows["train"], again], ignore_index=True)
    leaky = draw_subset(rows | {"train": train}, config)
    assert leaky["train"].attrs["copies_dropped"] == 60 + 320
    keys = pd.concat([leaky[split] for split in SPLITS]).text.map(normalised)
    assert keys.is_unique and len(keys) == 400


def test_texts_are_drawn_clean(config):  # of AG News' layout
    raw = [f"Firm #39;s  quot;best quot;\\year {i}" for i in range(12)]
    rows = pd.DataFrame({"raw": raw, "label": [0, 1, 2, 3] * 3})
    sizes = dataclasses.replace(config, train_size=4, validation_size=4, test_size=4)
    drawn = draw_subset({"train": rows[:8], "test": rows[8:].reset_index(drop=True)}, sizes)
    texts = {text for split in drawn.values() for text in split.text}
    assert texts == {f'Firm\'s "best" year {i}' for i in range(12)}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"train": (50, 50, 9, 50), "train_size": 32},
            "the training rows of 'sample' hold 9 of Business .0 copies are not counted., but "
            "train_size=32 and validation_size=8 need 10: lower QLORA_TRAIN_SIZE",
        ),
        ({"test": (50, 50, 0, 50)}, "the test split of 'sample' has no row of Business"),
        (
            {"test": (5, 5, 5, 4)},
            "the test split of 'sample' has 19 rows, but test_size=20: lower QLORA_TEST_SIZE",
        ),
        ({"train_size": 3}, "train_size=3 and .* leave a label without a training row"),
    ],
)
def test_too_few_rows_are_named(config, sizes, message):
    with pytest.raises(DataError, match=message):
        _draw(config, **{"train_size": 8, "validation_size": 8, "test_size": 20} | sizes)


# the bundled sample


def test_the_sample_is_balanced_clean_and_has_no_two_rows_alike():
    """Two texts share at most 15% of their words of four letters and more (Jaccard)."""
    folder, rows = resources.files("qlora_helpers") / "sample", []
    for split, each in (("train", 80), ("test", 20)):
        part = list(csv.reader((folder / f"{split}.csv").read_text("utf-8").splitlines()))
        assert Counter(row[0] for row in part) == dict.fromkeys("1234", each)
        rows += part
    assert len({title.casefold() for _, title, _ in rows}) == 400
    words = [set(re.findall(r"\w{4,}", " ".join(row[1:]).casefold())) for row in rows]
    pairs = itertools.combinations(words, 2)
    assert [one & two for one, two in pairs if len(one & two) > 0.15 * len(one | two)] == []
    for _, title, description in rows:
        text = f"{title} {description}"
        assert 2 <= len(title.split()) <= 14 and 9 <= len(description.split()) <= 48, title
        assert clean_text(text) == text and '"' not in text and text[-1] in ".?!'", title


# real rows


@pytest.mark.skipif(not AG_NEWS_FOLDER, reason="$AG_NEWS_FOLDER names no folder of AG News rows")
def test_real_rows_are_cleaned_as_they_always_were_and_nothing_of_the_crawl_is_left(config):
    rows = load_rows(dataclasses.replace(config, data=AG_NEWS_FOLDER))
    assert {split: len(table) for split, table in rows.items()} == {"train": 6000, "test": 1000}
    texts = [clean_text(raw) for table in rows.values() for raw in table.raw]
    entity = r"#\d{2,5};|\b(?:quot|amp|lt|gt|nbsp|hellip|mdash|ndash|apos);|&\w+;"
    leftover = re.compile(entity + r"|</?[A-Za-z]|\\|[\x00-\x1f\x7f-\x9f]|\s\s")
    assert [text for text in texts if leftover.search(text)] == []
    digest = hashlib.sha256("".join(text + "\n" for text in texts).encode()).hexdigest()
    assert digest == "70a554bc8f07bbae51c56975e76f2cbf93948de0bf19945c7377b33927290ce0"
