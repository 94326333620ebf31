"""What a model and a step cost: parameters, bytes, seconds."""
