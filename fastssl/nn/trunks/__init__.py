"""Trunks: images to pooled features."""
