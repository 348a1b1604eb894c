"""Source → plan → execute → verify → publish: the part that moves bytes."""
