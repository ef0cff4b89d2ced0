"""Errors of requests: a message for a person, the field that caused it, and the status of HTTP."""

from stdit.errors import UserError
from stdit.serve.json_values import whole_text


class RequestError(UserError):
    """A request that cannot be followed.

    Args:
        status: of HTTP, from 400 on.
        param: the field that caused it, if it is one.
        code: what kind of error it is, for programs.
        retry_after: seconds after which it can be followed.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str = "invalid_value",
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.error_code, self.retry_after = status, param, code, retry_after


def error_body(
    message: str, param: str | None = None, code: str = "invalid_value", status: int = 400
) -> dict:
    """Return the JSON of an error, as OpenAI's API has it, with whole characters alone."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    field = None if param is None else whole_text(param)
    return {"error": {"message": whole_text(message), "type": kind, "param": field, "code": code}}
