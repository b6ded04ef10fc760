"""Which policy a processor gets."""

import pytest

from unibiomed_jax.config.precision import CPU, FLOAT32, cpu_features, cpu_precision

ZEN2 = "fpu sse4_2 avx avx2 fma"
ICE_LAKE = f"{ZEN2} avx512f avx512_vnni"
COOPER_LAKE = f"{ICE_LAKE} avx512_bf16"
SAPPHIRE_RAPIDS = f"{COOPER_LAKE} amx_bf16 amx_tile"


@pytest.mark.parametrize(
    ("flags", "xla", "expected"),
    [
        ("", "", FLOAT32),
        (ZEN2, "", FLOAT32),
        (ICE_LAKE, "", FLOAT32),
        (COOPER_LAKE, "", CPU),
        (SAPPHIRE_RAPIDS, "", CPU),
        ("fp asimd sve bf16", "", CPU),
        (SAPPHIRE_RAPIDS, "--xla_cpu_max_isa=AVX2", FLOAT32),
        (SAPPHIRE_RAPIDS, "--a=1 --xla_cpu_max_isa=AVX512 --b=2", FLOAT32),
        (SAPPHIRE_RAPIDS, "--xla_cpu_max_isa=AVX512_BF16", CPU),
        (ZEN2, "--xla_cpu_max_isa=AMX", FLOAT32),
    ],
)
def test_bfloat16_is_for_processors_that_multiply_it(flags, xla, expected):
    assert cpu_precision(set(flags.split()), {"XLA_FLAGS": xla} if xla else {}) == expected


def test_features_are_those_of_the_first_processor(tmp_path):
    (tmp_path / "x86").write_text("processor\t: 0\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nflags\t\t: other\n")
    assert cpu_features(tmp_path / "x86") == {"fpu", "avx2"}
    (tmp_path / "arm").write_text("processor\t: 0\nFeatures\t: fp bf16\n")
    assert cpu_features(tmp_path / "arm") == {"fp", "bf16"}
    (tmp_path / "other").write_text("cpu : S390\n")
    assert cpu_features(tmp_path / "other") == cpu_features(tmp_path / "missing") == set()
