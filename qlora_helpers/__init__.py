"""What the five notebooks share: QLoRA on AG News, from a run's config to the headline panel.

`from qlora_helpers import RunConfig` imports what RunConfig needs, and no more.
"""

import logging
from importlib import import_module

_MODULES = {  # each with its public names, in the order in which the notebooks introduce them
    "errors": "QLoraError ConfigError DataError ModelError PreflightError TrainingStopped "
    "WorkspaceError",
    # 01_setup
    "config": "LABELS RunConfig",
    "colab.doctor": "examine findings_table require_ok",
    "colab.drive": "find_workspace open_workspace",
    "run.workspace": "Workspace",
    "run.files": "write_text",
    # 02_data_subset
    "texts": "clean_text",
    "data": "SPLITS draw_subset load_rows text_rules",
    "prompts": "build_prompt encode_prompts few_shot_prefix label_token_ids label_words",
    # 03_qlora_training
    "model": "attach_lora compute_dtype load_base_model load_tokenizer",
    "adapter": "load_adapter load_on_each_gpu save_adapter",
    "fast.plan": "BatchPlan",
    "training": "LabelTrainer plan_batches",
    "launch": "gpu_count lora_of publish_training train_in_processes",
    "history": "what_validation_says",
    "scoring": "check_same_adapter label_logits label_probabilities",
    # 04_evaluation
    "encoder": "load_encoder",
    "metrics": "ece_by_chance fit_temperature mcnemar p_text reliability scoreboard scores "
    "wilson_interval with_temperature",
    "card": "model_card",
    # 05_inference
    "classifier": "HeadlineClassifier classify_file",
    "export": "export_adapter merge_adapter",
    "gguf_adapter": "export_gguf",
    "colab.report": "run_report",
    # figures and panels
    "widgets.loss_panel": "LossPanel",
    "widgets.error_explorer": "ErrorExplorer review_table",
    "widgets.headline_panel": "EXAMPLES HeadlinePanel",
    "widgets.file_panel": "FilePanel",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = [*_MODULE_OF, "plots"]


def __getattr__(name: str):
    """Import the module of a public name when the name is first asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # On some CPUs bitsandbytes warns, when it is imported, of a kernel that is not needed here.
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        module = import_module(f"{__name__}.{_MODULE_OF.get(name, name)}")
    finally:
        logger.setLevel(level)
    return getattr(module, name, module)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
