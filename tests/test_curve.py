import dataclasses

import pytest

from qlora_helpers import DataError, learning_curve, load_rows


def test_each_point_is_a_training_on_nested_rows(tiny, config):
    """A random two-layer model learns little; what is tested is that each size trains, and answers for the same test rows."""
    run = dataclasses.replace(config, base_model=tiny, num_epochs=2, test_size=40)
    rows = load_rows(run)
    curve = learning_curve(run, rows, [40, 160])
    assert curve.index.tolist() == [40, 160] and curve.index.name == "rows"
    assert curve.columns.tolist() == ["tuned model", "TF-IDF + logistic regression"]
    assert curve["TF-IDF + logistic regression"].is_monotonic_increasing and curve["TF-IDF + logistic regression"].iloc[1] > 0.6
    assert ((curve >= 0) & (curve <= 1)).all().all()
    again = learning_curve(run, rows, [40])
    assert again.loc[40].tolist() == curve.loc[40].tolist()
    with pytest.raises(DataError, match="train_size=4000"):
        learning_curve(run, rows, [40, 4000])
