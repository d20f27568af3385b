import dataclasses
import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import stages
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
)

from qlora_helpers import history as history_module
from qlora_helpers import training
from qlora_helpers.adapter import load_adapter
from qlora_helpers.config import LABELS, PROFILES, RunConfig
from qlora_helpers.errors import ModelError
from qlora_helpers.fast import kernels
from qlora_helpers.fast.plan import BatchPlan, decoder_layers
from qlora_helpers.model import attach_lora, compute_dtype, load_base_model
from qlora_helpers.run.files import write_text
from qlora_helpers.run.workspace import Workspace
from qlora_helpers.scoring import check_same_adapter, label_logits, label_probabilities
from qlora_helpers.training import LabelTrainer
from qlora_helpers.widgets.loss_panel import LossPanel

CONFIG = RunConfig(profile="cpu", **PROFILES["cpu"])
TOLERANCE = 1e-5 if compute_dtype()[0] == torch.float32 else 0.03
SENTENCE = "rain stops play as the port of Dhaka closes and oil climbs while a browser written by volunteers mends its holes"


def _table(rows: int, start: int = 0) -> pd.DataFrame:
    texts = [f"{start + i} {SENTENCE[i % 5 : i % 5 + 12 + 7 * (i % 13)]}" for i in range(rows)]
    return pd.DataFrame({"text": texts, "label": [i % len(LABELS) for i in range(rows)]})


SUBSET = {"train": _table(19), "validation": _table(8, start=100)}


@pytest.fixture
def prepared(tiny, tokenizer, config, tmp_path):
    """The tiny model's trainer, before its first step."""

    def prepare(
        micro_batch_size=4, subset=SUBSET, kept_activations=10**9, **settings
    ) -> LabelTrainer:
        choices = {
            "base_model": tiny,
            "effective_batch_size": 8,
            "num_epochs": 2,
            "learning_rate": 0.01,
            "lora_dropout": 0.3,
        }
        run = dataclasses.replace(config, **(choices | settings))
        lora = LoraConfig(
            r=4,
            lora_alpha=8,
            lora_dropout=run.lora_dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = attach_lora(load_base_model(run), lora, run.seed)
        plan = BatchPlan(
            micro_batch_size,
            run.effective_batch_size // micro_batch_size,
            kept_activations,
            None,
            "as the test says",
        )
        return LabelTrainer(model, tokenizer, subset, run, plan)

    return prepare


@pytest.fixture
def trained(prepared):
    """The trainer after training, its history, and the rows in the order in which they were seen."""

    def train(**settings):
        trainer = prepared(**settings)
        seen, collate = [], trainer.data_collator
        trainer.data_collator = lambda rows: (
            seen.extend(tuple(row["input_ids"]) for row in rows) or collate(rows)
        )
        trainer.train()
        training = {tuple(ids) for ids in trainer.train_dataset["input_ids"]}
        return trainer, trainer.history(seconds=2.0), [ids for ids in seen if ids in training]

    return train


def _losses(history: dict, split: str = "train") -> list[float]:
    return [entry["loss"] for entry in history[split]]


def _without_times(history: dict) -> dict:
    return {
        split: [
            {name: value for name, value in entry.items() if name != "seconds"}
            for entry in history[split]
        ]
        for split in ("train", "validation")
    }


def _adapter(trainer) -> dict[str, torch.Tensor]:
    return {
        name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name
    }


@pytest.fixture(scope="module", params=[LlamaConfig, Qwen2Config, GemmaConfig, PhiConfig])
def family(request, tokenizer, tmp_path_factory) -> str:
    """The folder of a tiny model; Phi has dropout of its own."""
    own = {"resid_pdrop": 0.1, "embd_pdrop": 0.1} if request.param is PhiConfig else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        request.param(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            initializer_range=0.2,
            pad_token_id=tokenizer.pad_token_id,
            **own,
        ),
        dtype=torch.float32,
    )
    folder = tmp_path_factory.mktemp("family")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_no_plan_changes_a_loss(prepared, family, rate):
    """19 rows make steps of 8, 8 and 3, and the last is cut into 2 and 1: a mean of means would differ."""

    def train(micro_batch_size, kept_activations):
        trainer = prepared(
            micro_batch_size,
            kept_activations=kept_activations,
            base_model=family,
            lora_dropout=rate,
        )
        losses = stages.step_losses(trainer)
        return losses, _losses(trainer.history(1.0), "validation"), _adapter(trainer)

    losses, validation, adapter = train(8, 10**9)
    assert len(losses) == 6 and max(losses) - min(losses) > 0.1  # the model moves
    for plan in ((4, 10**9), (2, 0), (1, 60), (8, 100)):  # layers checkpointed: none, all, some
        cut, cut_validation, cut_adapter = train(*plan)
        assert cut == pytest.approx(losses, abs=TOLERANCE), plan
        assert cut_validation == pytest.approx(validation, abs=10 * TOLERANCE), plan
        for name, weight in adapter.items():
            torch.testing.assert_close(cut_adapter[name], weight, rtol=0, atol=10 * TOLERANCE)


