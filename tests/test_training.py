import json
import random

import numpy as np
import pandas as pd
import pytest
import stages
import torch
from lora_models import save_tiny
from peft import LoraConfig
from transformers import LlamaConfig, PhiConfig

from qlora_helpers import training
from qlora_helpers.adapter import load_adapter
from qlora_helpers.config import LABELS
from qlora_helpers.errors import ModelError
from qlora_helpers.fast import kernels
from qlora_helpers.fast.plan import BatchPlan, decoder_layers
from qlora_helpers.model import attach_lora, compute_dtype, load_base_model
from qlora_helpers.scoring import check_same_adapter, label_logits, label_probabilities
from qlora_helpers.training import LabelTrainer
from qlora_helpers.widgets.loss_panel import LossPanel

TOLERANCE = 1e-5 if compute_dtype()[0] == torch.float32 else 0.03
SENTENCE = (
    "rain stops play as the port of Dhaka closes and oil climbs while a browser written by "
    "volunteers mends its holes"
)


def _table(rows: int, start: int = 0) -> pd.DataFrame:
    texts = [f"{start + i} {SENTENCE[i % 5 : i % 5 + 12 + 7 * (i % 13)]}" for i in range(rows)]
    return pd.DataFrame({"text": texts, "label": [i % len(LABELS) for i in range(rows)]})


SUBSET = {"train": _table(19), "validation": _table(8, start=100)}
TEXTS = SUBSET["validation"].text.tolist()


@pytest.fixture
def prepared(tiny, tokenizer):
    """A function that makes a trainer for the tiny model: 19 rows, in steps of 8, 8 and 3."""

    def prepare(
        micro_batch_size=4, subset=SUBSET, kept=10**9, checkpoint=tiny, options=None, **settings
    ) -> LabelTrainer:
        config = stages.tiny_config(checkpoint, **{"max_length": 256} | settings)
        steps = config.effective_batch_size // micro_batch_size
        plan = BatchPlan(micro_batch_size, steps, kept, None, "as the test says")
        lora = LoraConfig(
            r=4, lora_alpha=8, lora_dropout=config.lora_dropout, target_modules="all-linear"
        )
        model = attach_lora(load_base_model(config), lora, config.seed)
        return LabelTrainer(model, tokenizer, subset, config, plan, **options or {})

    return prepare


@pytest.fixture
def trained(prepared):
    """A function that returns a trainer after training, and its history."""

    def train(**settings):
        trainer = prepared(**settings)
        trainer.train()
        return trainer, trainer.history(seconds=2.0)

    return train


def _losses(history: dict, split: str = "train") -> list[float]:
    return [entry["loss"] for entry in history[split]]


def _adapter(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.trainable.items()}


# Llama's layers are fused, Phi's are not
@pytest.mark.parametrize(("family", "rate"), [(LlamaConfig, 0.05), (PhiConfig, 0.5)])
def test_no_plan_changes_a_loss(prepared, tokenizer, tmp_path, family, rate):
    # Phi has dropout of its own
    own = {"resid_pdrop": 0.1, "embd_pdrop": 0.1} if family is PhiConfig else {}
    checkpoint = save_tiny(family, tokenizer, tmp_path, head_dim=16, **own)

    def train(micro_batch_size, kept):
        trainer = prepared(micro_batch_size, kept=kept, checkpoint=checkpoint, lora_dropout=rate)
        step_losses = stages.step_losses(trainer)
        return step_losses, _losses(trainer.history(1.0), "validation"), _adapter(trainer)

    losses, validation, adapter = train(8, 10**9)
    assert len(losses) == 6 and max(losses) - min(losses) > 0.1  # the model moves
    for plan in ((3, 10**9), (2, 0), (1, 60), (8, 100)):  # layers checkpointed: none, all, some
        cut, cut_validation, cut_adapter = train(*plan)
        assert cut == pytest.approx(losses, abs=TOLERANCE), plan
        assert cut_validation == pytest.approx(validation, abs=10 * TOLERANCE), plan
        for name, weight in adapter.items():
            torch.testing.assert_close(cut_adapter[name], weight, rtol=0, atol=10 * TOLERANCE)


def test_rows_are_grouped_by_length_in_an_order_of_the_seed_alone(prepared):
    def order(**settings) -> list[int]:
        batches = prepared(**settings).get_train_dataloader()
        return [row for _ in range(2) for batch in batches for row in batch["rows"].tolist()]

    rows = order(micro_batch_size=8)
    assert sorted(rows[:19]) == sorted(rows[19:]) == list(range(19))
    assert rows[:19] != rows[19:]  # each epoch has an order of its own
    torch.rand(3)  # whatever else draws
    assert order(micro_batch_size=2) == rows
    assert order(seed=7) != rows
    many = prepared(subset=SUBSET | {"train": _table(96)}).get_train_dataloader()
    lengths = [list(map(len, batch["prompts"])) for batch in many]
    assert sum(8 * max(batch) for batch in lengths) < 1.3 * sum(map(sum, lengths))


