"""The command line without a service: options at their limits, figures, tables, what reports and events become."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from anneal_client import Event
from anneal_client.cli import figures, logins, reading, serving, values
from anneal_client.cli.exits import Exit, Stop, verdict
from anneal_client.cli.live import Live
from anneal_client.cli.main import main, make_parser
from anneal_client.cli.screen import Screen, clean, cut, width
from anneal_client.cli.submitting import spec_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def nobody_s_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ANNEAL_URL", "ANNEAL_API_KEY", "NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ANNEAL_CONFIG_DIR", str(tmp_path / "config"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(out: io.StringIO, **environment: str) -> Screen:
    return Screen(out, {"TERM": "xterm", **environment})


# Options


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (values.percent, "1%", 1.0),
        (values.percent, "0.5 %", 0.5),
        (values.percent, "0", 0.0),
        (values.percent, "100%", 100.0),
        (values.milliseconds, "20ms", 20.0),
        (values.milliseconds, "500us", 0.5),
        (values.milliseconds, "1.5s", 1500.0),
        (values.milliseconds, "20", 20.0),
        (values.budget, "15m", 900.0),
        (values.budget, "10s", 10.0),
        (values.budget, "24h", 86_400.0),
        (values.megabytes, "1.5GB", 1500.0),
        (values.megabytes, "80", 80.0),
        (values.per_second, "400/s", 400.0),
        (values.batches, "1,8,32", [1, 8, 32]),
        (values.target, "cpu", {"device": "cpu"}),
        (values.target, "8.9", {"compute_capability": "8.9"}),
        (values.target, "cpu-amd-epyc-2c", {"hardware": "cpu-amd-epyc-2c"}),
        (values.shape, "x=1x3", ("x", {"min": [1, 3], "opt": [1, 3], "max": [1, 3]})),
        (values.shape, "a=b=1x3:8x3:32x3", ("a=b", {"min": [1, 3], "opt": [8, 3], "max": [32, 3]})),
    ],
)
def test_values(read: Callable[[str], Any], text: str, value: Any) -> None:
    assert read(text) == value


OF_OPTIMIZE: list[tuple[str, list[str]]] = [
    ("--max-loss", ["-1%", "101%", "1kg", "", "nan", "1e999%"]),
    ("--confidence", ["50%", "100%", "x"]),
    ("--p99", ["0ms", "-1ms", "20 parsecs", "inf"]),
    ("--throughput", ["0", "fast"]),
    ("--max-memory", ["0MB", "1 lot"]),
    ("--budget", ["9s", "25h", "0", "soon"]),
    ("--min-seconds", ["0.05s", "601s"]),
    ("--batch", ["0", "4097", "1,1", "1,,8", "1.5", ",".join(map(str, range(1, 18)))]),
    ("--precision", ["fp33", "int8,int8", ""]),
    ("--shape", ["x", "x=", "=1x3", "x=0x3", "x=1x3:2x3", "x=2x3:1x3:4x3", "x=1x3:1:1x3"]),
    ("--on", ["a b", "", "\x1b[31m", "../x"]),
    ("--objective", ["speed"]),
    ("--price", ["0", "-1", "1e9"]),
    ("--spec", ["/nowhere/spec.json"]),
    ("--timeout", ["0s"]),
]


@pytest.mark.parametrize(("option", "wrong"), OF_OPTIMIZE)
def test_an_option_beyond_its_limits_says_what_where_and_the_remedy(
    option: str, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for value in wrong:
        assert main(["optimize", "model.onnx", f"{option}={value}"]) == Exit.USAGE, value
        told = capsys.readouterr()
        assert option in told.err, "where"
        assert "remedy:  `anneal optimize --help`" in told.err
        assert "Traceback" not in told.err
        assert "\x1b" not in told.err
        assert told.out == ""


OF_OTHERS: list[tuple[list[str], str, list[str]]] = [
    (["jobs"], "--limit", ["0", "-1", "100001", "many", "1.5"]),
    (["jobs"], "--status", ["done", ""]),
    (["jobs"], "--model", ["job_1", "mdl_", "mdl_../x", "\x1b[31m"]),
    (["models"], "--limit", ["0"]),
    (["datasets"], "--limit", ["0"]),
    (["engines"], "--limit", ["0"]),
    (["engines", "pull", "eng_1"], "--kind", ["zip", ""]),
    (["watch", "job_1"], "--timeout", ["0s", "-1s", "never", "inf", "nan"]),
    (["bench", "bundle.zip"], "--batch", ["0", "4097", "1,1"]),
    (["bench", "bundle.zip"], "--seconds", ["0.05s", "601s", "long"]),
    (["bench", "bundle.zip"], "--input", ["/nowhere/x.npz"]),
    (["serve"], "--port", ["0", "65536", "http"]),
    (["serve"], "--with", ["", "torch,torch"]),
    (["optimize", "m.onnx"], "--backend", ["", "a,,b", "a,a"]),
    (["optimize", "m.onnx"], "--max-size", ["0MB", "-1MB", "1 lot", "inf"]),
    (["optimize", "m.onnx"], "--idempotency-key", ["", "ü", "a\nb", "x" * 256]),
]


@pytest.mark.parametrize(("command", "option", "wrong"), OF_OTHERS, ids=lambda value: str(value)[:40])
def test_options_of_every_command_have_limits(
    command: list[str], option: str, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for value in wrong:
        assert main([*command, f"{option}={value}"]) == Exit.USAGE, value
        told = capsys.readouterr()
        assert option in told.err
        assert "remedy:" in told.err
        assert "Traceback" not in told.err
        assert "\x1b" not in told.err


def test_every_option_with_limits_refuses_what_no_limit_admits(capsys: pytest.CaptureFixture[str]) -> None:
    def walk(parser: argparse.ArgumentParser, path: list[str]) -> Iterator[tuple[list[str], argparse.Action]]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, child in action.choices.items():
                    yield from walk(child, [*path, name])
            elif action.option_strings and (action.choices or action.type not in (None, Path)):
                yield path, action

    found = list(walk(make_parser(), []))
    assert len(found) > 30
    for path, action in found:
        option = action.option_strings[-1]
        wrong = "" if action.type is values.names else "\x1b[31m"
        assert main([*path, f"{option}={wrong}"]) == Exit.USAGE, (path, option)
        told = capsys.readouterr().err
        assert option in told
        assert "\x1b" not in told


@pytest.mark.parametrize(
    ("typed", "where", "meant"),
    [
        ("optmize model.onnx", "anneal", "did you mean optimize?"),
        ("optimize model.onnx --maxloss 1%", "anneal optimize", "did you mean --max-loss?"),
        ("engines pul job_1", "anneal engines", "did you mean pull?"),
        ("engines pull job_1 --unpak", "anneal engines pull", "did you mean --unpack?"),
        ("jobs --status runing", "anneal jobs", "did you mean running?"),
        ("job job_1 job_2", "anneal job", "It takes no further job_2."),
        ("jobs --zzz", "anneal jobs", "There is no option --zzz"),
    ],
)
def test_a_typo_is_told_what_may_have_been_meant(
    typed: str, where: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(typed.split()) == Exit.USAGE
    told = capsys.readouterr().err
    assert meant in told
    assert f"where:   {where}\n" in told
    assert f"`{where} --help`" in told


def test_what_is_none_of_these_is_told_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "bundle.zip"
    text.write_text("no archive")
    for arguments, exit, words in (
        (["bench", str(text)], Exit.REFUSED, "neither a .zip nor a .tar."),
        (["engines", "pull", "mdl_1"], Exit.USAGE, "is no id of a job or an engine"),
    ):
        assert main(arguments) == exit
        told = capsys.readouterr().err
        assert words in told
        assert "ReadError" not in told


def test_what_fails_while_logging_in_is_told_of_that_address(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ANNEAL_URL", "http://127.0.0.1:2")
    monkeypatch.setenv("ANNEAL_CONFIG_DIR", str(tmp_path))
    assert main(["login", "http://127.0.0.1:1"]) == Exit.UNREACHABLE
    told = capsys.readouterr().err
    assert "http://127.0.0.1:1" in told
    assert "http://127.0.0.1:2" not in told


def test_a_file_that_is_missing_is_told_before_anything_is_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(b"")
    for option in ("--data", "--calibration", "--validation"):
        assert main(["--url", "http://127.0.0.1:9", "optimize", str(model), option, "none.npz"]) == Exit.USAGE
        assert option in capsys.readouterr().err


@pytest.mark.parametrize("key", ["ank_ü", "two words", "a\nb"])
def test_a_key_that_is_none_is_told_before_anything_is_sent(
    key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANNEAL_API_KEY", key)
    for command in (["jobs"], ["doctor"]):
        assert main(["--url", "http://127.0.0.1:9", *command]) == Exit.UNAUTHORIZED
        told = capsys.readouterr()
        assert "characters that no key has" in told.out + told.err
        assert key not in told.out + told.err


def test_what_cannot_go_together_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "spec.json"
    for text in ("{", "[1]", "\x00"):
        spec.write_text(text)
        assert main(["optimize", "m.onnx", "--spec", str(spec)]) == Exit.USAGE
        assert "docs/api.md" in capsys.readouterr().err
    for arguments, word in (
        (["optimize", "m.onnx", "--data", "a.npz", "--validation", "b.npz"], "--data"),
        (["optimize", "m.onnx", "--timeout", "5m"], "--watch"),
        (["optimize", "m.onnx", "--out", "x.zip"], "--watch"),
        (["job", "eng_1"], "job_"),
        (["optimise"], "optimize"),
        (["engines", "pull"], "ENGINE"),
        (["--url", "ftp://x", "jobs"], "https://"),
        (["--url", "http://", "jobs"], "--url"),
    ):
        assert main(arguments) == Exit.USAGE, arguments
        assert word in capsys.readouterr().err
    assert main([]) == Exit.USAGE
    assert "COMMAND" in capsys.readouterr().out
    assert main(["optimize", "m.onnx", "--max-loss", "x", "--json"]) == Exit.USAGE
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == 2
    assert set(told["error"]) == {"code", "detail", "where", "remedy"}


def test_a_service_that_is_down(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anneal_client.transport.MAX_PAUSE_S", 0.05)
    nowhere = "http://127.0.0.1:9"
    about = [[verb, "job_1"] for verb in ("job", "report", "cancel", "delete")]
    for command in (["jobs"], ["capabilities"], *about):
        assert main(["--url", nowhere, *command]) == Exit.UNREACHABLE
        told = capsys.readouterr().err
        assert nowhere in told
        assert "anneal serve" in told
    assert main(["--url", nowhere, "doctor", "--json"]) == Exit.UNREACHABLE
    checks = {line["check"]: line for line in json.loads(capsys.readouterr().out)["checks"]}
    assert (checks["address"]["ok"], checks["service"]["ok"]) == (True, False)
    assert "anneal serve" in checks["service"]["remedy"]


ANSWERS = {
    "/empty": (200, {"Content-Type": "application/json"}, b"{}"),
    "/list": (200, {"Content-Type": "application/json"}, b"[1]"),
    "/page": (200, {"Content-Type": "text/html"}, b"<html>a proxy \x1b[2J</html>"),
    "/refused": (403, {"Content-Type": "text/plain"}, b"go away \x1b[2J"),
    "/round": (302, {"Location": "/round/v1/jobs"}, b""),
    "/zip": (200, {"Content-Encoding": "gzip", "Content-Type": "application/json"}, b"no gzip"),
}


@pytest.fixture
def something_else() -> Iterator[str]:
    """A server that is no service of ours."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = ANSWERS["/" + self.path.split("/")[1]]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("path", ANSWERS)
