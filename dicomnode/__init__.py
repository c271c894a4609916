"""dicomnode: a DICOM node that runs CNNs on incoming studies and returns SEG and SR to the PACS."""
