"""Ways to compute the gradients of many rows: one by one, batched, written out, compiled."""
