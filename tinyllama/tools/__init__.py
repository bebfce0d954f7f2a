"""Check a machine and estimate the cost of a run before it starts."""
