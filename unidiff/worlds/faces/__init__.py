"""The faces world: portraits made of layers of pixel art, what is said about them, and a reader that finds the layers again."""
