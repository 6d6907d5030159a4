"""``reelway rollout``: commands for the rollouts of a run directory or a cluster, and their output."""
