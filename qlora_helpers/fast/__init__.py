"""Faster training and scoring: fused LoRA layers, packed batches, and the batch plan."""
