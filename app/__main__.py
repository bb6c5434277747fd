"""The command line: `python -m app serve | api | migrate | create-key | revoke-key | openapi`; what else an operator
does is `anneal-admin` (`app.admin`)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from app.settings import load_settings


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m app", description="Anneal: inference optimization as a service.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="migrate, then run the API and one worker until Ctrl-C (the embedded default)")
    commands.add_parser("api", help="run the API alone")
    commands.add_parser("migrate", help="bring the database to the newest schema")
    key = commands.add_parser("create-key", help="make an API key and print it, once")
    key.add_argument("--tenant", required=True, help="the tenant's name; made where it does not exist")
    key.add_argument("--name", default="default", help="what the key is for")
    revoked = commands.add_parser("revoke-key", help="revoke an API key")
    revoked.add_argument("key", help="the key, or its id, which create-key prints too")
    commands.add_parser("openapi", help="print the OpenAPI document")
    arguments = parser.parse_args(argv)
    run = {
        "serve": _serve,
        "api": _api,
        "migrate": _migrate,
        "create-key": _create_key,
        "revoke-key": _revoke_key,
        "openapi": _openapi,
    }[arguments.command]
    return run(arguments)


def _serve(_: argparse.Namespace) -> int:
    from app.supervisor import serve

    return serve(load_settings())


def _api(_: argparse.Namespace) -> int:
    from app.supervisor import run_api

    return run_api(load_settings())


def _migrate(_: argparse.Namespace) -> int:
    from app.db.migrate import upgrade
    from app.errors import AppError

    try:
        upgrade(load_settings().database)
    except AppError as error:
        sys.stderr.write(f"{error.detail} {error.remedy or ''}\n")
        return 1
    return 0


def _create_key(arguments: argparse.Namespace) -> int:
    from app.db.base import make_engine
    from app.db.uow import Database
    from app.tenants import create_key, key_id

    db = Database(make_engine(load_settings().database))
    try:
        key = create_key(db, arguments.tenant, arguments.name)
        sys.stdout.write(key + "\n")
        sys.stderr.write(f"Its id, for revoke-key: {key_id(db, key)}\n")
    finally:
        db.close()
    return 0


def _revoke_key(arguments: argparse.Namespace) -> int:
    from app.db.base import make_engine
    from app.db.uow import Database
    from app.tenants import revoke_key

    db = Database(make_engine(load_settings().database))
    try:
        revoked = revoke_key(db, arguments.key)
    finally:
        db.close()
    sys.stderr.write("Revoked.\n" if revoked else "There is no such live key.\n")
    return 0 if revoked else 1


def _openapi(_: argparse.Namespace) -> int:
    from app.main import create_app

    sys.stdout.write(json.dumps(create_app().openapi(), indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
