"""Convert a PyTorch checkpoint: python -m convert.from_torch SRC DST

The same as `unibiomed convert from-torch`; the work is done in `unibiomed_jax/conversion/`.
"""

from unibiomed_jax.commands.convert import from_torch
from unibiomed_jax.commands.run import main
from unibiomed_jax.conversion.options import FromTorchOptions

if __name__ == "__main__":
    main(FromTorchOptions, from_torch)
