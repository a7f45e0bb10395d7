"""Examples: from published token files or plain jsonl to token ids, and which of them make up a step."""
