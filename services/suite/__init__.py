"""All four services in one process, joined by the local channel."""