def test_an_address_where_something_else_answers(
    something_else: str, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["jobs"], ["job", "job_1"], ["compare", "job_1"], ["report", "job_1", "--json"], ["doctor"]):
        code = main(["--url", something_else + path, *command])
        told = capsys.readouterr()
        assert code in (*((Exit.OK,) if path == "/empty" else ()), Exit.REFUSED, Exit.UNREACHABLE, Exit.UNAUTHORIZED)
        assert "Traceback" not in told.out + told.err
        assert "\x1b" not in told.out + told.err


def test_options_become_the_spec(tmp_path: Path) -> None:
    more = tmp_path / "spec.json"
    more.write_text(
        '{"search": {"strategy": "exhaustive"}, "validation": {"max_samples": 9, "strict": false}, '
        '"quantization": {"win_back": false, "training": {"epochs": 3}}}'
    )
    arguments = (
        "optimize m.onnx --max-loss 1% --p99 20ms --objective latency --on cpu --batch 1,8 --budget 2m --strict "
        "--confidence 99% --precision fp32,int8 --backend onnxruntime --max-size 20MB --shape x=1x4:8x4:16x4 "
        f"--train auto --spec {more}"
    )
    assert spec_of(make_parser().parse_args(arguments.split())) == {
        "search": {"strategy": "exhaustive"},
        "validation": {"max_samples": 9, "max_accuracy_loss_percent": 1.0, "confidence": 0.99, "strict": True},
        "constraints": {"p99_latency_ms": 20.0, "max_size_mb": 20.0},
        "target": {"device": "cpu", "backends": ["onnxruntime"]},
        "benchmark": {"batch_sizes": [1, 8]},
        "shapes": {"x": {"min": [1, 4], "opt": [8, 4], "max": [16, 4]}},
        "objective": "latency",
        "precisions": ["fp32", "int8"],
        "budget_seconds": 120,
        "quantization": {"win_back": False, "training": {"epochs": 3, "mode": "auto"}},
    }
    assert spec_of(make_parser().parse_args(["optimize", "m.onnx"])) == {}, "every default is the service's"


