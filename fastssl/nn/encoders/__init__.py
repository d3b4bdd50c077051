"""Encoders as configuration, a file a family: what a recipe writes down, and how it becomes a module."""
