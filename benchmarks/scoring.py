"""Seconds that strict scoring takes, and how many times longer a loop over surface-distance takes.

    python benchmarks/scoring.py                # 10,000 masks of 512x512, 100 volumes of 64x256x256
    python benchmarks/scoring.py --share 0.02   # a fiftieth of them

Ours starts from records as they lie in a file (run-length encodings), and gives all scores; the loop starts
from arrays, and gives Dice, HD95 and the surface Dice at three tolerances. Masks are ellipsoids with wavy
borders, predictions the same a little elsewhere. Needs the extra "test".
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import tyro
from scipy import ndimage

from unibiomed_jax.evaluation.records import Sample, decode_masks, encode_masks
from unibiomed_jax.evaluation.scoring import score_strict
from unibiomed_jax.evaluation.strict import TOLERANCES

# Name: number, shape, spacing in mm, task.
SETS = {
    "masks of 512x512": (10_000, (512, 512), (0.8, 0.8), "seg2d"),
    "volumes of 64x256x256": (100, (64, 256, 256), (2.5, 0.8, 0.8), "seg3d"),
}
# So many different pairs; more would take longer to draw than to score.
DIFFERENT = 20


@dataclass(frozen=True)
class Options:
    """Time strict scoring."""

    # Part of the masks and volumes that are scored.
    share: float = 1.0


def draw_pair(shape: tuple[int, ...], generator: np.random.Generator) -> list[np.ndarray]:
    """A mask and a prediction of it: radii of 5 to 30 % of the sides, shifted by up to 2 % of a radius."""
    sides = np.array(shape)
    radii = generator.uniform(0.05, 0.3) * sides
    centre = generator.uniform(radii, sides - radii)
    grid = np.indices(shape, np.float32)
    masks = []
    for shift in (0, generator.uniform(-0.02, 0.02, len(shape))):
        waves = ndimage.gaussian_filter(generator.standard_normal(shape, np.float32), sides / 32)
        place = (centre + shift * radii).reshape(-1, *[1] * len(shape))
        distance = (((grid - place) / radii.reshape(place.shape)) ** 2).sum(0)
        masks.append(distance + 0.05 * waves / waves.std() < 1)
    return masks


def draw_samples(name: str, number: int) -> list[Sample]:
    _, shape, spacing, task = SETS[name]
    generator = np.random.default_rng(0)
    pairs = [encode_masks(draw_pair(shape, generator)) for _ in range(min(number, DIFFERENT))]
    return [
        Sample(
            task,
            str(n),
            "",
            category="target",
            patient=str(n),
            spacing=spacing,
            truth_masks=pairs[n % len(pairs)][:1],
            masks=pairs[n % len(pairs)][1:],
        )
        for n in range(number)
    ]


def loop(samples: list[Sample]) -> Iterator[dict[str, float]]:
    """The scores by the package, one pair after the other."""
    np.Inf = np.inf  # NumPy 2 dropped the name; the package still says it
    import surface_distance

    for sample in samples:
        truth, predicted = (decode_masks(masks, "")[0] for masks in (sample.truth_masks, sample.masks))
        started = time.perf_counter(), time.process_time()
        distances = surface_distance.compute_surface_distances(truth, predicted, sample.spacing)
        scores = {
            "dice": surface_distance.compute_dice_coefficient(truth, predicted),
            "hd95_mm": surface_distance.compute_robust_hausdorff(distances, 95),
        }
        for tolerance in TOLERANCES:
            scores[f"nsd_{tolerance:g}mm"] = surface_distance.compute_surface_dice_at_tolerance(
                distances, tolerance
            )
        yield scores | {
            "seconds": time.perf_counter() - started[0],
            "cpu": time.process_time() - started[1],
        }


def timed(function: Callable, *arguments) -> tuple[float, float, object]:
    """Seconds on the clock, seconds of processors, and the result."""
    started = time.perf_counter(), time.process_time()
    result = function(*arguments)
    return time.perf_counter() - started[0], time.process_time() - started[1], result


def main(options: Options) -> None:
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    print("| what | number | seconds | CPU | loop: seconds | CPU | times as fast | in CPU time |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (number, *_) in SETS.items():
        samples = draw_samples(name, max(DIFFERENT, round(number * options.share)))
        task = samples[0].task
        score_strict({task: samples[:2]})  # imports, tables of areas
        seconds, cpu, (_, scored) = timed(score_strict, {task: samples})
        # What the loop takes is told from the different pairs.
        expected = list(loop(samples[:DIFFERENT]))
        for sample, scores in zip(scored[task], expected, strict=False):
            for score in scores.keys() - {"seconds", "cpu"}:
                np.testing.assert_allclose(sample.scores["strict"][score], scores[score], atol=1e-9)
        loop_seconds, loop_cpu = (
            np.mean([scores[kind] for scores in expected]) * len(samples) for kind in ("seconds", "cpu")
        )
        print(
            f"| {name} | {len(samples)} | {seconds:.2f} | {cpu:.2f} | {loop_seconds:.2f} | {loop_cpu:.2f} "
            f"| {loop_seconds / seconds:.1f} | {loop_cpu / cpu:.1f} |"
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
