"""Reads a multipart form as a stream: small fields into memory, the one file straight to its blob.

Starlette's own form parser first writes a whole upload to a temporary file, which would then be copied again; here the bytes are
hashed and written once, and the memory used does not depend on their number.
"""

from __future__ import annotations

import contextlib
from email.message import Message
from typing import TYPE_CHECKING, NamedTuple, cast

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from app.errors import BadField, BadRequest, TooLarge
from app.kit.humanize import human_number
from app.languages import gettext
from app.storage.files import Blob, BlobWriter

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_PARTS = 64
MAX_FIELD_BYTES = 64 * 1024
_FLUSH_BYTES = 1 << 20


class UploadedPart(NamedTuple):
    filename: str
    blob: Blob


class Form(NamedTuple):
    """The fields by name, and the file if there was one."""

    fields: dict[str, str]
    upload: UploadedPart | None


async def read_form(request: Request, limit: int, file_field: str = "file", passing: bool = False) -> Form:
    """Read a form to its end. `limit` is for the file, in bytes; `passing` says that it becomes part of another one.

    Raises BadRequest for a form that is malformed or incomplete, TooLarge beyond the limit; nothing is kept then.
    """
    reader = _Reader(limit, file_field, passing)
    try:
        parser = MultipartParser(_boundary(request), reader.callbacks(), max_header_count=16, max_header_size=16 * 1024)
        async for chunk in request.stream():
            parser.write(chunk)
            if len(reader.pending) >= _FLUSH_BYTES:
                await run_in_threadpool(reader.flush)
        parser.finalize()
        return await run_in_threadpool(reader.finish)
    except ClientDisconnect:
        raise BadRequest(gettext("The upload stopped before its end; nothing was saved."), hint=gettext("Send it again.")) from None
    except FormParserError as error:
        message = gettext("The form cannot be read: %(reason)s.", reason=error)
        raise BadRequest(message, hint=gettext("Send it as multipart/form-data with a correct boundary.")) from None
    finally:
        reader.discard()


def _boundary(request: Request) -> bytes:
    message = Message()
    with contextlib.suppress(Exception):
        message["content-type"] = request.headers.get("content-type", "")
    boundary = message.get_param("boundary", "")
    if message.get_content_type() != "multipart/form-data" or not isinstance(boundary, str) or not boundary:
        raise BadRequest(
            gettext("This address takes a form with a file."),
            hint=gettext("Send it as multipart/form-data with the fields file and purpose."),
        )
    return boundary.encode("latin-1", "replace")


class _Reader:
    """The parser's callbacks. The file's bytes wait in `pending` until the route's loop flushes them in a thread."""

    def __init__(self, limit: int, file_field: str, passing: bool) -> None:
        self.limit, self.passing = limit, passing
        self.file_field = file_field
        self.fields: dict[str, str] = {}
        self.pending = bytearray()
        self.writer: BlobWriter | None = None
        self.filename = ""
        self._parts = 0
        self._ended = False
        self._header_name, self._header_value = b"", b""
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._value: bytearray | None = None

    def callbacks(self) -> MultipartCallbacks:
        names = ("part_begin", "part_data", "part_end", "header_field", "header_value", "header_end", "headers_finished", "end")
        return cast("MultipartCallbacks", {f"on_{name}": getattr(self, f"on_{name}") for name in names})

    def on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            message = gettext("The form has more than %(most)s parts.", most=human_number(MAX_PARTS))
            raise BadRequest(message, hint=gettext("Send one file and its few fields."))
        self._headers = {}
        self._value = None

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name, self._header_value = b"", b""

    def on_headers_finished(self) -> None:
        message = Message()
        message["content-disposition"] = self._headers.get(b"content-disposition", b"").decode("utf-8", "replace").replace("\n", " ")
        name = message.get_param("name", "", "content-disposition")
        self._name = name if isinstance(name, str) else ""
        filename = message.get_filename()
        if self._name != self.file_field:
            self._value = bytearray()
            return
        if self.writer is not None:
            said = gettext("The form holds more than one file.")
            raise BadField(said, hint=gettext("Send one file in one request."), param=self.file_field)
        self.filename = filename or ""
        self.writer = BlobWriter(self.limit, self.passing)

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._value is None:
            self.pending += memoryview(data)[start:end]
            return
        self._value += memoryview(data)[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            field, most = self._name[:80], human_number(MAX_FIELD_BYTES)
            raise TooLarge(gettext("The field “%(field)s” is larger than %(most)s bytes.", field=field, most=most), param=field)

    def on_part_end(self) -> None:
        if self._value is not None:
            self.fields[self._name] = self._value.decode("utf-8", "replace")

    def on_end(self) -> None:
        self._ended = True

    def flush(self) -> None:
        if self.writer is not None and self.pending:
            self.writer.write(self.pending)
        self.pending = bytearray()

    def finish(self) -> Form:
        if not self._ended:
            raise BadRequest(gettext("The upload stopped before its end; nothing was saved."), hint=gettext("Send it again."))
        if self.writer is None:
            return Form(self.fields, None)
        self.flush()
        return Form(self.fields, UploadedPart(self.filename, self.writer.finish()))

    def discard(self) -> None:
        if self.writer is not None:
            self.writer.discard()
