"""Traffic between releases: buckets, routing, target and the backends that apply it."""
