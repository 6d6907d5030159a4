"""``reelway drill``: a rollback on purpose, on the running service."""
