import copy
import dataclasses
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from qlora_helpers import scoring
from qlora_helpers.config import LABELS, PROFILES, RunConfig
from qlora_helpers.data import load_rows
from qlora_helpers.errors import ModelError
from qlora_helpers.fast.packing import use_packed_attention
from qlora_helpers.metrics import with_temperature
from qlora_helpers.model import attach_lora, compute_dtype, load_base_model
from qlora_helpers.prompts import build_prompt, encode_prompts, few_shot_prefix, label_token_ids
from qlora_helpers.scoring import label_logits, label_probabilities, length_batches

CONFIG = RunConfig(profile="cpu", **PROFILES["cpu"])
TEXTS = [
    "Rain stops play",
    "Parliament in Dhaka votes on Thursday after three weeks of strikes that closed the port and emptied its streets of buses",
    "Oil climbs",
    "A browser written by volunteers closes eleven holes, two of them known since the spring",
    "Goalkeeper saves twice in shoot-out as Bergen reach the final for the first time since the club was founded by dockers",
]


@pytest.fixture(scope="module")
def exact(tiny, tokenizer):
    """The tiny model in float32 and not quantised: it is compared with itself to many digits."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    use_packed_attention(model)
    return model, tokenizer


@pytest.fixture(scope="module")
def small(tiny, tokenizer):
    """The tiny model in NF4."""
    return load_base_model(dataclasses.replace(CONFIG, base_model=tiny)), tokenizer


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(scoring, "TOKENS_PER_BATCH", {"cpu": 40, "cuda": 40})


def _encode(tokenizer, texts):
    return encode_prompts(tokenizer, texts, 256)


@torch.no_grad()
def test_label_logits_are_the_full_models_logits_of_the_next_token(exact):
    model, tokenizer = exact
    ids = label_token_ids(tokenizer, LABELS)
    expected = torch.stack(
        [
            model(input_ids=torch.tensor([tokens], device=model.device)).logits[0, -1, ids]
            for tokens in encode_prompts(tokenizer, TEXTS, 256)
        ]
    )
    torch.testing.assert_close(
        label_logits(model, _encode(tokenizer, TEXTS), ids), expected, atol=2e-4, rtol=0
    )


def test_labels_do_not_tie_in_half_precision(exact):
    """The head's product is in float32: in bfloat16, logits near 20 are 0.125 apart, and labels tie for the first place."""
    model, tokenizer = exact
    ids = label_token_ids(tokenizer, LABELS)
    head = model.get_output_embeddings()
    hidden = torch.randn(400, head.in_features, generator=torch.Generator().manual_seed(0)) * 3
    hidden = hidden.to(torch.bfloat16)
    expected = hidden.float() @ head.weight[ids].to(torch.bfloat16).float().T
    half = copy.deepcopy(head).to(torch.bfloat16)
    found = scoring._at_labels(SimpleNamespace(get_output_embeddings=lambda: half), hidden, ids)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    first, second = found.topk(2).values.T
    assert (first > second).all()
    rounded = (hidden @ half.weight[ids].T).topk(2).values  # what it would be
    assert (rounded[:, 0] == rounded[:, 1]).any()


def test_one_row_at_a_time_gives_what_a_batch_gives(base):
    model, tokenizer = base
    tolerance = 1e-5 if compute_dtype()[0] == torch.float32 else 0.02
    together = label_probabilities(model, tokenizer, TEXTS, CONFIG)
    alone = np.concatenate(
        [label_probabilities(model, tokenizer, [text], CONFIG) for text in TEXTS]
    )
    np.testing.assert_allclose(together, alone, atol=tolerance, rtol=0)


def test_probabilities_are_a_softmax_over_the_labels_in_the_order_of_the_texts(
    exact, small_batches
):
    model, tokenizer = exact
    with torch.no_grad():
        logits = (
            label_logits(model, _encode(tokenizer, TEXTS), label_token_ids(tokenizer, LABELS))
            .double()
            .cpu()
        )
    probabilities = label_probabilities(model, tokenizer, TEXTS, CONFIG)
    assert probabilities.dtype == np.float64
    np.testing.assert_allclose(
        probabilities, (logits.exp() / logits.exp().sum(1, keepdim=True)).numpy(), atol=1e-5
    )
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-9, rtol=0)
    order = [3, 0, 4, 2, 1]
    shuffled = label_probabilities(model, tokenizer, [TEXTS[i] for i in order], CONFIG)
    np.testing.assert_allclose(shuffled, probabilities[order], atol=1e-5)
    assert len(np.unique(probabilities.round(3), axis=0)) == len(
        TEXTS
    )  # else no order could be seen


