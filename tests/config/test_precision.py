"""What a processor can do, as far as XLA may use it."""

import pytest

from unibiomed_jax.config.precision import has_bfloat16_units

ZEN2 = "flags\t\t: fpu sse4_2 avx avx2 fma"
ICE_LAKE = f"{ZEN2} avx512f avx512_vnni"
COOPER_LAKE = f"{ICE_LAKE} avx512_bf16"
SAPPHIRE_RAPIDS = f"{COOPER_LAKE} amx_bf16 amx_tile"


@pytest.mark.parametrize(
    ("features", "xla", "expected"),
    [
        ("", "", False),
        ("cpu : S390", "", False),
        (ZEN2, "", False),
        (ICE_LAKE, "", False),
        (COOPER_LAKE, "", True),
        (SAPPHIRE_RAPIDS, "", True),
        ("Features\t: fp asimd sve bf16", "", True),
        ("Features\t: fp asimd", "", False),
        (SAPPHIRE_RAPIDS, "--xla_cpu_max_isa=AVX2", False),
        (SAPPHIRE_RAPIDS, "--a=1 --xla_cpu_max_isa=AVX512 --b=2", False),
        (SAPPHIRE_RAPIDS, "--xla_cpu_max_isa=AVX512_BF16", True),
        (ZEN2, "--xla_cpu_max_isa=AMX", False),
    ],
)
def test_bfloat16_units(tmp_path, features, xla, expected):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{features}\nbugs\t\t: spectre_v1 bf16\n")
    environment = {"XLA_FLAGS": xla} if xla else {}
    assert has_bfloat16_units(tmp_path / "cpuinfo", environment) == expected


def test_nobody_says(tmp_path):
    assert not has_bfloat16_units(tmp_path / "missing", {})
