"""Chat: a conversation that is only ever appended to, so that every turn reuses the cache."""
