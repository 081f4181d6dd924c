"""Packs plain values as bytes, and unpacks them; ``docs/structure.md`` specifies the bytes, under "Packed values".

The rest of the package uses :mod:`incckpt.state.packing`. Reading trusts nothing: every length is checked against the
bytes left, nesting is bounded, and no name is looked up.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.complex cimport PyComplex_FromDoubles, PyComplex_ImagAsDouble, PyComplex_RealAsDouble
from cpython.dict cimport PyDict_GetItem
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy


cdef extern from "Python.h":
    int PyFloat_Pack8(double x, char *p, int le) except -1
    double PyFloat_Unpack8(const char *p, int le) except? -1.0
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL
    int64_t PyLong_AsLongLongAndOverflow(object value, int *overflow) except? -1

cdef enum:
    MOST_NAMES = 1 << 16
    LONGEST_NAME = 255


cdef class Rules:
    """The types that can be packed, and how; the same for writing and reading.

    Parameters
    ----------
    most_depth
        The most containers inside one another.
    numpy_scalars
        The ``dtype.str`` of each numpy scalar type.
    others
        Types that `encode_other` takes.
    encode_other, decode_other
        From a value to bytes, and back; `decode_other` may raise anything.
    fields_of
        From a type to ``(name, fields)``; ``None`` if it is not a namedtuple's.
    type_of
        From ``(name, fields)`` to a type.
    scalar_of
        From ``(dtype.str, bytes)`` to a numpy scalar; with ``None`` in place of the bytes, their number.
    """

    cdef int most_depth
    cdef dict numpy_scalars
    cdef frozenset others
    cdef object encode_other, decode_other, fields_of, type_of, scalar_of
    cdef dict tuples

    def __init__(self, int most_depth, dict numpy_scalars, frozenset others, *, encode_other, decode_other, fields_of,
                 type_of, scalar_of):
        self.most_depth = most_depth
        self.numpy_scalars = numpy_scalars
        self.others = others
        self.encode_other = encode_other
        self.decode_other = decode_other
        self.fields_of = fields_of
        self.type_of = type_of
        self.scalar_of = scalar_of
        self.tuples = {}

    cdef object named(self, object kind):
        """Return ``(name, fields)`` of a namedtuple's type, or ``None``."""
        found = self.tuples.get(kind, self)
        if found is self:
            if len(self.tuples) >= 1024:
                self.tuples.clear()
            found = self.tuples[kind] = self.fields_of(kind)
        return found


# ---- weighing --------------------------------------------------------------------------------------------------------


cdef Py_ssize_t _weigh(Rules rules, object value, int depth, bint is_key) except -2:
    """Return the weight of `value`: 1 per value in it and per 64 characters or bytes; -1 if it cannot be packed."""
    cdef Py_ssize_t total = 1, one
    kind = type(value)
    if kind is str or kind is bytes:
        return 1 + (len(value) >> 6)
    if value is None or kind is float or kind is int or kind is bool or kind is complex:
        return 1
    if kind is list or kind is tuple or kind is dict or kind is set or kind is frozenset:
        if depth >= rules.most_depth or (is_key and kind is not tuple and kind is not frozenset):
            return -1
        if kind is dict:
            for key, item in (<dict>value).items():
                if type(key) is not str:
                    one = _weigh(rules, key, depth + 1, True)
                    if one < 0:
                        return -1
                    total += one - 1
                one = _weigh(rules, item, depth + 1, False)
                if one < 0:
                    return -1
                total += one
            return total
        for item in value:
            one = _weigh(rules, item, depth + 1, is_key or kind is set or kind is frozenset)
            if one < 0:
                return -1
            total += one
        return total
    if kind is bytearray:
        return -1 if is_key else 1 + (len(value) >> 6)
    if kind in rules.numpy_scalars or kind in rules.others:
        return 1
    if isinstance(value, tuple) and not is_key:
        if depth >= rules.most_depth:
            return -1
        named = rules.named(kind)
        if named is None or len(<tuple>named[1]) != len(value):
            return -1
        for item in <tuple>value:
            one = _weigh(rules, item, depth + 1, False)
            if one < 0:
                return -1
            total += one
        return total
    return -1