def test_the_order_of_rows_does_not_depend_on_the_micro_batch(trained):
    _, _, whole = trained(micro_batch_size=8)
    _, _, cut = trained(micro_batch_size=2)
    assert whole == cut
    assert (
        sorted(whole[:19]) == sorted(whole[19:]) and len(set(whole)) == 19
    )  # each epoch sees each row once
    assert whole[:19] != whole[19:]  # in an order of its own


def test_rows_of_like_length_share_a_batch(prepared):
    trainer = prepared(micro_batch_size=8, subset=SUBSET | {"train": _table(96)})
    lengths = [list(map(len, batch["prompts"])) for batch in trainer.get_train_dataloader()]
    assert [len(batch) for batch in lengths] == [8] * 12
    assert sum(8 * max(batch) for batch in lengths) < 1.3 * sum(map(sum, lengths))


def test_the_same_seed_gives_the_same_training_and_another_seed_another(trained):
    (one, history, order), (two, again, order_again) = trained(), trained()
    assert _without_times(history) == _without_times(again)
    assert order == order_again
    first, second = _adapter(one), _adapter(two)
    assert all(torch.equal(first[name], second[name]) for name in first)
    _, other, other_order = trained(seed=7)
    assert _losses(other) != _losses(history)
    assert other_order != order


def test_the_best_epoch_is_kept(trained):
    """Validation labels contradict the training labels of the same texts: the better the training, the worse the validation."""
    contradicting = SUBSET["train"].assign(label=(SUBSET["train"].label + 1) % 4)
    trainer, history, _ = trained(
        subset={"train": SUBSET["train"], "validation": contradicting},
        num_epochs=3,
        learning_rate=0.02,
    )
    losses = _losses(history, "validation")
    assert losses[1] < losses[2] < losses[3]
    assert history["best_epoch"] == 1.0
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[1], abs=1e-5)


def test_the_validation_loss_is_that_of_the_scored_labels(trained, tokenizer):
    """Training and evaluation agree on the prompt, on the label tokens and on their order."""
    trainer, history, _ = trained(num_epochs=1)
    validation = SUBSET["validation"]
    probabilities = torch.tensor(
        label_probabilities(trainer.model, tokenizer, validation.text.tolist(), CONFIG)
    )
    expected = torch.nn.functional.nll_loss(
        probabilities.log(), torch.tensor(validation.label)
    ).item()
    tolerance = 1e-4 if compute_dtype()[0] == torch.float32 else 0.03
    assert history["validation"][-1]["loss"] == pytest.approx(expected, abs=tolerance)
    assert (
        history["validation"][-1]["accuracy"]
        == (probabilities.argmax(-1).numpy() == validation.label).mean()
    )


def test_a_training_of_one_step_learns(trained):
    trainer, history, _ = trained(num_epochs=1, effective_batch_size=20)
    assert len(history["train"]) == 1
    learned = [weight for name, weight in _adapter(trainer).items() if "lora_B" in name]
    assert len(learned) == 14 and all(
        weight.abs().max() > 0.001 for weight in learned
    )  # they begin at 0
    assert _losses(history, "validation")[0] != _losses(history, "validation")[1]


def _validation(*losses: float) -> dict:
    return {"validation": [{"epoch": float(i), "loss": loss} for i, loss in enumerate(losses)]}


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        (
            (2.0, 0.5, 0.4),
            "Validation loss fell from 0.500 to 0.400 in the last epoch. Only a "
            "training with more epochs can tell",
        ),
        ((2.0, 0.5), "Validation loss fell from 2.000 to 0.500 in the last epoch. "),
        (
            (2.0, 0.5, 0.4, 0.45),
            "Validation loss was lowest after epoch 2 (0.400) and is 0.450 after "
            "the last: later epochs did not help",
        ),
        (
            (2.0, 0.5, 0.5),
            "Validation loss was lowest after epoch 1 (0.500) and is 0.500 after "
            "the last: later epochs did not help",
        ),
        (
            (0.3, 0.5, 0.4),
            "Validation loss was 0.300 before training, and is not lower after any "
            "epoch (0.400 at best): training has not helped",
        ),
    ],
)
def test_what_validation_says_is_what_is_known(losses, says):
    assert history_module.what_validation_says(_validation(*losses)).startswith(says)


