"""What differs by accelerator."""