# Figures and tables


def test_figures_are_for_people() -> None:
    assert figures.number(17260.0) == "17 260"
    assert figures.number(532) == "532"
    assert figures.number(0.00001234) == "0.0000123"
    assert "e" not in figures.number(1.7e12) + figures.number(1e-7)
    assert [figures.number(x) for x in (None, True, float("nan"), "x", 0)] == ["–", "–", "–", "–", "0"]
    assert figures.percent(0.7245) == "0.72 %"
    assert figures.speedup({"ratio": 2.14, "low": 2.07, "high": 2.2895}) == "2.14x [2.07, 2.29]"
    assert figures.speedup({"ratio": 1.0, "low": None, "high": None}) == "1.00x"
    assert figures.size(555_000) == "555 kB"
    assert figures.duration(3725) == "1 h 02 min"
    assert figures.bar(float("nan")) == "░" * 20


def test_names_cannot_give_orders_to_a_terminal() -> None:
    evil = "a\x1b]0;title\x07\x1b[2J\r\nb\x9b31m\u202eexe\u2028\ud800<script>"
    shown = clean(evil)
    assert shown.isprintable()
    assert "\\x1b]0;title\\x07" in shown
    assert "<script>" in shown, "a terminal knows no markup"
    out = io.StringIO()
    screen(out).table(("Name", "Size"), [[evil, "1"]])
    assert all(line.isprintable() for line in out.getvalue().splitlines())


