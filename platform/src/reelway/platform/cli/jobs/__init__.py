"""`reelway submit` and `reelway jobs`: work on a cluster, from a laptop."""
