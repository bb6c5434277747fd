"""`anneal webhooks`: who is told of job ends, what became of the messages, one sent again."""

from __future__ import annotations

import argparse
from typing import Any

from anneal_client import Client
from anneal_client.cli import figures, values
from anneal_client.cli.context import Context
from anneal_client.cli.exits import Exit
from anneal_client.cli.listing import limited, listed
from anneal_client.cli.screen import clean

Json = dict[str, Any]
EVENTS = ("job.succeeded", "job.failed", "job.cancelled")
STATES = ("pending", "delivered", "failed")


def add(commands: Any) -> None:
    parser = commands.add_parser("webhooks", help="list webhook endpoints; `webhooks add` makes one")
    limited(parser)
    parser.set_defaults(run=list_webhooks)
    below = commands.below(parser, "{add,test,rotate,remove,deliveries,redeliver}")
    new = below.add_parser("add", help="have a URL told of job ends; shows its secret, once")
    new.add_argument("address", metavar="URL")
    new.add_argument("--event", action="append", choices=EVENTS, help="of these only; may be given again (all)")
    new.add_argument("--description", default="", metavar="TEXT", help="what it is for")
    new.set_defaults(run=run_add)
    for name, help_text, run in (
        ("test", "have an endpoint sent a test", run_test),
        ("rotate", "give an endpoint a new secret; that of before signs for one more day", run_rotate),
        ("remove", "delete an endpoint; what waits for it is not sent", run_remove),
    ):
        one = below.add_parser(name, help=help_text)
        one.add_argument("webhook", metavar="WEBHOOK", type=values.identifier("whk", "webhook"))
        one.set_defaults(run=run)
    sent = below.add_parser("deliveries", help="list what was sent, or is to be")
    sent.add_argument("--status", choices=STATES)
    sent.add_argument("--webhook", metavar="ID", type=values.identifier("whk", "webhook"), help="to this endpoint only")
    sent.add_argument("--job", metavar="ID", type=values.job_id, help="of this job only")
    limited(sent)
    sent.set_defaults(run=list_deliveries)
    again = below.add_parser("redeliver", help="send a message once more, now")
    again.add_argument("delivery", metavar="DELIVERY", type=values.identifier("msg", "delivery", "webhooks deliveries"))
    again.set_defaults(run=run_redeliver)


def list_webhooks(ctx: Context, args: argparse.Namespace) -> Exit:
    head = ("Webhook", "State", "Told of", "Made", "URL")
    listed(ctx, args, Client.webhooks, head, lambda w: [
        str(w.get("id")), _state(w), ", ".join(map(str, w.get("events") or ("everything",))),
        figures.when(w.get("created_at")), str(w.get("url")),
    ])  # fmt: skip
    return Exit.OK


def _state(endpoint: Json) -> str:
    if not endpoint.get("enabled"):
        return "disabled"
    return "failing" if endpoint.get("failing_since") else "enabled"


def run_add(ctx: Context, args: argparse.Namespace) -> Exit:
    with ctx.service() as service:
        made = dict(service.client.create_webhook(args.address, events=args.event, description=args.description))
    _show_secret(ctx, made)
    return Exit.OK


def run_rotate(ctx: Context, args: argparse.Namespace) -> Exit:
    with ctx.service() as service:
        made = dict(service.client.rotate_webhook_secret(args.webhook))
    _show_secret(ctx, made)
    return Exit.OK


def _show_secret(ctx: Context, endpoint: Json) -> None:
    if ctx.json:
        ctx.emit(endpoint)
        return
    ctx.say(f"  {clean(endpoint.get('id'))}")
    # Also with --quiet: it cannot be asked for again.
    ctx.screen.line(f"  {clean(endpoint.get('secret'))}")
    ctx.say("  Keep the secret: it is shown this once. The receiver verifies with it.")


def run_test(ctx: Context, args: argparse.Namespace) -> Exit:
    with ctx.service() as service:
        sent = dict(service.client.test_webhook(args.webhook))
    return _show_delivery(ctx, sent)


def run_redeliver(ctx: Context, args: argparse.Namespace) -> Exit:
    with ctx.service() as service:
        sent = dict(service.client.redeliver(args.delivery))
    return _show_delivery(ctx, sent)


def _show_delivery(ctx: Context, sent: Json) -> Exit:
    if ctx.json:
        ctx.emit(sent)
    else:
        ctx.say(
            f"  {clean(sent.get('id'))}  {clean(sent.get('status'))}: `anneal webhooks deliveries` tells how it went"
        )
    return Exit.OK


def run_remove(ctx: Context, args: argparse.Namespace) -> Exit:
    with ctx.service() as service:
        service.client.delete_webhook(args.webhook)
    if ctx.json:
        ctx.emit({"id": args.webhook})
    else:
        ctx.say(f"  {args.webhook} is gone")
    return Exit.OK


def list_deliveries(ctx: Context, args: argparse.Namespace) -> Exit:
    head = ("Delivery", "Event", "Status", "Attempts", "Last answer", "Happened", "Job", "URL")
    filters = {"webhook_id": args.webhook, "job_id": args.job, "status": args.status}
    listed(ctx, args, lambda client: client.deliveries(**filters), head, lambda d: [
        str(d.get("id")), str(d.get("event")), str(d.get("status")), str(d.get("attempts")),
        str(d.get("last_error") or d.get("last_status") or figures.DASH), figures.when(d.get("created_at")),
        str(d.get("job_id") or figures.DASH), str(d.get("url")),
    ])  # fmt: skip
    return Exit.OK
