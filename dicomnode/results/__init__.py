"""Results: from findings to DICOM SEG and SR. The only importer of highdicom."""
