"""The command line `anneal`: everything that the service offers, from a terminal or a script. See docs/cli.md."""

from anneal_client.cli.main import main

__all__ = ["main"]
