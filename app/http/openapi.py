"""The OpenAPI document: FastAPI's, with the error schema of this service."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app.domain.roles import Role, needed_by
from app.http.problem import Problem

DESCRIPTION = """Inference optimization as a service: upload a trained model, get back an engine that was measured to
be faster, with the evidence. Errors are `application/problem+json` (RFC 9457)."""

NEEDED = "x-needed-role"  # of an operation, on its way to its `security`
_OPERATORS = "/v1/operator/"

_API_KEY = {
    "type": "http",
    "scheme": "bearer",
    "description": "`ank_…`, made by the operator or an admin of the tenant. Not needed where the service listens on "
    "loopback without keys. Each operation names the role that its key must have: `read` looks and downloads; "
    "`submit` may do so too, upload, run, cancel and delete; `admin` may do all of it, and has the tenant's keys and "
    "audit rows; `operator`, whose keys only `anneal-admin` makes, runs the service.",
}
_ACCESS_TOKEN = {
    "type": "http",
    "scheme": "bearer",
    "bearerFormat": "JWT",
    "description": "An access token of the identity provider, where the operator has set one (`OIDC_ISSUER`): signed, "
    "for this service's audience, with claims that name a tenant and a role. The roles are those of keys.",
}


def describe(app: FastAPI) -> None:
    """Make `app.openapi()` answer the document of this service; it is built once."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title,
                version=app.version,
                description=DESCRIPTION,
                routes=app.routes,
                webhooks=app.webhooks.routes,
            )
            document.setdefault("components", {})["securitySchemes"] = {
                "ApiKey": _API_KEY,
                "AccessToken": _ACCESS_TOKEN,
            }
            for path, operations in document["paths"].items():
                if path.startswith("/v1/"):
                    for method, operation in operations.items():
                        usual = Role.OPERATOR if path.startswith(_OPERATORS) else needed_by(method.upper())
                        needed = operation.pop(NEEDED, usual.value)
                        operation["security"] = [{"ApiKey": [needed]}, {"AccessToken": [needed]}]
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(problem.pop("$defs", {}))
            schemas["Problem"] = problem
            for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which no route answers
                schemas.pop(name, None)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the document
