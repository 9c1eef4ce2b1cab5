"""Seeded mutations of protobuf messages and of JSON: of their bytes, and of their fields.

After byte flips alone most frames fail to parse, and what lies behind the parser is never reached.
Fields set to extremes parse, and go deep.
"""

from __future__ import annotations

import random
import struct
from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

MessageT = TypeVar("MessageT", bound=Message)

_INTEGERS = {
    FieldDescriptor.CPPTYPE_UINT32: (0, 1, 2, 31, 96, 97, 255, 256, 1024, 2**31, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 1, 2, 3, 2**32, 2**63, 2**64 - 1),
    FieldDescriptor.CPPTYPE_INT32: (0, 1, -1, 10, -10, 2**31 - 1, -(2**31)),
    FieldDescriptor.CPPTYPE_INT64: (0, 1, -1, 2**63 - 1, -(2**63)),
    FieldDescriptor.CPPTYPE_ENUM: (0, 1, 2, 3, 4, 99, -1, 2**31 - 1),
    FieldDescriptor.CPPTYPE_BOOL: (0, 1),
}
_REALS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, float("inf"), float("-inf"), float("nan"))
_TEXTS = ("", "x", "<1,1>", "best-first", "dp:24:10,0.3,2", "x" * 129, "x" * 5000, "\0", "é€😀")
_INTEGERS_OF_JSON = (0, 1, -1, 97, 2**31, 2**63, 2**64, -(2**63), 10**400)
_OTHERS_OF_JSON: tuple[Any, ...] = (None, True, False, [], {}, [[[[]]]], {"a": {}}, "\ud800")
_LENGTHS = (0, 1, 2, 3, 17, 65, 257, 1025)


class Mutator:
    """The same seed gives the same mutations."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def mutate_bytes(self, data: bytes) -> bytes:
        """One to four edits: flipped, inserted, removed, repeated or cut off."""
        edited = bytearray(data)
        for _ in range(self.random.randint(1, 4)):
            self._edit(edited)
        return bytes(edited)

    def _edit(self, data: bytearray) -> None:
        at = self.random.randrange(len(data) + 1)
        size = self.random.randint(1, 8)
        match self.random.randrange(5):
            case 0 if at < len(data):
                data[at] ^= 1 << self.random.randrange(8)
            case 1:
                data[at:at] = self.random.randbytes(size)
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = data[at : at + size]
            case _:
                del data[at:]

    def mutate_fields(self, message: MessageT) -> MessageT:
        """A copy with one to three fields set to something extreme, at any depth."""
        copy = type(message)()
        copy.CopyFrom(message)
        for _ in range(self.random.randint(1, 3)):
            self._change(copy)
        return copy

    def mutate_json(self, value: Any) -> Any:
        """A copy with a value, at any depth, replaced by something extreme, added or left out."""
        children = list(value.items()) if isinstance(value, dict) else None
        if isinstance(value, list):
            children = list(enumerate(value))
        if not children or self.random.random() < 0.2:
            return self.random.choice((*_INTEGERS_OF_JSON, *_REALS, *_TEXTS, *_OTHERS_OF_JSON))
        key, child = self.random.choice(children)
        copy = value.copy()
        match self.random.randrange(8):
            case 0:
                del copy[key]
            case 1 if isinstance(copy, list):
                copy.extend([child] * self.random.choice(_LENGTHS))
            case 1:
                copy[self.random.choice(_TEXTS)] = child
            case _:
                copy[key] = self.mutate_json(child)
        return copy

    def _change(self, message: Message) -> None:
        if not message.DESCRIPTOR.fields:
            return
        field = self._choose(message)
        if self.random.random() < 0.1:
            message.ClearField(field.name)
        elif field.message_type is not None and field.message_type.GetOptions().map_entry:
            self._fill_map(getattr(message, field.name), field.message_type)
        elif field.is_repeated:
            self._fill(getattr(message, field.name), field)
        elif field.message_type is not None:
            inner = getattr(message, field.name)
            inner.SetInParent()
            self._change(inner)
        else:
            setattr(message, field.name, self._extreme(field))

    def _choose(self, message: Message) -> Any:  # its FieldDescriptor
        """What is set already, three times of four, so that an edit stays within its frame."""
        fields: list[Any] = list(message.DESCRIPTOR.fields)  # of either implementation
        present = {field.name for field, _ in message.ListFields()}
        if present and self.random.random() < 0.75:
            fields = [field for field in fields if field.name in present]
        return self.random.choice(fields)

    def _fill(self, items: Any, field: FieldDescriptor) -> None:  # a repeated container
        length = self.random.choice(_LENGTHS)
        if field.message_type is not None:
            self._fill_messages(items, min(length, 17))
        elif self.random.random() < 0.5:
            items.extend(self._extreme(field) for _ in range(length))
        else:
            del items[length % (len(items) + 1) :]

    def _fill_messages(self, items: Any, length: int) -> None:
        if items and self.random.random() < 0.7:
            self._change(self.random.choice(items))
            return
        for _ in range(length):
            self._change(items.add())

    def _fill_map(self, items: Any, entry: Descriptor) -> None:  # a map container
        key, value = (entry.fields_by_name[name] for name in ("key", "value"))
        if value.message_type is None:
            for _ in range(self.random.choice(_LENGTHS)):
                items[self._extreme(key)] = self._extreme(value)

    def _extreme(self, field: FieldDescriptor) -> Any:
        if field.cpp_type in _INTEGERS:
            return self.random.choice(_INTEGERS[field.cpp_type])
        if field.cpp_type == FieldDescriptor.CPPTYPE_FLOAT:
            return _as_float32(self.random.choice(_REALS))
        if field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE:
            return self.random.choice(_REALS)
        if field.type == FieldDescriptor.TYPE_BYTES:
            return self.random.randbytes(self.random.choice(_LENGTHS))
        return self.random.choice(_TEXTS)


def _as_float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])
