"""The only place that talks to Kubernetes: rollouts as resources, the operator, Ray jobs."""
