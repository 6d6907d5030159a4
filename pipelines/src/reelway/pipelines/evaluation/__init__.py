"""Offline evaluation of recommenders: metrics per viewer, baselines, off-policy estimates and release gates."""
