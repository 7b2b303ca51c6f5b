"""A second reader of frames, written from docs/format.md alone: slow, and obviously right.

What is transform coded is left to coded_reader and compacted_reader.
It shares no code with kvcached on purpose, so that a mistake has to be made twice to go unseen.
"""

import struct
from typing import Any

import ml_dtypes
import numpy as np
import zstandard


class Corrupt(Exception):  # noqa: N818
    """The frame does not add up."""


class Unsupported(Exception):  # noqa: N818
    """The frame uses something that version 1 does not know."""


MAGIC = bytes([0x89, 0x4B, 0x56, 0x46, 0x0D, 0x0A, 0x1A, 0x0A])
HEADER_BYTES = 168
RECORD_BYTES = 20
CHECKSUM_BYTES = 4
MAX_SECTIONS = 65_536
MAX_RECORDS_BYTES = 16 * 1024 * 1024
MAX_DIMS = 8

FIDELITIES = (COMPACTED, CODED, EXACT) = (1, 2, 3)
KEYS, VALUES, SINK_KEYS, SINK_VALUES, KEY_PLANE, VALUE_PLANE, OPAQUE = 1, 2, 3, 4, 5, 6, 16
KEPT, BIAS, KEY_ROWS, VALUE_ROWS = 7, 8, 9, 10
ALL_LAYERS = 65535
LOSSLESS, TRANSFORM = 1, 2
CODINGS = {
    **dict.fromkeys((KEYS, VALUES, SINK_KEYS, SINK_VALUES, KEPT, BIAS, OPAQUE), LOSSLESS),
    **dict.fromkeys((KEY_PLANE, VALUE_PLANE, KEY_ROWS, VALUE_ROWS), TRANSFORM),
}
KINDS_IN = {
    EXACT: (KEYS, VALUES, OPAQUE),
    CODED: (SINK_KEYS, SINK_VALUES, KEY_PLANE, VALUE_PLANE, OPAQUE),
    COMPACTED: (SINK_KEYS, SINK_VALUES, KEPT, BIAS, KEY_ROWS, VALUE_ROWS, OPAQUE),
}
DTYPES: dict[int, tuple[str, Any, int]] = {
    1: ("float16", np.float16, 2),
    2: ("bfloat16", ml_dtypes.bfloat16, 2),
    3: ("float32", np.float32, 4),
    4: ("float64", np.float64, 8),
    5: ("int8", np.int8, 1),
    6: ("int16", np.int16, 2),
    7: ("int32", np.int32, 4),
    8: ("int64", np.int64, 8),
    9: ("uint8", np.uint8, 1),
    10: ("uint16", np.uint16, 2),
    11: ("uint32", np.uint32, 4),
    12: ("uint64", np.uint64, 8),
    13: ("bool", np.bool_, 1),
}
BOOL = 13

Fields = dict[str, Any]


def read_frame(frame: bytes) -> Fields:
    """The fields of the header under their names in the document, and "sections", each with its array or payload."""
    header = _read_header(frame)
    records_end = HEADER_BYTES + header["records_bytes"]
    (expected,) = struct.unpack_from("<I", frame, records_end)
    if crc32c(frame[:records_end]) != expected:
        raise Corrupt("the checksum of header and records does not match")
    _check_header(header)
    records = _read_records(frame[HEADER_BYTES:records_end], header["n_sections"])
    payloads_start = records_end + CHECKSUM_BYTES
    if payloads_start + sum(record["payload_bytes"] for record in records) != len(frame):
        raise Corrupt("the payloads do not end where the frame ends")
    _check_kinds(header, records)
    if header["fidelity"] == EXACT:
        _check_dense(header, records)
    return {**header, "sections": _read_sections(frame, payloads_start, records)}


