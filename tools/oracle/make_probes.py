#!/usr/bin/env python3
"""Write inputs and outputs of single steps of the reference, so that a fault can be traced to one of them.

  python make_probes.py --out DIR

DIR/stages.safetensors    every stage of every layer of tiny-iq2 in the plain arithmetic
DIR/rounding.safetensors  the roundings of KV and indexer rows, on rows of tiny-iq2 and pro-iq2 in the official arithmetic

Needs: numpy, gguf, safetensors. See README.md beside this file for what is in the outputs.
"""
import make_tiny                            # first: it limits NumPy to one thread
import argparse, json, os
import numpy as np
from safetensors.numpy import save_file
import ref_model

STAGE_POSITIONS = [0, 1, 3, 4, 7, 63, 127, 128, 131, 255, 256, 399]
WHOLE = ["attn_h", "kv", "comp_kv", "index_k"]              # rows of all positions: later positions read them
MISSING = ["kv_in", "comp_in", "index_q_in", "index_k_in"]  # the same as without _in in the plain arithmetic
PROBE_ROWS = 1500                                           # rows taken from each model, of each kind
N_ROT = make_tiny.CFG["n_rot"]


def run(config, n_tokens, sim):
    cfg = make_tiny.CONFIGS[config]
    _, values = make_tiny.build_weights(cfg, make_tiny.SEED, "iq2")
    tokens = make_tiny.make_tokens(cfg, make_tiny.SEED, n_tokens)
    return tokens, ref_model.Ref(cfg, values, sim=sim).forward(tokens), values


def stages():
    tokens, tr, values = run("tiny", 400, None)
    at = STAGE_POSITIONS
    out = {"tokens": tokens, "positions": np.array(at, np.int32)}
    for name, x in tr.items():
        stage = name.rpartition(".")[2]
        if not isinstance(x, np.ndarray) or stage in MISSING:
            continue
        x = x if stage in WHOLE else x[at]
        if x.dtype.kind == "f":
            x = np.where(np.isfinite(x), x, np.sign(x) * 3e38).astype(np.float32)
        out[name] = x
    embedded = values["token_embd.weight"][tokens[at]]
    out["embedded"] = np.repeat(embedded[:, None, :], make_tiny.CFG["hc"], 1)
    return out


# ------------------------------------------------------------------ rounding
def margin(x, block, fmax, floor, grid):
    """How near each value is to a border of ref_model._blockwise, where it or its block's scale would turn out otherwise:
    the distance relative to the value."""
    b = x.reshape(*x.shape[:-1], -1, block)
    amax = np.maximum(np.abs(b).max(-1, keepdims=True), floor) / fmax
    k = np.log2(amax)
    scale_margin = np.abs(np.exp2(np.rint(k) - k) - 1)
    scale_margin = np.where(amax == floor / fmax, 1, scale_margin)         # the floor, not the values, sets the scale
    v = np.abs(b) / np.exp2(np.ceil(k))
    middle = (grid[1:] + grid[:-1]) / 2
    i = np.clip(np.searchsorted(middle, v), 1, len(middle) - 1)
    nearest = np.minimum(np.abs(v - middle[i]), np.abs(v - middle[i - 1]))
    return np.minimum(nearest / np.maximum(v, 1e-30), scale_margin).reshape(x.shape)


def probe_rows(rows, rng):
    """Some of the rows, and copies of a few at other magnitudes, down to zero."""
    rows = rows.reshape(-1, rows.shape[-1]).astype(np.float32)
    rows = rows[np.sort(rng.permutation(len(rows))[:PROBE_ROWS])]
    scaled = [rows[i] * np.float32(10.0) ** np.float32(e) for i, e in enumerate(range(-30, 31, 3))]
    return np.concatenate([rows, scaled, np.zeros_like(rows[:1])])


def rounding():
    rng = np.random.default_rng(make_tiny.SEED)
    found = {"kv": [], "index": []}
    for config in ("tiny", "pro"):
        _, tr, _ = run(config, 300, ref_model.OFFICIAL)
        for kind, names in (("kv", ("kv_in", "comp_in")), ("index", ("index_q_in", "index_k_in"))):
            for name in names:
                rows = [x.reshape(-1, x.shape[-1]) for k, x in tr.items() if k.endswith("." + name)]
                found[kind].append(probe_rows(np.concatenate(rows), rng))
    kv, index = (np.concatenate(found[k]) for k in ("kv", "index"))
    fp8 = ref_model.fp8_sim(kv.astype(np.float64), N_ROT)
    kv_margin = np.ones(kv.shape)                                          # BF16 rounding of an f32 has no doubt about it
    kv_margin[:, :-N_ROT] = margin(kv[:, :-N_ROT].astype(np.float64), 64, 448.0, 1e-4, ref_model._E4M3)
    rotated = ref_model.hadamard(index.astype(np.float64))
    out = {"kv.in": kv, "kv.fp8": fp8, "kv.out": ref_model.bf16_tail(fp8, N_ROT), "kv.margin": kv_margin,
           "index.in": index, "index.hadamard": rotated, "index.out": ref_model.indexer_sim(index.astype(np.float64)),
           "index.margin": margin(rotated, 32, 6.0, 6 * 2.0 ** -126, ref_model._E2M1)}
    return {k: x.astype(np.float32) for k, x in out.items()}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", required=True)
    o = ap.parse_args()
    os.makedirs(o.out, exist_ok=True)
    for name, arrays, about in (("stages", stages(), dict(config=make_tiny.CFG, model="tiny-iq2.gguf")),
                                ("rounding", rounding(), dict(n_rot=N_ROT))):
        save_file({k: np.ascontiguousarray(x) for k, x in arrays.items()}, os.path.join(o.out, f"{name}.safetensors"),
                  metadata={"about": json.dumps(about)})


if __name__ == "__main__":
    main()
