"""The pages: rendered here, readable without a script, nothing loaded from anywhere else."""
