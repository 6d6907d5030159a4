"""The ``reelway`` command. Members add their own commands through the entry-point group ``reelway.commands``."""
