"""The subject: frozen weights plus low-rank updates. Configuration, layer, life of an adapter, file format."""
