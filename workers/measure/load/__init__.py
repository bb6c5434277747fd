"""Load: how an engine and the server before it do under a job's traffic. Open loop: requests come when they are due,
whatever became of those before, and latency counts from that moment, so that a stall is not hidden."""
