"""The web role: DICOMweb over what the node holds (QIDO-RS, WADO-RS), and another way in (STOW-RS)."""
