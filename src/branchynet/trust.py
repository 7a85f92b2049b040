"""Which functions of run folders may run: those that this user named, and those of folders that the user trusts.

A run folder made elsewhere may name any function as its network. So a folder made here is signed with a secret of the
user's, kept in the cache folder, which a folder from elsewhere does not know.
"""

import contextlib
import hmac
import os
import secrets
from pathlib import Path


def signature(function: str) -> str | None:
    """What shows that this user named `function`; None where no secret can be kept."""
    secret = _secret()
    return None if secret is None else hmac.new(secret, function.encode("utf-8", "replace"), "sha256").hexdigest()


def signed(function: str, given: object) -> bool:
    """Whether `given` is this user's signature of `function`."""
    own = signature(function)
    return own is not None and isinstance(given, str) and hmac.compare_digest(own.encode(), given.encode())


def _place() -> Path:
    import pooch

    return Path(pooch.os_cache("branchynet")) / "secret"


def _secret() -> bytes | None:
    path = _place()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as stream:
            stream.write(secrets.token_bytes(32))
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content if len(content) == 32 else None
