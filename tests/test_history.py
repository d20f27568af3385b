from types import SimpleNamespace

import pytest

from qlora_helpers import history
from qlora_helpers.history import Watch, losses, what_validation_says


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((2.0, 0.5, 0.4), "Validation loss fell from 0.500 to 0.400 in the last epoch."),
        ((2.0, 0.5), "Validation loss fell from 2.000 to 0.500 in the last epoch."),
        (
            (2.0, 0.5, 0.4, 0.45),
            "Validation loss was lowest after epoch 2 (0.400) and is 0.450 after the last: later",
        ),
        (
            (0.3, 0.5, 0.4),
            "Validation loss was 0.300 before training, and is not lower after any epoch (0.400",
        ),
    ],
)
def test_what_validation_says_is_what_is_known(values, says):
    entries = [{"epoch": float(i), "loss": loss} for i, loss in enumerate(values)]
    assert what_validation_says({"validation": entries}).startswith(says)


def test_losses_are_those_of_the_log():
    common = {"epoch": 0.5, "seconds": 2.0, "skipped_steps": 0}
    step = common | {"step": 1, "loss": 1.5, "learning_rate": 0.1, "grad_norm": 3.0}
    scores = {"eval_accuracy": 0.5, "eval_macro_f1": 0.4, "eval_runtime": 1.0}
    evaluations = [
        common | scores | {"step": step, "epoch": step / 2, "eval_loss": loss, "probabilities": [p]}
        for step, loss, p in ((0, 0.1, [1.0]), (2, 0.7, [0.9]), (4, 0.8, [0.8]))
    ]
    found = losses([evaluations[0], step, *evaluations[1:], common | {"train_runtime": 9.0}])
    del step["skipped_steps"]
    assert found["train"] == [step]
    entry = {"step": 2, "epoch": 1.0, "seconds": 2.0}
    assert found["validation"][1] == entry | {"loss": 0.7, "accuracy": 0.5, "macro_f1": 0.4}
    # the first validation comes before training: its weights are no epoch's
    assert (found["best_epoch"], found["best_probabilities"]) == (1.0, [[0.9]])
    assert losses(evaluations[:1])["best_epoch"] is None
    assert losses(evaluations[:1])["best_probabilities"] == []


def test_the_time_left_does_not_count_the_step_that_compiles(monkeypatch):
    """20 steps in two epochs; 16 validation rows, as many as two steps have."""
    clock, said = [0.0], []
    monkeypatch.setattr(history, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    trainer = SimpleNamespace(
        config=SimpleNamespace(effective_batch_size=8),
        accelerator=SimpleNamespace(optimizer_step_was_skipped=False),
        eval_dataset=range(16),
        peak_gib=lambda: None,
    )
    watch = Watch(trainer)
    watch.show = lambda history, status: said.append(status)
    state = SimpleNamespace(
        global_step=0, max_steps=20, num_train_epochs=2, epoch=0.0, log_history=[]
    )
    watch.on_train_begin(None, state, None)

    def step(seconds):
        watch.on_step_begin()
        clock[0] += seconds
        state.global_step += 1
        state.epoch = state.global_step / 10
        watch.on_step_end()
        state.log_history.append({"loss": 1.0})
        watch.on_log(None, state, None)

    step(600)
    assert said == ["step 1 of 20, 0.01 rows/s"]  # nothing is known of the steps to come
    step(20)
    assert said[-1] == "step 2 of 20, 0.03 rows/s, 7.3 minutes left"  # 18 steps, 2 validations
    for _ in range(10):
        step(20)
    assert said[-1].endswith(", 3.3 minutes left")  # 8 steps and a validation
    trainer.peak_gib = lambda: 9.87
    for _ in range(8):
        step(20)
    assert said[-1].endswith(", 0.0 minutes left, peak 9.9 GiB of GPU memory")
    assert watch.step_seconds == 20 and state.log_history[-1]["seconds"] == 980
