"""The Lumina-DiMOO family."""
