"""No error of the API leaves its reader without what mends it."""

from __future__ import annotations

import ast

from app.errors import AppError, not_found
from app.remedies import USUAL
from tests.unit.test_errors_page import sources, told

_MAKERS = ("AppError", "conflict", "invalid_request", "invalid_model", "invalid_dataset")
_CODES = {"invalid_request": "invalid_request", "invalid_model": "invalid_model", "invalid_dataset": "invalid_dataset"}
# These take the place where `remedy` stands by position.
_POSITION = {"conflict": 2, "invalid_request": 2}


def unmended() -> set[str]:
    """Codes of errors that are raised without a remedy of their own."""
    found = set()
    for path in sources("app"):
        for call in ast.walk(ast.parse(path.read_text())):
            name = getattr(call.func, "id", "") if isinstance(call, ast.Call) else ""
            if not isinstance(call, ast.Call) or name not in _MAKERS or any(k.arg is None for k in call.keywords):
                continue
            if any(k.arg == "remedy" for k in call.keywords) or len(call.args) > _POSITION.get(name, 99):
                continue
            first = call.args[0] if call.args else None
            code = first.value if isinstance(first, ast.Constant) and name not in _CODES else _CODES.get(name)
            if isinstance(code, str):
                found.add(code)
    return found


def test_what_is_raised_without_a_remedy_has_a_usual_one() -> None:
    found = unmended()
    assert len(found) > 20
    assert found - set(USUAL) == set()


def test_usual_ones_are_of_codes_that_there_are() -> None:
    assert set(USUAL) - told() == set()
    for code, remedy in USUAL.items():
        assert AppError(code, "t", 400, "d").members()["remedy"] == remedy
    assert AppError("too_large", "t", 413, "d", remedy="Mine.").members()["remedy"] == "Mine."


def test_what_is_not_there_says_where_those_are_listed() -> None:
    assert not_found("engine", "eng_0").remedy == "GET /v1/engines lists those that there are."
    assert not_found("upload", "upl_0").remedy == USUAL["not_found"]
