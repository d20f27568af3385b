"""Google Colab: its machine, its Drive, its secrets, the hub."""
