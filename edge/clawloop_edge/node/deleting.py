"""Asking servers to delete what they got, until they have signed that they did: no other answer ends a request, for
who is in between could give it. Blocking: for a thread.

That is the owner's own word, so it goes out at any level, and to a server that was left. Knows no schedule of its own:
the queue says what is due.
"""

import logging

from clawloop_edge.node.hub_api import HubBusy, HubRefused, post
from clawloop_edge.node.transport import NodeError
from clawloop_edge.privacy.deletions import Deletion, Deletions, DeletionState
from clawloop_shared import wire
from clawloop_shared.errors import InvalidError
from clawloop_shared.messages import FORGET_PATH, SignedAnswer

_log = logging.getLogger(__name__)
_MAX_ANSWER_BYTES = 1 << 20


def ask_due(deletions: Deletions, *, timeout_s: float = 30.0) -> int:
    """Send every request that is due; gives how many of them were answered."""
    asked = [ask(deletions, request_id, timeout_s=timeout_s) for request_id in deletions.due()]
    return sum(deletion.state is not DeletionState.WAITING for deletion in asked)


def ask(deletions: Deletions, request_id: str, *, timeout_s: float = 30.0) -> Deletion:
    """Send one request, and note what came of it; gives it as it is then.

    Raises:
        StorageError: that cannot be noted.
    """
    message = deletions.message(request_id)
    if message is None:
        return deletions.get(request_id)
    server, body = message
    try:
        data = post(
            server.url, FORGET_PATH, ca_pem=server.ca_pem, body=body, max_bytes=_MAX_ANSWER_BYTES, timeout_s=timeout_s
        )
        found = deletions.answered(request_id, wire.decode(data, SignedAnswer, max_bytes=_MAX_ANSWER_BYTES))
    except HubRefused as error:
        _log.warning("a request to delete was refused, and is sent again: %s", error)
        deletions.failed(request_id, str(error))
    except HubBusy as error:
        deletions.failed(request_id, str(error), wait_ms=1000 * error.retry_after_s)
    except (NodeError, InvalidError) as error:
        deletions.failed(request_id, str(error))
    else:
        _log.info("%s has deleted %d records that were forgotten here", server.url, found.deleted)
        return found
    return deletions.get(request_id)
