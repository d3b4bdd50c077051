"""Which images a stream may use, or may see the labels of: subsets, and the lists that papers publish."""
