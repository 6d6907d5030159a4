"""How a release takes over from another: who is on which arm, and later what decides it."""
