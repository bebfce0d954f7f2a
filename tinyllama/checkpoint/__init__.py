"""Checkpoints: what a run needs to resume, written, found and read at any world size."""
