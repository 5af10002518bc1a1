"""Servers, channels and the one mapping between errors and statuses. Knows gRPC, and no service."""
