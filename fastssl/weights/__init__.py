"""Weights from elsewhere: files of tensors opened safely, their layouts recognised, one form for all."""