def test_the_same_seed_gives_the_same_training_and_another_seed_another(trained):
    (one, history), (two, again) = trained(), trained()
    for split in ("train", "validation"):
        assert _losses(history, split) == _losses(again, split)
    first, second = _adapter(one), _adapter(two)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert _losses(trained(seed=7)[1]) != _losses(history)


def test_the_best_epoch_is_kept(trained, tokenizer):
    """Validation contradicts training: the better the training, the worse the validation."""
    contradicting = SUBSET["train"].assign(label=(SUBSET["train"].label + 1) % 4)
    subset = {"train": SUBSET["train"], "validation": contradicting}
    trainer, history = trained(subset=subset, num_epochs=3, learning_rate=0.02)
    losses = _losses(history, "validation")
    assert losses[1] < losses[2] < losses[3]
    assert history["best_epoch"] == 1.0
    texts = contradicting.text.tolist()
    probabilities = label_probabilities(trainer.model, tokenizer, texts, trainer.config)
    np.testing.assert_allclose(probabilities, history["best_probabilities"], atol=TOLERANCE)
    loss = -np.log(probabilities[range(len(texts)), contradicting.label]).mean()
    assert loss == pytest.approx(losses[1], abs=TOLERANCE)
    accuracy = (probabilities.argmax(axis=1) == contradicting.label).mean()
    assert history["validation"][1]["accuracy"] == accuracy


def test_a_training_of_one_step_learns(trained):
    trainer, history = trained(num_epochs=1, effective_batch_size=20)
    assert len(history["train"]) == 1
    learned = [weight for name, weight in _adapter(trainer).items() if "lora_B" in name]
    assert len(learned) == 14 and all(weight.abs().max() > 0.001 for weight in learned)
    assert {weight.dtype for weight in learned} == {torch.float32}


def test_the_loss_is_the_one_that_was_handed_over(prepared):
    seen = []

    def doubled(logits, labels):
        seen.append((tuple(logits.shape), logits.dtype, tuple(labels.shape)))
        return 2 * torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    expected = stages.step_losses(prepared(8))
    losses = stages.step_losses(prepared(8, options={"loss": doubled}))
    assert losses[0] == pytest.approx(2 * expected[0], rel=1e-5)
    assert seen[0] == ((8, 4), torch.float32, (8,))


def test_the_history_holds_what_the_notebooks_plot(trained):
    trainer, history = trained()
    assert [entry["step"] for entry in history["train"]] == [1, 2, 3, 4, 5, 6]
    train = {"step", "epoch", "loss", "learning_rate", "grad_norm", "seconds"}
    assert history["train"][0].keys() == train
    assert [entry["epoch"] for entry in history["validation"]] == [0, 1.0, 2.0]
    validation = {"step", "epoch", "loss", "accuracy", "macro_f1", "seconds"}
    assert history["validation"][0].keys() == validation
    assert (history["seconds"], history["rows_per_second"]) == (2.0, 19.0)
    assert history["step_rows_per_second"] > 0 and history["skipped_steps"] == 0
    assert history["peak_gib"] is None and history["label_words"][0] == " World"
    assert history["plan"] == vars(trainer.plan) and np.shape(history["best_probabilities"]) == (
        8,
        4,
    )
    assert json.loads(json.dumps(history)) == history


def test_fit_is_published_once(tiny, tokenizer, workspace, capsys):
    stages.set_up(stages.tiny_config(tiny))
    stages.draw()
    run, config = stages.open_workspace("02_data_subset")
    trainer, panel = stages.trainer_for(run, config), LossPanel(run)
    history = stages.fit(run, trainer, panel)
    panel.load()
    assert panel.history == history and bytes(panel.picture.value).startswith(b"\x89PNG")
    assert json.loads((run / "training.json").read_text()) == history
    loaded = load_adapter(load_base_model(config), run / "adapter")
    expected = label_probabilities(trainer.model, tokenizer, TEXTS, config)
    np.testing.assert_array_equal(label_probabilities(loaded, tokenizer, TEXTS, config), expected)

    again = stages.trainer_for(run, config)
    assert stages.fit(run, again) == history and again.state.global_step == 0
    assert "holds the finished training" in capsys.readouterr().out


def test_out_of_memory_halves_the_plan_and_changes_no_loss(prepared, monkeypatch, capsys):
    expected, runs = stages.step_losses(prepared(8)), []

    def crowded(model, encoded, label_ids):
        layers = sum(not layer.gradient_checkpointing for layer in decoder_layers(model))
        kept = layers * sum(map(len, encoded))
        runs.append((len(encoded), kept))
        logits = label_logits(model, encoded, label_ids)
        if model.training and (kept > 100 or len(encoded) > 2):
            logits.sum().backward()  # half of the gradients are there when memory ends
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits

    monkeypatch.setattr(training, "label_logits", crowded)
    trainer = prepared(8)
    losses = stages.step_losses(trainer)
    assert {rows for rows, _ in runs} >= {8, 4, 2} and trainer.plan.micro_batch_size <= 2
    said = capsys.readouterr().out
    assert "Step 1 ran out of memory over 8 rows" in said and "micro-batch has 4 rows" in said
    assert "ran out of memory" in trainer.history(1.0)["plan"]["reason"]
    assert losses == pytest.approx(expected, abs=TOLERANCE)