def test_tables_are_aligned_whatever_the_script() -> None:
    out = io.StringIO()
    screen(out).table(("Name", "p50"), [["模型", "1.5 ms"], ["e\u0301tude", "12 ms"]])
    assert {width(line.rstrip()) for line in out.getvalue().splitlines()} == {2 + 5 + 2 + 6}
    assert cut("abcdef", 4) == "abc…"
    assert width(cut("模型模型", 5)) <= 5


def test_escape_codes_go_to_terminals_only() -> None:
    pipe, terminal, plain, dumb = io.StringIO(), Terminal(), Terminal(), Terminal()
    for out, shown in (
        (pipe, screen(pipe)),
        (terminal, screen(terminal)),
        (plain, screen(plain, NO_COLOR="1")),
        (dumb, Screen(dumb, {"TERM": "dumb"})),
    ):
        shown.line(shown.paint("text", "bold"))
        shown.draw(["one", "two"])
        shown.draw(["three"])
        shown.line("end")
        assert out.getvalue().endswith("end\n")
    assert pipe.getvalue() == dumb.getvalue() == "text\nend\n"
    assert "\x1b[1mtext\x1b[0m" in terminal.getvalue()
    assert "\x1b[2A\r\x1b[J" in terminal.getvalue(), "two lines up"
    assert "\x1b[1m" not in plain.getvalue()
    assert not screen(Terminal(), CI="true").live, "a log is nothing to draw on"


