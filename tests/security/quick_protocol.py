"""The protocol with its waits shortened, for tests that see them run out: `uvicorn --http tests.security.quick_protocol:Guarded`."""

from app.web import http_protocol
from app.web.http_protocol import Guarded

__all__ = ["Guarded"]
http_protocol.REQUEST_SECONDS = 1.5
http_protocol.BODY_SECONDS = 1.0
http_protocol.MIN_BODY_BYTES = 100
http_protocol.UNREAD_SECONDS = 2
