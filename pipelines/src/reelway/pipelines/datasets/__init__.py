"""Imported and simulated data sets in the event schema, checked before training."""
