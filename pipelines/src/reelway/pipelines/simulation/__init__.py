"""Simulation of a short-video service: viewers, creators, videos, trends and viewer behaviour.

A ``World`` gives the probability that a viewer enjoys a video at a time; all reactions derive from it. It holds
everything that does not depend on recommendations: properties, upload times, trends and drifts, until two weeks after
the log. A ``ViewingHistory`` holds earlier exposures, which make a viewer enjoy the same or similar videos less for
some time. ``World.respond`` reads and extends the history. The simulated log (``simulate_log``), live traffic
(``live_viewers``) and closed loops all call it.

``world_constants`` has every constant with its source or reason. The constants are frozen.
"""
