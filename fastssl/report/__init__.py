"""The page of a training run: its curves, its crops, its classes, its embeddings."""
