"""Data types shared by all members: validation only, no I/O and no frameworks."""
