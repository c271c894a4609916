"""DIMSE: the only room that speaks the DICOM network protocol and the only importer of pynetdicom."""
