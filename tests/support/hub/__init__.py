"""A small Hub on loopback, for tests: it speaks enough of the protocol for stock clients.

What flows: `__main__` starts a `handler.Server` (HTTP) with the routes of the `*_routes` modules,
over a `store.Store` (repositories, commits, blobs; all of it files below one folder, so a test can
look inside and a restarted server carries on). `faults` decides which requests fail and writes the
request log. `xet` reads what the client's own xet code left in its `local://` store. `process.Hub`
starts the whole as a process.

Differences from the real thing that a test could stumble over: blobs are shared by all
repositories, there are no permissions below a namespace, and nothing is ever garbage collected.
"""
