"""Jobs: data, the training loop, generation, evaluation."""
