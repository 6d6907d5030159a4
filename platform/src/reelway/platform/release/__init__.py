"""Releases: signing, storing and verifying what must go live, or back, as one. Nothing here trains or serves."""
