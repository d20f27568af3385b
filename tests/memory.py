"""As a program: train three times in one process, and print the MiB of anonymous memory held.

Each time is taken after the base model is loaded, as a reader who runs 03 again would see it.
"""

import json
import re
import shutil
from pathlib import Path

import stages

from qlora_helpers import label_probabilities, load_adapter, load_base_model, load_tokenizer
from qlora_helpers.config import RunConfig
from qlora_helpers.fast.plan import free_memory

SIZES = {"train_size": 8, "validation_size": 4, "test_size": 4, "effective_batch_size": 8}


def anonymous_mebibytes() -> int:
    status = Path("/proc/self/status").read_text()
    return round(int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024)


config = RunConfig.from_environment(**SIZES, num_epochs=1, max_length=48)
held, trainer, tuned = [], None, None
for _ in range(3):
    stages.set_up(config)
    stages.draw()
    workspace, config = stages.open_workspace("02_data_subset")
    trainer = tuned = None  # as the cell that loads does
    model = load_base_model(config)
    free_memory()
    held.append(anonymous_mebibytes())
    del model
    trainer = stages.trainer_for(workspace, config)
    stages.fit(workspace, trainer)
    tuned = load_adapter(load_base_model(config), workspace / "adapter")
    label_probabilities(tuned, load_tokenizer(config), ["a headline"], config)
    shutil.rmtree(workspace.path)
print(json.dumps(held))
