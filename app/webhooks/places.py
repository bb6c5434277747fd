"""Who has an attempt under way in this process, so that nobody has more than a share."""

from __future__ import annotations

import threading
from collections import Counter

from app.db.webhooks import WebhookDelivery
from app.webhooks.queue import Passed

PLACES = 16  # attempts at once, of one process
OF_A_TENANT = 4
OF_A_RECEIVER = 2
_REMEMBERED = 1000  # tenants, as to when each had its last turn


class FairPlaces:
    """Threads share it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken: dict[str, tuple[str, str]] = {}  # delivery → tenant, receiver
        self._freed = False
        self._turns: dict[str, int] = {}  # when each tenant had its last one, of those that had one of late
        self._turn = 0

    def full(self) -> Passed | None:
        """Whom there is no place for; None where there is none at all."""
        with self._changed:
            if len(self._taken) >= PLACES:
                return None
            tenants = Counter(tenant for tenant, _ in self._taken.values())
            receivers = Counter(receiver for _, receiver in self._taken.values())
            return Passed(
                [*self._taken],
                [tenant for tenant, count in tenants.items() if count >= OF_A_TENANT],
                [receiver for receiver, count in receivers.items() if count >= OF_A_RECEIVER],
            )

    def turn(self, tenants: list[str]) -> str | None:
        """Whose turn it is of those that wait, who has waited longest first."""
        with self._changed:
            held = Counter(tenant for tenant, _ in self._taken.values())
            return min(tenants, key=lambda tenant: (held[tenant], self._turns.get(tenant, 0)), default=None)

    def take(self, delivery: WebhookDelivery) -> None:
        with self._changed:
            self._turn += 1
            self._turns.pop(delivery.tenant_id, None)
            self._turns[delivery.tenant_id] = self._turn
            if len(self._turns) > _REMEMBERED:
                del self._turns[next(iter(self._turns))]
            self._taken[delivery.id] = (delivery.tenant_id, delivery.receiver)

    def leave(self, delivery: WebhookDelivery) -> None:
        with self._changed:
            del self._taken[delivery.id]
            self._freed = True
            self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Until a place becomes free, or has since the last time; at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._freed, seconds)
            self._freed = False
