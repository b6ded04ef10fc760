"""A PyTorch release to JAX and back, and whether anything was lost.

    python examples/convert.py

Writes converted/ and released_again/ to the current folder. The release is the small one of the tests, with
random weights. The same on the command line:

    unibiomed convert from-torch tests/golden/micro/checkpoint converted
    unibiomed convert to-torch converted released_again
    unibiomed convert verify tests/golden/micro/checkpoint released_again
"""

import sys
from pathlib import Path

from unibiomed_jax.commands import convert
from unibiomed_jax.conversion.options import FromTorchOptions, ToTorchOptions, VerifyOptions

RELEASED = Path(__file__).parents[1] / "tests/golden/micro/checkpoint"


def main() -> int:
    converted, again = Path("converted"), Path("released_again")
    convert.from_torch(FromTorchOptions(RELEASED, converted, overwrite=True))
    convert.to_torch(ToTorchOptions(converted, again, overwrite=True))
    different = convert.verify(VerifyOptions(RELEASED, again))
    print("Not every bit came back." if different else "Every bit came back.")
    return different


if __name__ == "__main__":
    sys.exit(main())
