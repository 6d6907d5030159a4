"""``reelway demo``: all steps from events to rollouts on one machine."""
