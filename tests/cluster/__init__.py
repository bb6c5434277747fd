"""A whole deployment on this machine, of real processes: for its own tests, for faults, and to look at."""
