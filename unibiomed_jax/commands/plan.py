"""`unibiomed plan`: what a program asks of chips that are not rented yet."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from unibiomed_jax.commands.run import DONE, FAILED_IN_PART
from unibiomed_jax.config.fields import ABOVE_ZERO, ONE_OR_MORE, ZERO_OR_MORE, require_limits
from unibiomed_jax.errors import InputError

if TYPE_CHECKING:
    from unibiomed_jax.planning.facts import Facts
    from unibiomed_jax.planning.programs import Case
    from unibiomed_jax.training.config import TrainConfig

console = Console()
STAGES = ("encode_tiles", "prefill", "advance", "encode_image", "segment", "segment_frames")


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Compile an update or an answer for chips that need not exist, and say what they would need."""

    # Chips: v5e:4x4, v5p:2x2x4, v6e:16x16, v4:2x2x2, tpu7x:2x2x1, v5e:16x16@2 (two slices), h100:8, h200:4x8.
    topology: tuple[str, ...] = ("v5e:2x4",)
    # Sizes of the model.
    model: tuple[Literal["1b", "3b", "7b", "14b"], ...] = ("1b",)
    # What trains: adapters and what the published recipe trains beside them, or everything.
    mode: tuple[Literal["lora", "full"], ...] = ("lora",)
    # Strategies of unibiomed_jax/sharding/strategies.py.
    strategy: tuple[str, ...] = ("data_parallel",)
    # Devices along the axes of the mesh, fsdp=4,tensor=2; by default spread as the strategy asks.
    mesh: str | None = None
    # "update" of a training run; "ground", an answer as one program, or "stages", its parts one by one; or
    # one of these.
    program: Literal[
        "update",
        "ground",
        "stages",
        "encode_tiles",
        "prefill",
        "advance",
        "encode_image",
        "segment",
        "segment_frames",
    ] = "update"
    # Samples of each share of a batch in training (a device's, unless several share one); answers at a time
    # of all devices else.
    batch: Annotated[int, ONE_OR_MORE] = 1
    # Of every sample: tiles of its image, tokens of its text with those of the tiles, masks.
    tiles: Annotated[int, ZERO_OR_MORE] = 1
    tokens: Annotated[int, ONE_OR_MORE] = 1280
    objects: Annotated[int, ONE_OR_MORE] = 4
    # Of every answer: tokens that are said; frames of its volume (1: an image).
    new_tokens: Annotated[int, ONE_OR_MORE] = 256
    frames: Annotated[int, ONE_OR_MORE] = 1
    # Find the largest batch that fits under every strategy, and the best of them.
    search: bool = False
    # Show all plans side by side.
    compare: bool = False
    # Write all plans as JSON, or as a page with bars.
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    html: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    # Write the page of plans of this project (docs/plans.md) from what was compiled so far, and nothing else.
    page: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    # Folder where compiled programs are kept; by default one in the user's cache.
    kept: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    # GiB that compilers may take together; one takes up to 6.
    memory: Annotated[float, ABOVE_ZERO] = 6.0


def plan(options: PlanOptions) -> int:
    """Run `unibiomed plan`."""
    require_limits(options, "--")
    from unibiomed_jax import runtime  # JAX starts only when it is needed

    folder = options.kept or runtime.cache_folder("plans")
    if options.page is not None:
        from unibiomed_jax.planning.page import page

        options.page.write_text(page(folder))
        return DONE
    from unibiomed_jax.planning.worker import find_all

    find = functools.partial(find_all, folder=folder, memory=options.memory)
    if options.search:
        return _search(options, find)
    cases = [
        _case(options, *chosen, program=program, batch=options.batch)
        for chosen in itertools.product(options.topology, options.model, options.mode, options.strategy)
        for program in (STAGES if options.program == "stages" else (options.program,))
    ]
    return _show(find(cases), options)


def plan_run(config: TrainConfig, topology: str) -> int:
    """The plan of one's own run, for the heaviest batch of its data: `train.py CONFIG --dry-run --topology`.

    Raises:
        InputError: the configuration or its data cannot be used, or its program cannot be on that topology.
    """
    from unibiomed_jax import runtime
    from unibiomed_jax.planning.own import own_case
    from unibiomed_jax.planning.worker import find_all

    folder = runtime.cache_folder("plans")
    return _show(find_all([own_case(config, topology)], folder, PlanOptions.memory), PlanOptions())


def _case(
    options: PlanOptions, topology: str, model: str, mode: str, strategy: str, *, program: str, batch: int
) -> Case:
    from unibiomed_jax.planning.cases import answer_case, train_case

    sizes = {"tiles": options.tiles, "tokens": options.tokens, "objects": options.objects}
    if program == "update":
        return train_case(topology, model, mode, strategy, options.mesh, per_share=batch, **sizes)
    return answer_case(
        topology,
        model,
        program,
        strategy,
        options.mesh,
        batch=batch,
        new_tokens=options.new_tokens,
        frames=options.frames,
        **sizes,
    )


def _search(options: PlanOptions, find: Callable[[list[Case]], list[Facts | InputError]]) -> int:
    from unibiomed_jax.planning.report import title
    from unibiomed_jax.planning.search import best, largest_batches

    if options.program == "stages":
        raise InputError("--search looks for the batch of one program; name one of the stages.")
    found: list[Facts | InputError] = []
    for topology, model, mode in itertools.product(options.topology, options.model, options.mode):

        def case(strategy: str, batch: int, chosen=(topology, model, mode)) -> Case:
            return _case(options, *chosen, strategy, program=options.program, batch=batch)

        plans = [*largest_batches(options.strategy, case, find).values()]
        first = best([facts for facts in plans if not isinstance(facts, InputError)])
        if first is None:
            _say(f"Nothing of this fits {topology}.")
        else:
            _say(f"Best: {title(first)}, {first.samples:,} samples at a time.")
        found += plans
    return _show(found, dataclasses.replace(options, compare=True))


def _show(found: Sequence[Facts | InputError], options: PlanOptions) -> int:
    """Print and write plans; of one that cannot be, its sentence is the command's."""
    from unibiomed_jax.planning.report import as_html, as_json, side_by_side, table

    plans = [facts for facts in found if not isinstance(facts, InputError)]
    impossible = [error for error in found if isinstance(error, InputError)]
    if not plans:
        raise impossible[0]
    if options.compare:
        console.print(side_by_side(plans))
    else:
        for facts in plans:
            console.print(table(facts))
    for error in impossible:
        _say(f"Left out: {error}")
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(plans), indent=1) + "\n")
    if options.html is not None:
        options.html.write_text(as_html(plans))
    return FAILED_IN_PART if impossible else DONE


def _say(sentence: str) -> None:
    console.print(sentence, markup=False, highlight=False, soft_wrap=True)
