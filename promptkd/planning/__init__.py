"""Compute from config.json files what memory a run needs on each rank and in each phase, before it starts."""
