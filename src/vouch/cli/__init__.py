"""The `vouch` command: thin, over the library."""