# A job's events


def _speed(ratio: float) -> dict[str, float]:
    return {"ratio": ratio, "low": ratio - 0.1, "high": ratio + 0.1}


def _candidate(name: str, standing: str, ratio: float | None, **more: Any) -> dict[str, Any]:
    told = {"candidate": name, "name": f"the {name}", "backend": "b", "precision": "int8", "standing": standing}
    return {**told, "speedup": None if ratio is None else _speed(ratio), "loss_percent": None, "reason": None, **more}


TIMED = [_candidate("a", "screened", 1.5), _candidate("b", "screened", 2.5)]
DROPPED = [_candidate("b", "refused", 2.5, reason="loses 3 %", loss_percent=3.0)]
EVENTS = [
    Event("state", {"status": "queued"}),
    Event("state", {"status": "running"}),
    Event("stage", {"stage": "export", "status": "running", "progress": 0.02}),
    Event("candidates", {"candidates": [_candidate("a", "proposed", None), _candidate("b", "proposed", None)]}),
    Event("progress", {"stage": "benchmark", "candidate": "a", "progress": 0.4, "message": "round 2 \x1b[2J"}),
    Event("candidates", {"leader": "b", "candidates": TIMED}),
    Event("candidates", {"leader": "a", "candidates": DROPPED}),
    Event("note", {"message": "the trial run\ntells nothing"}),
    Event("state", {"status": "succeeded"}),
]  # fmt: skip


def test_what_is_tried_and_what_leads_is_told_line_by_line_in_a_pipe() -> None:
    out = io.StringIO()
    live = Live(screen(out), "job_1")
    for event in EVENTS:
        live(event)
    text = out.getvalue()
    assert "\x1b" not in text
    told = [line.split(" s  ", 1)[-1].strip() for line in text.splitlines()]
    assert told == [
        "queued",
        "running",
        "the a: timed 1.50x [1.40, 1.60]",
        "the b: timed 2.50x [2.40, 2.60]",
        "leads: the b",
        "the b: dropped 2.50x [2.40, 2.60], loss 3.00 % (loses 3 %)",
        "leads: the a",
        "i the trial run\\ntells nothing",
        "succeeded",
    ]


def test_on_a_terminal_it_is_drawn_again_with_the_leader_first() -> None:
    out = Terminal()
    shown = screen(out)
    live = Live(shown, "job_1")
    for event in EVENTS[:6]:
        live(event)
    lines = live.lines()
    assert "40 %" in lines[0]
    assert "\x1b[2J" not in "".join(lines), "no message gives orders"
    rows = [line for line in lines if "the " in line]
    assert "▶ the b" in rows[0]
    assert "the a" in rows[1]
    for event in EVENTS[6:]:
        live(event)
    assert "░" not in out.getvalue().rpartition("\x1b[J")[2], "at the end the block is gone"


# Verdicts and reports


