"""A run on disk: its folder, its checkpoints, restoring it."""
