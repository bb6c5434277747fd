"""The operator's command line, `anneal-admin`: one module a noun."""
