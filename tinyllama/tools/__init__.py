"""Before a run: what a machine has, and what a run will take."""
