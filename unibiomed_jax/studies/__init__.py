"""What an archive gives (DICOM, NIfTI, NRRD, pictures) as values at known places in a patient."""
