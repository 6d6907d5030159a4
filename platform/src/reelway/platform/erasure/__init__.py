"""Erases viewers from every store that a command can reach.

Each installed member registers a function under the entry point group ``reelway.erasers``. The function receives an
``ErasureRequest`` and yields an ``ErasedStore`` per store. It deletes what it finds, leaves complete files if it is
interrupted, and finds nothing when it runs again.
"""
