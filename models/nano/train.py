"""Trains nano on one GPU within a budget of minutes (see docs/nano.md).

    python train.py --out DIR --minutes 20
    python train.py --warm && python train.py --out DIR --init PIECES --minutes 7 --lr 2e-3 --adam-lr 1e-3
    python train.py --out DIR --minutes 1 --device cpu --toy       # rehearsal, also with --init

Phases follow the clock: short conversations rich in copying, full conversations, both in rows of 1,024, then rows of 4,096 for the indexer.
`--init` goes on from saved weights: rows of 2,048 with many requests, every sixth step rows of 4,096, the rate falling to zero from the beginning.
FP8, BF16 and FP4 roundings of KV and indexer rows are on from the start.
Weights come out as bf16 pieces in DIR/half (until the end) and DIR/final, the log as DIR/log.jsonl.
"""
import argparse, json, math, os, shutil, time
from pathlib import Path

import torch

import data, heldout, model as M, weights

# phase -> (share of the time at which it ends, tokens in a row, rows in a step, every compressed row visible)
PHASES = {1: (0.15, 1024, 96, True), 2: (0.68, 1024, 96, False), 3: (1.0, 4096, 24, False)}
CONTINUED = {4: (1.0, 2048, 32, False), 5: (1.0, 4096, 16, False)}      # 5 is mixed in: every LONG_EVERY-th step
LONG_EVERY = 6
TOY = {1: (0.3, 512, 2, True), 2: (0.7, 512, 2, False), 3: (1.0, 1024, 1, False)}
TOY_CONTINUED = {4: (1.0, 512, 2, False), 5: (1.0, 1024, 1, False)}


# ---------------------------------------------------------------- data
class Rows(torch.utils.data.IterableDataset):
    """Batches of (tokens int16 [B, T + 1], weights in percent uint8 [B, T + 1]); every worker has its own seed."""

    def __init__(self, phase, T, B, seed):
        self.phase, self.T, self.B, self.seed = phase, T, B, seed

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        m, codec = data.Maker(self.seed * 1000 + self.phase * 100 + (info.id if info else 0)), data.Codec()
        while True:
            rows = [data.row(m, codec, self.T, self.phase) for _ in range(self.B)]
            yield (torch.tensor([r[0] for r in rows], dtype=torch.int16),
                   torch.tensor([[int(100 * w) for w in r[1]] for r in rows], dtype=torch.uint8))


def loader(phase, phases, seed, workers):
    _, T, B, _ = phases[phase]
    return iter(torch.utils.data.DataLoader(Rows(phase, T, B, seed), batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None,
                                            pin_memory=torch.cuda.is_available()))


