"""Training and scoring in fewer and leaner passes: fused LoRA layers, packed batches, and the plan of a batch."""
