"""The MMaDA family."""
