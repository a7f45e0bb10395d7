"""The paper's baselines, on promptkd's trainer, losses and rollouts."""
