"""Scores of a GGUF file on the held-out sets, in PyTorch on a CPU with the values the file holds and the official roundings.

    python eval.py ../nano.gguf [--tasks tool,sum] [--limit 50] [--show 5] [--plain]

An item counts when every token of the answer, its EOS included, is the argmax given the tokens before it; that is greedy decoding giving the
answer exactly. For prose the figure is the mean negative log-likelihood per token (nats).
"""
import argparse

import gguf
import torch
from gguf.quants import dequantize

import data, heldout, model as M


def load_gguf(path, max_len=4096):
    r = gguf.GGUFReader(path)
    get = lambda k: r.fields["deepseek4." + k].contents()
    c = M.Config(
        n_layer=get("block_count"), ratios=get("attention.compress_ratios"), n_hash=get("hash_layer_count"), vocab=get("vocab_size"), embd=get("embedding_length"),
        n_head=get("attention.head_count"), head_dim=get("attention.key_length"), n_rot=get("rope.dimension_count"), q_rank=get("attention.q_lora_rank"),
        o_groups=get("attention.output_group_count"), o_rank=get("attention.output_lora_rank"), n_expert=get("expert_count"),
        n_used=get("expert_used_count"), ff=get("expert_feed_forward_length"), index_heads=get("attention.indexer.head_count"),
        index_topk=get("attention.indexer.top_k"))
    m = M.Nano(c, max_len=max_len)
    values = {t.name: torch.from_numpy(t.data.copy() if t.tensor_type == gguf.GGMLQuantizationType.I32 else dequantize(t.data, t.tensor_type).copy())
              for t in r.tensors}
    with torch.no_grad():
        for name, p in list(m.named_parameters()) + list(m.named_buffers()):
            if name == "tid2eid":
                p.copy_(torch.stack([values.pop(f"blk.{i}.ffn_gate_tid2eid.weight") for i in range(c.n_hash)]))
            elif m.gguf_name(name) in values:
                p.copy_(values.pop(m.gguf_name(name)).view_as(p))
    assert not values, list(values)
    return m


@torch.no_grad()
def answer_logits(m, ids, start, sim):
    """Logits that predict ids[start:]; the row is padded to a multiple of the window, which no earlier position sees."""
    padded = ids[:-1] + [1] * (-(len(ids) - 1) % m.c.n_swa)
    X, _, _ = m.trunk(torch.tensor([padded]), sim, torch.float32)
    return m.head(X[:, start - 1:len(ids) - 1])[0]


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("gguf")
    ap.add_argument("--tasks")
    ap.add_argument("--limit", type=int, default=10 ** 9)
    ap.add_argument("--show", type=int, default=0, help="print up to so many wrong answers of each task")
    ap.add_argument("--plain", action="store_true", help="without the FP8/BF16/FP4 roundings")
    o = ap.parse_args()
    codec, m = data.Codec(), load_gguf(o.gguf)
    for task, items in heldout.load().items():
        if o.tasks and task not in o.tasks.split(","):
            continue
        right, shown = 0, 0
        for it in items[:o.limit]:
            ids, start = heldout.ids_of(it, codec)
            got = answer_logits(m, ids, start, not o.plain).argmax(-1).tolist()
            want = ids[start:]
            right += got == want
            if got != want and shown < o.show:
                k = next(i for i in range(len(want)) if got[i] != want[i])
                print(f"  {it['prompt'][-3][1][-200:]!r}\n    ...{codec.decode(want[max(0, k - 8):k])!r} wants {codec.decode(want[k:k + 5])!r}, got {codec.decode(got[k:k + 1])!r}")
                shown += 1
        print(f"{task:12} {right}/{len(items[:o.limit])} = {right / len(items[:o.limit]):.3f}", flush=True)
    if not o.tasks or "prose" in o.tasks:
        nll = count = 0
        for line in (heldout.FOLDER / "prose.txt").read_text().splitlines()[:o.limit]:
            ids = [0] + list(codec.text(line)) + [1]
            lp = torch.log_softmax(answer_logits(m, ids, 1, not o.plain), -1)
            nll -= lp[range(len(ids) - 1), ids[1:]].sum().item()
            count += len(ids) - 1
        print(f"prose        {nll / count:.4f} nats a token, perplexity {2.718281828 ** (nll / count):.2f}")


if __name__ == "__main__":
    main()
