"""What the Storage SCP accepts and refuses, and with which status."""

import contextlib
import hashlib
import mmap
from io import BytesIO

import pydicom
import pytest
from dimse_cases import BIG_ENDIAN, CT, EXPLICIT, HEVC, IMPLICIT, JPEG_2000, SEG, a_dataset, encapsulated, encoded, received, split_part10
from hypothesis import given, settings, strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from dicomnode.dimse.encoding import Limits
from dicomnode.dimse.scp import ReceivedInstance, _plane, decode_text, is_uid, part10_prefix, read_header
from dicomnode.errors import CannotUnderstand, DataSetDoesNotMatchSOPClass, PixelDataTooShort, StoreRefused
from storage.records import InstanceHeader

LIMITS = Limits()


def read_whole(instance: ReceivedInstance, limits: Limits = LIMITS) -> InstanceHeader:
    return read_header(instance, instance.dataset, hashlib.sha256(instance.dataset).hexdigest(), limits=limits)


def header_of(dataset, syntax=EXPLICIT, tail=b"", limits=LIMITS, **declared):
    data = encoded(dataset, syntax) + tail
    return read_whole(received(data, uid=dataset.SOPInstanceUID, sop_class=dataset.SOPClassUID, syntax=syntax, **declared), limits)


def refusal_of(error, *args, **kwargs):
    """The refusal, which fits into an Error Comment and says nothing of the patient."""
    with pytest.raises(error) as caught:
        header_of(*args, **kwargs)
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.isascii()
    assert len(message) <= 64
    assert "Doe" not in message
    return caught.value


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG_ENDIAN])
def test_the_header_says_what_the_data_set_says(syntax):
    dataset = a_dataset()
    header = header_of(dataset, syntax)
    assert (header.sop_instance_uid, header.sop_class_uid, header.transfer_syntax_uid) == (dataset.SOPInstanceUID, CT, syntax)
    assert (header.study_instance_uid, header.series_instance_uid) == ("1.2.3.4", "1.2.3.4.5")
    assert (header.patient_name, header.patient_id, header.accession_number) == ("Doe^Jane", "P1", "A1")
    assert (header.modality, header.kind, header.study_date) == ("CT", "image", "20260102")
    assert (header.instance_number, header.series_number) == (7, 2)
    assert header.dataset_sha256 == hashlib.sha256(encoded(dataset, syntax)).hexdigest()
    assert (header.calling_ae_title, header.called_ae_title) == ("SCANNER", "DICOMNODE")
    assert (header.requested_priority, header.note) == ("routine", "")


@pytest.mark.parametrize(
    ("position", "orientation", "expected"),
    [
        ([-120.5, -99.25, 12.5], [1, 0, 0, 0, 1, 0], ("1 0 0 0 1 0", 12.5)),
        ([-120.5, -99.25, 12.5], [0.9999, 0.0012, -0.0004, 0, 1, 0], ("1 0 0 0 1 0", 12.451)),
        ([7, -99.25, 12.5], [0, 1, 0, 0, 0, -1], ("0 1 0 0 0 -1", -7.0)),
        ([-120.5, -99.25], [1, 0, 0, 0, 1, 0], ("", None)),
        ([-120.5, -99.25, 12.5], [1, 0, 0, 0, 1], ("", None)),
        ([-120.5, -99.25, 12.5], None, ("", None)),
        (None, [1, 0, 0, 0, 1, 0], ("", None)),
    ],
)
def test_an_image_that_is_a_plane_in_space_says_where_along_its_normal_it_lies(position, orientation, expected):
    header = header_of(a_dataset(ImagePositionPatient=position or [], ImageOrientationPatient=orientation or []))
    assert (header.orientation, header.position) == expected


@pytest.mark.parametrize("value", [b"1\\0\\0\\0\\1\\x ", b"1e400\\0\\0\\0\\1\\0", b"0\\" * 5000, b"nan\\0\\0\\0\\1\\0 "])
def test_a_direction_that_is_none_is_nowhere(value):
    values = {0x00200032: b"0\\0\\5 ", 0x00200037: value}
    assert _plane(values) == ("", None)


