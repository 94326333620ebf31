"""A fine-tuning job: options, training loop, checkpoints, the folder of a run."""
