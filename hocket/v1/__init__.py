"""The contracts, generated from `proto/hocket/v1` by `make proto`. Never edited."""
