"""What models are made of: modules, layers, the Llama decoder, optimizers. Knows nothing of LoRA."""