def test_the_time_left_is_that_of_the_recent_steps_and_the_validations_to_come(
    prepared, monkeypatch
):
    """A first validation and a first step that compile take ten minutes; then a step takes 20
    seconds, a validation 5."""
    clock, said = [0.0], []
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    watch = prepared().watch
    watch.show = lambda history, status: said.append(status)
    state = SimpleNamespace(global_step=0, max_steps=20, num_train_epochs=2, log_history=[])
    watch.on_train_begin()

    def log(**entry):
        state.log_history.append(entry)
        watch.on_log(None, state, None)

    def step(seconds):
        watch.on_step_begin()
        clock[0] += seconds
        state.global_step += 1
        watch.on_step_end()
        log(loss=1.0)

    clock[0] += 300
    log(eval_runtime=300.0)
    step(300)
    assert said == ["step 1 of 20, 0.01 rows/s"]  # nothing is known of the steps to come
    step(20)
    assert said[-1].endswith(
        " rows/s, 6.7 minutes left"
    )  # 18 steps, and two validations of as many rows as a step
    for _ in range(8):
        step(20)
    clock[0] += 5
    log(eval_runtime=5.0)
    assert said[-1].endswith(" rows/s, 3.4 minutes left")  # ten steps and a validation: 205 s
    for _ in range(10):
        step(20)
    assert said[-1].endswith(" rows/s, 0.1 minutes left")
    clock[0] += 5
    log(eval_runtime=5.0)
    assert said[-1].endswith(" rows/s, 0.0 minutes left")


def test_the_panel_is_told_the_time_left_of_a_real_training(prepared):
    trainer, said = prepared(), []
    trainer.watch.show = lambda history, status: said.append(status)
    trainer.train()
    assert (
        len(
            [
                text
                for text in said
                if re.search(r"^step [2-6] of 6, [\d.]+ rows/s, \d\.\d minutes left$", text)
            ]
        )
        >= 5
    )
    assert sum("eval_runtime" in entry for entry in trainer.state.log_history) == 3


def test_the_history_holds_what_the_notebooks_plot(trained):
    trainer, history, _ = trained()
    assert [entry["step"] for entry in history["train"]] == [1, 2, 3, 4, 5, 6]
    assert history["train"][0].keys() == {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "seconds",
    }
    assert [entry["epoch"] for entry in history["validation"]] == [0, 1.0, 2.0]
    assert history["validation"][0].keys() == {
        "step",
        "epoch",
        "loss",
        "accuracy",
        "macro_f1",
        "seconds",
    }
    assert (history["seconds"], history["rows_per_second"]) == (2.0, 19.0)
    assert history["plan"]["micro_batch_size"] == 4
    assert json.loads(json.dumps(history)) == history
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 * 7
    assert {p.dtype for p in trainable} == {torch.float32}


def test_fit_writes_the_adapter_and_the_history_once(prepared, tokenizer, workspace, capsys):
    run, trainer = Workspace(workspace), prepared(num_epochs=1)
    write_text(run / "subset" / "rows", "as drawn")
    run.publish("02_data_subset", vars(trainer.config), ["subset"])
    panel = LossPanel(run)
    history = stages.fit(run, trainer, panel)
    panel.load()
    assert panel.history == history and bytes(panel.picture.value).startswith(b"\x89PNG")
    assert json.loads((run / "training.json").read_text()) == history
    assert sorted(run.require("03_qlora_training")["files"]) == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/qlora_config.json",
        "training.json",
    ]
    texts = SUBSET["validation"].text.tolist()
    loaded = load_adapter(load_base_model(trainer.config), run / "adapter")
    expected = label_probabilities(trainer.model, tokenizer, texts, CONFIG)
    np.testing.assert_array_equal(label_probabilities(loaded, tokenizer, texts, CONFIG), expected)

    again = prepared(num_epochs=1)
    assert stages.fit(run, again) == history
    assert again.state.global_step == 0
    assert "holds the finished training" in capsys.readouterr().out

    other = prepared(num_epochs=1, seed=7)
    assert _losses(stages.fit(run, other)) != _losses(history)
    assert run.is_current("03_qlora_training", vars(other.config))
    [earlier] = (run / "earlier").iterdir()
    assert json.loads((earlier / "training.json").read_text()) == history


