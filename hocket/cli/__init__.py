"""The `hocket` command: one small module per group of verbs."""
