"""Faults done to real training at random moments, and whether anything is lost by them."""
