import dataclasses
import os
from pathlib import Path

import pytest

from qlora_helpers import DataError, draw_subset, learning_curve, load_rows, tfidf_classifier

AG_NEWS_FOLDER = Path(
    os.environ.get("AG_NEWS_FOLDER") or Path(__file__).parents[2] / "shared" / "ag_news"
)


def test_the_cheap_baseline_reads_characters_beside_words():
    """No word of a test text was seen in training; its parts were."""
    train, labels = ["unbreakable", "unthinkable", "rewriting", "reloading"], [0, 0, 1, 1]
    assert tfidf_classifier().fit(train, labels).predict(["unreadable", "replaying"]).tolist() == [
        0,
        1,
    ]


@pytest.mark.skipif(
    not (AG_NEWS_FOLDER / "train.csv").is_file(),
    reason="no AG News rows in $AG_NEWS_FOLDER or ../shared/ag_news",
)
@pytest.mark.parametrize(("rows", "validation", "accuracy"), [(400, 40, 0.819), (1000, 142, 0.836)])
def test_the_cheap_baseline_on_real_rows(config, rows, validation, accuracy):
    """Words alone reach 0.781 and 0.814 of the same 1,000 test rows."""
    run = dataclasses.replace(
        config,
        data=str(AG_NEWS_FOLDER),
        train_size=rows,
        validation_size=validation,
        test_size=1000,
    )
    train, _, test = draw_subset(load_rows(run), run).values()
    assert tfidf_classifier().fit(train.text, train.label).score(
        test.text, test.label
    ) == pytest.approx(accuracy, abs=0.005)


def test_each_point_is_a_training_on_nested_rows(tiny, config):
    """A random two-layer model learns little; what is tested is that each size trains, and answers for the same test rows."""
    run = dataclasses.replace(config, base_model=tiny, num_epochs=2, test_size=40)
    rows = load_rows(run)
    curve = learning_curve(run, rows, [40, 160])
    assert curve.index.tolist() == [40, 160] and curve.index.name == "rows"
    assert curve.columns.tolist() == ["tuned model", "TF-IDF + logistic regression"]
    assert (
        curve["TF-IDF + logistic regression"].is_monotonic_increasing
        and curve["TF-IDF + logistic regression"].iloc[1] > 0.6
    )
    assert ((curve >= 0) & (curve <= 1)).all().all()
    again = learning_curve(run, rows, [40])
    assert again.loc[40].tolist() == curve.loc[40].tolist()
    with pytest.raises(DataError, match="train_size=4000"):
        learning_curve(run, rows, [40, 4000])
