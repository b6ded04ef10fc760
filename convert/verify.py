"""Compare two checkpoints: python -m convert.verify A B

The same as `unibiomed convert verify`; the work is done in `unibiomed_jax/conversion/`.
"""

from unibiomed_jax.commands.convert import verify
from unibiomed_jax.commands.run import main
from unibiomed_jax.conversion.options import VerifyOptions

if __name__ == "__main__":
    main(VerifyOptions, verify)
