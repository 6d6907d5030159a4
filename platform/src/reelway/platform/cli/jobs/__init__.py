"""``reelway submit`` and ``reelway jobs``: jobs on a cluster."""
