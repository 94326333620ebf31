"""Bytes and names: safetensors, GGUF and quantised blocks, in and out. Knows no models."""
