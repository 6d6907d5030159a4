"""Commands and HTTP API of the catalogue: uploads, updates, takedowns."""
