"""The finalizer ``reelway.dev/traffic-on-stable``, which delays a deletion until all traffic is on stable.

It is set before a rollout starts and removed when the rollout is at rest. A rollout at rest can be deleted without a
running operator, and an uninstall leaves no object behind that waits for one.
"""

from __future__ import annotations

from reelway.platform.cluster.kube_api import AbsentError, ConflictError, KubeApi
from reelway.platform.cluster.resources import FINALIZER, Resource
from reelway.platform.cluster.shelf import PATH, ToldShelf, read


def set_finalizer(api: KubeApi, cache: ToldShelf, resource: Resource, *, present: bool) -> Resource | None:
    """Adds or removes the finalizer and stores the server's answer in the cache.

    Returns:
        The rollout as written. None if the copy was outdated or the rollout is deleted: the watch delivers the new
        state, and the caller tries again then.

    Raises:
        KubernetesError: if the server cannot be reached or rejects the patch.
    """
    others = [name for name in resource.finalizers if name != FINALIZER]
    finalizers = [*others, FINALIZER] if present else others
    if finalizers == list(resource.finalizers):
        return resource
    change = {"metadata": {"resourceVersion": resource.resource_version, "finalizers": finalizers}}
    try:
        written = read(api.patch(f"{PATH}/{resource.name}", change))
    except ConflictError:
        return None
    except AbsentError:
        cache.forget(resource.uid)
        return None
    if written.deleting and not written.finalizers:
        cache.forget(resource.uid)  # this patch completed the deletion
    else:
        cache.put(written)
    return written
