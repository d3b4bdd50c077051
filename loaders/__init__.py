"""Images to batches for self- and semi-supervised training; usable without fastssl. See `loaders.loader`."""

from loaders.plan.plan import PlanError
from loaders.store.source import StoreError

DATA_ERRORS: tuple[type[Exception], ...] = (PlanError, StoreError)
"""What users can put right, each with a message of one line."""
