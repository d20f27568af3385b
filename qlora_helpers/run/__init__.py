"""What one notebook hands to the next: the workspace, checkpoints, whole files."""
