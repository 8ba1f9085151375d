"""One training run: file names, lock, checkpoints, states, signals, logs, processes."""
