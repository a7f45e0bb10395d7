"""The baselines of the paper and of the field, on promptkd's trainer, losses and rollouts."""
