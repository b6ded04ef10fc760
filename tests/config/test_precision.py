"""What a processor can do, as far as XLA may use it, and which policy that gives."""

import jax
import pytest

from unibiomed_jax.config import precision
from unibiomed_jax.config.precision import BFLOAT16, FAST, FLOAT32, bfloat16_units, find_precision

ZEN2 = "flags\t\t: fpu sse4_2 avx avx2 fma"
ICE_LAKE = f"{ZEN2} avx512f avx512_vnni"
ZEN4 = f"{ICE_LAKE} avx512_bf16"
SAPPHIRE_RAPIDS = f"{ZEN4} amx_bf16 amx_tile"


@pytest.mark.parametrize(
    ("features", "xla", "expected"),
    [
        ("", "", None),
        ("cpu : S390", "", None),
        (ZEN2, "", None),
        (ICE_LAKE, "", None),
        (ZEN4, "", "vector"),
        (SAPPHIRE_RAPIDS, "", "matrix"),
        ("Features\t: fp asimd sve bf16", "", None),  # not measured
        (SAPPHIRE_RAPIDS, "--xla_cpu_max_isa=AVX2", None),
        (SAPPHIRE_RAPIDS, "--a=1 --xla_cpu_max_isa=AVX512 --b=2", None),
        (SAPPHIRE_RAPIDS, "--xla_cpu_max_isa=AVX512_BF16", "vector"),
        (SAPPHIRE_RAPIDS, "--xla_cpu_max_isa=amx_fp16", "matrix"),
        (ZEN4, "--xla_cpu_max_isa=AMX", "vector"),
        (ZEN2, "--xla_cpu_max_isa=AMX", None),
    ],
)
def test_bfloat16_units(tmp_path, features, xla, expected):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{features}\nbugs\t\t: spectre_v1 amx_bf16\n")
    environment = {"XLA_FLAGS": xla} if xla else {}
    assert bfloat16_units(tmp_path / "cpuinfo", environment) == expected


def test_nobody_says(tmp_path):
    assert bfloat16_units(tmp_path / "missing", {}) is None


@pytest.mark.parametrize(
    ("backend", "units", "policies"),
    [
        ("cpu", None, (FLOAT32, FLOAT32, FLOAT32, BFLOAT16)),
        ("cpu", "vector", (FLOAT32, FLOAT32, FAST, BFLOAT16)),
        ("cpu", "matrix", (FLOAT32, FLOAT32, FAST, BFLOAT16)),
        ("gpu", None, (BFLOAT16, FLOAT32, BFLOAT16, BFLOAT16)),
        ("tpu", None, (BFLOAT16, FLOAT32, BFLOAT16, BFLOAT16)),
    ],
)
def test_a_name_becomes_what_suits_the_device(monkeypatch, backend, units, policies):
    names = ("auto", "float32", "fast", "bfloat16")
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(precision, "bfloat16_units", lambda: units)
    assert tuple(map(find_precision, names)) == policies
    # Of a layout, whatever this process would take.
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu" if backend == "cpu" else "cpu")
    assert tuple(find_precision(name, backend) for name in names) == policies
