"""Simulation of a short-video service: viewers, creators, videos, trends and viewer behaviour."""
