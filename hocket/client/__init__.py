"""Typed asynchronous callers of the services."""
