"""Standardized uptake values of PET: activity per gram of the patient, of the dose left at the scan."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from unibiomed_jax.studies.dicom_files import Frame

if TYPE_CHECKING:
    from pydicom import Dataset

# Below this a dose, Bq, was written in MBq.
_LEAST_DOSE = 10_000.0


def suv_factor(frames: Sequence[Frame]) -> tuple[float | None, str]:
    """The factor from modality values to SUV by body weight, and the unit if there is none with the reason.

    Body-weight SUV as the Quantitative Imaging Biomarkers Alliance defines it: Bq/mL * weight in g / dose at
    the time to which the scanner corrected the decay.

    Returns:
        (factor, "") or (None, "UNIT; why not"); the frames of a series share times and dose.
    """
    header = frames[0].file.header
    units = header.get("Units")
    if units == "GML":
        return 1.0, ""
    if units == "CNTS":
        factor = _number(_private(header, 0x7053, "Philips PET Private Group", 0x00))
        if factor:
            return factor, ""
        to_activity = _number(_private(header, 0x7053, "Philips PET Private Group", 0x09))
        if not to_activity:
            return None, "counts; no scale to activity"
    elif units == "BQML":
        to_activity = 1.0
    else:
        return None, "; the unit is not stated"
    unit = "counts" if units == "CNTS" else "Bq/mL"  # values are scaled to activity with the factor alone
    if not {"ATTN", "DECY"} <= set(header.get("CorrectedImage") or ()):
        return None, f"{unit}; not corrected for attenuation and decay"
    weight = _number(header.get("PatientWeight"))
    if not weight:
        return None, f"{unit}; no body weight"
    doses = header.get("RadiopharmaceuticalInformationSequence")
    dose = _number(doses[0].get("RadionuclideTotalDose")) if doses else None
    if not dose:
        return None, f"{unit}; no injected dose"
    dose = dose * 1e6 if dose < _LEAST_DOSE else dose
    correction = header.get("DecayCorrection")
    if correction == "ADMIN":
        return to_activity * weight * 1000 / dose, ""
    if correction != "START":
        return None, f"{unit}; not decay-corrected to the start of the scan"
    half_life = _number(doses[0].get("RadionuclideHalfLife"))
    scanned = _scan_start(frames)
    injected = None if scanned is None else _injection(doses[0], scanned)
    if not half_life or scanned is None or injected is None:
        return None, f"{unit}; no half-life or times of injection and scan"
    seconds = (scanned - injected).total_seconds()
    if not 0 <= seconds < 86_400:
        return None, f"{unit}; the times of injection and scan do not fit"
    return to_activity * weight * 1000 / (dose * 2 ** (-seconds / half_life)), ""


def _scan_start(frames: Sequence[Frame]) -> datetime | None:
    """Series time, unless it was rewritten after the first acquisition."""
    header = frames[0].file.header
    series = _moment(header.get("SeriesDate"), header.get("SeriesTime"))
    taken = [
        _moment(frame.file.header.get("AcquisitionDate"), frame.file.header.get("AcquisitionTime"))
        for frame in frames
    ]
    earliest = min((moment for moment in taken if moment is not None), default=None)
    if series is not None and (earliest is None or series <= earliest):
        return series
    private = str(_private(header, 0x0009, "GEMS_PETD_01", 0x0D) or "")
    return _moment(private[:8], private[8:]) or earliest


def _injection(dose: Dataset, scanned: datetime) -> datetime | None:
    stated = str(dose.get("RadiopharmaceuticalStartDateTime") or "")
    if stated:
        return _moment(stated[:8], stated[8:].split("+")[0].split("-")[0])
    moment = _moment(scanned.strftime("%Y%m%d"), dose.get("RadiopharmaceuticalStartTime"))
    # A time without a date that lies after the scan was before midnight.
    return moment - timedelta(days=1) if moment is not None and moment > scanned else moment


def _moment(date, time) -> datetime | None:
    date, time = str(date or ""), str(time or "")
    whole, _, fraction = time.partition(".")
    try:
        moment = datetime.strptime(date + whole.ljust(6, "0"), "%Y%m%d%H%M%S")
        return moment + timedelta(seconds=float(f"0.{fraction or 0}"))
    except ValueError:
        return None


def _private(header: Dataset, group: int, creator: str, element: int):
    try:
        return header.private_block(group, creator)[element].value
    except KeyError:
        return None


def _number(value) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 < number < float("inf") else None
