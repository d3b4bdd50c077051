"""Configuration as frozen dataclasses: changed by `key=value`, written as plain values, read back."""