# ---------------------------------------------------------------- optimizer
class Muon:
    """Momentum whose matrix updates are orthogonalised by a Newton-Schulz iteration, scaled to the size of an AdamW step
    (K. Jordan's Muon with Moonlight's factor). Matrices of one shape are one batch."""

    def __init__(self, params, momentum=0.95, decay=0.05):
        groups = {}
        for p in params:
            groups.setdefault(tuple(p.shape[-2:]), []).append(p)
        self.groups = [(ps, [torch.zeros_like(p) for p in ps]) for ps in groups.values()]
        self.momentum, self.decay = momentum, decay

    @torch.no_grad()
    def step(self, lr):
        for ps, bufs in self.groups:
            grads = [p.grad for p in ps]
            torch._foreach_lerp_(bufs, grads, 1 - self.momentum)
            u = torch._foreach_lerp(grads, bufs, self.momentum)
            stack = torch.cat([x.reshape(-1, *x.shape[-2:]) for x in u])
            stack = orthogonal(stack) * (0.2 * max(stack.shape[-2:]) ** 0.5)
            parts = [s.view_as(p) for s, p in zip(stack.split([p.numel() // (p.shape[-1] * p.shape[-2]) for p in ps]), ps)]
            torch._foreach_mul_(ps, 1 - lr * self.decay)
            torch._foreach_add_(ps, parts, alpha=-lr)


def orthogonal(g):
    """Newton-Schulz, five steps, [n, a, b] -> nearest orthogonal, about."""
    x = g.to(torch.bfloat16) if g.is_cuda else g
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()


def split_parameters(m):
    """-> (matrices for Muon, AdamW groups; `share` scales the rate where one step of all inputs at once would move a gate too far)"""
    matrices, groups = [], {1.0: [], 0.3: [], 0.1: []}
    for n, p in m.named_parameters():
        if n.endswith("_fn"):
            groups[0.1].append(p)
        elif "gate_inp" in n or "indexer_proj" in n:
            groups[0.3].append(p)
        elif p.dim() < 2 or n in ("token_embd", "output") or n.endswith("ape"):
            groups[1.0].append(p)
        else:
            matrices.append(p)
    return matrices, [dict(params=ps, share=share) for share, ps in groups.items()]


# ---------------------------------------------------------------- forward, once
def run_block(blk, *inputs):
    return blk(*inputs)


class Runner:
    """The model with its layers and its head compiled one by one: the layers of one kind share their code."""

    def __init__(self, m, compiled, dtype):
        wrap = (lambda f: torch.compile(f, dynamic=False, fullgraph=True)) if compiled else (lambda f: f)
        self.m, self.dtype, self.block, self.head_loss = m, dtype, wrap(run_block), wrap(m.head_loss)

    def loss(self, ids, weights, dense):
        """-> (loss to differentiate, cross entropy, per-token cross entropy, hits, mean KL, loads)"""
        X, kls, loads = self.m.trunk(ids[:, :-1], True, self.dtype, dense, self.block)
        ce, each, hit = self.head_loss(X, ids[:, 1:].contiguous(), weights[:, 1:].contiguous())
        kl = sum(kls) / len(kls)
        return ce + kl, ce.detach(), each, hit, kl.detach(), loads


# ---------------------------------------------------------------- held-out scores
class Scores:
    """Exact answers by teacher forcing: greedy decoding gives the answer iff every answer token is the argmax."""

    def __init__(self, limit):
        codec = data.Codec()
        self.sets = {t: [heldout.ids_of(i, codec) for i in items[:limit]] for t, items in heldout.load().items()}
        prose = [[0] + list(codec.text(line)) + [1] for line in (heldout.FOLDER / "prose.txt").open().read().splitlines()]
        self.sets["prose"] = [(p, 1) for p in prose[:limit]]

    def run(self, runner, shapes, device):
        """-> {set: [share right, nats a token]}, prose: nats a token, check sets also the wrong items. An item is run in the first of the
        `shapes` (tokens in a row, rows) that holds it, and left out if none does."""
        out = {}
        for task, items in self.sets.items():
            wrong, nll, count, ran, shorter = [], 0, 0, 0, 0
            for T, B in shapes:
                fit = [(i, *x) for i, x in enumerate(items) if shorter < len(x[0]) <= T + 1]
                shorter, ran = T + 1, ran + len(fit)
                for at in range(0, len(fit), B):
                    part = fit[at:at + B]
                    ids = torch.full((B, T + 1), 1, dtype=torch.long)
                    w = torch.zeros(B, T + 1)
                    for r, (_, seq, a) in enumerate(part):
                        ids[r, :len(seq)] = torch.tensor(seq)
                        w[r, a:len(seq)] = 1
                    ids, w = ids.to(device), w.to(device)
                    _, _, each, hit, _, _ = runner.loss(ids, w, torch.zeros((), device=device))
                    bad = ((w[:, 1:] > 0) & ~hit).any(1).tolist()
                    wrong += [i for (i, _, _), b in zip(part, bad) if b]
                    nll += (each * w[:, 1:]).sum().item()
                    count += w[:, 1:].sum().item()
            if ran:
                out[task] = round(nll / count, 4) if task == "prose" else [round(1 - len(wrong) / ran, 3), round(nll / count, 4)]
                if task.startswith("check"):
                    out[task].append(sorted(wrong))
        return out


# ---------------------------------------------------------------- compilation beforehand
def warm_one(layer, T, B):
    """Compiles one layer, or the head (None), for rows of T tokens, there and back: the code goes to Inductor's cache on disk."""
    torch.set_float32_matmul_precision("high")
    m = M.Nano(M.Config()).cuda()
    runner, c = Runner(m, True, torch.bfloat16), m.c
    ids, weights_ = torch.randint(0, c.vocab, (B, T), device="cuda"), torch.ones(B, T, device="cuda")
    X = torch.randn(B, T, c.hc, c.embd, device="cuda", dtype=torch.bfloat16).requires_grad_()
    if layer is None:
        return runner.head_loss(X, ids, weights_)[0].backward()
    blk, nm = m.blk[layer], "yarn" if m.blk[layer].ratio else "plain"
    cos, sin = getattr(m, nm + "_cos")[:T], getattr(m, nm + "_sin")[:T]
    Y, kl, _ = runner.block(blk, X, m.tid2eid[layer][ids] if blk.hashed else None, cos, sin, m.had, True, torch.zeros((), device="cuda"))
    ((Y * torch.randn_like(Y)).float().sum() + (0 if kl is None else kl)).backward()


def warm():
    """Every kind of layer in every shape of CONTINUED, each in a process of its own."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    context = torch.multiprocessing.get_context("spawn")
    jobs = [context.Process(target=warm_one, args=(layer, T, B)) for _, T, B, _ in CONTINUED.values() for layer in (0, 2, 3, None)]
    for j in jobs:
        j.start()
    for j in jobs:
        j.join()
    print("compiled", [j.exitcode for j in jobs], flush=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--out", default="run")
    ap.add_argument("--minutes", type=float, default=20)
    ap.add_argument("--device", default="cuda")
    ap.add_argument("--toy", action="store_true")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--lr", type=float, default=5e-3)
    ap.add_argument("--adam-lr", type=float, default=3e-3)
    ap.add_argument("--workers", type=int, default=15)
    ap.add_argument("--init", help="pieces of weights to go on from; the rate falls from the beginning, compilation counts")
    ap.add_argument("--warm", action="store_true", help="compile what --init needs, in parallel, and exit")
    o = ap.parse_args()
    if o.warm:
        return warm()
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.accumulated_recompile_limit = 512
    out = Path(o.out)
    out.mkdir(parents=True, exist_ok=True)
    log_file = (out / "log.jsonl").open("a", buffering=1)
    start = time.time()

    def log(**kw):
        line = json.dumps(dict(at=round(time.time() - start, 1), **kw))
        print(line, flush=True)
        log_file.write(line + "\n")

    phases = (TOY_CONTINUED if o.toy else CONTINUED) if o.init else TOY if o.toy else PHASES
    config = M.Config(embd=64, head_dim=128, n_layer=5, n_head=2, o_groups=2, o_rank=32, q_rank=32, ff=64, index_heads=2) if o.toy and not o.init else M.Config()
    m = M.Nano(config, o.seed).to(o.device)
    if o.init:
        m.load_state_dict(weights.load_pieces(o.init).state_dict())
    matrices, groups = split_parameters(m)
    rest = [p for g in groups for p in g["params"]]
    log(parameters=sum(p.numel() for p in m.parameters()), muon=sum(p.numel() for p in matrices))
    muon, adam = Muon(matrices), torch.optim.AdamW(groups, lr=o.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=o.device == "cuda")
    runner = Runner(m, compiled=not o.toy, dtype=torch.bfloat16 if o.device == "cuda" else torch.float32)

    def step(ids, w, dense, lr):
        loss, ce, each, hit, kl, loads = runner.loss(ids, w, torch.full((), float(dense), device=o.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        muon.step(lr * o.lr)
        for g in adam.param_groups:
            g["lr"] = lr * o.adam_lr * g["share"]
        adam.step()
        m.zero_grad()
        with torch.no_grad():       # experts that get too little become more attractive (bias for selection only)
            for b, load in zip(m.blk, loads):
                if not b.hashed:
                    b.exp_probs_b += 0.002 * lr * (load.mean() - load).sign()
        return ce, each, hit, kl, loads

    def shapes():
        """(tokens in a row, rows) that are compiled by now, without the rest of the phases"""
        return [(T, B) for k, (_, T, B, _) in phases.items() if o.init or k == phase]

    def batch(it):
        ids, w = next(it)
        return ids.to(o.device, non_blocking=True).long(), w.to(o.device, non_blocking=True).float() / 100

    sync = torch.cuda.synchronize if o.device == "cuda" else (lambda: None)
    scores = Scores(8 if o.toy else 64)
    budget, n, tokens, phase, it, upcoming = 60 * o.minutes, 0, 0, 0, None, loader(min(phases), phases, o.seed, o.workers)
    good, last_eval, fresh = {k: v.clone() for k, v in m.state_dict().items()}, time.time(), False
    long = loader(5, phases, o.seed, max(1, o.workers // 4) if o.workers else 0) if o.init else None
    ce_sum = kl_sum = torch.zeros((), device=o.device)
    since, since_t = 0, time.time()
    start = time.time()
    while True:
        p = (time.time() - start) / budget
        if p >= 1:
            break
        want = next(k for k in phases if p < phases[k][0])
        if want != phase:
            it, phase, fresh = loader(want, phases, o.seed, o.workers) if upcoming is None else upcoming, want, True
            upcoming = None
        end, T, B, dense = phases[phase]
        if upcoming is None and not o.init and phase + 1 in phases and p > end - 0.02:
            upcoming = loader(phase + 1, phases, o.seed, o.workers)
        flat = 0.0 if o.init else 0.5
        lr = min(1, (n + 1) / (100 if o.init else 300)) * (1 if p < flat else (1 - p) / (1 - flat) * 0.98 + 0.02)
        ids, w = batch(long if o.init and n % LONG_EVERY == 0 else it)
        ce, _, _, kl, loads = step(ids, w, dense, lr)
        ce_sum, kl_sum = ce_sum + ce, kl_sum + kl
        n, since, tokens = n + 1, since + 1, tokens + B * T
        if fresh:
            sync()
            log(phase=phase, step=n, first_step_s=round(time.time() - since_t, 1))
            if n == 1 and not o.init:       # the budget begins when the first shape is compiled
                start = last_eval = time.time()
            fresh, since_t, since, ce_sum, kl_sum = False, time.time(), 0, torch.zeros_like(ce_sum), torch.zeros_like(ce_sum)
        elif since >= (10 if o.toy else 100):
            c = (ce_sum / since).item()
            if not math.isfinite(c):
                log(error="not finite, back to the last good weights with half the rate", step=n)
                m.load_state_dict(good)
                adam.state.clear()
                for _, bufs in muon.groups:
                    torch._foreach_zero_(bufs)
                o.lr, o.adam_lr = o.lr / 2, o.adam_lr / 2
            else:
                good = {k: v.clone() for k, v in m.state_dict().items()}
                dt = (time.time() - since_t) / since
                log(step=n, phase=phase, p=round(p, 3), lr=round(lr, 3), loss=round(c, 4), kl=round((kl_sum / since).item(), 3), tokens=tokens,
                    tokens_per_s=round(B * T / dt), load=[round(x.max().item(), 2) for x in loads])
            since_t, since, ce_sum, kl_sum = time.time(), 0, torch.zeros_like(ce_sum), torch.zeros_like(ce_sum)
            if time.time() - last_eval > (10 if o.toy else 100):
                log(step=n, eval=scores.run(runner, shapes(), o.device))
                last_eval = since_t = time.time()
                weights.save_pieces(m, out / "half")
    sync()
    log(steps=n, tokens=tokens, done=True)
    weights.save_pieces(m, out / "final")
    shutil.rmtree(out / "half", ignore_errors=True)
    log(final=Scores(8 if o.toy else 200).run(runner, shapes(), o.device))
    (out / "finished").touch()


if __name__ == "__main__":
    main()