def test_a_single_row_without_memory_is_an_error(prepared, monkeypatch):
    def full(model, encoded, label_ids):
        if model.training:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return label_logits(model, encoded, label_ids)

    monkeypatch.setattr(training, "label_logits", full)
    with pytest.raises(ModelError, match=r"a single row of \d+ tokens .*QLORA_MAX_LENGTH"):
        prepared().train()


def test_one_process_uses_one_gpu(prepared, monkeypatch):
    """The Trainer counts every GPU it sees, and would multiply the batch by their number."""

    class TwoGpus(training.TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2

    monkeypatch.setattr(training, "TrainingArguments", TwoGpus)
    trainer = prepared()
    assert trainer.args.n_gpu == 1 and trainer.steps_per_epoch == 3
    assert [len(batch["labels"]) for batch in trainer.get_train_dataloader()] == [8, 8, 3]
    trainer.train()
    assert trainer.state.max_steps == trainer.state.global_step == 6


def test_a_compiler_that_fails_costs_one_line_and_changes_no_loss(trained, monkeypatch, capsys):
    _, expected = trained()
    capsys.readouterr()
    calls = []

    def failing(name, *args):
        calls.append(name)
        raise RuntimeError("Triton knows no such card\nand more lines")

    monkeypatch.setattr(kernels, "_failure", None)
    monkeypatch.setattr(kernels, "_compiles", lambda x: True)
    monkeypatch.setattr(kernels, "_run", failing)
    _, history = trained()
    for split in ("train", "validation"):
        assert _losses(history, split) == _losses(expected, split)
    [said] = [line for line in capsys.readouterr().out.splitlines() if "compiled" in line]
    assert "(RuntimeError: Triton knows no such card)" in said
    assert len(calls) == 1  # nothing is tried again


def test_an_adapter_that_was_not_kept_is_told_from_rounding(trained, tokenizer):
    """03's last check: of another seed, with a layer left out, scaled by 0.9; and other batches."""
    trainer, history = trained(num_epochs=3)
    kept, dtype = history["best_probabilities"], compute_dtype()[0]

    def check(found: np.ndarray, kept=kept) -> str:
        known = {"best_probabilities": kept, "dtype": str(dtype).removeprefix("torch.")}
        return check_same_adapter(found, known, dtype)

    def probabilities(texts=TEXTS) -> np.ndarray:
        return label_probabilities(trainer.model, tokenizer, texts, trainer.config)

    check(probabilities())
    chance = random.Random(0)
    for size in (1, 2, 3, 5):
        order = chance.sample(range(8), 8)
        texts = [TEXTS[i] for i in order]
        parts = [probabilities(texts[i : i + size]) for i in range(0, 8, size)]
        check(np.concatenate(parts), [kept[i] for i in order])

    weights = _adapter(trainer)
    without_a_layer = {name: w * ("layers.1." not in name) for name, w in weights.items()}
    scaled = {name: w * (0.9 if "lora_B" in name else 1) for name, w in weights.items()}
    for changed in (_adapter(trained(num_epochs=3, seed=7)[0]), without_a_layer, scaled):
        trainer.put(changed)
        with pytest.raises(ModelError, match="is not the one that training kept: mean change"):
            check(probabilities())
    trainer.put(weights)
    check(probabilities())


def test_an_adapter_of_a_gpu_is_read_back_on_a_cpu():
    """The coarser of the two dtypes says what rounding explains."""
    kept = np.full((8, 4), 0.25)
    history = {"best_probabilities": kept.tolist(), "dtype": "float16"}
    said = check_same_adapter(kept + 1e-3, history, torch.float32)
    assert said == "mean change of a probability 1.0e-03, largest 1.0e-03"
    with pytest.raises(ModelError, match="is not the one that training kept"):
        check_same_adapter(kept + 1e-3, history | {"dtype": "float32"}, torch.float32)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_rows(prepared, monkeypatch):
    trainer = prepared(micro_batch_size=2)
    bad = trainer.train_dataset["prompt"][11]

    def poisoned(model, encoded, label_ids):
        factors = [torch.nan if list(ids) == bad else 1.0 for ids in encoded]
        return label_logits(model, encoded, label_ids) * torch.tensor(factors)[:, None]

    monkeypatch.setattr(training, "label_logits", poisoned)
    rows = r"in the micro-batch of training rows \[(\d+, )?11[],]"
    with pytest.raises(ModelError, match=rf"loss is nan at step \d, {rows}.*QLORA_LEARN"):
        trainer.train()
    assert trainer.state.global_step < 3
