"""The playground: a page in which a model is taught in the browser. `minilora site` writes it."""
