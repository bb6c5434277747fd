"""What mends an error where who raised it says nothing more exact, by code: no error leaves a reader without a next
step. The whole list of codes is docs/errors.md."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_AGAIN_WHOLE = "Send it again, whole; a proxy in between may have changed it or cut it off."
_READYZ = "Try again; GET /readyz says what is missing."
_FIELDS = "Mend what is named; GET /openapi.json (in a browser: /docs) says what each field takes."
_NEW_UPLOAD = "Open a new one with POST /v1/uploads."
_PARTS = "PUT the parts that GET /v1/uploads/{id} tells of, each of `part_size` bytes but for the last one."

USUAL: Mapping[str, str] = MappingProxyType(
    {
        "background_died": "Restart the service; its log says why.",
        "bad_request": _AGAIN_WHOLE,
        "content_missing": "Try again; if it stays so, upload the file or run the job once more.",
        "cross_origin": "Ask from a page of this service, or from a program with an API key.",
        "database_unavailable": _READYZ,
        "headers_too_large": "Send fewer or shorter headers; cookies of others are often what is long.",
        "incomplete_body": _AGAIN_WHOLE,
        "inspection_interrupted": "Send it again.",
        "internal_error": "Try again; if it stays so, report it with this answer's X-Request-ID.",
        "invalid_dataset": "Write it anew: `numpy.savez(path, input=array)`, arrays named as the model's inputs.",
        "invalid_digest": "Send `Content-Digest: sha-256=:BASE64:`, or leave it out.",
        "invalid_model": "Export the model again, and see that `onnx.checker.check_model` takes it.",
        "invalid_multipart": "Send the file itself as the body, and its name as ?filename=.",
        "invalid_request": _FIELDS,
        "method_not_allowed": "Use a method that the Allow header names; GET /openapi.json lists all of them.",
        "no_worker": "Start one: `anneal serve` runs one beside the API, `python -m workers` one more.",
        "not_found": "GET /openapi.json (in a browser: /docs) lists what there is; the API is below /v1.",
        "not_migrated": "Run `python -m app migrate`.",
        "part_number_invalid": _PARTS,
        "part_size_mismatch": _PARTS,
        "process_ending": "Try again: another process answers, or this one is back soon.",
        "range_not_satisfiable": "Begin at byte 0.",
        "request_timeout": "Send it again, over a better connection.",
        "size_mismatch": "Send the file again, whole, or open an upload of the size that it has.",
        "storage_unavailable": _READYZ,
        "tenant_exists": "Take another name.",
        "too_large": "Send less, or ask the operator to raise the limit.",
        "too_many_connections": "Close some; wait with one long poll (?wait=30) for each job, not with several.",
        "too_many_streams": "Close some pages or streams of running jobs, or wait for some of them to end.",
        "unsupported_form": "Send it as the page's own form does; programs use /v1 with JSON.",
        "upload_closed": _NEW_UPLOAD,
        "upload_consumed": _NEW_UPLOAD,
        "upload_invalid": _NEW_UPLOAD,
        "webhook_deleted": "Make an endpoint anew with POST /v1/webhooks.",
    }
)
