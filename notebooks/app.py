"""05's panels alone: the page that `make app` serves with Voila."""

from IPython.display import HTML, display

from qlora_helpers import EXAMPLES, LABELS, FilePanel, HeadlineClassifier, HeadlinePanel
from qlora_helpers.errors import QLoraError
from qlora_helpers.widgets.markup import escape

try:
    classifier = HeadlineClassifier.from_workspace()
except QLoraError as error:  # Voila would show that something failed, and not what
    display(HTML(f"<h2>Not ready</h2><p>{escape(str(error))}</p>"))
else:
    display(
        HTML(
            f"<h2>Type a headline</h2><p>Its label, by {escape(classifier.config.base_model)} and this run's adapter: one of "
            f"{escape(', '.join(classifier.labels))}.</p>"
        ),
        HeadlinePanel(classifier, EXAMPLES if classifier.labels == LABELS else ()),
        HTML("<h2>Or a file</h2>"),
        FilePanel(classifier),
    )
