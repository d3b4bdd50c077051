"""The errors that a user of the loaders can put right, each with a message of one line."""


class LoaderError(ValueError):
    """Base of them all: what a program that uses the loaders catches."""


class StoreError(LoaderError):
    """The data asked for is missing, damaged or not what was expected."""


class PlanError(LoaderError):
    """The streams asked for cannot be drawn from the data, or not by this number of ranks."""


class RenderError(LoaderError):
    """An image that cannot be read or decoded; names its id and file. `image_id` is None where none is to blame."""

    def __init__(self, message: str, image_id: int | None = None):
        super().__init__(message)
        self.image_id = image_id
