"""The two models and their losses: torch only, so that a unit test, Ray Train and an exporter run the same lines."""
