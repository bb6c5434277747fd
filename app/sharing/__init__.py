"""One job on several workers: its calls, handed out by the worker that has the job and answered by idle ones."""
