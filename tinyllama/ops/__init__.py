"""Implement the operations of the model, one file each; the reference implementation comes first."""
