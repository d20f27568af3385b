import dataclasses

import yaml

from qlora_helpers import LABELS, model_card, scoreboard

HISTORY = {
    "best_epoch": 2.0,
    "seconds": 90.0,
    "plan": {"micro_batch_size": 16},
    "label_words": [f" {label}" for label in LABELS],
}


def test_the_card_says_what_the_adapter_is_and_what_it_reached(config):
    table = scoreboard(
        [0, 1, 2, 3], {"majority class": [0, 0, 0, 0], "tuned model": [0, 1, 2, 0]}, LABELS
    )
    card = model_card(config, table, HISTORY, 1.25, "abc123")
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    for part in (
        "revision abc123",
        "280 rows of sample for 3 epochs",
        "(epoch 2)",
        "accuracy 0.7500 (95% interval 0.3006 to 0.9544)",
        "| tuned model | 0.75 |",
        "temperature 1.250",
        '"lora_dropout": 0.05',
        "peft 0.",
        "\\nTopic:",
        "1.5 minutes",
    ):
        assert part in text, part


def test_the_card_does_not_tell_where_this_machine_keeps_its_data(config, tmp_path):
    table = scoreboard([0, 1], {"tuned model": [0, 1]}, LABELS)
    card = model_card(
        dataclasses.replace(config, data=str(tmp_path / "ag_news")), table, HISTORY, 1.0, None
    )
    assert str(tmp_path) not in card and "rows of ag_news" in card


def test_the_card_asks_for_a_temperature_only_where_one_is_used(config):
    table = scoreboard([0, 1], {"tuned model": [0, 1]}, LABELS)
    for temperature, said, unsaid in (
        (1.25, "Divide the logits by the temperature 1.250", "no temperature"),
        (1.0, "The logits need no temperature", "Divide the logits"),
    ):
        card = model_card(config, table, HISTORY, temperature, None)
        assert said in card and unsaid not in card


def test_no_p_value_of_the_card_is_nought(config):
    n = 4000
    table = scoreboard([0] * n, {"majority class": [1] * n, "tuned model": [0] * n}, LABELS)
    assert table.p_value["majority class"] == 0
    lines = [
        line
        for line in model_card(config, table, HISTORY, 1.0, None).splitlines()
        if line.startswith("| ")
    ]
    assert "| <1e-16 |" in lines[2] and lines[3].count("|  |") == 1 and "nan" not in "".join(lines)
