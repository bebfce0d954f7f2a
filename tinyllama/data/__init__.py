"""What training reads: packed tokens, their order, and batches."""
