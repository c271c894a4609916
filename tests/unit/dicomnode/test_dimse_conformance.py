"""The conformance statement in deploy/ is what the code renders."""

from pathlib import Path

from dicomnode.config import Settings
from dicomnode.dimse.conformance import conformance_statement
from dicomnode.dimse.contexts import STORAGE_CLASSES, TRANSFER_SYNTAXES
from dicomnode.errors import StoreRefused

FILE = Path(__file__).resolve().parents[3] / "deploy" / "CONFORMANCE.md"


def test_the_file_in_deploy_is_what_the_code_renders():
    assert FILE.read_text(encoding="utf-8") == conformance_statement(Settings()) + "\n"


def test_every_class_syntax_and_status_is_stated():
    text = conformance_statement(Settings())
    for row in (*STORAGE_CLASSES, *TRANSFER_SYNTAXES):
        assert f"| `{row.uid}` |" in text
    for refusal in StoreRefused.__subclasses__():
        assert f"| {refusal.dimse_status:04X} |" in text
