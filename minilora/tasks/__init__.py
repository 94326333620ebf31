"""Small tasks whose answers are known: generated from a seed, with a measure and a ceiling."""
