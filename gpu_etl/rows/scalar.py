"""Scalar functions for one row or one value: the only place where the logic of a row is written.

The loops of cpu.py and the CUDA kernels call the same functions; tests/reference.py is their specification. They also
run as plain Python (NUMBA_DISABLE_JIT=1). To mean the same in all three, they compute in signed 64-bit integers and
mask to 32 bits by hand, raise nothing and allocate nothing. Places in arrays are cast to unsigned before the access:
Numba would test each signed one for being negative (a third of the time of parse_row).
"""

import numpy as np

from gpu_etl.common.jit import compiled as scalar
from gpu_etl.schema import COLUMNS, FIRST_SPARSE

TAB = 9
NEWLINE = 10
CARRIAGE_RETURN = 13
MINUS = 45
ZERO = 48

INT32_MAX = 2**31 - 1
UINT32_MASK = 0xFFFFFFFF
HEX_DIGITS = 8
LEAST_ROW_BYTES = COLUMNS + 1  # of a row that can be parsed: a label, 39 tabs and a newline
LEAST_ROWS = 1 << 12  # that there is always room for
ONES = 0x0101010101010101
INFINITY = np.inf
HIGH_NIBBLES = -0x0F0F0F0F0F0F0F10  # 0xF0 in each byte, as a signed number

# Kinds of fault; parse_row returns kind * FAULT_STRIDE + column, or 0 for a good row.
FAULT_STRIDE = 64
FAULT_FIELDS = 1
FAULT_LABEL = 2
FAULT_INTEGER = 3
FAULT_RANGE = 4
FAULT_HEX = 5


