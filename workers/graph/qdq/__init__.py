"""Q/DQ nodes: where they go, how they are repaired, and how single ones are switched off."""
