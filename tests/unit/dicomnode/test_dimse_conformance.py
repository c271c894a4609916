"""The conformance statement in deploy/ is what the code renders."""

from pathlib import Path

from dicomnode.config import ListenerSection, NodeSection, Settings, TlsSection
from dicomnode.dimse.conformance import conformance_statement
from dicomnode.dimse.contexts import STORAGE_CLASSES, TRANSFER_SYNTAXES
from dicomnode.dimse.tls import SUITES
from dicomnode.errors import StoreRefused
from dicomnode.findings import Code
from dicomnode.results import codes

FILE = Path(__file__).resolve().parents[3] / "deploy" / "CONFORMANCE.md"


def test_the_file_in_deploy_is_what_the_code_renders():
    assert FILE.read_text(encoding="utf-8") == conformance_statement(Settings(), codes.PRIVATE) + "\n"


def test_every_class_syntax_and_status_is_stated():
    text = conformance_statement(Settings())
    for row in (*STORAGE_CLASSES, *TRANSFER_SYNTAXES):
        assert f"| `{row.uid}` |" in text
    for refusal in StoreRefused.__subclasses__():
        assert f"| {refusal.dimse_status:04X} |" in text


def test_every_private_code_of_the_results_is_stated():
    """A scheme that begins with 99 is private (PS3.16 8.2)."""
    private = [code for code in vars(codes).values() if isinstance(code, Code) and code.scheme.startswith("99")]
    assert private
    text = conformance_statement(Settings(), codes.PRIVATE)
    for code in private:
        assert f"| `{code.value}` | `{code.scheme}` | {code.meaning} |" in text


def test_every_limit_of_the_listener_and_every_setting_of_tls_is_stated_with_its_value():
    settings = Settings(listener=ListenerSection(maximum_nesting=13, maximum_half_open=77, least_bytes_per_second=99))
    text = conformance_statement(settings)
    for key in ListenerSection.model_fields:
        assert f"`listener.{key}`" in text or key == "host"
    for key in TlsSection.model_fields:
        assert f"`tls.{key}`" in text
    assert "| `listener.maximum_half_open` | 77 |" in text
    assert "| `listener.least_bytes_per_second` | 99 |" in text
    assert "more than 13 sequences inside each other" in text
    assert all(f"`{suite}`" in text for suite in SUITES)


def test_every_ae_title_and_the_tls_port_are_stated():
    files = {"certificate": Path("/secret/place/node.pem"), "key": Path("/secret/place/node.key"), "ca": Path("/secret/place/ca.pem")}
    node = NodeSection(ae_title="ONE", more_ae_titles=("TWO", "THREE"))
    text = conformance_statement(Settings(node=node, tls=TlsSection(port=12762, **files)))
    assert "| AE titles | `ONE`, `TWO`, `THREE` (`node.ae_title`, `node.more_ae_titles`) |" in text
    assert "| TCP port of DICOM over TLS | 12762 (`tls.port`) |" in text
    assert "| TCP port of DICOM over TLS | none: " in conformance_statement(Settings())
    assert "/secret" not in text  # the statement is for others


def test_the_deflated_syntax_is_stated_as_accepted_only_where_it_is():
    row = "| Deflated Explicit VR Little Endian | `1.2.840.10008.1.2.1.99` |"
    without, accepted = conformance_statement(Settings()), conformance_statement(Settings(listener=ListenerSection(accept_deflated=True)))
    assert without.index("Not accepted:") < without.index(row)
    assert accepted.index(row) < accepted.index("Not accepted:")
    assert accepted.count(row) == without.count(row) == 1