def crc32c(data: bytes) -> int:
    """CRC-32C: one table look-up for each byte."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _crc_of_one_byte(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)  # 0x1EDC6F41 with its bits reversed
    return byte


_CRC_TABLE = [_crc_of_one_byte(byte) for byte in range(256)]


def _read_header(frame: bytes) -> Fields:
    """All fields of the header. Only what is needed to find the first checksum is checked here."""
    if frame[0:8] != MAGIC:
        raise Corrupt("wrong magic")
    if len(frame) < HEADER_BYTES + CHECKSUM_BYTES:
        raise Corrupt("shorter than an empty frame")
    header: Fields = {
        "magic": frame[0:8],
        "version": struct.unpack_from("<H", frame, 8)[0],
        "flags": struct.unpack_from("<H", frame, 10)[0],
        "fidelity": frame[12],
        "lineage": frame[13],
        "reserved": struct.unpack_from("<H", frame, 14)[0],
        "n_layers": struct.unpack_from("<I", frame, 16)[0],
        "n_kv_heads": struct.unpack_from("<I", frame, 20)[0],
        "n_source_tokens": struct.unpack_from("<I", frame, 24)[0],
        "n_sections": struct.unpack_from("<I", frame, 28)[0],
        "first_position": struct.unpack_from("<Q", frame, 32)[0],
        "frame_bytes": struct.unpack_from("<Q", frame, 40)[0],
        "records_bytes": struct.unpack_from("<I", frame, 48)[0],
        "am_ratio": struct.unpack_from("<f", frame, 52)[0],
        "profile": frame[56:72],
        "model_id": frame[72:104],
        "block_hash": frame[104:136],
        "bundle_id": frame[136:168],
    }
    # Another version may lay out everything that follows in another way, so this comes before all else.
    if header["version"] != 1:
        raise Unsupported(f"version {header['version']}")
    if header["frame_bytes"] != len(frame):
        raise Corrupt("frame_bytes is not the length of the frame")
    if header["n_sections"] > MAX_SECTIONS:
        raise Corrupt("too many sections")
    if header["records_bytes"] > MAX_RECORDS_BYTES:
        raise Corrupt("too many bytes of records")
    if HEADER_BYTES + header["records_bytes"] + CHECKSUM_BYTES > len(frame):
        raise Corrupt("the records go beyond the end of the frame")
    return header


def _check_header(header: Fields) -> None:
    if header["flags"] != 0:
        raise Unsupported(f"flags {header['flags']}")
    if header["fidelity"] not in FIDELITIES or header["lineage"] not in FIDELITIES:
        raise Unsupported(f"fidelity {header['fidelity']}, lineage {header['lineage']}")
    profile = header["profile"].rstrip(b"\0")
    if b"\0" in profile or not profile.isascii():
        raise Corrupt("the profile is not ASCII, padded with zero bytes")
    if header["fidelity"] == EXACT and profile:
        raise Corrupt("an EXACT frame with a profile")
    if header["fidelity"] != COMPACTED and header["am_ratio"] != 0:
        raise Corrupt("an am_ratio, but not COMPACTED")
    header["profile"] = profile.decode("ascii")


def _read_records(data: bytes, n_sections: int) -> list[Fields]:
    records, at = [], 0
    for _ in range(n_sections):
        record, at = _read_record(data, at)
        records.append(record)
    if at != len(data):
        raise Corrupt("bytes between the last record and its checksum")
    return records


def _read_record(data: bytes, at: int) -> tuple[Fields, int]:
    """One record, and where the next one starts."""
    if at + RECORD_BYTES > len(data):
        raise Corrupt("a record goes beyond the end of the records")
    kind, coding, dtype, n_dims, layer, name_bytes, payload_bytes, checksum = struct.unpack_from("<BBBBHHQI", data, at)
    if kind not in CODINGS or coding != CODINGS[kind] or dtype not in DTYPES:
        raise Unsupported(f"kind {kind}, coding {coding}, dtype {dtype}")
    if n_dims > MAX_DIMS:
        raise Corrupt("too many dims")
    dims_start = at + RECORD_BYTES
    name_start = dims_start + 4 * n_dims
    end = name_start + name_bytes
    if end > len(data):
        raise Corrupt("a record goes beyond the end of the records")
    if name_bytes and kind != OPAQUE:
        raise Corrupt("a name on a section that is not opaque")
    shape = struct.unpack_from(f"<{n_dims}I", data, dims_start)
    record = {"kind": kind, "dtype": dtype, "layer": layer, "payload_bytes": payload_bytes, "crc32c": checksum}
    return {**record, "shape": shape, "name": _utf8(data[name_start:end])}, end


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Corrupt("a name that is not UTF-8") from error


def _check_kinds(header: Fields, records: list[Fields]) -> None:
    """No section of another fidelity."""
    if any(record["kind"] not in KINDS_IN[header["fidelity"]] for record in records):
        raise Corrupt("a section that does not belong into a frame of this fidelity")


def _check_dense(header: Fields, records: list[Fields]) -> None:
    """One section of keys and one of values for each dense layer, in the order of layers, of the stated shape."""
    for kind in (KEYS, VALUES):
        sections = [record for record in records if record["kind"] == kind]
        # The lengths first: n_layers may be four thousand million, and a list of so many numbers should not be built.
        if len(sections) != header["n_layers"] or [s["layer"] for s in sections] != list(range(len(sections))):
            raise Corrupt("not one section for every dense layer, in the order of layers")
        for section in sections:
            if len(section["shape"]) != 3:
                raise Corrupt("a dense section that has not three dims")
            if section["shape"][:2] != (header["n_kv_heads"], header["n_source_tokens"]):
                raise Corrupt("a dense section of another shape")
            if section["shape"][2] != sections[0]["shape"][2]:
                raise Corrupt("a head_dim that differs between layers")


def _read_sections(frame: bytes, at: int, records: list[Fields]) -> list[Fields]:
    sections = []
    for record in records:
        payload = frame[at : at + record["payload_bytes"]]
        at += record["payload_bytes"]
        if crc32c(payload) != record["crc32c"]:
            raise Corrupt("the checksum of a payload does not match")
        section = {key: record[key] for key in ("kind", "layer", "name", "shape")}
        section["dtype"] = DTYPES[record["dtype"]][0]
        if CODINGS[record["kind"]] == TRANSFORM:
            section["payload"] = payload
        else:
            section["array"] = _read_tensor(payload, record["dtype"], record["shape"])
        sections.append(section)
    return sections


def _read_tensor(payload: bytes, dtype: int, shape: tuple[int, ...]) -> np.ndarray:
    _, numpy_dtype, size = DTYPES[dtype]
    n = 1
    for dim in shape:
        n *= dim
    planes = [_read_plane(stored, n) for stored in _split_planes(payload, size)]
    elements = bytearray(n * size)
    for i, plane in enumerate(planes):
        elements[i::size] = plane
    flat = np.frombuffer(bytes(elements), dtype=np.dtype(numpy_dtype).newbyteorder("<"))
    try:
        return flat.reshape(shape)
    except ValueError as error:  # a dim of 0 among others so large that NumPy cannot count what they would span
        raise Corrupt(f"no array can have the shape {shape}") from error


def _split_planes(payload: bytes, size: int) -> list[bytes]:
    if len(payload) < 4 * size:
        raise Corrupt("a payload shorter than its table of planes")
    lengths = struct.unpack_from(f"<{size}I", payload, 0)
    if 4 * size + sum(lengths) != len(payload):
        raise Corrupt("the planes do not fill the payload")
    planes, at = [], 4 * size
    for length in lengths:
        planes.append(payload[at : at + length])
        at += length
    return planes


def _read_plane(stored: bytes, n: int) -> bytes:
    """The `n` bytes of one plane."""
    if len(stored) == n:
        return stored
    try:
        if zstandard.get_frame_parameters(stored).content_size != n:
            raise Corrupt("a zstd frame that does not claim n bytes")
        decoder = zstandard.ZstdDecompressor().decompressobj()
        plane = decoder.decompress(stored)
    except zstandard.ZstdError as error:
        raise Corrupt("a plane that is no zstd frame") from error
    if not decoder.eof or decoder.unused_data or len(plane) != n:
        raise Corrupt("a plane that is not one zstd frame of n bytes")
    return plane
