"""Pixels from ids and boxes: each renderer turns a step's rows into uint8 NHWC crops."""
