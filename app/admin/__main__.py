"""`anneal-admin NOUN VERB …`, or `python -m app.admin`: what an operator does beside the API, on the same database."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextvars import copy_context
from importlib import import_module

from sqlalchemy.exc import SQLAlchemyError

from app.admin.desk import Desk
from app.audit import acting
from app.errors import AppError
from app.logging import configure_logging
from app.settings import load_settings

# Each is a module of this package with `HELP` and `add(parser)`, which sets `run` to a function of the arguments and
# the desk that returns an exit code.
NOUNS = ("audit", "doctor", "jobs", "keys", "plans", "retention", "sessions", "tenants", "workers")


def parser() -> argparse.ArgumentParser:
    """Every noun with its verbs."""
    found = argparse.ArgumentParser(prog="anneal-admin", description="Operate Anneal: settings as of the service.")
    found.add_argument("--json", action="store_true", help="answer in JSON, a document a line")
    nouns = found.add_subparsers(dest="noun", required=True, metavar="NOUN")
    for name in NOUNS:
        module = import_module(f"app.admin.{name}")
        module.add(nouns.add_parser(name, help=module.HELP, description=module.HELP))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: refused, or nothing there to do it to; 2: the arguments make no sense; 3: the database is away."""
    arguments, settings = parser().parse_args(argv), load_settings()
    # Answers are on stdout, and nothing else.
    configure_logging(json=not sys.stderr.isatty(), level="WARNING")
    with Desk(settings, json=arguments.json) as desk:
        context = copy_context()
        context.run(acting, desk.actor)
        try:
            return int(context.run(arguments.run, arguments, desk))
        except AppError as error:
            desk.complain(f"{error.detail}{f' {error.remedy}' if error.remedy else ''}")
            return 1
        except SQLAlchemyError as error:
            desk.complain(f"The database cannot be used ({type(error).__name__}): {str(error).splitlines()[0][:300]}")
            return 3


if __name__ == "__main__":
    sys.exit(main())
