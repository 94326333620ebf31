"""The contract of errors: the right type, one line, and in it every name and value that its reader needs."""

from collections.abc import Callable

import pytest


def refused(call: Callable[[], object], *names: object, error: type[BaseException] = ValueError) -> str:
    """The message of the error that `call` raises."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message, message
    assert not [name for name in names if str(name) not in message], message
    return message
