"""The compositions of a service: where its stages run. ``platform/decisions`` has the reasons.

This module imports nothing, so that the command line can offer the choice without loading Ray or the models.
"""

from __future__ import annotations

from typing import Literal

Composition = Literal["staged", "fused"]
"""Where the three stages of a release run.

``staged``: each stage is a Ray Serve deployment and is scaled separately. A crash in a release's native code ends a
process of that release only. A request makes three calls between processes.

``fused``: in the router processes, each release on a thread of its own. There are no calls between processes; ``make
bench-serving`` prints their cost. All stages are scaled together, by the number of routers. A canary shares their cores
with stable, and a crash in a release's native code ends a router.
"""
