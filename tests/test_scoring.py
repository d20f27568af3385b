"""Label probabilities: right alone, in batches, in threads, after a prefix and in little memory."""

import copy
import dataclasses
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lora_models import lora_config, save_tiny, with_random_b
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora_helpers import scoring
from qlora_helpers.config import LABELS, PROFILES, RunConfig
from qlora_helpers.errors import ModelError
from qlora_helpers.fast.packing import use_packed_attention
from qlora_helpers.metrics import with_temperature
from qlora_helpers.model import attach_lora, compute_dtype, load_base_model
from qlora_helpers.prompts import build_prompt, encode_prompts, few_shot_prefix, label_token_ids
from qlora_helpers.scoring import label_logits, label_probabilities, length_batches

CONFIG = RunConfig(profile="cpu", **PROFILES["cpu"])
TOLERANCE = 1e-5 if compute_dtype()[0] == torch.float32 else 0.02
TEXTS = [
    "Rain stops play",
    "Parliament in Dhaka votes on Thursday after three weeks of strikes that closed the port",
    "Oil climbs",
    "A browser written by volunteers closes eleven holes, two of them known since the spring",
    "Goalkeeper saves twice in shoot-out as Bergen reach the final for the first time since 1910",
]


@pytest.fixture(scope="module")
def exact(embedded_tokenizer, tmp_path_factory):
    """A tiny model in float32 and not quantised: it is compared with itself to many digits."""
    folder = save_tiny(LlamaConfig, embedded_tokenizer, tmp_path_factory.mktemp("exact"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    use_packed_attention(model)
    return model, embedded_tokenizer


@pytest.fixture(scope="module")
def small(tiny, tokenizer):
    """The tiny model in NF4."""
    return load_base_model(dataclasses.replace(CONFIG, base_model=tiny)), tokenizer


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(scoring, "TOKENS_PER_BATCH", {"cpu": 40, "cuda": 40})


def test_label_logits_are_the_full_models_logits_of_the_next_token(exact):
    model, tokenizer = exact
    encoded, ids = encode_prompts(tokenizer, TEXTS, 256), label_token_ids(tokenizer, LABELS)
    with torch.no_grad():
        expected = [model(torch.tensor([row])).logits[0, -1, ids] for row in encoded]
        together = label_logits(model, encoded, ids)
        alone = torch.cat([label_logits(model, [row], ids) for row in encoded])
    torch.testing.assert_close(together, torch.stack(expected), atol=1e-4, rtol=0)
    probabilities = together.double().softmax(1)
    torch.testing.assert_close(probabilities, alone.double().softmax(1), atol=1e-6, rtol=0)


def test_labels_do_not_tie_in_half_precision(exact):
    """In bfloat16, logits near 20 are 0.125 apart, and labels tie for the first place."""
    model, tokenizer = exact
    ids = label_token_ids(tokenizer, LABELS)
    half = copy.deepcopy(model.get_output_embeddings()).to(torch.bfloat16)
    hidden = torch.randn(400, half.in_features, generator=torch.Generator().manual_seed(0)) * 3
    hidden = hidden.to(torch.bfloat16)
    found = scoring._at_labels(SimpleNamespace(get_output_embeddings=lambda: half), hidden, ids)
    expected = hidden.float() @ half.weight[ids].float().T
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    first, second = found.topk(2).values.T
    assert (first > second).all()
    first, second = (hidden @ half.weight[ids].T).topk(2).values.T  # what it would be
    assert (first == second).any()


def test_one_row_at_a_time_gives_what_a_batch_gives(base):
    together = label_probabilities(*base, TEXTS, CONFIG)
    alone = np.concatenate([label_probabilities(*base, [text], CONFIG) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=TOLERANCE, rtol=0)


def test_probabilities_are_a_softmax_over_the_labels_in_the_order_of_the_texts(
    exact, small_batches
):
    model, tokenizer = exact
    config, texts = dataclasses.replace(CONFIG, max_length=32), [*TEXTS[:4], " ".join(TEXTS)]
    encoded, ids = encode_prompts(tokenizer, texts, 32), label_token_ids(tokenizer, LABELS)
    assert len(encoded[4]) == 32  # it is cut
    with torch.no_grad():
        expected = label_logits(model, encoded, ids).double().softmax(1).numpy()
    found = label_probabilities(model, tokenizer, texts, config)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-9, rtol=0)
    order = [3, 0, 4, 2, 1]
    shuffled = label_probabilities(model, tokenizer, [texts[i] for i in order], config)
    np.testing.assert_allclose(shuffled, found[order], atol=1e-6)
    assert len(np.unique(found.round(3), axis=0)) == 5  # else no order could be seen
    softer = label_probabilities(model, tokenizer, texts, config, temperature=2.5)
    np.testing.assert_allclose(softer, with_temperature(found, 2.5), atol=1e-12)
    assert label_probabilities(model, tokenizer, [], config).shape == (0, 4)


def test_solved_examples_are_read_once_and_give_what_the_whole_text_gives(
    exact, small_batches, monkeypatch
):
    model, tokenizer = exact
    prefix = few_shot_prefix(["Keeper saves twice", "Oil climbs again"], [" Sports", " Business"])
    assert prefix == "Keeper saves twice\nTopic: Sports\n\nOil climbs again\nTopic: Business\n\n"
    ids, read, real = label_token_ids(tokenizer, LABELS), [], scoring._score_after

    def score_after(model, shared, label_ids):
        read.append(len(shared))
        return real(model, shared, label_ids)

    monkeypatch.setattr(scoring, "_score_after", score_after)
    plain = label_probabilities(model, tokenizer, TEXTS, CONFIG)
    # Five rows, one row, equal rows, and rows that share more than the examples.
    for texts in (TEXTS, TEXTS[:1], TEXTS[:1] * 2, ["Rain stops play", "Rain stops the vote"]):
        found = label_probabilities(model, tokenizer, texts, CONFIG, prefix=prefix)
        encoded = [tokenizer(prefix + build_prompt(text)).input_ids for text in texts]
        with torch.no_grad():
            logits = [model(torch.tensor([row])).logits[0, -1, ids].double() for row in encoded]
        np.testing.assert_allclose(found, torch.stack(logits).softmax(1).numpy(), atol=1e-6)
    five, one, equal, alike = read
    assert one == equal == len(tokenizer(prefix + build_prompt(TEXTS[0])).input_ids) - 1
    assert 5 < five < alike < one
    assert label_probabilities(model, tokenizer, [], CONFIG, prefix=prefix).shape == (0, 4)
    # Nothing of the examples is left.
    np.testing.assert_array_equal(label_probabilities(model, tokenizer, TEXTS, CONFIG), plain)


def test_batches_that_run_out_of_memory_are_halved_and_nothing_changes(small, monkeypatch):
    texts = [f"{i} goals " * (1 + i % 5) for i in range(23)]
    expected, sizes, limit = label_probabilities(*small, texts, CONFIG), [], 6

    def limited(model, rows, label_ids):
        sizes.append(len(rows))
        if len(rows) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return label_logits(model, rows, label_ids)

    monkeypatch.setattr(scoring, "label_logits", limited)
    found = label_probabilities(*small, texts, CONFIG)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert sizes == [23, 11, 5, 6, 6, 6]
    limit = 0
    with pytest.raises(ModelError, match="QLORA_MAX_LENGTH"):
        label_probabilities(*small, texts, CONFIG)


def test_many_batches_run_in_a_thread_a_core_and_leave_everything_as_it_was(
    small, small_batches, monkeypatch
):
    texts, seen, counted = TEXTS * 2, set(), []
    one_by_one = np.concatenate([label_probabilities(*small, [text], CONFIG) for text in texts])

    def watched(*args, **options):
        in_main = threading.current_thread() is threading.main_thread()
        seen.add((in_main, torch.get_num_threads(), torch.is_grad_enabled()))
        return label_logits(*args, **options)

    def stop(rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "label_logits", watched)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = label_probabilities(*small, texts, CONFIG, progress=counted.append)
        with pytest.raises(KeyboardInterrupt):
            label_probabilities(*small, texts, CONFIG, progress=stop)
        assert torch.get_num_threads() == 2 and torch.is_grad_enabled()
    finally:
        torch.set_num_threads(before)
    assert seen == {(False, 1, False)} and sum(counted) == 10 and len(counted) > 2
    np.testing.assert_allclose(found, one_by_one, atol=TOLERANCE)


def test_models_that_are_the_same_share_the_batches(tiny, small, small_batches, monkeypatch):
    """As 04 has one on each GPU. Memory runs out on the second one, and the first does its rows."""
    model, tokenizer = small
    texts, prefix = TEXTS * 2, few_shot_prefix(TEXTS[:1], [" World"])
    right = [label_probabilities(model, tokenizer, texts, CONFIG, prefix=p) for p in ("", prefix)]
    other, asked = load_base_model(dataclasses.replace(CONFIG, base_model=tiny)), []

    def watched(one, rows, label_ids):
        asked.append(one)
        if one is other and len(asked) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return label_logits(one, rows, label_ids)

    monkeypatch.setattr(scoring, "label_logits", watched)
    for p, expected in zip(("", prefix), right, strict=True):
        found = label_probabilities([model, other], tokenizer, texts, CONFIG, prefix=p)
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert {id(one) for one in asked} == {id(model), id(other)}


def test_progress_is_one_line(small, capsys):
    label_probabilities(*small, TEXTS, CONFIG, progress="tuned model")
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "tuned model: 100%" in shown and "5/5" in shown
    label_probabilities(*small, TEXTS, CONFIG)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("training", [True, False])
def test_scoring_has_no_dropout_and_leaves_the_mode_as_it_was(tiny, tokenizer, training):
    base = load_base_model(dataclasses.replace(CONFIG, base_model=tiny))
    model = with_random_b(attach_lora(base, lora_config(lora_dropout=0.5), seed=1))
    expected = label_probabilities(model.eval(), tokenizer, TEXTS, CONFIG)
    model.train(training)
    np.testing.assert_array_equal(label_probabilities(model, tokenizer, TEXTS, CONFIG), expected)
    assert {module.training for module in model.modules()} == {training}


def test_length_batches():
    def batches(*lengths):
        return length_batches([[0] * length for length in lengths], 12)

    assert batches(3, 9, 4, 2, 4) == [[1], [2, 4, 0], [3]]
    assert batches(2, 50, 2) == [[1], [0, 2]]  # a row over the budget, alone
    assert batches() == []
