"""What the five notebooks share: QLoRA on AG News, from a run's config to the headline panel."""

from qlora_helpers import _bitsandbytes, plots
from qlora_helpers.adapter_files import export_adapter
from qlora_helpers.batching import BatchPlan, plan_batches
from qlora_helpers.card import model_card
from qlora_helpers.classifier import HeadlineClassifier
from qlora_helpers.cleaning import clean_text
from qlora_helpers.config import LABELS, RunConfig
from qlora_helpers.curve import learning_curve, tfidf_classifier
from qlora_helpers.data import SPLITS, draw_subset, load_rows, text_rules
from qlora_helpers.doctor import examine, findings_table, require_ok
from qlora_helpers.errors import (
    ConfigError,
    DataError,
    ModelError,
    PreflightError,
    QLoraError,
    TrainingStopped,
    WorkspaceError,
)
from qlora_helpers.file_panel import FilePanel
from qlora_helpers.files import write_text
from qlora_helpers.headline_panel import EXAMPLES, HeadlinePanel
from qlora_helpers.merging import merge_adapter, merged_bytes
from qlora_helpers.metrics import (
    ece_by_chance,
    fit_temperature,
    mcnemar,
    p_text,
    reliability,
    scoreboard,
    scores,
    wilson_interval,
    with_temperature,
)
from qlora_helpers.modeling import (
    attach_lora,
    compute_dtype,
    load_adapter,
    load_base_model,
    load_tokenizer,
    save_adapter,
)
from qlora_helpers.prompts import (
    build_prompt,
    encode_prompts,
    few_shot_prefix,
    label_token_ids,
    label_words,
)
from qlora_helpers.scoring import check_same_adapter, label_logits, label_probabilities
from qlora_helpers.text_table import classify_file
from qlora_helpers.training import LabelTrainer, what_validation_says
from qlora_helpers.widgets import ErrorExplorer, LossPanel, review_table
from qlora_helpers.workspace import Workspace, open_workspace