def test_the_number_of_images_in_an_acquisition_is_that_of_images_with_one_frame():
    assert header_of(a_dataset(AcquisitionNumber=3, ImagesInAcquisition=200)).images_in_acquisition == 200
    assert header_of(a_dataset(ImagesInAcquisition=200, NumberOfFrames=1)).images_in_acquisition == 200
    assert header_of(a_dataset(ImagesInAcquisition=200, NumberOfFrames=2, Rows=2)).images_in_acquisition is None
    assert header_of(a_dataset(AcquisitionNumber=3)).acquisition_number == 3


def test_the_stored_file_is_our_meta_information_and_the_bytes_that_came():
    dataset = a_dataset()
    instance = received(encoded(dataset), uid=dataset.SOPInstanceUID)
    content = part10_prefix(instance) + instance.dataset
    assert split_part10(content)[1] == instance.dataset
    read = pydicom.dcmread(BytesIO(content))
    assert content[:128] == bytes(128)
    assert read.file_meta.MediaStorageSOPInstanceUID == read.SOPInstanceUID == dataset.SOPInstanceUID
    assert read.file_meta.MediaStorageSOPClassUID == CT
    assert read.file_meta.TransferSyntaxUID == EXPLICIT
    assert read.file_meta.SourceApplicationEntityTitle == "SCANNER"
    assert read.PixelData == bytes(48)


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG_ENDIAN])
def test_no_part_of_an_image_passes_for_the_whole(syntax):
    dataset = a_dataset(RequestAttributesSequence=Sequence([a_dataset(PixelData=None, Rows=None)]))
    data = encoded(dataset, syntax)
    for length in range(len(data)):
        with pytest.raises(StoreRefused):
            read_whole(received(data[:length], uid=dataset.SOPInstanceUID, syntax=syntax))


def test_bytes_after_the_last_element_are_refused():
    refusal_of(CannotUnderstand, a_dataset(), tail=b"\x00\x00")


def test_a_refusal_names_the_study_as_far_as_it_was_read():
    dataset = a_dataset()
    data = encoded(dataset)
    with pytest.raises(CannotUnderstand) as caught:
        read_whole(received(data[:-10], uid=dataset.SOPInstanceUID))
    assert caught.value.study_instance_uid == "1.2.3.4"
    with pytest.raises(CannotUnderstand) as caught:
        read_whole(received(data[:40], uid=dataset.SOPInstanceUID))
    assert caught.value.study_instance_uid is None


def test_another_transfer_syntax_than_negotiated_is_refused():
    dataset = a_dataset()
    for written, declared in [(IMPLICIT, EXPLICIT), (EXPLICIT, IMPLICIT), (BIG_ENDIAN, EXPLICIT), (EXPLICIT, BIG_ENDIAN)]:
        with pytest.raises(CannotUnderstand):
            read_whole(received(encoded(dataset, written), uid=dataset.SOPInstanceUID, syntax=declared))


@pytest.mark.parametrize(
    "tail",
    [
        b"\x01\x00\x00\x00UN\x00\x00",  # group 0001 is forbidden
        b"\x02\x00\x10\x00UI\x02\x001\x00",  # file meta information inside the data set
        b"\xff\x00\x01\x00LO\x03\x00abc",  # odd length
        b"\xff\x00\x01\x00??\x02\x00ab",  # no VR of the standard
        b"\xff\x00\x01\x00LO\x08\x00ab",  # longer than the data set
        b"\xff\x00\x01\x00OB\x00\x00\xff\xff\xff\xff",  # undefined length where none is allowed
        b"\xff\x00\x01\x00SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff\xfe\xff\x0d\xe0\x00\x00\x00\x00",  # no end
        b"\xff\x00\x01\x00SQ\x00\x00\x08\x00\x00\x00\xfe\xff\x00\xe0\x04\x00\x00\x00",  # item longer than its sequence
        b"\xff\x00\x01\x00SQ\x00\x00\x08\x00\x00\x00\x08\x00\x05\x00CS\x00\x00",  # no item
        b"\xfe\xff\x00\xe0\x00\x00\x00\x00",  # an item outside a sequence
        b"\x10\x00\x10\x00PN\x04\x00Roe ",  # a second patient
    ],
)
def test_a_malformed_element_is_refused(tail):
    refusal_of(CannotUnderstand, a_dataset(), tail=tail)


