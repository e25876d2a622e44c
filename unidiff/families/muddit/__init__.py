"""The Muddit and Meissonic family."""
