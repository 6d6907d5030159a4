"""The two-tower, the ranker and their losses, in torch only: unit tests, Ray Train and the export run this code."""
