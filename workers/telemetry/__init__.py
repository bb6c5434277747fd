"""What a worker tells of itself: metrics on a port of its own, and spans of its jobs and their stages."""
