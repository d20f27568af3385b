import numpy as np
import pandas as pd
import pytest

from qlora_helpers import LABELS, classify_file
from qlora_helpers.classifier import read_texts
from qlora_helpers.errors import DataError

NEW = ["label", "confidence", *(f"P({label})" for label in LABELS)]


@pytest.mark.parametrize(
    ("name", "data", "columns", "texts"),
    [
        (
            "a.txt",
            'one, with a comma\n\n"quoted"\r\n  \nlast',
            ["text"],
            ["one, with a comma", "", '"quoted"', "  ", "last"],
        ),
        ("", "one\ntwo\n", ["text"], ["one", "two"]),
        (
            "a.csv",
            'id,Text\n1,"one, two"\n2,\n\n4,"three\nlines"\n',
            ["id", "Text"],
            ["one, two", "", "", "three\nlines"],
        ),
        (
            "a.CSV",
            "\ufefftitle,description,label\nA,B,x\nC,,y\n",
            ["title", "description", "label"],
            ["A B", "C "],
        ),
        ("a.csv", "title,day\nA,1\n", ["title", "day"], ["A"]),
        ("a.csv", "Tag;Headline\n1;one, two\n", ["Tag", "Headline"], ["one, two"]),
        ("a.csv", "headline\tday\none\t1\n", ["headline", "day"], ["one"]),
        (
            "a.csv",
            '"3","Title, with comma","Description"\n"1","A","B"\n',
            ["class", "title", "description"],
            ["Title, with comma Description", "A B"],
        ),
        (
            "a.csv",
            "3,Firm #39;s loss &lt;b&gt;,falls\\again\n",
            ["class", "title", "description"],
            ["Firm's loss falls again"],
        ),
        (
            "a.csv",
            "text\norder #4521; <b@x.com> C:\\Users &lt;\n",
            ["text"],
            ["order #4521; <b@x.com> C:\\Users &lt;"],
        ),
        (
            "a.txt",
            "order #4521; <b@x.com> C:\\Users &lt;",
            ["text"],
            ["order #4521; <b@x.com> C:\\Users &lt;"],
        ),
        (
            "a.csv",
            'first line\n"second, quoted"\n\nlast\n',
            ["text"],
            ["first line", "second, quoted", "", "last"],
        ),
        ("a.csv", "", ["text"], []),
    ],
)
def test_read_texts(name, data, columns, texts):
    table, found = read_texts(data.encode(), name)
    assert list(table.columns) == columns and found == texts and len(table) == len(texts)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "a.csv",
            b"id,words\n1,one\n",
            "a.csv: the first row, 'id,words', does not say which of 2 columns holds the texts. Name the column",
        ),
        (
            "a.csv",
            b"text,day\none,1\ntwo, three,2\n",
            "a.csv, row 3: 3 columns instead of 2. Put double quotes",
        ),
        ("a.csv", b'text\n"one\n', "a.csv, after row 1: not valid CSV"),
        ("a.csv", b"text\n" + b"a" * 200_000 + b"\n", "not valid CSV"),
        ("a.txt", b"one\nf\xfcnf\n", "a.txt is not UTF-8 .line 2."),
        ("a.csv", b"\xff\xfet\x00e\x00", "a.csv is not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_named(name, data, message):
    with pytest.raises(DataError, match=message):
        read_texts(data, name)


def test_a_file_keeps_its_columns_and_order_and_empty_rows(classifier):
    data, done = b'day,text\n1,Striker signs\n\n3," "\n4,"Oil climbs, again"\n', []
    table = classify_file(classifier, data, "a.csv", done.append)
    assert list(table.columns) == ["day", "text", *NEW]
    assert table.day.tolist() == ["1", "", "3", "4"] and sum(done) == 4
    assert (table.label == "(no text)").tolist() == [False, True, True, False]
    expected = classifier(["Striker signs", "Oil climbs, again"])
    assert table.label[[0, 3]].tolist() == expected.label.tolist()
    np.testing.assert_allclose(
        table.loc[[0, 3], NEW[1:]].to_numpy(float), expected[NEW[1:]].to_numpy(), atol=1e-5
    )
    assert table.loc[[1, 2], NEW[1:]].isna().all(axis=None)


def test_columns_of_the_same_name_stay(classifier):
    once = classify_file(classifier, b"text,label\nRain,Sports\n", "a.csv")
    assert list(once.columns) == [
        "text",
        "label",
        "label (predicted)",
        *NEW[1:],
    ] and once.label.tolist() == ["Sports"]
    twice = classify_file(classifier, once.to_csv(index=False).encode(), "a.csv")
    assert len(set(twice.columns)) == len(twice.columns) == 14
    assert twice.iloc[0, 8] == once.iloc[0, 2]


def test_what_is_written_reads_back(classifier):
    table = classify_file(classifier, 'text\n"one, ""two""\nthree"\n央行\n\n'.encode(), "a.csv")
    again, texts = read_texts(table.to_csv(index=False).encode(), "b.csv")
    assert texts == ['one, "two"\nthree', "央行", ""] == table.text.tolist()
    assert pd.to_numeric(again.confidence[:2]).tolist() == table.confidence[:2].tolist()
