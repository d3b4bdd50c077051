"""Self-contained HTML pages: `page` and `charts` are the frame and the drawings that any of them uses, and know nothing
of runs; the rest makes the page of a training run."""
