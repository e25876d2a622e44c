"""Commit rules: which masked positions a pass fills. One file per rule, which `ModalityDecoding.rule` calls by its name."""
