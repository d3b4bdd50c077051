"""Networks: trunks, heads and the batch norm between them."""
