"""What is said of a bucket, without one."""

import pytest

from unibiomed_jax.bucket import BucketPath, told
from unibiomed_jax.errors import BucketError

PATH = BucketPath("gs://mine/kidney-512/Timeout")


def raised(error: Exception) -> Exception:
    with pytest.raises((BucketError, OSError, ValueError)) as caught, told(PATH):
        raise error
    return caught.value


def test_a_missing_file_is_no_bucket_that_does_not_answer():
    error = raised(FileNotFoundError("mine/kidney-512/Timeout/manifest.json"))
    assert isinstance(error, FileNotFoundError) and error.filename == str(PATH)


def test_a_damaged_file_is_no_bucket_that_does_not_answer():
    """Places in it look like answers of a server."""
    error = ValueError("OUT_OF_RANGE: byte range [512, 5160) is not valid for value of size 403")
    assert raised(error) is error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FileNotFoundError("The specified bucket does not exist"), "there is no such bucket"),
        (OSError("503 for mine/kidney-512/Timeout"), "does not answer"),
        (OSError("mine/kidney-512/Timeout: 403"), "permission is denied"),
        (OSError("mine/kidney-512/Timeout: something odd"), "refuses what is asked"),
    ],
)
def test_a_reason_is_not_read_out_of_the_path(error, sentence):
    found = raised(error)
    assert isinstance(found, BucketError) and sentence in str(found) and str(PATH) in str(found)
