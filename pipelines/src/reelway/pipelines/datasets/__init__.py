"""Other people's data and the simulator's, in the one event schema, checked before anything learns from it."""
