"""What a step needs, counted and modelled: arithmetic, messages, memory, and what other machines would make of it."""
