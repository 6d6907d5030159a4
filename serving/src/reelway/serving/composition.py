"""Why: whoever starts a service says where its stages run, and a command line must know the words before it loads any.

It holds the choice and what it costs; nothing is run here. See ``platform/decisions`` for the reasons.
"""

from __future__ import annotations

from typing import Literal

Composition = Literal["staged", "fused"]
"""Where the three stages of a release run.

``staged``: each is a deployment of its own, scaled on its own, and a fault of a release's native code ends a process
of that release. Three hops.
``fused``: in the routers' processes, each release on a thread of its own. No hops; what they cost is printed by ``make
bench-serving``. The stages are scaled together, by the routers' replicas; a canary shares the routers' cores with
stable, and native code of a release that crashes takes a router with it.
"""
