"""model.py and export.py against the float64 NumPy oracle (tools/oracle/ref_model.py), on random weights.

    python check_oracle.py ORACLE_FOLDER [TOKENS]
"""
import dataclasses, sys

import numpy as np
import torch
from gguf import GGMLQuantizationType as QT

import export, model as M, weights

sys.path.insert(0, sys.argv[1])
import ref_model

T = int(sys.argv[2]) if len(sys.argv) > 2 else 384
c = M.Config(index_topk=16)
m = M.Nano(c, seed=3, max_len=T)
with torch.no_grad():       # leave no parameter at a value that hides an error
    for n, p in m.named_parameters():
        p.add_(torch.randn_like(p) * (0.3 if p.dim() == 1 else 0.02))
    m.output.normal_(std=0.2)
    for b in m.blk:
        if not b.hashed:
            b.exp_probs_b.normal_(std=0.3)
weights.save_pieces(m, "/tmp/nano-check")
m = weights.load_pieces("/tmp/nano-check", index_topk=16)
print("parameters", sum(p.numel() for p in m.parameters()))
stored, values = export.store(export.gguf_tensors(m), QT.Q8_0)
export.write_gguf("/tmp/nano-check/random.gguf", c, stored, "random")
import os
print("file bytes", os.path.getsize("/tmp/nano-check/random.gguf"))
# the torch model computes with the values an engine will see
back = {m.gguf_name(n): p for n, p in list(m.named_parameters()) + list(m.named_buffers())}
with torch.no_grad():
    for n, v in values.items():
        if n in back:
            back[n].copy_(torch.from_numpy(v))
m = m.double()
for nm, comp in (("plain", False), ("yarn", True)):
    m_cos, m_sin = M.rope_tables(c, comp, 4096)
    setattr(m, nm + "_cos", m_cos), setattr(m, nm + "_sin", m_sin)
tokens = np.random.default_rng(0).integers(3, 2000, T)
cfg = dataclasses.asdict(c)
for tag, sim in (("plain", None), ("official", ref_model.OFFICIAL)):
    ref = ref_model.Ref(cfg, values, sim=sim).forward(tokens)["logits"]
    with torch.no_grad():
        got = m.logits(torch.from_numpy(tokens)[None], sim=sim is not None, dtype=torch.float64)[0].numpy()
    d = np.abs(got - ref)
    rel = np.sqrt((d ** 2).mean(-1) / (ref ** 2).mean(-1))
    print(tag, "max abs", d.max(), "std", ref.std(), "relative RMS per position p50/p90", np.percentile(rel, [50, 90]),
          "argmax", (got.argmax(-1) == ref.argmax(-1)).mean())