def most_rows(size: int) -> int:
    """How many rows of `size` bytes of text are parsed at a time: no fewer than can be good. So rows of nothing, 8 M in
    a slab of 8 MiB, take no more memory than such rows do."""
    return max(size // LEAST_ROW_BYTES, LEAST_ROWS) + 1


@scalar
def byte_at(text, position):
    """text[position] as a 64-bit integer: as the uint8 that it is, it would wrap around below 0 in plain Python."""
    return np.int64(text[np.uint64(position)])


@scalar
def at_field_end(text, position, end):
    """Whether the field ends before text[position]: at a tab, or where the row ends."""
    return position >= end or text[np.uint64(position)] == TAB


@scalar
def parse_integer(text, position, end):
    """Decimal int32 field at text[position], not empty -> (value, fault kind, its end). A minus sign, then digits."""
    negative = text[np.uint64(position)] == MINUS
    if negative:
        position += 1
    first = position
    value = 0
    while not at_field_end(text, position, end):
        digit = byte_at(text, position) - ZERO
        if digit < 0 or digit > 9:
            return 0, FAULT_INTEGER, position
        if value <= INT32_MAX:
            value = value * 10 + digit
        position += 1
    if position == first:
        return 0, FAULT_INTEGER, position
    if negative:
        value = -value
    if value > INT32_MAX or value < -INT32_MAX - 1:
        return 0, FAULT_RANGE, position
    return value, 0, position


@scalar
def hex_digit(byte):
    """Value of an ASCII hex digit (either case), without a branch; 16 or more, or below 0, where it is none."""
    letter = (byte | 32) - 97
    is_letter = (letter >= 0) & (letter < 6)
    digit = byte - ZERO
    is_digit = (digit >= 0) & (digit < 10)
    return (byte & 15) + 9 * is_letter + 16 * (1 - (is_letter | is_digit))


@scalar
def eight_hex_digits(text, position):
    """text[position : position + 8] as a 32-bit number -> (value, 0), or (any, not 0) where a byte is no hex digit.

    All eight bytes at once in one 64-bit word, the first one lowest. Low nibbles are 0 to 9 for digits and 1 to 6 for
    letters (bit 6 set), so no sum below carries into the next byte.
    """
    word = byte_at(text, position)
    for i in range(1, HEX_DIGITS):
        word |= byte_at(text, position + i) << (8 * i)
    letter = (word >> 6) & ONES
    low = word & (15 * ONES)
    nibbles = low + 9 * letter
    wrong = ((word | letter << 5) & HIGH_NIBBLES) ^ (0x30 * (ONES + letter))  # high nibble 3, or 6 in lower case
    wrong |= (nibbles + 6 * (ONES - letter)) & (16 * ONES)  # digit above 9, letter above f
    wrong |= (letter << 4) & ~(low + 15 * ONES)  # letter below a
    pairs = (nibbles << 4 | nibbles >> 8) & 0x00FF00FF00FF00FF
    quads = (pairs << 8 | pairs >> 16) & 0x0000FFFF0000FFFF
    return (quads << 16 | quads >> 32) & UINT32_MASK, wrong


@scalar
def parse_hex(text, position, end):
    """Field of one to eight hex digits at text[position], not empty -> (value, fault kind, its end)."""
    if position + HEX_DIGITS <= end and at_field_end(text, position + HEX_DIGITS, end):
        # All real rows come here.
        value, wrong = eight_hex_digits(text, position)
        if not wrong:
            return value, 0, position + HEX_DIGITS
    value = wrong = 0
    first = position
    while not at_field_end(text, position, end):
        digit = hex_digit(byte_at(text, position))
        wrong |= digit
        value = (value << 4 | digit) & UINT32_MASK
        position += 1
    if wrong > 15:
        return 0, FAULT_HEX, position
    if position - first > HEX_DIGITS:
        return 0, FAULT_RANGE, position
    return value, 0, position


@scalar
def hex_string(data, begin, end):
    """data[begin:end], not empty, all of which must be one to eight hex digits -> (value, fault kind)."""
    value, kind, stop = parse_hex(data, begin, end)
    if stop < end:  # at a tab, which ends a field of text but is no digit here
        return 0, FAULT_HEX
    return value, kind


@scalar
def whole_number(number):
    """A float64 other than NaN that must be a whole number of 32 bits -> (integer, fault kind)."""
    if number in (INFINITY, -INFINITY) or (-(2.0**53) < number < 2.0**53 and np.int64(number) != number):
        return 0, FAULT_INTEGER
    if number < -INT32_MAX - 1 or number > INT32_MAX:
        return 0, FAULT_RANGE
    return np.int64(number), 0


@scalar
def is_valid(valid, row):
    """Whether `row` is not null by an Arrow bitmask, uint8 [bytes]; no bytes where no row is."""
    return len(valid) == 0 or valid[row >> 3] >> (row & 7) & 1 == 1


@scalar
def put_empty(row, column, values, missing):
    """Note in values uint32 [n, 40] and missing uint64 [n] that a column of a row is empty."""
    values[row, column] = 0
    missing[row] |= np.uint64(1) << np.uint64(column)


@scalar
def parse_label(text, position, end):
    """Label field at text[position] -> (0 or 1, fault kind, its end)."""
    if position < end and at_field_end(text, position + 1, end):
        label = byte_at(text, position) - ZERO
        if label == 0 or label == 1:
            return label, 0, position + 1
    return 0, FAULT_LABEL, position


@scalar
def fault_code(text, begin, end, kind, column):
    """Code of a fault in the row text[begin:end]: a wrong number of fields outranks what it makes of a column."""
    tabs = 0
    for position in range(begin, end):
        if text[position] == TAB:
            tabs += 1
    if tabs != COLUMNS - 1:
        return FAULT_FIELDS * FAULT_STRIDE
    return kind * FAULT_STRIDE + column


@scalar
def parse_row(text, begin, end, row, values, missing):
    """Parse text[begin:end], one row without its newline, into values[row] and missing[row]; return its fault code.

    text uint8 [bytes]; values uint32 [n, 40] (integers in two's complement, categories as numbers, empty fields 0);
    missing uint64 [n], bit c set where column c was empty. A carriage return before the newline is dropped.
    """
    if end > begin and text[end - 1] == CARRIAGE_RETURN:
        end -= 1
    value, fault, position = parse_label(text, begin, end)
    if fault:
        return fault_code(text, begin, end, fault, 0)
    values[row, 0] = value
    empty = 0
    for column in range(1, COLUMNS):
        if position >= end:
            return fault_code(text, begin, end, FAULT_FIELDS, column)
        position += 1
        value = 0
        if at_field_end(text, position, end):
            empty |= 1 << column
        elif column < FIRST_SPARSE:
            value, fault, position = parse_integer(text, position, end)
        else:
            value, fault, position = parse_hex(text, position, end)
        if fault:
            return fault_code(text, begin, end, fault, column)
        values[row, column] = value & UINT32_MASK
    if position < end:
        return fault_code(text, begin, end, FAULT_FIELDS, COLUMNS - 1)
    missing[row] = empty
    return 0


@scalar
def signed32(value):
    """The integer that 32 bits (0 to 2^32 - 1) mean in two's complement."""
    if value > INT32_MAX:
        value -= UINT32_MASK + 1
    return value


@scalar
def dense_value(value, empty, shift, empty_value):
    """What the record keeps of a parsed integer column (uint32, two's complement): max(integer + shift, 0), or
    empty_value, held within int32."""
    if empty:
        return empty_value
    return min(max(signed32(value) + shift, 0), INT32_MAX)


@scalar
def is_missing(mask, column):
    """Whether a row's mask of missing fields (uint64) has the bit of `column` set."""
    return (np.int64(mask) >> column) & 1 == 1


@scalar
def category_key(value, max_index_range):
    """Dictionary key of a category value: the value modulo `max_index_range`, or the value itself if that is 0."""
    if max_index_range > 0:
        return value % max_index_range
    return value


@scalar
def hash32(key):
    """Scramble a 32-bit key (MurmurHash3's 32-bit finaliser, a bijection, public domain)."""
    key = (key ^ (key >> 16)) * 0x85EBCA6B & UINT32_MASK
    key = (key ^ (key >> 13)) * 0xC2B2AE35 & UINT32_MASK
    return key ^ (key >> 16)


@scalar
def make_entry(key, payload):
    """Entry of a hash table, int64: a 32-bit key above a payload of 1 to 2^31 - 1, so no entry is 0."""
    return np.int64(key) << 32 | payload


@scalar
def entry_key(entry):
    """The key of an entry."""
    return (np.int64(entry) >> 32) & UINT32_MASK


@scalar
def entry_payload(entry):
    """The payload of an entry; 0 for an empty slot."""
    return np.int64(entry) & UINT32_MASK


@scalar
def find_slot(table, base, mask, key):
    """Slot of `key` in the open-addressing table table[base : base + mask + 1], or the empty slot where it belongs.

    table int64 [slots]: entries of make_entry, 0 in an empty slot, so every 32-bit key is legal. mask + 1 is a power of
    two, and at least one slot is empty.
    """
    slot = hash32(key) & mask
    while table[np.uint64(base + slot)] != 0 and entry_key(table[np.uint64(base + slot)]) != key:
        slot = (slot + 1) & mask
    return base + slot


@scalar
def encode_category(table, base, mask, value, empty, missing_is_zero, max_index_range, rare_id):
    """Id of one category field: what the table holds (payload - 1), or rare_id for a missing or unlisted value."""
    if empty and not missing_is_zero:
        return rare_id
    payload = entry_payload(table[find_slot(table, base, mask, category_key(value, max_index_range))])
    if payload == 0:
        return rare_id
    return payload - 1