def test_an_over_long_text_is_scored_at_its_prompts_end(exact):
    model, tokenizer = exact
    [ids] = encode_prompts(tokenizer, [" ".join(TEXTS) * 40], 48)
    with torch.no_grad():
        logits = (
            model(input_ids=torch.tensor([ids], device=model.device))
            .logits[0, -1, label_token_ids(tokenizer, LABELS)]
            .double()
            .cpu()
        )
    found = label_probabilities(
        model, tokenizer, [" ".join(TEXTS) * 40], dataclasses.replace(CONFIG, max_length=48)
    )
    np.testing.assert_allclose(found[0], logits.softmax(-1).numpy(), atol=1e-5)


def test_solved_examples_are_read_once_and_give_what_the_whole_text_gives(exact, small_batches):
    model, tokenizer = exact
    prefix = few_shot_prefix(
        ["Keeper saves twice", "Oil climbs as ports close"], [" Sports", " Business"]
    )
    assert (
        prefix
        == "Keeper saves twice\nTopic: Sports\n\nOil climbs as ports close\nTopic: Business\n\n"
    )
    found = label_probabilities(model, tokenizer, TEXTS, CONFIG, prefix=prefix)
    ids = label_token_ids(tokenizer, LABELS)
    for row, text in zip(found, TEXTS, strict=True):
        whole = tokenizer(prefix + build_prompt(text)).input_ids
        assert (
            whole != tokenizer(prefix).input_ids + tokenizer(build_prompt(text)).input_ids
        )  # the last line end joins another
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0, -1, ids].double()
        np.testing.assert_allclose(row, logits.softmax(-1).numpy(), atol=1e-5)
    plain = label_probabilities(model, tokenizer, TEXTS, CONFIG)
    assert abs(found - plain).max() > 0.05
    np.testing.assert_array_equal(
        label_probabilities(model, tokenizer, TEXTS, CONFIG), plain
    )  # nothing of the examples is left


def test_what_rows_share_is_read_once_and_no_row_is_empty(exact, monkeypatch):
    """One row, equal rows, and rows that share more than the examples."""
    model, tokenizer = exact
    prefix, read = few_shot_prefix(["Keeper saves twice"], [" Sports"]), []
    real = scoring._read_prefix
    monkeypatch.setattr(
        scoring, "_read_prefix", lambda model, ids: read.append(len(ids)) or real(model, ids)
    )
    [alone] = label_probabilities(model, tokenizer, ["Rain stops play"], CONFIG, prefix=prefix)
    twice = label_probabilities(model, tokenizer, ["Rain stops play"] * 2, CONFIG, prefix=prefix)
    other = label_probabilities(
        model, tokenizer, ["Rain stops play", "Rain stops the vote"], CONFIG, prefix=prefix
    )
    np.testing.assert_allclose(twice, [alone, alone], atol=1e-5)
    np.testing.assert_allclose(other[0], alone, atol=1e-5)
    assert (
        read[0]
        == read[1]
        == len(tokenizer(prefix + build_prompt("Rain stops play")).input_ids) - 1
        > read[2]
        > 5
    )
    assert label_probabilities(model, tokenizer, [], CONFIG, prefix=prefix).shape == (0, 4)