def weigh(Rules rules not None, value, int depth, Py_ssize_t heavy):
    """Return the weight of a container.

    Parameters
    ----------
    value
        A list, tuple, set, dict or deque, or an instance of a subclass.
    depth
        Number of containers around it.
    heavy
        An element of this weight or more counts as 1: it is packed by itself if its container is not.

    Returns
    -------
    int
        Its weight; -1 if something in it cannot be packed, or is nested too deeply.
    """
    cdef Py_ssize_t total = 1, one
    cdef bint mapping = isinstance(value, dict)
    cdef bint keys = isinstance(value, (set, frozenset))
    if depth >= rules.most_depth:
        return -1
    for item in value.items() if mapping else value:
        if mapping:
            key, item = item
            if type(key) is not str and _weigh(rules, key, depth + 1, True) < 0:
                return -1
        one = _weigh(rules, item, depth + 1, keys)
        if one < 0:
            return -1
        total += one if one < heavy else 1
    return total


# ---- writing ---------------------------------------------------------------------------------------------------------


cdef class _Packer:
    cdef Rules rules
    cdef uint8_t *data
    cdef Py_ssize_t used, size, block_bytes
    cdef dict names
    cdef list blocks

    def __cinit__(self, Rules rules, Py_ssize_t block_bytes):
        self.rules = rules
        self.block_bytes = block_bytes
        self.names = {}
        self.blocks = []

    def __dealloc__(self):
        free(self.data)

    cdef int room(self, Py_ssize_t count) except -1:
        cdef Py_ssize_t size
        cdef uint8_t *data
        if self.used + count > self.size:
            size = max(2 * self.size, self.used + count + 4096)
            data = <uint8_t *>realloc(self.data, size)
            if data == NULL:
                raise MemoryError
            self.data = data
            self.size = size
        return 0

    cdef int tag(self, char tag) except -1:
        self.room(1)
        self.data[self.used] = <uint8_t>tag
        self.used += 1
        return 0

    cdef int count(self, uint64_t value) except -1:
        self.room(10)
        while value >= 128:
            self.data[self.used] = <uint8_t>(value & 127) | 128
            self.used += 1
            value >>= 7
        self.data[self.used] = <uint8_t>value
        self.used += 1
        return 0

    cdef int raw(self, const char *data, Py_ssize_t nbytes) except -1:
        self.room(nbytes)
        memcpy(self.data + self.used, data, nbytes)
        self.used += nbytes
        return 0

    cdef int run(self, char tag, object data) except -1:
        """Append a tag, the number of bytes in `data`, and `data`."""
        self.tag(tag)
        self.count(PyBytes_GET_SIZE(data))
        return self.raw(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))

    cdef int number(self, double value) except -1:
        self.room(8)
        PyFloat_Pack8(value, <char *>self.data + self.used, 1)
        self.used += 8
        return 0

    cdef int text(self, str value) except -1:
        cdef const char *utf8
        cdef Py_ssize_t size = 0
        try:
            utf8 = PyUnicode_AsUTF8AndSize(value, &size)
        except UnicodeEncodeError:  # lone surrogates
            return self.run(b"s", value.encode("utf-8", "surrogatepass"))
        self.tag(b"s")
        self.count(size)
        return self.raw(utf8, size)

    cdef int name(self, str value) except -1:
        """Append a string that may be repeated: from the second time on, as a number."""
        cdef PyObject *found = PyDict_GetItem(self.names, value)
        if found != NULL:
            self.tag(b"r")
            return self.count(<uint64_t><object>found)
        cdef Py_ssize_t before = self.used
        self.text(value)
        if self.used - before <= LONGEST_NAME and len(self.names) < MOST_NAMES:
            self.names[value] = len(self.names)
        return 0

    cdef int key(self, object value, int depth) except -1:
        return self.name(<str>value) if type(value) is str else self.value(value, depth)

    cdef int value(self, object value, int depth) except -1:
        cdef int overflow = 0
        cdef int64_t number
        kind = type(value)
        if kind is str:
            return self.text(<str>value)
        if kind is float:
            self.tag(b"f")
            return self.number(<double>value)
        if kind is int:
            number = PyLong_AsLongLongAndOverflow(value, &overflow)
            if not overflow:
                self.tag(b"i")
                return self.count((<uint64_t>number << 1) ^ <uint64_t>(number >> 63))
            return self.run(b"I", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
        if value is None:
            return self.tag(b"N")
        if kind is bool:
            return self.tag(b"T" if value else b"F")
        if kind is bytes:
            return self.run(b"b", value)
        if kind is complex:
            self.tag(b"c")
            self.number(PyComplex_RealAsDouble(value))
            return self.number(PyComplex_ImagAsDouble(value))
        if kind is bytearray:
            return self.run(b"a", bytes(value))
        if kind is list or kind is tuple or kind is dict or kind is set or kind is frozenset:
            if depth >= self.rules.most_depth:
                raise ValueError("nested too deeply")
            return self.container(kind, value, depth + 1)
        text = self.rules.numpy_scalars.get(kind)
        if text is not None:
            self.run(b"y", (<str>text).encode("ascii"))
            data = value.tobytes()
            return self.raw(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
        if kind in self.rules.others:
            return self.run(b"j", self.rules.encode_other(value))
        named = self.rules.named(kind) if isinstance(value, tuple) else None
        if named is None or depth >= self.rules.most_depth or len(<tuple>value) != len(<tuple>named[1]):
            raise TypeError(f"a {kind.__name__} cannot be packed")
        self.tag(b"n")
        self.name(named[0])
        self.count(len(<tuple>value))
        for field in <tuple>named[1]:
            self.name(field)
        for item in <tuple>value:
            self.value(item, depth + 1)
        return 0

    cdef int container(self, object kind, object value, int depth) except -1:
        cdef Py_ssize_t count = len(value)
        if kind is dict:
            self.tag(b"d")
            self.count(count)
            for key, item in (<dict>value).items():
                self.key(key, depth)
                self.value(item, depth)
                count -= 1
        else:
            self.tag(b"l" if kind is list else b"t" if kind is tuple else b"e" if kind is set else b"z")
            self.count(count)
            for item in value:
                self.value(item, depth)
                count -= 1
        if count:
            raise RuntimeError("changed while it was saved")
        return 0

    cdef int cut(self, bint last) except -1:
        if self.used >= self.block_bytes or (last and self.used):
            self.blocks.append(PyBytes_FromStringAndSize(<char *>self.data, self.used))
            self.used = 0
        return 0


def pack(Rules rules not None, value, int depth, Py_ssize_t block_bytes):
    """Return the packed elements of a container, in blocks.

    A block ends with the first element that fills it, so appending to a list changes only the last block.

    Parameters
    ----------
    value, depth
        As for `weigh`, which must have returned a weight.
    block_bytes
        The least that each block but the last holds.
    """
    packer = _Packer(rules, block_bytes)
    if isinstance(value, dict):
        for key, item in value.items():
            packer.key(key, depth + 1)
            packer.value(item, depth + 1)
            packer.cut(False)
    else:
        for item in value:
            packer.value(item, depth + 1)
            packer.cut(False)
    packer.cut(True)
    return packer.blocks


# ---- reading ---------------------------------------------------------------------------------------------------------


cdef class _Unpacker:
    cdef Rules rules
    cdef const uint8_t *data
    cdef Py_ssize_t at, end
    cdef list names

    cdef Py_ssize_t need(self, uint64_t count) except -1:
        """Return `count` if at least as many bytes are left."""
        if count > <uint64_t>(self.end - self.at):
            raise ValueError(f"cut short at byte {self.at} of {self.end}")
        return <Py_ssize_t>count

    cdef uint64_t count(self) except? 0:
        cdef uint64_t value = 0
        cdef int shift = 0
        cdef uint8_t byte = 128
        while byte & 128:
            self.need(1)
            byte = self.data[self.at]
            self.at += 1
            if shift == 63 and byte > 1:
                raise ValueError(f"a number beyond 64 bits at byte {self.at}")
            value |= <uint64_t>(byte & 127) << shift
            shift += 7
        return value

    cdef bytes run(self):
        cdef Py_ssize_t nbytes = self.need(self.count())
        self.at += nbytes
        return PyBytes_FromStringAndSize(<const char *>self.data + self.at - nbytes, nbytes)

    cdef double number(self) except? -1.0:
        self.need(8)
        self.at += 8
        return PyFloat_Unpack8(<const char *>self.data + self.at - 8, 1)

    cdef str text(self):
        cdef Py_ssize_t nbytes = self.need(self.count())
        self.at += nbytes
        return PyUnicode_DecodeUTF8(<const char *>self.data + self.at - nbytes, nbytes, "surrogatepass")

    cdef object key(self, int depth):
        """Return the next value, a key; a string may be given by its number."""
        cdef Py_ssize_t before = self.at
        cdef uint64_t number
        self.need(1)
        if self.data[self.at] == c"r":
            self.at += 1
            number = self.count()
            if number >= <uint64_t>PyList_GET_SIZE(self.names):
                raise ValueError(f"there is no name {number}")
            return <object>PyList_GET_ITEM(self.names, <Py_ssize_t>number)
        if self.data[self.at] == c"s":
            self.at += 1
            text = self.text()
            if self.at - before <= LONGEST_NAME and PyList_GET_SIZE(self.names) < MOST_NAMES:
                self.names.append(text)
            return text
        return self.value(depth)

    cdef object value(self, int depth):
        cdef uint64_t number
        cdef double real
        cdef uint8_t tag
        self.need(1)
        tag = self.data[self.at]
        self.at += 1
        if tag == c"f":
            return self.number()
        if tag == c"i":
            number = self.count()
            return <int64_t>(number >> 1) ^ -<int64_t>(number & 1)
        if tag == c"s":
            return self.text()
        if tag == c"N":
            return None
        if tag == c"T":
            return True
        if tag == c"F":
            return False
        if tag == c"b":
            return self.run()
        if tag == c"a":
            return bytearray(self.run())
        if tag == c"c":
            real = self.number()
            return PyComplex_FromDoubles(real, self.number())
        if tag == c"I":
            return int.from_bytes(self.run(), "little", signed=True)
        if tag == c"j":
            return self.rules.decode_other(self.run())
        if tag == c"y":
            return self.scalar()
        if depth >= self.rules.most_depth:
            raise ValueError("nested too deeply")
        if tag == c"d":
            return self.mapping(depth + 1)
        if tag == c"n":
            return self.named_tuple(depth + 1)
        if tag == c"l" or tag == c"t" or tag == c"e" or tag == c"z":
            return self.sequence(tag, depth + 1)
        raise ValueError(f"unknown tag {tag} at byte {self.at - 1}")

    cdef object scalar(self):
        text = self.run().decode("ascii")
        cdef Py_ssize_t nbytes = self.need(self.rules.scalar_of(text, None))
        self.at += nbytes
        return self.rules.scalar_of(text, PyBytes_FromStringAndSize(<const char *>self.data + self.at - nbytes, nbytes))

    cdef object sequence(self, uint8_t tag, int depth):
        cdef Py_ssize_t count = self.need(self.count()), i
        cdef list items = []
        for i in range(count):
            items.append(self.value(depth))
        if tag == c"l":
            return items
        if tag == c"t":
            return tuple(items)
        found = set(items) if tag == c"e" else frozenset(items)
        if len(found) != count:
            raise ValueError("an element of a set occurs twice")
        return found

    cdef object mapping(self, int depth):
        cdef Py_ssize_t count = self.need(self.count()), i
        cdef dict items = {}
        for i in range(count):
            key = self.key(depth)
            items[key] = self.value(depth)
        if len(items) != count:
            raise ValueError("a key occurs twice")
        return items

    cdef object named_tuple(self, int depth):
        name = self.key(depth)
        cdef Py_ssize_t count = self.need(self.count()), i
        cdef list fields = [], items = []
        for i in range(count):
            fields.append(self.key(depth))
        for i in range(count):
            items.append(self.value(depth))
        return self.rules.type_of(name, tuple(fields))(*items)


def unpack(Rules rules not None, const uint8_t[::1] data not None, bint pairs):
    """Return the packed elements as a list or, with `pairs`, as a dict.

    Raises
    ------
    Exception
        If `pack` did not write the bytes: ValueError, TypeError, or whatever the functions of `rules` raise.
    """
    unpacker = _Unpacker()
    unpacker.rules = rules
    unpacker.data = &data[0] if len(data) else NULL
    unpacker.end = len(data)
    unpacker.names = []
    cdef list items = []
    cdef dict mapping = {}
    cdef Py_ssize_t count = 0
    if not pairs:
        while unpacker.at < unpacker.end:
            items.append(unpacker.value(0))
        return items
    while unpacker.at < unpacker.end:
        key = unpacker.key(0)
        mapping[key] = unpacker.value(0)
        count += 1
    if len(mapping) != count:
        raise ValueError("a key occurs twice")
    return mapping
