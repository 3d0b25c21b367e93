"""The front door for data: files of any known shape become conversations, preferences or prompts."""
