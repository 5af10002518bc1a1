"""The starter kit at work: a small base, nine signed experts, and a dozen prompts."""
