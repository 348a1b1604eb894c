"""Bit packings, by eye, in golden bytes, and against their definition on Python integers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.ints import AWQ_ORDER, planar_stream, stream

from xpuquant.formats.packing import plain as nibbles
from xpuquant.formats.packing.compare_loops import equal_bytes, equal_fields, equal_stream, equal_upright
from xpuquant.formats.packing.convert_loops import (
    permute_nibbles,
    spread_words,
    transpose_nibbles,
    transpose_words,
    widen_words,
)
from xpuquant.formats.packing.plain import (
    pack_nibbles,
    unpack_nibbles,
    unpack_planar,
    unpack_rows,
)
from xpuquant.formats.packing.verify_loops import (
    count_dead,
    count_halves,
    count_large,
    count_nibbles,
    count_octets,
    count_scales,
    spread_stream,
    upright_fields,
)
from xpuquant.formats.readers.awq import unpack_awq
from xpuquant.formats.weights.decoded import in_order

ZERO_TO_SEVEN = np.arange(8, dtype=np.uint8)[None]


def random_codes(bits: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << bits, shape, np.uint8)


def flipped(words: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """The words with one bit turned over: in the first of them, in the last, and in any."""
    random = np.random.default_rng(seed)
    for at in (0, words.size - 1, int(random.integers(words.size))):
        spoilt = words.copy()
        spoilt.reshape(-1)[at] ^= np.uint32(1 << int(random.integers(32)))
        yield spoilt


def pack_rows(values: np.ndarray, bits: int) -> np.ndarray:
    """uint32 `[n, ceil(count * bits / 32)]`: the inverse of `unpack_rows`; unused high bits are 0."""
    n, count = values.shape
    stream = np.unpackbits(values.astype(np.uint8)[:, :, None], axis=2, count=bits, bitorder="little")
    total = -(-count * bits // 32) * 32
    padded = np.zeros((n, total), np.uint8)
    padded[:, : count * bits] = stream.reshape(n, count * bits)
    packed = np.packbits(padded, axis=1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u4").astype(np.uint32)


def test_nibbles_go_in_low_first():
    words = pack_nibbles(ZERO_TO_SEVEN)
    assert hex(words[0, 0]) == "0x76543210"
    assert words.tobytes() == bytes.fromhex("10 32 54 76")
    assert unpack_nibbles(words.view(np.uint8)).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


# Octal digits are 3-bit fields: the number reads as the codes, last first.
@pytest.mark.parametrize(
    ("bits", "word"),
    [(2, 0b11_10_01_00_11_10_01_00), (3, 0o76543210), (4, 0x76543210)],
)
def test_a_stream_holds_code_i_at_bit_i_times_width(bits, word):
    codes = ZERO_TO_SEVEN % (1 << bits)
    assert pack_rows(codes, bits).tolist() == [[word]]
    assert unpack_rows(np.array([[word]], np.uint32), bits, 8).tolist() == codes.tolist()


@pytest.mark.parametrize(
    ("bits", "minus_one", "true"),
    [
        (2, ["55555555"], ["aaaaaaaa"]),
        (3, ["db6db6db", "b6db6db6", "6db6db6d"], ["24924924", "49249249", "92492492"]),
        (4, ["77777777"], ["88888888"]),
        (8, ["7f7f7f7f"], ["80808080"]),
    ],
)
def test_words_of_symmetric_zero_points(bits, minus_one, true):
    middle = 1 << (bits - 1)
    count = len(true) * 32 // bits
    for value, expected in ((middle - 1, minus_one), (middle, true)):
        packed = pack_rows(np.full((1, count), value, np.uint8), bits)
        assert [f"{word:08x}" for word in packed[0]] == expected


def test_a_3_bit_code_straddles_words():
    # v10 has its low two bits on top of word 0 and its high bit at the bottom of word 1 (GPTQ's 3-bit packing).
    codes = np.zeros((1, 32), np.uint8)
    codes[0, 10] = 0b101
    assert pack_rows(codes, 3).tolist() == [[0b01 << 30, 0b1, 0]]


def test_planar_3_bit_by_eye():
    # Low planes of two bits first: words 0 and 1 hold 16 codes' low bits each; word 2 the high bit of all 32.
    low, high = 0b11_10_01_00, 0b1111_0000
    words = np.array([[low | low << 8, 0, high]], np.uint32)
    assert unpack_planar(words, 3, 32)[0, :8].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert unpack_planar(words, 3, 32)[0, 8:].tolist() == [0] * 24


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_planar_blocks_are_planes_of_words(bits):
    codes = random_codes(bits, (3, 64))
    packed = np.array([planar_stream(list(row), bits) for row in codes], np.uint32)
    assert np.array_equal(unpack_planar(packed, bits, 64), codes)


def test_awq_order_by_eye():
    # Columns 0..7 lie in one word in the order 0, 2, 4, 6, 1, 3, 5, 7, low nibble first.
    assert unpack_awq(np.array([[0x75316420]], np.int32)).T.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_awq_words_turn_into_rows_by_eye():
    # Row k of the source holds k in every column: each output row reads 0..7.
    source = np.array([[0x11111111 * k] for k in range(8)], np.uint32)
    out = np.empty((8, 1), np.uint32)
    transpose_nibbles(source, out, AWQ_ORDER)
    assert [hex(word) for word in out[:, 0]] == ["0x76543210"] * 8
    # Column c holds c in every row: output row c is all c.
    source[:] = 0x75316420
    transpose_nibbles(source, out, AWQ_ORDER)
    assert out[:, 0].tolist() == [0x11111111 * c for c in range(8)]


@given(st.integers(1, 40), st.integers(1, 700), st.integers(0, 9))
def test_transposing_nibbles_is_the_definition_for_any_tiling(height, width, seed):
    source = np.random.default_rng(seed).integers(0, 1 << 32, (8 * height, width), np.uint32)
    out = np.empty((8 * width, height), np.uint32)
    transpose_nibbles(source, out, AWQ_ORDER)
    assert np.array_equal(unpack_nibbles(out.view(np.uint8)), unpack_awq(source))


@given(st.integers(1, 40), st.integers(1, 1100))
def test_transposing_words(height, width):
    source = np.arange(height * width, dtype=np.uint32).reshape(height, width)
    out = np.empty((width, height), np.uint32)
    transpose_words(source, out)
    assert np.array_equal(out, source.T)


@given(st.integers(1, 40), st.integers(1, 90), st.integers(0, 3), st.integers(0, 2))
def test_transposing_some_columns_of_a_matrix(height, width, before, after):
    """Rows lie apart, and begin at any word; or elements of a row do."""
    matrix = np.random.default_rng(height).integers(0, 1 << 32, (8 * height, before + width + after), np.uint32)
    some = matrix[:, before : before + width]
    for source in (some, np.asfortranarray(some), some[::-1]):
        out = np.empty((width, 8 * height), np.uint32)
        transpose_words(source, out)
        assert np.array_equal(out, source.T)
        nibbles, of_copy = (np.empty((8 * width, height), np.uint32) for _ in range(2))
        transpose_nibbles(source, nibbles, AWQ_ORDER)
        transpose_nibbles(source.copy(), of_copy, AWQ_ORDER)
        assert np.array_equal(nibbles, of_copy)


def test_spreading_by_eye():
    out = np.empty((4, 1), np.uint32)
    spread_words(np.array([[0o76543210], [0], [0]], np.uint32), 3, out)
    assert [hex(word) for word in out[:, 0]] == ["0x76543210", "0x0", "0x0", "0x0"]
    spread_words(np.array([[0b11100100_11100100_00000000_00011011], [0]], np.uint32), 2, out)
    assert [hex(word) for word in out[:, 0]] == ["0x123", "0x32103210", "0x0", "0x0"]


@given(st.sampled_from([2, 3]), st.integers(1, 9), st.integers(1, 40), st.integers(0, 9))
def test_spreading_keeps_every_code(bits, blocks, columns, seed):
    codes = random_codes(bits, (columns, 32 * blocks), seed)
    packed = np.array([stream(list(row), bits) for row in codes], np.uint32)
    out = np.empty((columns, 4 * blocks), np.uint32)
    spread_words(packed.T, bits, out.T)
    assert np.array_equal(unpack_nibbles(out.view(np.uint8)), codes)
    wider = np.zeros((packed.shape[1], columns + 3), np.uint32)
    wider[:, 2 : 2 + columns] = packed.T
    out[:] = 0
    widen_words(wider[:, 2 : 2 + columns], bits, out)
    assert np.array_equal(unpack_nibbles(out.view(np.uint8)), codes)


@given(st.integers(1, 8), st.integers(1, 99), st.integers(1, 4), st.integers(0, 9))
def test_streams_of_every_width_and_length(bits, count, n, seed):
    codes = random_codes(bits, (n, count), seed)
    packed = pack_rows(codes, bits)
    assert packed.tolist() == [stream(list(row), bits) for row in codes]
    assert np.array_equal(unpack_rows(packed, bits, count), codes)


@pytest.mark.parametrize("bits", [2, 3])
def test_the_compiled_loop_unpacks_what_numpy_does(bits):
    """Long streams take another way than short ones."""
    codes = random_codes(bits, (256, 1024))
    packed = pack_rows(codes, bits)
    assert packed.size >= nibbles._COMPILED_WORDS > packed[:1].size
    assert np.array_equal(unpack_rows(packed, bits, 1024), codes)
    assert np.array_equal(np.concatenate([unpack_rows(packed[i : i + 1], bits, 1024) for i in range(256)]), codes)


def test_permuting_nibbles():
    words = pack_nibbles(np.arange(16, dtype=np.uint8)[None])
    permute_nibbles(words, np.arange(16)[::-1])
    assert [hex(word) for word in words[0]] == ["0x89abcdef", "0x1234567"]


class TestPackedComparison:
    """The loops that show both ends of a conversion as nibbles, against the plain definitions."""

    @given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
    def test_upright_fields_are_unpack_fields(self, rows, width, seed):
        words = np.random.default_rng(seed).integers(0, 1 << 32, (8 * rows, width), np.uint32)
        out = np.empty((8 * width, rows), np.uint32)
        upright_fields(words, np.array(AWQ_ORDER), out)
        assert np.array_equal(unpack_nibbles(out.view(np.uint8)), unpack_awq(words))

    @given(st.sampled_from((2, 3)), st.integers(1, 20), st.integers(1, 12), st.booleans(), st.integers(0, 2**32 - 1))
    def test_spread_streams_are_unpacked_rows_and_what_is_added(self, bits, rows, words, upright, seed):
        K = 32 * words
        codes, added = random_codes(bits, (rows, K), seed), random_codes(bits, (rows, words), seed + 1) + 1
        stream = pack_rows(codes, bits)
        out = np.empty((rows, K // 8), np.uint32)
        spread_stream(np.asfortranarray(stream) if upright else stream, bits, added.astype(np.uint8), 4, out)
        assert np.array_equal(unpack_nibbles(out.view(np.uint8)), codes + np.repeat(added, 32, axis=1))

    @given(
        st.integers(1, 70), st.integers(1, 70), st.sampled_from((1, 2, 4, 8)), st.booleans(), st.integers(0, 2**32 - 1)
    )
    def test_columns_are_turned_into_rows(self, n, K, itemsize, eights, seed):
        if eights:
            n, K = 8 * n, 8 * K
        lying = random_codes(8, (K, n * itemsize), seed).view(f"u{itemsize}")
        for columns in (lying, lying[:, : n // 2 + 1], lying[::2]):
            assert np.array_equal(in_order(columns.T), columns.T)

    @given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 32), st.integers(0, 2**32 - 1))
    def test_columns_are_compared_with_rows_word_by_word(self, K, N, left, seed):
        """K and N in pairs of words; some of the columns of a wider matrix."""
        random = np.random.default_rng(seed)
        wide = random.integers(0, 1 << 64, (2 * K, left + N), np.uint64)
        columns = wide[:, left:]
        rows = np.ascontiguousarray(columns.view(np.uint32).T).view(np.uint64)
        assert equal_upright(columns, rows)
        for n, k in {(0, 0), (2 * N - 1, K - 1), (int(random.integers(2 * N)), int(random.integers(K)))}:
            spoilt = rows.copy()
            spoilt[n, k] ^= np.uint64(1 << int(random.integers(64)))
            assert not equal_upright(columns, spoilt)

    @given(
        *(st.integers(1, 40) for _ in "KN"),
        st.permutations(range(8)) | st.just(AWQ_ORDER),
        st.integers(0, 20),
        st.integers(0, 2**32 - 1),
    )
    def test_fields_of_words_are_compared_with_rows_code_by_code(self, K, N, places, left, seed):
        """K and N in pairs of words; some of the columns of a wider matrix."""
        codes = random_codes(4, (16 * N, 16 * K), seed)
        fields = np.zeros((16 * K, 2 * (left + N)), np.uint32)
        for i, place in enumerate(places):
            fields[:, 2 * left :] |= codes[place::8].T.astype(np.uint32) << np.uint32(4 * i)
        rows = pack_nibbles(codes)
        assert equal_fields(fields[:, 2 * left :], np.array(places), rows)
        for spoilt in flipped(rows, seed):
            assert not equal_fields(fields[:, 2 * left :], np.array(places), spoilt)

    @given(
        st.sampled_from((2, 3)),
        *(st.integers(1, 40) for _ in "KN"),
        st.sampled_from((8, 16, 32, 64, 10**6)),
        st.integers(0, 20),
        st.booleans(),
        st.integers(0, 2**32 - 1),
    )
    def test_streams_by_columns_are_compared_with_rows_code_by_code(self, bits, K, N, group, left, padded, seed):
        """K in blocks of 32 codes, N in pairs; some columns of a wider matrix, with words behind the last code."""
        codes = random_codes(bits, (2 * N, 32 * K), seed)
        group = min(group, 32 * K)
        zeros = np.random.default_rng(seed).integers(0, 8, (2 * N, -(-32 * K // group)), np.uint8)
        words = np.zeros((K * bits + padded, 2 * (left + N)), np.uint32)
        words[: K * bits, 2 * left :] = pack_rows(codes, bits).T
        rows = pack_nibbles(codes + np.repeat(zeros, group, axis=1)[:, : 32 * K])
        assert equal_stream(words[:, 2 * left :], bits, zeros.T, group // 8, rows)
        for spoilt in flipped(rows, seed):
            assert not equal_stream(words[:, 2 * left :], bits, zeros.T, group // 8, spoilt)

    @given(st.integers(0, 200), st.sampled_from((0x7F, 0x7C, 1)), st.integers(0, 2**32 - 1))
    def test_large_codes_are_counted_whatever_their_sign(self, words, least, seed):
        codes = random_codes(8, (8 * words,), seed)
        assert count_large(codes.view(np.uint64), least) == np.count_nonzero((codes & 0x7F) >= least)

    def test_scales_are_counted_apart_from_what_is_no_number(self):
        values = np.array([0, -0.0, 3, -4, np.inf, -np.inf, np.nan, 1e-40], np.float32)
        bad, zero, squares, largest = count_scales(values)
        assert (bad, zero, largest) == (3, 2, 4)
        assert squares == 25 + np.square(np.float64(values[-1]))

    @given(st.integers(0, 3000), st.integers(0, 2**32 - 1))
    def test_equal_bytes_finds_each_byte(self, count, seed):
        a = random_codes(8, (count,), seed)
        assert equal_bytes(a, a.copy())
        for at in {0, count // 2, count - 1} if count else ():
            b = a.copy()
            b[at] ^= 1 << at % 8
            assert not equal_bytes(a, b)

    @given(st.integers(1, 50), st.integers(0, 15), st.integers(0, 15), st.integers(0, 2**32 - 1))
    def test_nibbles_are_counted(self, words, first, second, seed):
        codes = random_codes(4, (3, 16 * words), seed)
        packed = pack_nibbles(codes).view(np.uint64)
        assert count_nibbles(packed, first, second) == np.isin(codes, (first, second)).sum()
        assert count_nibbles(packed[::2], first, second) == np.isin(codes[::2], (first, second)).sum()

    @given(st.integers(1, 5), st.integers(1, 300), st.integers(0, 255), st.integers(0, 255), st.integers(0, 2**32 - 1))
    def test_octets_are_counted(self, rows, columns, first, second, seed):
        codes = random_codes(8, (rows, columns), seed)
        for some in (codes, codes[::2], codes[:, 1:]):
            assert count_octets(some, first, second) == np.isin(some, (first, second)).sum()

    @pytest.mark.parametrize("dtype, mantissa", [("float16", 10), ("bfloat16", 7)])
    def test_every_number_of_16_bits_is_counted_as_what_it_is(self, dtype, mantissa):
        bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
        with np.errstate(invalid="ignore"):  # NaN stays NaN
            values = np.abs(bits.view(dtype).astype(np.float64))
        for some, value in ((bits, values), (bits.T, values.T), (bits[3:9:2, :80], values[3:9:2, :80])):
            finite = value[np.isfinite(value)]
            bad, zero, squares, largest = count_halves(some, mantissa)
            assert (bad, zero) == (value.size - finite.size, np.count_nonzero(value == 0))
            assert largest == finite.max()
            assert squares == pytest.approx(np.square(finite).sum(), rel=1e-12)
        one = np.array([[0x0001]], np.uint16)
        assert count_halves(one, mantissa)[3] == float(one.view(dtype)[0, 0])

    @given(st.integers(1, 6), st.integers(1, 6), st.sampled_from((0x7, 0xF)), st.integers(0, 2**32 - 1))
    def test_dead_groups_are_counted(self, rows, groups, mask, seed):
        rng = np.random.default_rng(seed)
        nothing = rng.integers(0, mask + 1, (rows, groups), np.uint8)
        codes = np.repeat(nothing, 32, axis=1) | rng.integers(0, 2, (rows, 32 * groups), np.uint8) * np.uint8(15 - mask)
        alive = rng.random((rows, groups)) < 0.5
        for n, g in np.argwhere(alive):
            codes[n, 32 * g + rng.integers(32)] ^= 1
        packed = pack_nibbles(codes).view(np.uint64).reshape(rows, groups, 2)
        assert count_dead(packed, nothing, mask) == (~alive).sum()
        same = (codes.reshape(rows, groups, 32) & mask == nothing[0][:, None]).all(axis=2)
        assert count_dead(packed, nothing[:1], mask) == same.sum()