def test_sequences_of_every_encoding_are_walked():
    item = b"\xfe\xff\x00\xe0\x0a\x00\x00\x00\x08\x00\x05\x00CS\x02\x00A "
    open_item = b"\xfe\xff\x00\xe0\xff\xff\xff\xff\x08\x00\x05\x00CS\x02\x00A \xfe\xff\x0d\xe0\x00\x00\x00\x00"
    implicit_item = b"\xfe\xff\x00\xe0\x0a\x00\x00\x00\x08\x00\x05\x00\x02\x00\x00\x00A "
    end = b"\xfe\xff\xdd\xe0\x00\x00\x00\x00"
    defined = b"\xf0\x7f\x01\x00SQ\x00\x00\x12\x00\x00\x00" + item
    undefined = b"\xf0\x7f\x02\x00SQ\x00\x00\xff\xff\xff\xff" + item + open_item + end
    unknown = b"\xf0\x7f\x03\x00UN\x00\x00\xff\xff\xff\xff" + implicit_item + end  # PS3.5 6.2.2 note 2
    assert header_of(a_dataset(), tail=defined + undefined + unknown).kind == "image"


@pytest.mark.parametrize(("depth", "accepted"), [(64, True), (65, False)])
def test_sequences_nest_up_to_64_deep(depth, accepted):
    opened = (b"\xf0\x7f\x01\x00SQ\x00\x00\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * depth
    closed = (b"\xfe\xff\x0d\xe0\x00\x00\x00\x00" + b"\xfe\xff\xdd\xe0\x00\x00\x00\x00") * depth
    if accepted:
        assert header_of(a_dataset(), tail=opened + closed).kind == "image"
    else:
        refusal_of(CannotUnderstand, a_dataset(), tail=opened + closed)


def test_the_setting_lowers_how_deep_sequences_nest():
    opened = (b"\xf0\x7f\x01\x00SQ\x00\x00\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * 4
    closed = (b"\xfe\xff\x0d\xe0\x00\x00\x00\x00" + b"\xfe\xff\xdd\xe0\x00\x00\x00\x00") * 4
    assert header_of(a_dataset(), tail=opened + closed, limits=Limits(maximum_nesting=4)).kind == "image"
    refusal_of(CannotUnderstand, a_dataset(), tail=opened + closed, limits=Limits(maximum_nesting=3))


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG_ENDIAN])
def test_a_data_set_is_read_from_anywhere_in_bytes_or_a_mapped_file(syntax, tmp_path):
    dataset = a_dataset(RequestAttributesSequence=Sequence([a_dataset(PixelData=None, RequestedProcedurePriority="STAT")]))
    instance = received(encoded(dataset, syntax), uid=dataset.SOPInstanceUID, syntax=syntax)
    header = read_header(instance, instance.dataset, "digest")
    prefix = part10_prefix(instance)
    assert read_header(instance, prefix + instance.dataset, "digest", start=len(prefix)) == header
    file = tmp_path / "object"
    file.write_bytes(prefix + instance.dataset)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert read_header(instance, mapped, "digest", start=len(prefix)) == header
        with pytest.raises(CannotUnderstand):
            read_header(instance, mapped, "digest", start=len(mapped))


@pytest.mark.parametrize("uid", ["1.2.3/../../etc/passwd", "1..2", ".1", "1.", "1.2.x", "", "1" * 65, "1.2.3 4", "١.٢"])
def test_what_is_no_uid_is_refused(uid):
    assert not is_uid(uid)
    dataset = a_dataset()
    with pytest.raises(CannotUnderstand):
        read_whole(received(encoded(dataset), uid=uid))


def raw_element(group, element, vr, value):
    return group.to_bytes(2, "little") + element.to_bytes(2, "little") + vr + len(value).to_bytes(2, "little") + value


@pytest.mark.parametrize(("element", "keyword"), [(0x000D, "StudyInstanceUID"), (0x000E, "SeriesInstanceUID")])
@pytest.mark.parametrize("value", [None, b"", b"../../x ", b"1.2/3\x00"])
def test_study_and_series_need_a_valid_uid(element, keyword, value):
    tail = b"" if value is None else raw_element(0x0020, element, b"UI", value)
    refusal_of(CannotUnderstand, a_dataset(**{keyword: None}), tail=tail)


def test_a_uid_with_leading_zeros_and_padding_is_a_uid():
    tail = raw_element(0x0020, 0x000D, b"UI", b"1.02.3\x00\x00")
    assert header_of(a_dataset(StudyInstanceUID=None), tail=tail).study_instance_uid == "1.02.3"


