"""`anneal delete`: what is not needed any more, by its id."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from anneal_client import Client
from anneal_client.cli import values
from anneal_client.cli.context import Context
from anneal_client.cli.exits import Exit
from anneal_client.cli.screen import clean

_DELETE: Mapping[str, Callable[[Client, str], None]] = {
    "job": Client.delete_job,
    "eng": Client.delete_engine,
    "mdl": Client.delete_model,
    "dst": Client.delete_dataset,
}


def add(commands: Any) -> None:
    parser = commands.add_parser("delete", help="delete jobs that have ended, engines, models, data sets")
    parser.add_argument("ids", metavar="ID", nargs="+", type=values.any_id(*_DELETE))
    parser.add_argument("--with-engines", action="store_true", help="of a job: also what it delivered")
    parser.set_defaults(run=run)


def run(ctx: Context, args: argparse.Namespace) -> Exit:
    with ctx.service() as service:
        for given in args.ids:
            if args.with_engines and values.is_id("job", given):
                service.client.delete_job(given, engines=True)
            else:
                _DELETE[given.partition("_")[0]](service.client, given)
            ctx.say(f"  {clean(given)}  deleted")
    if ctx.json:
        ctx.emit({"deleted": args.ids})
    return Exit.OK
