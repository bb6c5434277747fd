"""The architectures that the benchmarks measure, what they are fed, and what little training they get."""
