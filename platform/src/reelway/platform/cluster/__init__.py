"""All code that calls the Kubernetes API: rollouts as resources, the operator and Ray jobs."""
