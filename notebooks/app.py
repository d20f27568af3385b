"""05's panels alone: the page that serve.py serves with Voila."""

from IPython.display import HTML, display

from qlora_helpers import EXAMPLES, LABELS, FilePanel, HeadlineClassifier, HeadlinePanel
from qlora_helpers.errors import QLoraError
from qlora_helpers.widgets.markup import escape

try:
    classifier = HeadlineClassifier.from_workspace()
except QLoraError as error:  # Voila alone would say that something failed, not what
    display(HTML(f"<h2>Not ready</h2><p>{escape(str(error))}</p>"))
else:
    model, labels = escape(classifier.config.base_model), escape(", ".join(classifier.labels))
    display(
        HTML("<h2>Type a headline</h2>"),
        HTML(f"<p>Its label, by {model} and this run's adapter: one of {labels}.</p>"),
        HeadlinePanel(classifier, EXAMPLES if classifier.labels == LABELS else ()),
        HTML("<h2>Or a file</h2>"),
        FilePanel(classifier),
    )