def test_exit_codes_of_ended_jobs() -> None:
    done = {"status": "succeeded"}
    fine = {"picked": "a", "claim": True, "checks": [{"name": "p99_latency_ms", "passed": True}]}
    for job, report, code in (
        (done, fine, 0),
        (done, {**fine, "picked": "baseline"}, 3),
        (done, {**fine, "claim": False}, 3),
        (done, {**fine, "checks": [{"name": "size_mb", "passed": False}]}, 4),
        (done, {**fine, "traffic": {"served": False}}, 4),
        (done, {"targets": [], "headline": "x"}, 0),
        ({"status": "failed", "error": {"code": "no_feasible_candidate", "detail": "p99"}}, None, 4),
        ({"status": "failed", "error": {"code": "out_of_memory", "detail": "m"}}, None, 5),
        ({"status": "cancelled"}, None, 8),
    ):
        assert verdict(job, report).exit == code, (job, report)


REPORT: dict[str, Any] = {
    "analysis": {"model": "net|<b>", "hardware": "AMD EPYC", "original_size_mb": 0.555, "original_latency_ms": 0.237},
    "final_metrics": {
        "latency_ms": 0.111, "throughput_qps": 8641.0, "accuracy_loss_percent": 0.7245, "memory_mb": 75.4,
        "speedup": "2.1x", "batch_size": 1, "size_mb": 0.153, "accuracy_metric": "top1", "accuracy_samples": 532,
        "accuracy_verdict_reason": "proven: at most 0.9 % at 95 %",
    },
    "deployment_config": {"precision": "int8"},
    "baseline": {"id": "baseline", "precision": "fp32", "size_mb": 0.555, "batches": {"1": {"p50_ms": 0.237}}},
    "candidates": [
        {"id": "q", "name": "static int8", "precision": "int8", "status": "picked", "reason": "the fastest",
         "batches": {"1": {"p50_ms": 0.111, "speedup": _speed(2.14)}}, "accuracy": {"loss_percent": 0.7245},
         "size_mb": 0.153},
        {"id": "f", "name": "fp32\x1b[31m", "precision": "fp32", "status": "dropped", "reason": "slower"},
    ],
    "picked": "q",
    "checks": [{"name": "accuracy_loss_percent", "value": 0.7245, "limit": 1.0, "passed": True, "proven": True},
               {"name": "p99_latency_ms", "value": 0.19, "limit": 0.1, "passed": False}],
    "skipped": [{"name": "int4", "reason": "no weights are large enough"}],
    "optimizations_applied": [{"name": "quantization", "impact": "48 % latency reduction"}],
    "recommendations": ["Raise the budget."],
    "warnings": ["The model is random."],
}  # fmt: skip


def test_a_report_reads_well() -> None:
    out = io.StringIO()
    reading.show_report(screen(out), REPORT)
    text = out.getvalue()
    assert "2.14x [2.04, 2.24] as fast: p50 0.111 ms, was 0.237 ms, at batch size 1 in int8" in text
    assert "accuracy loss 0.72 % of top1, on 532 samples; proven" in text
    assert "kept, proven" in text
    assert "NOT KEPT" in text
    assert "fp32\\x1b[31m: slower" in text
    for word in ("Raise the budget.", "48 % latency", "not tried: int4", "The model is random.", "ships", "original"):
        assert word in text
    assert "{" not in text.replace("{}", ""), "no dictionary is prose"


def test_a_report_as_markdown_holds_no_markup_of_others() -> None:
    text = reading.markdown(REPORT)
    assert "net\\|\\<b\\>" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table[:5]}) == 1
    assert "| ---: |" in table[1] or "---:" in table[1]
    reading.markdown({"targets": [{"hardware": "a", "per_million_requests": 1.5}]})


def test_reports_with_nothing_in_them_are_no_reason_to_fall() -> None:
    out = io.StringIO()
    for report in ({}, {"candidates": None, "final_metrics": None, "checks": [{}], "baseline": {}}, {"targets": []}):
        reading.show_report(screen(out), report)
        reading.markdown(report)


