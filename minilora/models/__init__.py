"""Whole models: by name, from a folder or a GGUF file; tokenizers; merged models; a base with its adapters."""
