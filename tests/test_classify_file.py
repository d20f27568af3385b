import io

import numpy as np
import pandas as pd
import pytest

from qlora_helpers import LABELS, classify_file
from qlora_helpers.classifier import read_texts, write_csv
from qlora_helpers.errors import DataError

NEW = ["label", "confidence", *(f"P({label})" for label in LABELS)]
OWN = "order #4521; <b@x.com> C:\\Users &lt;"


@pytest.mark.parametrize(
    ("name", "data", "columns", "texts"),
    [
        ("a.txt", 'one, two\n\n"q"\r\n  \nlast', "text", ["one, two", "", '"q"', "  ", "last"]),
        ("", "one\ntwo\n", "text", ["one", "two"]),
        ("a.csv", 'id,Text\n1,"a, b"\n2,\n\n4,"c\nd"\n', "id,Text", ["a, b", "", "", "c\nd"]),
        ("a.CSV", "\ufefftitle,description,x\nA,B,\nC,,\n", "title,description,x", ["A B", "C "]),
        ("a.csv", "title,day\nA,1\n", "title,day", ["A"]),
        (
            "a.csv",
            'headline\n"second, quoted"\n\nlast\n',
            "headline",
            ["second, quoted", "", "last"],
        ),
        (
            "a.csv",
            '"3","Firm #39;s, &lt;b&gt;","falls\\again"\n"1","A","B"\n\n',
            "class,title,description",
            ["Firm's, falls again", "A B", ""],
        ),
        ("a.csv", f"text\n{OWN}\n", "text", [OWN]),
        ("a.txt", OWN, "text", [OWN]),
    ],
)
def test_read_texts(name, data, columns, texts):
    table, read = read_texts(data.encode(), name)
    assert ",".join(table.columns) == columns and read == texts and len(table) == len(texts)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"id,words\n1,x\n", "the first row, 'id,words', does not say which of 2 columns"),
        ("a.csv", b"Tag;Text\n1;x\n", "first row, 'Tag;Text', .* Separate the columns by commas"),
        ("a.csv", b"Rain stops play\n", "'Rain stops play', does not .* or give a file of lines"),
        ("a.csv", b"", "the first row, '', does not say which"),
        ("a.csv", b"text,day\n\nb, c,2\n", "a.csv, row 3: the number of columns is 3, not 2. Comm"),
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
    assert classify_file(classifier, b"\n \n").label.tolist() == ["(no text)"] * 2


def test_columns_of_the_same_name_stay(classifier):
    once = classify_file(classifier, b"text,label\nRain,Sports\n", "a.csv")
    assert list(once.columns) == ["text", "label", "label (predicted)", *NEW[1:]]
    assert once.label.tolist() == ["Sports"]
    twice = classify_file(classifier, once.to_csv(index=False).encode(), "a.csv")
    assert len(set(twice.columns)) == len(twice.columns) == 14
    assert twice.iloc[0, 8] == once.iloc[0, 2]


def test_what_is_written_reads_back(classifier):
    data = 'text\n"one, ""two""\nthree"\n央行\n"a\rb\r\nc"\n\n'.encode()
    table = classify_file(classifier, data, "a.csv")
    again, texts = read_texts(write_csv(table), "b.csv")
    assert texts == ['one, "two"\nthree', "央行", "a\rb\r\nc", ""] == table.text.tolist()
    assert again.confidence[:3].astype(float).tolist() == table.confidence[:3].tolist()


def test_no_cell_is_a_formula():
    formulas = ["=1+1", "+1-555", "-A1", "@SUM(A1)", "\t=A1", "\r=A1"]
    plain = ["-3.5", "+1,000", "-", "a=b", "1-2", "mail@x.com", ""]
    table = pd.DataFrame({"=text": formulas + plain, "confidence": -0.5})
    read = pd.read_csv(io.BytesIO(write_csv(table)), dtype=str, keep_default_na=False)
    assert read["'=text"].tolist() == [f"'{cell}" for cell in formulas] + plain
    assert set(read.confidence) == {"-0.5"}
