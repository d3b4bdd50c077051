"""A run's networks as a folder for others, who need no fastssl to use it."""
