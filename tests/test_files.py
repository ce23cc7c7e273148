"""What a user names by path or writes as text: key=value pairs."""

from __future__ import annotations

import pytest

from fastrl.errors import UserError
from fastrl.files import key_values, load_object


def test_a_value_may_hold_an_equals_sign_or_be_empty():
    """Wrong implementations: split at the last `=`; an empty value is refused."""
    assert key_values(["a=b=c", "d="], "--columns") == {"a": "b=c", "d": ""}


@pytest.mark.parametrize("text", ["k", "=2", ""])
def test_a_text_without_key_or_equals_sign_is_refused(text):
    with pytest.raises(UserError) as error:
        key_values(["a=b", text], "--columns")
    assert str(error.value) == f"--columns: expected key=value, got {text!r}"


POOLED = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from beside_{stem} import lengths

def one(text):
    return {scale} * len(text)

def pool(method, completions):
    with multiprocessing.get_context(method).Pool(1) as workers:
        return workers.map(one, completions) + workers.map(lengths, completions)

def executor(method, completions):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as workers:
        return list(workers.map(one, completions))
"""


def test_pools_that_start_fresh_interpreters_find_the_users_files(tmp_path):
    """Wrong implementations: workers that cannot import the file die and are replaced for ever; only one of
    two files of a name is found, or a function of a neighbour is not; the old text of a file that was edited.
    """
    for number, folder in enumerate((tmp_path / "a", tmp_path / "b"), 1):
        folder.mkdir()
        (folder / f"beside_{number}.py").write_text("def lengths(text):\n    return len(text)\n")
        (folder / "random.py").write_text(POOLED.format(scale=number, stem=number))

    first, second = (load_object(f"{tmp_path}/{name}/random.py:pool", "--reward") for name in "ab")
    assert first("spawn", ["a", "bcd"]) == [1, 3, 1, 3] and second("spawn", ["bcd"]) == [6, 3]
    assert load_object(f"{tmp_path}/b/random.py:executor", "--reward")("spawn", ["bcd"]) == [6]
    assert first("forkserver", ["bcd"]) == [3, 3]

    (tmp_path / "a/random.py").write_text(POOLED.format(scale=100, stem=1))
    assert load_object(f"{tmp_path}/a/random.py:pool", "--reward")("spawn", ["a"]) == [100, 1]


def test_pairs_with_commas_between_them_are_told_apart():
    """Wrong implementation: `a=b,c=d` read as one pair, and blamed on the data set."""
    assert key_values(["a=b", "targets=[1,40]", "x=b,c"], "--columns") == {
        "a": "b",
        "targets": "[1,40]",
        "x": "b,c",
    }
    with pytest.raises(UserError, match=r"expected blanks .* write --columns q=prompt a=completion"):
        key_values(["q=prompt,a=completion"], "--columns")
