"""The panels of 03, 04 and 05."""

from qlora_helpers.widgets.error_explorer import ErrorExplorer, review_table
from qlora_helpers.widgets.file_panel import FilePanel
from qlora_helpers.widgets.headline_panel import EXAMPLES, HeadlinePanel
from qlora_helpers.widgets.loss_panel import LossPanel

__all__ = [
    "EXAMPLES",
    "ErrorExplorer",
    "FilePanel",
    "HeadlinePanel",
    "LossPanel",
    "review_table",
]
