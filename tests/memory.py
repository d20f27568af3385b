"""As a program: the cells of 03 that hold memory, three times in one process; prints the MiB of anonymous memory after each loading."""

import json
import re
import shutil
from pathlib import Path

import stages

from qlora_helpers import label_probabilities, load_adapter, load_base_model, load_tokenizer
from qlora_helpers.config import RunConfig
from qlora_helpers.fast.plan import free_memory

config = RunConfig.from_environment(
    train_size=8,
    validation_size=4,
    test_size=4,
    num_epochs=1,
    effective_batch_size=8,
    max_length=48,
)
held, model, trainer, tuned = [], None, None, None


def anonymous_mebibytes() -> float:
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


for _ in range(3):
    stages.set_up(config)
    stages.draw()
    workspace, config = stages.open_workspace("02_data_subset")
    model = trainer = tuned = None  # as the cell that loads does
    model = load_base_model(config)
    free_memory()
    held.append(round(anonymous_mebibytes()))
    del model
    trainer = stages.trainer_for(workspace, config)
    stages.fit(workspace, trainer)
    tuned = load_adapter(load_base_model(config), workspace / "adapter")
    label_probabilities(tuned, load_tokenizer(config), ["a headline"], config)
    shutil.rmtree(workspace.path)
print(json.dumps(held))
