"""Tensor types of GGUF: what is packed is what the library and llama.cpp's layout unpack."""

import gguf
import numpy as np
import pytest

from wrinklefree.gguf.blocks import INTEGERS, Array, decoded, pack, rounded_q6_k, rounded_q8_0, unpack

ROWS, COLUMNS = 3, 512


def drawn(name: str) -> tuple[Array, Array]:
    """Integers of every value that a type holds, and fp16 scales."""
    kind, draw = INTEGERS[name], np.random.default_rng(0)
    values = [q for q in range(kind.least, kind.most + 1) if q or kind.zero]
    integers = draw.choice(np.array(values, dtype=np.int8), (ROWS, COLUMNS))
    scales = draw.standard_normal((ROWS, COLUMNS // kind.columns)).astype(np.float16).astype(np.float32)
    return integers, scales


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_and_scales_come_back(name: str) -> None:
    integers, scales = drawn(name)
    data = pack(name, integers, scales)
    assert data.shape == (ROWS, COLUMNS // INTEGERS[name].columns * INTEGERS[name].size)
    found = unpack(name, data)
    assert np.array_equal(found[0], integers)
    assert np.array_equal(found[1], scales)
    assert np.array_equal(decoded(name, data), integers * scales.repeat(INTEGERS[name].columns, axis=1))


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "Q4_0", "Q8_0"])
def test_the_library_reads_the_same_values(name: str) -> None:
    data = pack(name, *drawn(name))
    theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    assert np.array_equal(theirs, decoded(name, data))


def test_bytes_of_q2_0_and_q1_0_are_those_of_llama_cpp() -> None:
    """A block by hand, after block_q2_0 and block_q1_0 of ggml-common.h: d first, the first code in the lowest bits."""
    integers = np.zeros((1, 64), dtype=np.int8)
    integers[0, :5] = [-1, 0, 1, 2, 2]
    data = pack("Q2_0", integers, np.array([[0.5]], dtype=np.float32))
    assert data[0, :4].tolist() == [0x00, 0x38, 0b11_10_01_00, 0b01_01_01_11]
    signs = np.full((1, 128), -1, dtype=np.int8)
    signs[0, [0, 3, 8, 127]] = 1
    data = pack("Q1_0", signs, np.array([[2.0]], dtype=np.float32))
    assert data[0, :4].tolist() == [0x00, 0x40, 0b1001, 1]
    assert data[0, -1] == 0x80


@pytest.mark.parametrize(("name", "wrong"), [("Q1_0", 0), ("Q2_0", 3), ("TQ1_0", 2), ("Q4_0", 8)])
def test_what_a_type_does_not_hold_is_refused(name: str, wrong: int) -> None:
    integers, scales = drawn(name)
    integers[1, 7] = wrong
    with pytest.raises(ValueError, match="does not hold these integers"):
        pack(name, integers, scales)
    with pytest.raises(ValueError, match="no fp16 number"):
        pack(name, drawn(name)[0], scales + 1e-4)


def test_rounded_types_are_as_close_as_their_bits_allow() -> None:
    values = np.random.default_rng(1).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    values[0, :256] = 0
    for kind, data, error in (("Q8_0", rounded_q8_0(values), 0.006), ("Q6_K", rounded_q6_k(values), 0.025)):
        back = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
        assert np.sqrt(np.square(back - values).mean()) < error
        assert not back[0, :256].any()
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    back = gguf.quants.dequantize(theirs, gguf.GGMLQuantizationType.Q8_0)
    assert np.square(decoded("Q8_0", rounded_q8_0(values)) - values).mean() < 1.01 * np.square(back - values).mean()