def test_out_of_memory_in_training_keeps_less_then_cuts_the_batch_and_changes_no_loss(
    prepared, monkeypatch, capsys
):
    expected, room, runs = stages.step_losses(prepared(8)), 100, []

    def crowded(model, encoded, label_ids):
        kept = sum(not layer.gradient_checkpointing for layer in decoder_layers(model)) * sum(
            map(len, encoded)
        )
        runs.append((len(encoded), kept))
        logits = label_logits(model, encoded, label_ids)
        if model.training and (kept > room or len(encoded) > 2):
            logits.sum().backward()  # half of the gradients are there when memory ends
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits

    monkeypatch.setattr(training, "label_logits", crowded)
    trainer = prepared(8)
    losses = stages.step_losses(trainer)
    assert {rows for rows, kept in runs} > {8, 4, 2}
    assert (
        trainer.plan.kept_activations < 1000
        and trainer.plan.micro_batch_size == 2
        and "ran out of memory" in trainer.history(1.0)["plan"]["reason"]
    )
    said = capsys.readouterr().out
    assert "Step 1 ran out of memory over 8 rows" in said and said.count("'micro_batch_size'") == 2
    assert losses == pytest.approx(expected, abs=TOLERANCE)


def test_one_process_uses_one_gpu(prepared, monkeypatch):
    """The Trainer counts every GPU it sees, and would multiply the batch by their number."""

    class TwoGpus(training.TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2

    monkeypatch.setattr(training, "TrainingArguments", TwoGpus)
    trainer = prepared(micro_batch_size=4)
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == 4
    assert [len(batch["labels"]) for batch in trainer.get_train_dataloader()] == [4, 4, 4, 4, 3]
    assert trainer.steps_per_epoch == 3
    trainer.train()
    assert trainer.state.max_steps == trainer.state.global_step == 6


def test_a_compiler_that_fails_costs_one_line_and_changes_no_loss(trained, monkeypatch, capsys):
    _, expected, _ = trained()
    capsys.readouterr()
    calls = []

    def failing(function, **options):
        def compiled(*args):
            calls.append(function.__name__)
            raise RuntimeError("Triton knows no such card\nand more lines")

        return compiled

    monkeypatch.setattr(kernels, "_failure", None)
    monkeypatch.setattr(kernels, "_compiles", lambda x: True)
    monkeypatch.setattr(torch, "compile", failing)
    _, history, _ = trained()
    assert _losses(history) == _losses(expected) and _losses(history, "validation") == _losses(
        expected, "validation"
    )
    said = [line for line in capsys.readouterr().out.splitlines() if "compiled" in line]
    assert said == [
        "The fused kernels cannot be compiled here (RuntimeError: Triton knows no such card). Plain PyTorch functions are used "
        "instead: the results are the same, a step takes longer."
    ]
    assert len(calls) == 1  # nothing is tried again


def test_an_adapter_that_was_not_kept_is_told_from_rounding(trained, tokenizer):
    """03's last check: of another seed, with a layer left out, scaled by 0.9; and twenty other batch compositions."""
    trainer, history, _ = trained(num_epochs=3)
    model = trainer.model
    texts, dtype = SUBSET["validation"].text.tolist(), compute_dtype()[0]
    kept = history["best_probabilities"]

    def found() -> np.ndarray:
        return label_probabilities(model, tokenizer, texts, CONFIG)

    check_same_adapter(found(), kept, dtype)
    chance = random.Random(0)
    for _ in range(20):
        order = chance.sample(range(len(texts)), len(texts))
        size = chance.randint(1, len(texts))
        parts = [order[i : i + size] for i in range(0, len(order), size)]
        cut = np.concatenate(
            [
                label_probabilities(model, tokenizer, [texts[i] for i in part], CONFIG)
                for part in parts
            ]
        )
        check_same_adapter(cut, [kept[i] for i in order], dtype)

    weights = {name: p.detach().clone() for name, p in trainer.trainable().items()}
    other = _adapter(trained(num_epochs=3, seed=7)[0])
    wrong = {
        "another seed": other,
        "a layer left out": {name: w * ("layers.1." not in name) for name, w in weights.items()},
        "scaled by 0.9": {
            name: w * (0.9 if "lora_B" in name else 1) for name, w in weights.items()
        },
    }
    for name, changed in wrong.items():
        trainer.put(changed)
        with pytest.raises(ModelError, match="is not the one that training kept: mean change"):
            check_same_adapter(found(), kept, dtype)
            pytest.fail(f"{name} passed")
    trainer.put(weights)
    check_same_adapter(found(), kept, dtype)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_rows(prepared, monkeypatch):
    def poisoned(model, encoded, label_ids):
        logits = label_logits(model, encoded, label_ids)
        return (
            logits
            * torch.where(torch.tensor([list(ids) == bad for ids in encoded]), torch.nan, 1.0)[
                :, None
            ]
        )

    trainer = prepared(micro_batch_size=2)
    bad = trainer.train_dataset["input_ids"][11]
    monkeypatch.setattr(training, "label_logits", poisoned)
    with pytest.raises(
        ModelError,
        match=r"loss is nan at step \d, in the micro-batch of training rows \[(\d+, )?11[],].*QLORA_LEARN",
    ):
        trainer.train()
    assert trainer.state.global_step < 3
