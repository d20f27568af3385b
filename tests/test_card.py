import dataclasses

import yaml

from qlora_helpers import LABELS, model_card, scoreboard

HISTORY = {
    "best_epoch": 2.0,
    "seconds": 90.0,
    "plan": {"micro_batch_size": 16},
    "label_words": [f" {label}" for label in LABELS],
}
VERSIONS = {"peft": "0.20.0", "torch": "2.11.0"}


def card(config, n=1, temperature=1.0, revision=None) -> str:
    systems = {"majority class": [0, 0, 0, 0] * n, "tuned model": [0, 1, 2, 0] * n}
    table = scoreboard([0, 1, 2, 3] * n, systems, LABELS)
    return model_card(config, table, HISTORY, temperature, revision, VERSIONS)


def test_the_card_says_what_the_adapter_is_and_what_it_reached(config):
    _, head, text = card(config, temperature=1.25, revision="abc123").split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    for part in (
        "revision abc123",
        "280 rows of sample for 3 epochs",
        "(epoch 2)",
        "accuracy 0.7500 (95% interval\n0.3006 to 0.9544)",
        "| tuned model | 0.75 |",
        "Divide the logits by the temperature 1.250",
        '"lora_dropout": 0.05',
        "peft 0.20.0, torch 2.11.0",
        "\\nTopic:",
        "1.5 minutes",
    ):
        assert part in text, part


def test_the_card_does_not_tell_where_this_machine_keeps_its_data(config, tmp_path):
    text = card(dataclasses.replace(config, data=str(tmp_path / "ag_news")))
    assert str(tmp_path) not in text and "rows of ag_news" in text


def test_the_card_asks_for_no_temperature_of_1_and_shows_no_p_value_of_0(config):
    text = card(config, n=1000)
    assert "The logits need no temperature" in text and "Divide the logits" not in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert "| <1e-16 |" in lines[2] and lines[3].count("|  |") == 1 and "nan" not in text
