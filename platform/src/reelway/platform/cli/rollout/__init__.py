"""``reelway rollout``: commands, what they ask of a run or a cluster, and how it is shown."""
