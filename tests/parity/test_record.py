"""What lies in tests/recorded is what torch computes today."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("sam2.modeling")

from measured import relative_error  # noqa: E402
from module_checks import gradient_error  # noqa: E402
from record import RECORDERS  # noqa: E402
from recorded_modules import MODULES, ROUNDED, read  # noqa: E402


@pytest.mark.parametrize("name", MODULES)
def test_recordings_are_what_torch_computes(name):
    stored, fresh = (recording._asdict() for recording in (read(name), RECORDERS[name]()))
    for field in stored:
        assert stored[field].keys() == fresh[field].keys()
        for key, expected in fresh[field].items():
            if field in ROUNDED:
                assert (stored[field][key] == expected).all(), (field, key)
            elif field == "weight_gradients":
                assert gradient_error(stored[field], fresh[field], key) <= 1e-6, (field, key)
            else:
                assert relative_error(stored[field][key], expected) <= 1e-6, (field, key)
