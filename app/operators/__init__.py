"""What whoever runs the service may do beyond any tenant: at the command line (`app.admin`) and over HTTP."""
