"""Where a checkpoint comes from: a folder, a repository on the Hub, or one streamed shard by shard."""
