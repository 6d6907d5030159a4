"""Creates a RayJob from a file; the program of the chart's CronJobs. Arguments: file, number of ended jobs to retain.

It creates none while a RayJob of the same kind and run is in progress, because both would write the same files. KubeRay
never deletes ended RayJobs; the program deletes the oldest ones of its kind.
"""

import os
import sys
from pathlib import Path

import yaml
from kubernetes import client, config

ENDED = ("Complete", "Failed", "Suspended")
LABELS = ("app.kubernetes.io/instance", "reelway.dev/job", "reelway.dev/run")


def main() -> int:
    path, kept = sys.argv[1], int(sys.argv[2])
    config.load_incluster_config()
    api, namespace = client.CustomObjectsApi(), os.environ["POD_NAMESPACE"]
    job = yaml.safe_load(Path(path).read_text())
    same = ",".join(f"{key}={job['metadata']['labels'][key]}" for key in LABELS)
    others = api.list_namespaced_custom_object("ray.io", "v1", namespace, "rayjobs", label_selector=same)["items"]
    ended = [one for one in others if one.get("status", {}).get("jobDeploymentStatus") in ENDED]
    for other in others:
        if other not in ended:
            print(f"RayJob {other['metadata']['name']} is in progress; no other one created")
            return 0
    made = api.create_namespaced_custom_object("ray.io", "v1", namespace, "rayjobs", job)
    print(f"RayJob {made['metadata']['name']} created")
    newest_first = sorted(ended, key=lambda one: one["metadata"]["creationTimestamp"], reverse=True)
    for old in newest_first[kept:]:
        api.delete_namespaced_custom_object("ray.io", "v1", namespace, "rayjobs", old["metadata"]["name"])
        print(f"RayJob {old['metadata']['name']} deleted: ended, beyond the history limit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
