"""What people see of a run: console, metrics, report, wandb, watchdog."""
