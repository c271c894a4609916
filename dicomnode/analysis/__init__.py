"""Analysis: from DICOM files to findings. Must never import storage or the network."""
