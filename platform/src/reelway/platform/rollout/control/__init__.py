"""The rollout controller: its loop, its store, the alert webhook and the settings."""
