"""The four services, and the suite that runs them all in one process.

Each folder is one service with the same skeleton: `settings` (what an operator may choose), `service` (messages in,
messages out), `app` (how it is wired), and beside them the nouns of its own work. Services never import each other.
"""
