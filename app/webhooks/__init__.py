"""Endpoints that tenants have told of job ends, and deliveries: to these, and to the URL that a job names."""
