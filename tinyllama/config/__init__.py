"""Settings: the sizes of a model, the settings of a run, and the command line."""
