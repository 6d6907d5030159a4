"""Canary rollouts: policy, evidence, decisions, traffic and the controller."""
