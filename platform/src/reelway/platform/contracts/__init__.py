"""The types every part agrees on. No logic beyond validation, no I/O, no frameworks."""
