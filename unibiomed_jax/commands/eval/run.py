"""`unibiomed eval` itself: answering and scoring, or one of them."""

from __future__ import annotations

import dataclasses

from unibiomed_jax import distributed
from unibiomed_jax.commands.eval.answer import answer
from unibiomed_jax.commands.eval.options import EvalOptions
from unibiomed_jax.commands.eval.printing import console
from unibiomed_jax.commands.eval.score import score
from unibiomed_jax.commands.run import DONE, FAILED_IN_PART
from unibiomed_jax.errors import InputError
from unibiomed_jax.files import in_bucket


def evaluate(options: EvalOptions) -> int:
    """Run `unibiomed eval`; FAILED_IN_PART if something could not be answered or scored.

    Every process of a job has the model on devices of its own and answers its share; the first one scores.
    """
    distributed.join(options)
    console.quiet = not distributed.is_first()
    if "all" in options.task:
        options = dataclasses.replace(options, task=())
    _check(options)
    failed = 0
    if options.checkpoint is not None:
        failed = answer(options)
    if options.mode == "infer" or not distributed.is_first():
        return FAILED_IN_PART if failed else DONE
    return score(options)


def _check(options: EvalOptions) -> None:
    for name in ("batch_size", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1.")
    if options.mesh is not None and options.strategy is None:
        raise InputError(f"--mesh {options.mesh} spreads a strategy over devices; add --strategy.")
    if options.checkpoint is None:
        if options.mode == "infer":
            raise InputError("--mode infer asks a model; name it with --checkpoint.")
    else:
        if options.mode == "score":
            raise InputError("--mode score asks no model; leave out --checkpoint, or --mode.")
        if options.predictions is not None:
            raise InputError("--predictions are answers of another system; leave out --checkpoint.")
        if in_bucket(options.out):
            raise InputError(
                f"Answers are appended to files of --out, and {options.out} lies in a bucket, where nothing "
                "can be; choose a folder on a disk."
            )
        if options.data is None:
            raise InputError("--checkpoint is asked about a dataset; name its folder with --data.")
        return
    if options.predictions is None:
        if options.data is not None:
            raise InputError(
                "--data belongs to --checkpoint or --predictions; name one of them, or leave it out."
            )
        return
    if options.folders is not None:
        raise InputError("--folders writes the predictions of a run; leave out --predictions.")
    if len(options.task) != 1:
        raise InputError("--predictions holds those of one task; name it with --task.")
    if options.data is None:
        raise InputError(
            "--predictions are compared with the truth of a dataset; name its folder with --data."
        )
