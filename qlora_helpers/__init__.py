"""What the five notebooks share: QLoRA on AG News, from a run's config to the headline panel."""
