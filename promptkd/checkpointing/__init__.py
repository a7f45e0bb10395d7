"""Checkpoints: writing, selecting, restoring and repartitioning."""
