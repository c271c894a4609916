"""Names in every character set of PS3.3 C.12.1.1.2, as bytes on the wire, show as what a person would write."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from dimse_cases import a_dataset, encoded, received

from dicomnode.dimse.scp import NAME_DELIMITERS, decode_text, read_header

# Where PS3.5 annexes H to K give an example, it stands here.
NAMES = [
    ("ISO_IR 6", b"Doe^Jane", "Doe^Jane"),
    ("", b"Doe^Jane", "Doe^Jane"),
    ("ISO_IR 100", b"Buc^J\xe9r\xf4me", "Buc^Jérôme"),
    ("ISO_IR 100", b"\xc4neas^R\xfcdiger", "Äneas^Rüdiger"),
    ("ISO_IR 101", b"Wa\xb3\xeasa^Stanis\xb3aw", "Wałęsa^Stanisław"),
    ("ISO_IR 109", b"Bor\xf5^\xd5or\xf5", "Borġ^Ġorġ"),
    ("ISO_IR 110", b"\xaeukauskait\xec^R\xfeta", "Žukauskaitė^Rūta"),
    ("ISO_IR 144", b"\xbb\xee\xdace\xdc\xd1yp\xd3", "Люкceмбypг"),
    ("ISO_IR 127", b"\xe2\xc8\xc7\xe6\xea^\xe4\xe6\xd2\xc7\xd1", "قباني^لنزار"),
    ("ISO_IR 126", b"\xc4\xe9\xef\xed\xf5\xf3\xe9\xef\xf2", "Διονυσιος"),
    ("ISO_IR 138", b"\xf9\xf8\xe5\xef^\xe3\xe1\xe5\xf8\xe4", "שרון^דבורה"),
    ("ISO_IR 148", b"\xc7avu\xfeo\xf0lu^\xddbrahim", "Çavuşoğlu^İbrahim"),
    ("ISO_IR 203", b"\xbcuvrard^Zo\xeb=\xa4", "Œuvrard^Zoë=€"),
    ("ISO_IR 13", b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3", "ﾔﾏﾀﾞ^ﾀﾛｳ"),
    ("ISO_IR 166", b"\xca\xc1\xaa\xd2\xc2^\xe3\xa8\xb4\xd5", "สมชาย^ใจดี"),
    ("ISO_IR 192", b"Wang^XiaoDong=\xe7\x8e\x8b^\xe5\xb0\x8f\xe6\x9d\xb1=", "Wang^XiaoDong=王^小東="),
    ("GB18030", b"Wang^XiaoDong=\xcd\xf5^\xd0\xa1\xb6\xab=", "Wang^XiaoDong=王^小东="),
    ("GB18030", b"\x95\x32\x82\x36", "𠀀"),  # four bytes a character
    ("GBK", b"Wang^XiaoDong=\xcd\xf5^\xd0\xa1\xb6\xab=", "Wang^XiaoDong=王^小东="),
    ("GBK", b"\x96|\x90^", "東恀"),  # the second byte is no delimiter
    (
        "\\ISO 2022 IR 87",
        b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B",
        "Yamada^Tarou=山田^太郎=やまだ^たろう",
    ),
    (
        "ISO 2022 IR 13\\ISO 2022 IR 87",
        b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J=\x1b$B$d$^$@\x1b(J^\x1b$B$?$m$&\x1b(J",
        "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう",
    ),
    ("\\ISO 2022 IR 87\\ISO 2022 IR 159", b"\x1b$BAp\x1b$(D<t\x1b(B^\x1b$B9d\x1b(B", "草彅^剛"),
    (
        "\\ISO 2022 IR 149",
        b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6\xb5\xbf",
        "Hong^Gildong=洪^吉洞=홍^길동",
    ),
    ("\\ISO 2022 IR 58", b"Zhang^XiaoDong=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1\xb6\xab=", "Zhang^XiaoDong=张^小东="),
    ("ISO 2022 IR 6\\ISO 2022 IR 100", b"\x1b-ABuc^\x1b-AJ\xe9r\xf4me", "Buc^Jérôme"),
    ("ISO 2022 IR 100\\ISO 2022 IR 144", b"\x1b-L\xbb\xee\xda^J\xe9r\xf4me", "Люк^Jérôme"),  # ^ ends the extension
    ("ISO 2022 IR 100\\ISO 2022 IR 126", b"Dionysios=\x1b-F\xc4\xe9\xef\xed", "Dionysios=Διον"),
    ("\\ISO 2022 IR 101", b"\x1b-BWa\xb3\xeasa", "Wałęsa"),
    ("\\ISO 2022 IR 109", b"\x1b-CBor\xf5", "Borġ"),
    ("\\ISO 2022 IR 110", b"\x1b-D\xaeuk", "Žuk"),
    ("\\ISO 2022 IR 127", b"\x1b-G\xe2\xc8\xc7\xe6\xea", "قباني"),
    ("\\ISO 2022 IR 138", b"\x1b-H\xf9\xf8\xe5\xef", "שרון"),
    ("\\ISO 2022 IR 148", b"\x1b-M\xc7avu\xfeo\xf0lu", "Çavuşoğlu"),
    ("\\ISO 2022 IR 166", b"\x1b-T\xca\xc1\xaa\xd2\xc2", "สมชาย"),
    ("\\ISO 2022 IR 203", b"\x1b-b\xbcuvre", "Œuvre"),
]


@pytest.mark.parametrize(("sets", "value", "name"), NAMES)
def test_a_name_is_read_as_it_was_meant(sets, value, name):
    character_sets = tuple(sets.split("\\"))
    assert decode_text(value, character_sets, delimiters=NAME_DELIMITERS) == name
    padded = value + b" " * (len(value) % 2)
    assert decode_text(padded, character_sets, delimiters=NAME_DELIMITERS) == name
    dataset = a_dataset(PatientName=None)
    tail = b"\x10\x00\x10\x00PN" + len(padded).to_bytes(2, "little") + padded
    charset = (sets + " " * (len(sets) % 2)).encode()
    head = b"\x08\x00\x05\x00CS" + len(charset).to_bytes(2, "little") + charset
    data = head + encoded(dataset) + tail
    assert read_header(received(data, uid=dataset.SOPInstanceUID), data, "").patient_name == name


@pytest.mark.system
@pytest.mark.parametrize(
    ("codec", "sets"),
    [
        ("ISO-8859-1", "ISO_IR 100"), ("ISO-8859-2", "ISO_IR 101"), ("ISO-8859-3", "ISO_IR 109"), ("ISO-8859-4", "ISO_IR 110"),
        ("ISO-8859-5", "ISO_IR 144"), ("ISO-8859-6", "ISO_IR 127"), ("ISO-8859-7", "ISO_IR 126"), ("ISO-8859-8", "ISO_IR 138"),
        ("ISO-8859-9", "ISO_IR 148"), ("ISO-8859-15", "ISO_IR 203"), ("TIS-620", "ISO_IR 166"),
    ],
)  # fmt: skip
def test_each_byte_of_a_single_byte_set_means_what_the_c_library_says(codec, sets):
    if shutil.which("iconv") is None:
        pytest.skip("iconv is not installed (apt-get install libc-bin)")
    letters = [b"a%cb" % value for value in range(0xA1, 0x100)]
    # -c leaves out what the set does not have
    told = subprocess.run(["iconv", "-c", "-f", codec, "-t", "UTF-8"], input=b"\n".join(letters), capture_output=True, check=False)
    meant = ["a\ufffdb" if text == "ab" else text for text in told.stdout.decode().split("\n")]
    assert [decode_text(value, (sets,)) for value in letters] == meant


@pytest.mark.parametrize(
    ("sets", "value", "shown"),
    [
        ("ISO_IR 192", b"M\xfcller", "M\ufffdller"),
        ("ISO_IR 192", b"\xed\xa0\x80\xf0\x90", "\ufffd" * 4),  # a surrogate, and half a character
        ("GB18030", b"a\xff", "a\ufffd"),
        ("\\ISO 2022 IR 87", b"\x1b$B;", "\ufffd"),  # half a character
        ("\\ISO 2022 IR 149", b"\x1b$)C\xfb", "\ufffd"),
        ("ISO_IR 127", b"\xa1", "\ufffd"),  # no such letter
        ("ISO_IR 999", b"M\xfcller", "Müller"),
        ("utf_16", b"M\xfcller", "Müller"),  # codecs of the language that are no character sets of the standard
        ("idna", b"a.b", "a.b"),
        ("rot13", b"abc", "abc"),
    ],
)
def test_wrong_bytes_and_wrong_sets_show_as_such(sets, value, shown):
    assert decode_text(value, tuple(sets.split("\\"))) == shown


def test_a_text_of_escapes_alone_shows_nothing():
    assert decode_text(b"\x1b$B\x1b(B" * 682, ("", "ISO 2022 IR 87")) == ""
