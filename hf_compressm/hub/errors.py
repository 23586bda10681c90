"""What the Hub's client raises, as one sentence that says why and what to do."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import CompreSSMError, HubError

# The common ancestor of the HTTP client's own errors; which client it is depends on the version of huggingface_hub.
HTTP_ERRORS: tuple[type[BaseException], ...] = (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError)

_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN"


@contextmanager
def translated(what: str, repository: str) -> Iterator[None]:
    """
    Turn the client's errors into [`~errors.HubError`].

    Args:
        what (`str`): What was being done, for the message.
        repository (`str`): The repository's name.

    Raises:
        [`~errors.HubError`]: the Hub refused, could not be reached, or the disk is full.
    """
    try:
        yield
    except CompreSSMError:
        raise
    except (*HTTP_ERRORS, OSError) as error:
        raise HubError(f"{what} failed: {reason(error, repository)}") from error


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error carries, or None."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: the server is overloaded, busy or was not reached."""
    if isinstance(error, (OfflineModeIsEnabled, LocalTokenNotFoundError)):
        return False
    status = status_of(error)
    if status is None:
        return isinstance(error, HTTP_ERRORS) and not has_no_network(error)
    # 409 and 412: somebody else's commit came first.
    return status >= 500 or status in (408, 409, 412, 429)


def has_no_network(error: BaseException | None) -> bool:
    """Whether the Hub's name could not be resolved, or nobody answers there; the HTTP client wraps the error."""
    while error is not None:
        if isinstance(error, (socket.gaierror, ConnectionRefusedError)):
            return True
        error = error.__cause__ or error.__context__
    return False


def reason(error: BaseException, repository: str) -> str:
    """
    Why a request failed and what to do.

    Args:
        error (`BaseException`): What the client raised.
        repository (`str`): The repository's name.
    """
    status = status_of(error)
    is_offline = isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE
    if isinstance(error, OfflineModeIsEnabled) or is_offline:
        return "the Hub is switched off here (HF_HUB_OFFLINE). Unset it, or give a local folder."
    if isinstance(error, LocalTokenNotFoundError):
        return f"there is no token. {_LOG_IN}."
    if isinstance(error, LocalEntryNotFoundError):
        return f"the Hub could not be reached and {repository} is not in the cache. Check the network and try again."
    if isinstance(error, GatedRepoError):
        return f"{repository} is gated. Ask for access on its page, and log in with the account that got it."
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} has no such revision. Give a branch, tag or commit that exists."
    if status == 401 and "Invalid credentials" in str(error):
        return f"the token is not valid; it may have expired. {_LOG_IN} to a new one."
    if isinstance(error, RepositoryNotFoundError):
        return f"{repository} does not exist, or is private and the token cannot see it. Check the name. {_LOG_IN}."
    if status is not None:
        return f"{_STATUS.get(status, _ANY_SERVER_ERROR if status >= 500 else 'the Hub refused the request.')} " + (
            f"(HTTP {status}{_server_message(error)})"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full. Free some space, or point HF_HOME to another disk, and run it again."
    if has_no_network(error):
        return "the Hub could not be reached; there seems to be no network. Check it and run it again."
    if isinstance(error, HTTP_ERRORS):
        return f"the connection broke ({type(error).__name__}). Run it again; what was uploaded is not sent twice."
    return " ".join(str(error).split())


_ANY_SERVER_ERROR = "the Hub has a problem of its own. Try again later; see https://status.huggingface.co."
_STATUS = {
    400: "the Hub could not accept the upload.",
    401: f"a token is needed. {_LOG_IN}.",
    403: "the token may not write there. Create one with write access, or use another repository.",
    409: "somebody else changed the repository at the same time. Run it again.",
    412: "somebody else changed the repository at the same time. Run it again.",
    413: "a file is larger than the Hub allows. Save with a smaller max_shard_size.",
    429: "too many requests. Wait a few minutes and run it again.",
    507: "the storage quota of the account is used up.",
}


def _server_message(error: BaseException) -> str:
    message = getattr(error, "server_message", None)
    return f": {' '.join(str(message).split())[:200]}" if message else ""
