"""The ``reelway`` command. Members add commands through the entry-point group ``reelway.commands``."""
