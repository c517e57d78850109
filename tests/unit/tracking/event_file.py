"""A reader of TensorBoard's files, made from the definitions of tensorflow's messages alone."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any


def crc_bit_by_bit(data: bytes) -> int:
    """CRC-32C by division of polynomials, the slow way."""
    crc = 0xFFFFFFFF
    for byte in data:
        for bit in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 * ((crc ^ (byte >> bit)) & 1))
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc_bit_by_bit(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def read_frames(path: Path, *, checked: int = 50) -> list[bytes]:
    """Messages of a file; the checksums of the first ones are computed again."""
    content, found, place = path.read_bytes(), [], 0
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        (of_length,) = struct.unpack_from("<I", content, place + 8)
        data = content[place + 12 : place + 12 + length]
        (of_data,) = struct.unpack_from("<I", content, place + 12 + length)
        assert len(data) == length
        if len(found) < checked:
            assert of_length == masked(content[place : place + 8]) and of_data == masked(data)
        found.append(data)
        place += 16 + length
    return found


def fields(message: bytes) -> list[tuple[int, Any]]:
    """(number, value) of a message's fields."""
    found, place = [], 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(message):
        key = varint()
        number, kind = key >> 3, key & 7
        value: Any
        if kind == 0:
            value = varint()
        else:
            size = {1: 8, 5: 4}.get(kind) or varint()
            value = message[place : place + size]
            place += size
        found.append((number, value))
    return found


def read_events(path: Path) -> list[dict[str, Any]]:
    """Events as objects: step, time, and either version, scalar, text or picture."""
    events = []
    for data in read_frames(path):
        event = dict(fields(data))
        when, step = struct.unpack("<d", event[1])[0], event.get(2, 0)
        if 3 in event:
            events.append({"version": event[3].decode(), "time": when})
            continue
        for number, value in fields(event[5]):
            assert number == 1
            entry = dict(fields(value))
            shown: dict[str, Any] = {"tag": entry[1].decode(), "step": step, "time": when}
            if 2 in entry:
                shown["scalar"] = struct.unpack("<f", entry[2])[0]
            elif 4 in entry:
                image = dict(fields(entry[4]))
                shown["picture"] = (image[2], image[1], image[4])
            else:
                tensor = dict(fields(entry[8]))
                plugin = dict(fields(dict(fields(entry[9]))[1]))
                assert tensor[1] == 7 and plugin[1] == b"text"
                assert dict(fields(dict(fields(tensor[2]))[2]))[1] == 1
                shown["text"] = tensor[8].decode()
            events.append(shown)
    return events
