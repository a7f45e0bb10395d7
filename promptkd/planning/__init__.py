"""What a run will need before it is started: memory by rank and phase, work, traffic, time. Reads config.json files."""
