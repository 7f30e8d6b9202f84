"""Weights on disk between training and export: bf16, in files small enough to carry."""
from pathlib import Path

import torch

import model as M


def save_pieces(model, folder, limit=15_000_000):
    """Weights as bf16 (buffers as they are) in files small enough to carry."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    piece, size, k = {}, 0, 0
    items = [(n, (t.detach().to(torch.bfloat16) if t.is_floating_point() and t.dim() > 1 else t.detach()).cpu()) for n, t in model.state_dict().items()]
    for n, t in items + [(None, None)]:
        b = 0 if t is None else t.numel() * t.element_size()
        if piece and (n is None or size + b > limit):
            torch.save(piece, folder / f"weights-{k}.pt")
            piece, size, k = {}, 0, k + 1
        if n is not None:
            piece[n], size = t, size + b


def load_pieces(folder, **config):
    state = {}
    for f in sorted(Path(folder).glob("weights-*.pt")):
        state.update(torch.load(f, map_location="cpu"))
    m = M.Nano(M.Config(**config))
    m.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return m
