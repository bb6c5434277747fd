"""Tenants, their API keys, and the browsers that signed in with one."""

from app.db.accounts import LOCAL_TENANT
from app.tenants.callers import caller_of_key, caller_of_session
from app.tenants.keys import KEY_PREFIX, KeyService, create_key, key_id, revoke_key
from app.tenants.sessions import SESSION_TIME, sign_in, sign_out

__all__ = [
    "KEY_PREFIX",
    "LOCAL_TENANT",
    "SESSION_TIME",
    "KeyService",
    "caller_of_key",
    "caller_of_session",
    "create_key",
    "key_id",
    "revoke_key",
    "sign_in",
    "sign_out",
]
