"""Methods: the base class, what the trainer hands to it, PromptKD, and the registry."""
