"""The emoji world: scenes, words, cases, readers and the demo."""
