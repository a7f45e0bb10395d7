"""Published checkpoints and data: from the Hugging Face hub into the folders that the scripts read."""
