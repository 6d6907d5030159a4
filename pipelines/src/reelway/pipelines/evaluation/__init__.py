"""Judging recommenders: metrics over viewers, baselines, one question asked of all, off-policy estimates, gates."""
