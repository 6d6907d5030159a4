"""The finalizer ``reelway.dev/traffic-on-stable``, which delays a deletion until all traffic is on stable.

It is set before a rollout starts and removed when the rollout is at rest. A rollout at rest can be deleted without a
running operator, and an uninstall leaves no object behind that waits for one.
"""

from __future__ import annotations

from reelway.platform.cluster.kube_api import ConflictError, KubeApi, NotFoundError
from reelway.platform.cluster.resources import FINALIZER, RolloutResource
from reelway.platform.cluster.rollout_cache import PATH, InformerCache, parse_rollout


def set_finalizer(
    api: KubeApi, cache: InformerCache, resource: RolloutResource, *, present: bool
) -> RolloutResource | None:
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
        written = parse_rollout(api.patch(f"{PATH}/{resource.name}", change))
    except ConflictError:
        return None
    except NotFoundError:
        cache.remove(resource.uid)
        return None
    if written.deleting and not written.finalizers:
        cache.remove(resource.uid)  # this patch completed the deletion
    else:
        cache.store_written(written)
    return written
