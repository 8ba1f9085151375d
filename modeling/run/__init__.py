"""One training run: its file names, checkpoints, states, signals, logs, and how its processes start."""
