"""Why: a CronJob makes pods, and what is wanted is a RayJob; this is the step between.

Refuses while the last one of the same kind is still under way: two trainings of one run would write the same files.
"""

import os
import sys
from pathlib import Path

import yaml
from kubernetes import client, config

ENDED = ("Complete", "Failed", "Suspended")


def main() -> int:
    config.load_incluster_config()
    api, namespace = client.CustomObjectsApi(), os.environ["POD_NAMESPACE"]
    job = yaml.safe_load(Path(sys.argv[1]).read_text())
    labels = job["metadata"]["labels"]
    same = ",".join(f"{key}={labels[key]}" for key in ("app.kubernetes.io/instance", "reelway.dev/job"))
    others = api.list_namespaced_custom_object("ray.io", "v1", namespace, "rayjobs", label_selector=same)["items"]
    for other in others:
        if other.get("status", {}).get("jobDeploymentStatus") not in ENDED:
            print(f"RayJob {other['metadata']['name']} is still under way; this time nothing is created")
            return 0
    made = api.create_namespaced_custom_object("ray.io", "v1", namespace, "rayjobs", job)
    print(f"RayJob {made['metadata']['name']} is created")
    return 0


if __name__ == "__main__":
    sys.exit(main())
