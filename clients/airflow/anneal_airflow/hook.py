"""Connections of the type `anneal`: the service's address, and its key as the password."""

from __future__ import annotations

from typing import Any

from airflow.sdk import BaseHook

from anneal_client import AnnealError, Client


class AnnealHook(BaseHook):
    """A client of the service that the connection names.

    Host: `anneal.example.com`, or a whole address (`https://anneal.example.com/base`). Schema: `https` (default where
    there is a key and no port) or `http`. Password: the key, empty where the service needs none.
    """

    conn_name_attr = "anneal_conn_id"
    default_conn_name = "anneal_default"
    conn_type = "anneal"
    hook_name = "Anneal"

    def __init__(self, anneal_conn_id: str = default_conn_name) -> None:
        super().__init__()
        self.anneal_conn_id = anneal_conn_id

    @classmethod
    def get_ui_field_behaviour(cls) -> dict[str, Any]:
        return {
            "hidden_fields": ["login", "extra"],
            "relabeling": {"password": "API key", "schema": "http or https"},
            "placeholders": {"host": "anneal.example.com", "port": "8000", "schema": "https"},
        }

    def get_conn(self) -> Client:
        """A client; close it, or use it in a `with` block."""
        return Client(*address(self.get_connection(self.anneal_conn_id)))

    def test_connection(self) -> tuple[bool, str]:
        """For the button of Airflow's page: whether the service answers, and takes the key."""
        try:
            with Client(*address(self.get_connection(self.anneal_conn_id)), retries=0) as client:
                workers = client.capabilities()["workers"]
        except AnnealError as error:
            return False, str(error)
        return True, f"{len(workers)} live workers"


def address(connection: Any) -> tuple[str, str | None]:
    """(URL, key or None) of a connection."""
    host = connection.host or "127.0.0.1"
    key = connection.password or None
    if "://" not in host:
        schema = connection.schema or ("https" if key and not connection.port else "http")
        host = f"{schema}://{host}"
    if connection.port:
        scheme, _, rest = host.partition("://")
        name, slash, path = rest.partition("/")
        host = f"{scheme}://{name}:{connection.port}{slash}{path}"
    return host, key
