"""What a user names by path or writes as text: key=value pairs."""

from __future__ import annotations

import pytest

from fastrl.errors import UserError
from fastrl.files import key_values


def test_a_value_may_hold_an_equals_sign_or_be_empty():
    """Wrong implementations: split at the last `=`; an empty value is refused."""
    assert key_values(["a=b=c", "d="], "--columns") == {"a": "b=c", "d": ""}


@pytest.mark.parametrize("text", ["k", "=2", ""])
def test_a_text_without_key_or_equals_sign_is_refused(text):
    with pytest.raises(UserError) as error:
        key_values(["a=b", text], "--columns")
    assert str(error.value) == f"--columns: expected key=value, got {text!r}"
