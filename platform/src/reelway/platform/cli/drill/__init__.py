"""``reelway drill``: tests a rollback on the running service."""
