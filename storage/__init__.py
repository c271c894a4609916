"""The node's durable memory: DICOM objects on disk and everything known about them in one database.

Imports nothing of dicomnode, and is the only importer of SQLAlchemy.
"""
