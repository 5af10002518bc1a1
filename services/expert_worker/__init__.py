"""The expert worker: verifies experts, keeps them in memory under a budget, and runs them.

A request's way: `service` (messages), `residency` (what is in memory, under the `budget` of each; on a miss `supply`
fetches, `loader` moves to the device), `batching` (one compute thread per device), `compute` (the arithmetic). A text's
way: `text` (messages, the experts it needs, all of them by `gathering`, and with `composing` whether they go together),
then `engine`, which `text_engine` sets up around a base. Beside it `authority` says what is trusted now, `feed` and the
trust folder change that, and `announce` tells the registry what is here.
"""
