"""Images to batches for self- and semi-supervised training; usable without fastssl. See `loaders.loader`."""
