"""Parts of losses as pure functions of tensors, on any number of ranks."""
