"""model.py and export.py against the float64 NumPy oracle (tools/oracle/ref_model.py), on random weights; fails if they differ.

    python check_oracle.py ORACLE_FOLDER [TOKENS]
"""
import dataclasses, sys, tempfile

import numpy as np
import torch
from gguf import GGMLQuantizationType as QT

import export, model as M, weights

sys.path.insert(0, sys.argv[1])
import ref_model

BOUND = 1e-9


def random_model(c, tokens):
    """No parameter is left at a value that hides an error; saved and loaded, so that this is checked as well."""
    m = M.Nano(c, seed=3, max_len=tokens)
    with torch.no_grad():
        for _, p in m.named_parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.dim() == 1 else 0.02))
        m.output.normal_(std=0.2)
        for b in m.blk:
            if not b.hashed:
                b.exp_probs_b.normal_(std=0.3)
    with tempfile.TemporaryDirectory() as folder:
        weights.save_pieces(m, folder)
        return weights.load_pieces(folder, index_topk=c.index_topk)


def with_stored_values(m, c, values):
    """The model in float64, computing with the values that an engine will see."""
    back = {m.gguf_name(n): p for n, p in list(m.named_parameters()) + list(m.named_buffers())}
    with torch.no_grad():
        for n, v in values.items():
            if n in back:
                back[n].copy_(torch.from_numpy(v))
    m = m.double()
    for name, compressed in (("plain", False), ("yarn", True)):
        m_cos, m_sin = M.rope_tables(c, compressed, 4096)
        setattr(m, name + "_cos", m_cos), setattr(m, name + "_sin", m_sin)
    return m


def main():
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 384
    c = M.Config(index_topk=16)
    m = random_model(c, count)
    stored, values = export.store(export.gguf_tensors(m), QT.Q8_0)
    m = with_stored_values(m, c, values)
    tokens = np.random.default_rng(0).integers(3, 2000, count)
    for tag, sim in (("plain", None), ("official", ref_model.OFFICIAL)):
        ref = ref_model.Ref(dataclasses.asdict(c), values, sim=sim).forward(tokens)["logits"]
        with torch.no_grad():
            got = m.logits(torch.from_numpy(tokens)[None], sim=sim is not None, dtype=torch.float64)[0].numpy()
        worst = np.abs(got - ref).max()
        print(f"{tag}: max abs {worst:.1e} over {count} positions, logits' deviation {ref.std():.2f}")
        assert worst < BOUND


if __name__ == "__main__":
    main()
