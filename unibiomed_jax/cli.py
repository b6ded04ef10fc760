"""UniBiomed for research: ask medical images questions, convert checkpoints, make datasets to train on."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from unibiomed_jax.commands.eval.options import CompareOptions, EvalOptions, ListOptions, ReproduceOptions
from unibiomed_jax.commands.explain_sharding import ExplainShardingOptions
from unibiomed_jax.commands.export import ExportOptions
from unibiomed_jax.commands.plan import PlanOptions
from unibiomed_jax.commands.predict import PredictOptions
from unibiomed_jax.commands.run import run
from unibiomed_jax.commands.study import StudyOptions
from unibiomed_jax.conversion.options import FromTorchOptions, ToTorchOptions, VerifyOptions
from unibiomed_jax.datasets.build import BuildOptions
from unibiomed_jax.datasets.pack import PackOptions
from unibiomed_jax.datasets.validate import ValidateOptions

_Data = (
    Annotated[BuildOptions, tyro.conf.subcommand("build")]
    | Annotated[ValidateOptions, tyro.conf.subcommand("validate")]
    | Annotated[PackOptions, tyro.conf.subcommand("pack")]
)
_Convert = (
    Annotated[FromTorchOptions, tyro.conf.subcommand("from-torch")]
    | Annotated[ToTorchOptions, tyro.conf.subcommand("to-torch")]
    | Annotated[VerifyOptions, tyro.conf.subcommand("verify")]
)
_Eval = (
    Annotated[EvalOptions, tyro.conf.subcommand("run")]
    | Annotated[CompareOptions, tyro.conf.subcommand("compare")]
    | Annotated[ListOptions, tyro.conf.subcommand("list")]
    | Annotated[ReproduceOptions, tyro.conf.subcommand("reproduce")]
)
Command = (
    Annotated[PredictOptions, tyro.conf.subcommand("predict")]
    | Annotated[ExplainShardingOptions, tyro.conf.subcommand("explain-sharding")]
    | Annotated[PlanOptions, tyro.conf.subcommand("plan")]
    | Annotated[ExportOptions, tyro.conf.subcommand("export")]
    | Annotated[StudyOptions, tyro.conf.subcommand("study")]
    | Annotated[_Convert, tyro.conf.subcommand("convert", description="PyTorch checkpoints in and out.")]
    | Annotated[_Data, tyro.conf.subcommand("data", description="Make, check and pack datasets to train on.")]
    | Annotated[_Eval, tyro.conf.subcommand("eval", description="Score answers, and compare two runs.")]
)
# Where each command is: its module below `commands`, which is loaded when it is asked for, and its function.
PLACES = {
    PredictOptions: ("predict", "predict"),
    ExplainShardingOptions: ("explain_sharding", "explain_sharding"),
    PlanOptions: ("plan", "plan"),
    ExportOptions: ("export", "export"),
    StudyOptions: ("study", "study"),
    FromTorchOptions: ("convert", "from_torch"),
    ToTorchOptions: ("convert", "to_torch"),
    VerifyOptions: ("convert", "verify"),
    BuildOptions: ("data", "build"),
    ValidateOptions: ("data", "validate"),
    PackOptions: ("data", "pack"),
    EvalOptions: ("eval.run", "evaluate"),
    CompareOptions: ("eval.compare", "compare"),
    ListOptions: ("eval.listing", "list_known"),
    ReproduceOptions: ("eval.reproduce", "reproduce"),
}


def parse(arguments: Sequence[str]) -> Any:
    """The options of a command line."""
    arguments = list(arguments)
    if arguments == ["eval", "--list"]:
        arguments[1] = "list"
    others = ("run", "compare", "list", "reproduce", "--help", "-h")
    if arguments[:1] == ["eval"] and not set(arguments[1:2]) & set(others):
        arguments.insert(1, "run")  # what `unibiomed eval` does, if nothing else is said
    return tyro.cli(Command, prog="unibiomed", description=__doc__, args=arguments)


def main() -> None:
    """Entry point of `unibiomed`; exit codes are those of `commands.run`."""
    options = parse(sys.argv[1:])
    module, function = PLACES[type(options)]
    command = getattr(importlib.import_module(f"unibiomed_jax.commands.{module}"), function)
    sys.exit(run(lambda: command(options)))


if __name__ == "__main__":
    main()