def test_the_zero_shot_answers_are_those_of_the_base_model_without_any_adapter(
    tiny, tokenizer, config
):
    run = dataclasses.replace(config, base_model=tiny)
    expected = label_probabilities(load_base_model(run), tokenizer, TEXTS, CONFIG)
    model = attach_lora(
        load_base_model(run), LoraConfig(target_modules="all-linear", lora_dropout=0.5), seed=1
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert abs(label_probabilities(model, tokenizer, TEXTS, CONFIG) - expected).max() > 0.1
    with model.disable_adapter():
        np.testing.assert_allclose(
            label_probabilities(model, tokenizer, TEXTS, CONFIG), expected, atol=1e-6, rtol=0
        )


def test_batches_that_run_out_of_memory_are_halved_and_nothing_changes(small, monkeypatch):
    texts = [f"{i} goals " * (1 + i % 5) for i in range(23)]
    short = dataclasses.replace(CONFIG, max_length=64)
    expected, real, sizes = label_probabilities(*small, texts, short), scoring.label_logits, []

    def limited(limit):
        def logits(model, rows, label_ids):
            sizes.append(len(rows))
            if len(rows) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(model, rows, label_ids)

        return logits

    monkeypatch.setattr(scoring, "label_logits", limited(6))
    np.testing.assert_allclose(label_probabilities(*small, texts, short), expected, atol=1e-5)
    assert sizes == [23, 11, 5, 6, 6, 6]
    monkeypatch.setattr(scoring, "label_logits", limited(0))
    with pytest.raises(ModelError, match="QLORA_MAX_LENGTH"):
        label_probabilities(*small, texts, short)


def test_many_batches_run_in_a_thread_a_core_and_leave_everything_as_it_was(
    small, small_batches, monkeypatch
):
    one_by_one = np.concatenate([label_probabilities(*small, [text], CONFIG) for text in TEXTS * 2])
    before, seen = torch.get_num_threads(), set()

    def watched(*args):
        seen.add(
            (
                threading.current_thread() is threading.main_thread(),
                torch.get_num_threads(),
                torch.is_grad_enabled(),
            )
        )
        return label_logits(*args)

    def stop(rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "label_logits", watched)
    torch.set_num_threads(2)
    try:
        counted = []
        found = label_probabilities(*small, TEXTS * 2, CONFIG, progress=counted.append)
        with pytest.raises(KeyboardInterrupt):
            label_probabilities(*small, TEXTS * 2, CONFIG, progress=stop)
        assert torch.get_num_threads() == 2 and torch.is_grad_enabled()
    finally:
        torch.set_num_threads(before)
    assert seen == {(False, 1, False)} and sum(counted) == 10 and len(counted) > 2
    np.testing.assert_allclose(
        found, one_by_one, atol=1e-5 if compute_dtype()[0] == torch.float32 else 2e-2
    )


def test_a_temperature_divides_the_logits(small):
    once = label_probabilities(*small, TEXTS, CONFIG)
    np.testing.assert_allclose(
        label_probabilities(*small, TEXTS, CONFIG, temperature=2.5),
        with_temperature(once, 2.5),
        atol=1e-12,
    )


def test_no_text_gives_no_row(small):
    assert label_probabilities(*small, [], CONFIG).shape == (0, 4)


@pytest.mark.parametrize("training", [True, False])
def test_scoring_has_no_dropout_and_leaves_the_mode_as_it_was(tiny, tokenizer, config, training):
    lora = LoraConfig(target_modules="all-linear", lora_dropout=0.5)
    model = attach_lora(load_base_model(dataclasses.replace(config, base_model=tiny)), lora, seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    expected = label_probabilities(model.eval(), tokenizer, TEXTS, CONFIG)
    model.train(training)
    np.testing.assert_array_equal(label_probabilities(model, tokenizer, TEXTS, CONFIG), expected)
    assert {module.training for module in model.modules()} == {training}


def test_length_batches():
    def rows(*lengths):
        return [[0] * length for length in lengths]

    assert length_batches(rows(3, 9, 4, 2, 4), 12) == [[1], [2, 4, 0], [3]]
    assert length_batches(rows(2, 50, 2), 12) == [[1], [0, 2]]  # a row over the budget, alone
    assert length_batches([], 12) == []


def test_length_batches_take_each_real_row_once_within_the_budget(tokenizer, config):
    encoded = encode_prompts(tokenizer, load_rows(config)["test"].raw.tolist(), 256)
    batches = length_batches(encoded, 512)
    assert sorted(i for batch in batches for i in batch) == list(range(80))
    assert max(sum(len(encoded[i]) for i in batch) for batch in batches) <= 512
    assert sum(len(batch) * len(encoded[batch[0]]) for batch in batches) < 1.1 * sum(
        map(len, encoded)
    )  # places, in attention