# Logins


def test_a_key_is_for_its_own_address_and_nobody_else_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    path = logins.keep("https://anneal.example", "ank_secret")
    assert path.stat().st_mode & 0o077 == 0
    assert (logins.find(None).url, logins.find(None).key) == ("https://anneal.example", "ank_secret")
    assert logins.find("https://other.example").key is None
    assert logins.find("localhost:9000").url == "http://localhost:9000"
    monkeypatch.setenv("ANNEAL_URL", "http://127.0.0.1:1/")
    assert logins.find(None).url == "http://127.0.0.1:1"
    monkeypatch.setenv("ANNEAL_API_KEY", "ank_env\n")
    assert logins.find(None).key == "ank_env"
    assert logins.forget("https://anneal.example")
    assert not logins.forget("https://anneal.example")
    path.write_text("{")
    with pytest.raises(Stop) as caught:
        logins.find("http://x")
    assert caught.value.where == str(path)


# Completions


def test_bash_completes_commands_options_and_their_values() -> None:
    script = """
eval "$(cat)"
try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _anneal; echo "${COMPREPLY[*]}"; }
try anneal op
try anneal optimize --max-l
try anneal optimize --objective ""
try anneal engines pu
try anneal engines pull --ki
try anneal engines pull --kind t
try anneal completions f
"""
    made = _completions("bash")
    done = subprocess.run(["bash", "-c", script], input=made, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "optimize", "--max-loss", "latency throughput cost", "pull", "--kind", "triton", "fish",
    ]  # fmt: skip
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_every_command_and_read_what_they_get(shell: str) -> None:
    made = _completions(shell)
    for word in ("optimize", "max-loss", "completions", "pull"):
        assert word in made
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=made, text=True, check=True)


def _completions(shell: str) -> str:
    command = [sys.executable, "-m", "anneal_client.cli", "completions", shell]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# Serving


def test_what_an_extra_takes_is_read_off_the_installed_service(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [
        "alembic>=1",
        'anneal[worker]; extra == "cpu"',
        'onnxruntime<2,>=1.24; extra == "cpu"',
        'numpy>=2; extra == "worker"',
        'pycuda; sys_platform == "linux" and extra == "gpu"',
        'rtx; (sys_platform == "linux" and platform_machine == "x86_64") and extra == "gpu"',
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: told)
    assert serving.requirements_of("cpu") == ["numpy>=2", "onnxruntime<2,>=1.24"]
    assert serving.requirements_of("gpu") == [
        'pycuda; sys_platform == "linux"',
        'rtx; (sys_platform == "linux" and platform_machine == "x86_64")',
    ]
    with pytest.raises(Stop, match="no extra 'torhc'") as caught:
        serving.requirements_of("torhc")
    assert caught.value.remedy == "There are cpu, gpu, worker."


def test_serve_without_the_service_says_what_to_install(tmp_path: Path) -> None:
    """In an environment with the client and what it stands on alone."""
    import httpx

    site = Path(httpx.__file__).parents[1]
    names = ("httpx", "httpcore", "h11", "anyio", "idna", "certifi", "sniffio", "typing_extensions.py")
    for name in names:
        if (site / name).exists():
            (tmp_path / name).symlink_to(site / name)
    (tmp_path / "anneal_client").symlink_to(ROOT / "clients" / "python" / "anneal_client")
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-S", "-P", "-m", "anneal_client.cli", "serve"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == Exit.REFUSED, done.stderr
    assert "pip install" in done.stderr
    assert "anneal[cpu,openvino]" in done.stderr


def test_every_option_has_help() -> None:
    def walk(parser: argparse.ArgumentParser) -> None:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for child in action.choices.values():
                    walk(child)
            elif action.option_strings and action.choices is None:
                assert action.help, (parser.prog, action.option_strings)
        parser.format_help()

    walk(make_parser())
