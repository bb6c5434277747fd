"""Exit codes: what scripts go by. They are stable; docs/cli.md tells them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from anneal_client.errors import AnnealError, ConnectionFailed, NotFound, Unauthorized, Unavailable


class Exit(IntEnum):
    OK = 0  # done; of a job: the promise is kept
    REFUSED = 1  # the service does not take it, or something is wrong with a file
    USAGE = 2  # a command or an option is wrong
    NOT_FASTER = 3  # nothing beats the original: it ships
    LIMITS_MISSED = 4  # a limit of the job is not kept
    FAILED = 5  # the job failed
    UNREACHABLE = 6  # no answer, or the service cannot now
    UNAUTHORIZED = 7  # no key, or a wrong one
    CANCELLED = 8  # the job was cancelled
    UNFINISHED = 9  # --timeout ran out before the job did
    INTERRUPTED = 130  # Ctrl-C


class Stop(Exception):
    """Ends the command: what is wrong, where, what to do about it, and how it exits."""

    def __init__(
        self, what: str, *, where: str | None = None, remedy: str | None = None, exit: Exit = Exit.REFUSED
    ) -> None:
        super().__init__(what)
        self.what, self.where, self.remedy, self.exit = what, where, remedy, exit
        self.code = exit.name.lower()

    @classmethod
    def of(cls, error: AnnealError, url: str) -> Stop:
        """The same for an error of the client."""
        stop = cls(error.detail, where=_where(error, url), remedy=error.remedy, exit=_exit(error))
        stop.code = error.code
        if isinstance(error, ConnectionFailed):
            stop.what = f"No answer from {url}: {error.detail}"
            stop.remedy = (
                "Start one with `anneal serve`, or say where it is with --url or $ANNEAL_URL; `anneal doctor` "
                "tells more."
            )
            if "WRONG_VERSION_NUMBER" in error.detail:
                stop.remedy = f"What answers there speaks no TLS: try {url.replace('https://', 'http://', 1)}."
        elif isinstance(error, Unauthorized):
            stop.remedy = (
                f"Give a valid key: `anneal login {url}`, or $ANNEAL_API_KEY. The operator makes keys. Where the "
                f"service has an identity provider: `anneal login {url} --oidc`."
            )
        elif isinstance(error, NotFound) and (stop.remedy is None or stop.remedy.startswith("GET /v1/")):
            stop.remedy = "`anneal jobs`, `anneal models`, `anneal datasets` and `anneal engines` list what is there."
        return stop

    def to_json(self) -> dict[str, Any]:
        told = {"code": self.code, "detail": self.what, "where": self.where, "remedy": self.remedy}
        return {"error": {k: v for k, v in told.items() if v is not None}, "exit_code": int(self.exit)}


def _exit(error: AnnealError) -> Exit:
    if isinstance(error, Unauthorized):
        return Exit.UNAUTHORIZED
    if isinstance(error, ConnectionFailed | Unavailable):
        return Exit.UNREACHABLE
    return Exit.REFUSED


def _where(error: AnnealError, url: str) -> str | None:
    problem = error.problem
    fields = [e for e in problem.get("errors") or () if isinstance(e, Mapping)]
    if fields:
        # What is wrong stands in the detail already, of the first of them at least.
        told = [(str(e.get("pointer", "")), str(e.get("message", ""))) for e in fields[:5]]
        return "; ".join(at if what in error.detail else f"{at}: {what}" for at, what in told)
    named = [f"{name} {problem[name]}" for name in ("stage", "node", "tensor") if problem.get(name)]
    if named:
        return ", ".join(named)
    return str(problem["instance"]) if problem.get("instance") else (None if error.status is None else url)


@dataclass(frozen=True)
class Verdict:
    """What became of a job: how the command exits, in a word and in a sentence."""

    exit: Exit
    word: str
    sentence: str


def verdict(job: Mapping[str, Any], report: Mapping[str, Any] | None) -> Verdict:
    """Of a job that has ended; `report`: its report, where there is one."""
    status, error = str(job.get("status")), job.get("error") or {}
    if status == "cancelled":
        return Verdict(Exit.CANCELLED, "cancelled", "The job was cancelled.")
    if status != "succeeded":
        missed = error.get("code") == "no_feasible_candidate"
        detail = str(error.get("detail") or f"The job is {status}.")
        return Verdict(Exit.LIMITS_MISSED if missed else Exit.FAILED, "limits missed" if missed else "failed", detail)
    report = report or {}
    if "targets" in report:
        return Verdict(Exit.OK, "compared", str(report.get("headline") or "The targets are compared."))
    missed_checks = [str(c.get("name")) for c in report.get("checks") or () if c.get("passed") is False]
    if (report.get("traffic") or {}).get("served") is False:
        missed_checks.append("the wanted rate of requests")
    if missed_checks:
        return Verdict(Exit.LIMITS_MISSED, "limits missed", f"Not kept: {', '.join(missed_checks)}.")
    if report.get("claim") is False:
        return Verdict(Exit.NOT_FASTER, "unproven", "The machine was too busy to prove a gain: none is claimed.")
    if report.get("picked") in (None, "baseline"):
        sentence = "Nothing beats the original by more than the noise: the original ships."
        return Verdict(Exit.NOT_FASTER, "not faster", sentence)
    return Verdict(Exit.OK, "promise kept", "Faster, and within every limit.")
