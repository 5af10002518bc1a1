"""Logs, metrics and the request id: what operators see."""
