"""Releases: signing, storing and verifying the files that go live, and are rolled back, as one."""
