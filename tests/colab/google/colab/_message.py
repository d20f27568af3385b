from google.colab import errors


class MessageError(errors.Error):
    """Colab's page answered with an error."""
