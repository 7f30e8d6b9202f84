"""bf16 weights of a training run -> GGUF, in the tensor layout and key names of docs/spec/model.md section 4.

    python export.py --weights DIR/pieces --out nano.gguf            # Q8_0 experts and dense matrices
    python export.py --weights DIR/pieces --out nano-f16.gguf --experts f16    # to requantise elsewhere
"""
import argparse, sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QT
from gguf.quants import dequantize, quantize

import data, weights

Q8 = ("attn_q_a.", "attn_q_b.", "attn_kv.", "attn_output_a.", "attn_output_b.", "_shexp.")
F16 = ("token_embd.", "hc_attn_fn.", "hc_ffn_fn.", "output_hc_fn.", "compressor_kv.", "compressor_gate.", "compressor_ape.",
       "indexer.attn_q_b.", "indexer.proj.", "ffn_gate_inp.")


def tensor_type(name, experts):
    if "tid2eid" in name:
        return QT.I32
    if "_exps." in name:
        return experts
    if name == "output.weight" or (any(k in name for k in Q8) and "indexer." not in name):
        return QT.Q8_0
    return QT.F16 if any(k in name for k in F16) else QT.F32


def gguf_tensors(model):
    """-> {GGUF name: float32 or int32 array} of a model.Nano"""
    out = {}
    for name, t in list(model.named_parameters()) + list(model.named_buffers()):
        if name == "tid2eid":
            for il, table in enumerate(t):
                out[f"blk.{il}.ffn_gate_tid2eid.weight"] = table.cpu().numpy().astype(np.int32)
        elif not name.endswith(("_cos", "_sin")) and name != "had":
            out[model.gguf_name(name)] = t.detach().float().cpu().numpy()
    return out


def store(tensors, experts):
    """-> ({name: (type, array as stored)}, {name: values as an engine will see them})"""
    stored, values = {}, {}
    for name, x in tensors.items():
        qt = tensor_type(name, experts)
        if qt in (QT.F32, QT.I32):
            s = v = np.ascontiguousarray(x)
        elif qt == QT.F16:
            s = x.astype(np.float16)
            v = s.astype(np.float32)
        else:
            s = quantize(np.ascontiguousarray(x), qt)
            v = dequantize(s, qt).astype(np.float32)
        stored[name], values[name] = (qt, s), v
    return stored, values


def vocabulary():
    """-> (token strings by id, their types, merges)"""
    import json
    bpe = json.loads(data.TOKENIZER.read_text())["model"]
    own = sorted(bpe["vocab"], key=bpe["vocab"].get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    user_defined = (data.THINK, data.UNTHINK, data.DSML)
    toks = data.CONTROL_HEAD + own + data.CONTROL_TAIL
    types = [3] * len(data.CONTROL_HEAD) + [1] * len(own) + [4 if t in user_defined else 3 for t in data.CONTROL_TAIL]
    assert len(toks) == len(set(toks)) == data.VOCAB
    return toks, types, merges


def write_gguf(path, c, stored, name):
    w = gguf.GGUFWriter(path, "deepseek4")
    a = "deepseek4."
    w.add_name(name)
    w.add_quantization_version(2)
    w.add_file_type(7)
    w.add_license("mit OR apache-2.0")
    for k, v in {
        "block_count": c.n_layer, "context_length": c.ctx, "embedding_length": c.embd, "vocab_size": c.vocab, "feed_forward_length": c.ff,
        "attention.head_count": c.n_head, "attention.head_count_kv": 1, "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim, "attention.q_lora_rank": c.q_rank, "attention.output_lora_rank": c.o_rank,
        "attention.output_group_count": c.o_groups, "attention.sliding_window": c.n_swa, "attention.indexer.head_count": c.index_heads,
        "attention.indexer.key_length": c.index_dim, "attention.indexer.top_k": c.index_topk, "rope.dimension_count": c.n_rot,
        "rope.scaling.original_context_length": c.rope_orig_ctx, "expert_count": c.n_expert, "expert_used_count": c.n_used,
        "expert_shared_count": c.n_shared, "expert_feed_forward_length": c.ff, "expert_group_count": 0, "expert_group_used_count": 0,
        "expert_gating_func": 4, "hash_layer_count": c.n_hash, "hyper_connection.count": c.hc,
        "hyper_connection.sinkhorn_iterations": c.sinkhorn,
    }.items():
        w.add_uint32(a + k, v)
    for k, v in {
        "rope.freq_base": c.rope_base, "rope.scaling.factor": c.rope_factor, "rope.scaling.yarn_beta_fast": c.beta_fast,
        "rope.scaling.yarn_beta_slow": c.beta_slow, "attention.compress_rope_freq_base": c.compress_rope_base,
        "attention.layer_norm_rms_epsilon": c.eps, "hyper_connection.epsilon": c.hc_eps, "expert_weights_scale": c.route_scale,
    }.items():
        w.add_float32(a + k, v)
    w.add_bool(a + "expert_weights_norm", True)
    w.add_string(a + "rope.scaling.type", "yarn")
    w.add_array(a + "attention.compress_ratios", [int(r) for r in c.ratios])
    w.add_array(a + "swiglu_clamp_exp", [float(c.swiglu_limit)] * c.n_layer)
    toks, types, merges = vocabulary()
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("joyai-llm")
    w.add_token_list(toks)
    w.add_token_types(types)
    w.add_token_merges(merges)
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)
    w.add_pad_token_id(1)
    w.add_add_bos_token(False)
    for nm, (qt, x) in stored.items():
        w.add_tensor(nm, x, raw_dtype=None if qt in (QT.F32, QT.F16, QT.I32) else qt)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--weights", required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--experts", choices=["q8_0", "f16"], default="q8_0")
    o = ap.parse_args()
    m = weights.load_pieces(o.weights)
    stored, _ = store(gguf_tensors(m), QT.Q8_0 if o.experts == "q8_0" else QT.F16)
    write_gguf(o.out, m.c, stored, "infall nano")
    print(o.out, Path(o.out).stat().st_size, "bytes,", sum(p.numel() for p in m.parameters()), "parameters")


if __name__ == "__main__":
    main()
