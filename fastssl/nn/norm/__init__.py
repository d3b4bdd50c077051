"""Batch norm over all ranks: layers in lockstep, the module, and the passes over tensors behind it."""
