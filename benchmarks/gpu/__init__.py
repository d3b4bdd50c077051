"""What a training step must show on a GPU, in calls of less than ten minutes: see `benchmarks.gpu.__main__`."""
