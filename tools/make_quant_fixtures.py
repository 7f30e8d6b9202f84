"""Makes the fixtures of crates/quant/tests: what other implementations say about the block formats.

    pip install numpy gguf
    python tools/make_quant_fixtures.py dequantize    # PyPI `gguf`: random blocks of every type and their values
    python tools/make_quant_fixtures.py kv            # tools/oracle/ref_model.py: rows and their FP8 / FP4 round trips
    python tools/make_quant_fixtures.py quantize libggml-base.so    # ggml_quantize_chunk of other engines

The shared library of the last is built from the ggml sources in PyPI `llama-cpp-python` (0.3.36 was used):

    pip download --no-binary :all: --no-deps llama-cpp-python==0.3.36 && tar xzf llama_cpp_python-*.tar.gz
    cmake -S llama_cpp_python-*/vendor/llama.cpp -B build -DGGML_NATIVE=OFF && cmake --build build --target ggml-base

A fixture (crates/quant/tests/fixtures/*.bin) is a sequence of records, each three u32 (tag, b, c), then b bytes,
then c f32, all little endian. dequantize: tag = ggml type id, bytes = blocks, floats = values. kv: tag = 8 or 4
(bits), bytes = f32 inputs, floats = outputs. quantize: per distribution first tag 0, bytes = f32 importance of the
columns, floats = rows; then tag = ggml type id (+ 256 if importance was given), bytes = ggml's blocks, no floats.
"""
import struct
import sys
from pathlib import Path

import numpy as np

OUT = Path(__file__).resolve().parent.parent / "crates/quant/tests/fixtures"


def record(a, data, values):
    data = np.ascontiguousarray(data).tobytes()
    values = np.ascontiguousarray(values, np.float32).tobytes()
    return struct.pack("<3I", a, len(data), len(values) // 4) + data + values


def random_blocks(rng, qtype, n):
    """n blocks of random bits, with finite scales; small code spaces are covered whole."""
    from gguf import GGML_QUANT_SIZES

    name, size = qtype.name, GGML_QUANT_SIZES[qtype][1]
    blocks = rng.integers(0, 256, (n, size), dtype=np.uint8)
    halves = dict(F16=[0], Q8_0=[0], Q2_K=[80, 82], Q3_K=[108], Q4_K=[0, 2], Q5_K=[0, 2], Q6_K=[208], IQ2_XXS=[0])
    for offset in halves.get(name, []):
        d = blocks[:, offset : offset + 2].copy().view("<u2")
        d[(d & 0x7C00) == 0x7C00] &= 0xBFFF                       # no infinities, no NaN
        blocks[:, offset : offset + 2] = d.view(np.uint8)
    if name == "IQ2_XXS":                                         # every code-book point and sign pattern occurs
        words = blocks[:, 2:].reshape(n, 8, 8)
        words[..., :4] = np.arange(n * 32).reshape(n, 8, 4) % 256
        patterns = (np.arange(n * 32).reshape(n, 8, 4) % 128).astype(np.uint32)
        packed = (patterns << np.array([0, 7, 14, 21], np.uint32)).sum(-1).astype("<u4")
        packed |= rng.integers(0, 16, (n, 8), dtype=np.uint32) << 28
        words[..., 4:] = packed[..., None].view(np.uint8)
    if name == "MXFP4":
        blocks[:, 0] = np.arange(n) % 256
    return blocks


def dequantize():
    from gguf import GGMLQuantizationType as T
    from gguf.quants import dequantize as gguf_dequantize

    rng = np.random.default_rng(1)
    counts = dict(F32=64, F16=4096, BF16=1024, Q8_0=64, MXFP4=256)
    out = b""
    for t in [T.F32, T.F16, T.BF16, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K, T.IQ2_XXS, T.MXFP4]:
        blocks = random_blocks(rng, t, counts.get(t.name, 16))
        if t in (T.F32, T.BF16):
            blocks[:, -1] &= 0xBF                                 # no infinities, no NaN
        with np.errstate(over="ignore"):
            out += record(int(t), blocks, gguf_dequantize(blocks, t))
    (OUT / "dequantize.bin").write_bytes(out)


def kv():
    sys.path.insert(0, str(OUT.parents[3] / "tools/oracle"))
    from ref_model import fp8_sim, indexer_sim

    rng = np.random.default_rng(2)

    def rows(n, width):
        size = 10.0 ** rng.uniform(-7, 4, (n, 1))
        return (rng.standard_t(3, (n, width)) * size).astype(np.float32)

    rope = 64                                                     # fp8_sim leaves the last `rope` columns alone
    x8 = rows(24, 448 + rope)
    x4 = rows(64, 128)
    y8 = fp8_sim(x8.astype(np.float64), rope)[:, :-rope]
    y4 = indexer_sim(x4.astype(np.float64))
    (OUT / "kv.bin").write_bytes(record(8, x8[:, :-rope], y8) + record(4, x4, y4))


def quantize():
    import ctypes
    from gguf import GGMLQuantizationType as T, GGML_QUANT_SIZES

    ggml = ctypes.CDLL(sys.argv[2])
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    rng = np.random.default_rng(3)
    rows, cols = 12, 512
    outliers = rng.normal(size=(rows, cols))
    outliers[rng.random((rows, cols)) < 0.01] *= 30
    distributions = [
        rng.normal(size=(rows, cols)),
        rng.standard_t(3, (rows, cols)),
        outliers,
        rng.uniform(0, 1, (rows, cols)),
        rng.normal(size=(rows, cols)) * 3e-6,
    ]
    out = b""
    for x in distributions:
        x = np.ascontiguousarray(x, np.float32)
        importance = rng.lognormal(0, 1.5, cols).astype(np.float32)
        out += record(0, importance, x)
        for t in [T.Q8_0, T.Q2_K, T.Q4_K, T.IQ2_XXS, T.MXFP4]:
            elements, size = GGML_QUANT_SIZES[t]
            for weighted in [False, True] if t != T.IQ2_XXS else [True]:
                blocks = np.zeros(rows * cols // elements * size, np.uint8)
                weights = importance.ctypes.data if weighted else None
                done = ggml.ggml_quantize_chunk(int(t), x.ctypes.data, blocks.ctypes.data, 0, rows, cols, weights)
                assert done == blocks.size
                out += record(int(t) + 256 * weighted, blocks, [])
    (OUT / "quantize.bin").write_bytes(out)


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    {"dequantize": dequantize, "kv": kv, "quantize": quantize}[sys.argv[1]]()
