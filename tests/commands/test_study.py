"""`unibiomed study`, as a user runs it."""

from __future__ import annotations

import shutil

import pytest

pydicom = pytest.importorskip("pydicom")

from dicom_series import PLANTED, MadeSeries, save  # noqa: E402
from pydicom.data import get_testdata_file  # noqa: E402


def test_the_list_names_series_by_alias_and_says_what_is_odd(unibiomed, tmp_path):
    folder = MadeSeries(attributes={"BodyPartExamined": "CHEST"}).write(tmp_path / "Plantedname_A", skip=(2,))
    save(MadeSeries(attributes={"ImageType": ["LOCALIZER"]}).slice(0), folder / "scout")
    shutil.copy(get_testdata_file("rtdose.dcm"), folder)
    run = unibiomed("study", str(folder), "--list")
    assert run.returncode == 1, run.stderr  # the localizer cannot be opened
    line = next(line for line in run.stdout.splitlines() if "uneven" in line)
    for part in ("CT", "axial", "20 x 16", "2.5 x 0.9 x 0.7", "lung", "5.00 mm instead of 2.50 mm"):
        assert part in line
    assert "nothing but localizers" in run.stdout and "RT dose" in run.stdout
    assert "2 series; 1 files left out." in run.stdout
    assert not any(word in run.stdout + run.stderr for word in PLANTED)
    run = unibiomed("study", str(tmp_path / "Plantedname_B"), "--list")
    assert run.returncode == 2 and "check it" in run.stderr and "Planted" not in run.stderr
    run = unibiomed("study", str(folder))
    assert run.returncode == 2 and "add --list" in run.stderr and "Traceback" not in run.stderr
