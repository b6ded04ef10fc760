"""Write a converted checkpoint in the released layout: python -m convert.to_torch SRC DST

The same as `unibiomed convert to-torch`; the work is done in `unibiomed_jax/conversion/`.
"""

from unibiomed_jax.commands.convert import to_torch
from unibiomed_jax.commands.run import main
from unibiomed_jax.conversion.options import ToTorchOptions

if __name__ == "__main__":
    main(ToTorchOptions, to_torch)
