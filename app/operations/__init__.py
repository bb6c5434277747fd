"""What operators see of the service: its state as the database tells it, metrics, spans."""
