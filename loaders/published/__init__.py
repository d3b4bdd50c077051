"""Published test sets in their published layouts: those of robustness and those of transfer."""
