"""Files in, files out: GGUF, safetensors, tokenizers, and where models are kept."""