def test_command_context_and_data_set_must_agree():
    dataset = a_dataset()
    data = encoded(dataset)
    cases = [
        {"uid": "1.2.3"},
        {"uid": dataset.SOPInstanceUID, "sop_class": "1.2.840.10008.5.1.4.1.1.4"},
        {"uid": dataset.SOPInstanceUID, "context": "1.2.840.10008.5.1.4.1.1.4"},
        {"uid": dataset.SOPInstanceUID, "sop_class": "1.2.3"},
    ]
    for case in cases:
        with pytest.raises(DataSetDoesNotMatchSOPClass):
            read_whole(received(data, **case))
    refusal_of(DataSetDoesNotMatchSOPClass, a_dataset(), context="1.2.840.10008.5.1.4.1.1.4")


NATIVE = [
    ({}, 48),
    ({"NumberOfFrames": 3}, 144),
    ({"BitsAllocated": 1, "NumberOfFrames": 5}, 15),
    ({"BitsAllocated": 1, "Rows": 3, "Columns": 3, "NumberOfFrames": 3}, 4),
    ({"BitsAllocated": 8, "SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, 72),
    ({"BitsAllocated": 8, "SamplesPerPixel": 3, "PhotometricInterpretation": "YBR_FULL_422"}, 48),
    ({"BitsAllocated": 8, "SamplesPerPixel": 3, "PhotometricInterpretation": "YBR_FULL"}, 72),
    ({"BitsAllocated": 32}, 96),
]


@pytest.mark.parametrize("syntax", [EXPLICIT, BIG_ENDIAN])
@pytest.mark.parametrize(("attributes", "size"), NATIVE)
def test_native_pixel_data_is_as_long_as_its_header_says(attributes, size, syntax):
    even = size + size % 2
    assert header_of(a_dataset(**attributes, PixelData=bytes(even)), syntax).note == ""
    assert header_of(a_dataset(**attributes, PixelData=bytes(even + 6)), syntax).note == "pixel data has 6 bytes more than its header says"
    refusal = refusal_of(PixelDataTooShort, a_dataset(**attributes, PixelData=bytes(even - 2)), syntax)
    assert refusal.dimse_status == 0xC002


def test_pixel_data_without_its_padding_byte_is_noted():
    pixels = b"\xe0\x7f\x10\x00OW\x00\x00\x0f\x00\x00\x00" + bytes(15)
    dataset = a_dataset(BitsAllocated=8, Rows=3, Columns=5, PixelData=None)
    assert header_of(dataset, tail=pixels).note == "pixel data has an odd length"


@pytest.mark.parametrize(("keyword", "size"), [("FloatPixelData", 96), ("DoubleFloatPixelData", 192)])
def test_float_pixel_data_is_measured_too(keyword, size):
    whole = a_dataset(PixelData=None, BitsAllocated=size // 3, **{keyword: bytes(size)})
    assert header_of(whole).note == ""
    refusal_of(PixelDataTooShort, a_dataset(PixelData=None, **{keyword: bytes(size - 8)}))


@pytest.mark.parametrize(
    "attributes", [{"Rows": None}, {"Columns": 0}, {"BitsAllocated": None}, {"NumberOfFrames": 0}, {"PixelData": None}]
)
def test_an_image_needs_pixels_and_their_header(attributes):
    refusal_of(PixelDataTooShort, a_dataset(**attributes))


def test_a_report_needs_no_pixels_but_a_segmentation_that_has_rows_does():
    report = a_dataset("1.2.840.10008.5.1.4.1.1.88.34", PixelData=None, Rows=None, Columns=None, BitsAllocated=None)
    assert header_of(report).kind == "other"
    refusal_of(PixelDataTooShort, a_dataset(SEG, PixelData=None))


@pytest.mark.parametrize(("syntax", "frames", "fragments"), [(JPEG_2000, 1, 1), (JPEG_2000, 1, 3), (JPEG_2000, 3, 3), (HEVC, 100, 1)])
def test_encapsulated_pixel_data_is_whole(syntax, frames, fragments):
    tail = encapsulated(*[bytes(10)] * fragments)
    assert header_of(a_dataset(PixelData=None, NumberOfFrames=frames), syntax, tail).note == ""


@pytest.mark.parametrize(
    "tail",
    [
        encapsulated(),
        encapsulated(bytes(10)),
        encapsulated(bytes(10), bytes(10), delimiter=False),
        encapsulated(bytes(10), bytes(10))[:-14],
        encapsulated(bytes(9), bytes(10)),
        b"\xe0\x7f\x10\x00OB\x00\x00\xff\xff\xff\xff\xfe\xff\xdd\xe0\x00\x00\x00\x00",
        b"\xe0\x7f\x10\x00OB\x00\x00\xff\xff\xff\xff" + bytes(20),
        b"\xe0\x7f\x10\x00OB\x00\x00\x64\x00\x00\x00" + bytes(100),
    ],
)
def test_broken_encapsulated_pixel_data_is_refused(tail):
    refusal_of(PixelDataTooShort, a_dataset(PixelData=None, NumberOfFrames=2), JPEG_2000, tail)


def test_encapsulated_pixel_data_in_a_native_transfer_syntax_is_refused():
    refusal_of(PixelDataTooShort, a_dataset(PixelData=None), EXPLICIT, encapsulated(bytes(48)))


def test_the_pixels_of_an_icon_are_not_those_of_the_image():
    icon = a_dataset(Rows=2, Columns=2, PixelData=bytes(8))
    assert header_of(a_dataset(IconImageSequence=Sequence([icon]))).note == ""
    refusal_of(PixelDataTooShort, a_dataset(IconImageSequence=Sequence([icon]), PixelData=None))


@pytest.mark.parametrize(("value", "priority"), [("STAT", "stat"), ("stat", "stat"), ("HIGH", "routine"), ("", "routine")])
def test_the_requested_procedure_priority_is_read_where_scanners_write_it(value, priority):
    item = Dataset()
    item.RequestedProcedurePriority = value
    assert header_of(a_dataset(RequestAttributesSequence=Sequence([item]))).requested_priority == priority
    assert header_of(a_dataset(RequestedProcedurePriority=value)).requested_priority == priority


@pytest.mark.parametrize(
    ("value", "sets", "text"),
    [
        (b"Buc^J\xe9r\xf4me", ("ISO_IR 100",), "Buc^Jérôme"),
        ("Люкceмбypг".encode("iso8859-5"), ("ISO_IR 144",), "Люкceмбypг"),
        ("Wang^XiaoDong=王^小東".encode(), ("ISO_IR 192",), "Wang^XiaoDong=王^小東"),
        ("Wang^XiaoDong=王^小东".encode("gb18030"), ("GB18030",), "Wang^XiaoDong=王^小东"),
        (b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B", ("", "ISO 2022 IR 87"), "Yamada^Tarou=山田^太郎"),
        (b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7", ("", "ISO 2022 IR 149"), "Hong^Gildong=洪^吉洞"),
        (b"M\xfcller", (), "Müller"),
        (b"M\xfcller", ("NO SUCH SET",), "Müller"),
        (b"M\xfcller", ("ISO_IR 192",), "M\ufffdller"),
        (b"\x1b$", ("", "ISO 2022 IR 87"), "$"),
        (b"a\x00b\r\n", (), "a b"),
    ],
)
def test_text_is_decoded_by_its_character_set(value, sets, text):
    assert decode_text(value, sets) == text


@given(
    st.binary(max_size=80),
    st.lists(
        st.sampled_from(
            ["", "ISO 2022 IR 87", "ISO 2022 IR 159", "ISO 2022 IR 149", "ISO 2022 IR 58", "ISO_IR 192", "GB18030", "ISO_IR 13", "x"]
        ),
        max_size=3,
    ),
)
def test_no_bytes_are_too_odd_to_be_shown(value, sets):
    text = decode_text(value, tuple(sets))
    text.encode()  # no lone surrogate, which a database would refuse
    assert not any(ord(character) < 32 for character in text)


@settings(max_examples=300)
@given(st.data())
def test_damaged_data_sets_are_read_or_refused(data):
    syntax = data.draw(st.sampled_from([IMPLICIT, EXPLICIT, BIG_ENDIAN]))
    dataset = a_dataset(SOPInstanceUID="1.2.3", RequestAttributesSequence=Sequence([a_dataset(PixelData=None, SOPInstanceUID="1.2.3")]))
    damaged = bytearray(encoded(dataset, syntax))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(StoreRefused):  # anything else is a crash
        header = read_whole(received(bytes(damaged), uid="1.2.3", syntax=syntax))
        assert is_uid(header.study_instance_uid)
