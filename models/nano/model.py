"""DeepSeek V4 at nano size in plain PyTorch, written to be trained: whole rows at once, no cache, no graph breaks under torch.compile.

The mathematics is that of docs/spec/model.md section 2; parameters carry the GGUF tensor names. Three things serve training only:
all experts are computed for every token and masked (they are small), the indexer learns from a KL loss (see `indexer_loss`), and
`sim=True` applies the FP8 / BF16 / FP4 roundings of KV and indexer rows with straight-through gradients.
"""
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

import sinkhorn


@dataclass
class Config:
    n_layer: int = 7
    ratios: list = field(default_factory=lambda: [0, 0, 4, 128, 4, 128, 4])
    n_hash: int = 2
    vocab: int = 2048
    embd: int = 256
    n_head: int = 8
    head_dim: int = 256
    n_rot: int = 64
    q_rank: int = 128
    o_groups: int = 4
    o_rank: int = 64
    n_expert: int = 5
    n_used: int = 2
    n_shared: int = 1
    ff: int = 256
    route_scale: float = 1.5
    swiglu_limit: float = 10.0
    n_swa: int = 128
    index_heads: int = 8
    index_dim: int = 128
    index_topk: int = 64
    hc: int = 4
    sinkhorn: int = 20
    hc_eps: float = 1e-6
    eps: float = 1e-6
    rope_base: float = 10000.0
    compress_rope_base: float = 160000.0
    rope_factor: float = 16.0
    rope_orig_ctx: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    ctx: int = 8192


# ---------------------------------------------------------------- roundings (model.md 2.8), straight-through
def through(x, rounded):
    return x + (rounded - x).detach()


def pow2_ceil(x):
    return torch.exp2(torch.ceil(torch.log2(x)))


def fp8_row(x, n_rot):
    """KV row as stored: E4M3 with a power-of-two scale per 64 values, the RoPE tail in BF16."""
    a, b = x[..., :-n_rot].float(), x[..., -n_rot:]
    blocks = a.unflatten(-1, (-1, 64))
    scale = pow2_ceil(blocks.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448)
    q = ((blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).flatten(-2)
    return through(x, torch.cat([q.to(x.dtype), b.to(torch.bfloat16).to(x.dtype)], -1))


def fp4_row(x):
    """E2M1 with a power-of-two scale per 32 values."""
    blocks = x.float().unflatten(-1, (-1, 32))
    scale = pow2_ceil(blocks.abs().amax(-1, keepdim=True).clamp_min(6 * 2.0 ** -126) / 6)
    v = (blocks / scale).clamp(-6, 6)
    a = v.abs()
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    return through(x, (torch.round(v / step) * step * scale).flatten(-2).to(x.dtype))


def hadamard_matrix(n):
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / math.sqrt(n)


# ---------------------------------------------------------------- small pieces
def wide(x):
    """At least float32."""
    return x.float() if x.dtype == torch.bfloat16 else x


def linear(x, w):
    return F.linear(x, w.to(x.dtype))


def rms(x, eps, w=None):
    v = wide(x)
    y = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    return (y if w is None else y * w).to(x.dtype)


def rope_tables(c, compressed, length):
    d, base = c.n_rot, c.compress_rope_base if compressed else c.rope_base
    f = base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    if compressed and c.rope_factor > 1:
        dim = lambda rot: d * math.log(c.rope_orig_ctx / (rot * 2 * math.pi)) / (2 * math.log(base))
        lo, hi = max(math.floor(dim(c.beta_fast)), 0), min(math.ceil(dim(c.beta_slow)), d - 1)
        t = ((torch.arange(d // 2, dtype=torch.float64) - lo) / max(hi - lo, 0.001)).clamp(0, 1)
        f = f / c.rope_factor * t + f * (1 - t)
    a = torch.arange(length, dtype=torch.float64)[:, None] * f
    return a.cos(), a.sin()


def rope(x, cos, sin):
    """Rotate the last 2 * cos.shape[-1] channels, interleaved pairs; cos and sin broadcast against x[..., pairs]."""
    n = 2 * cos.shape[-1]
    keep, tail = x[..., :-n], wide(x[..., -n:])
    a, b = tail[..., 0::2], tail[..., 1::2]
    y = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([keep, y.to(x.dtype)], -1)


# ---------------------------------------------------------------- one layer
class Block(nn.Module):
    def __init__(self, c, il):
        super().__init__()
        self.c, self.ratio, self.hashed = c, c.ratios[il], il < c.n_hash
        d, D, n = c.embd, c.head_dim, c.hc

        def mat(*shape, std=None):
            return nn.Parameter(torch.randn(*shape) * (std or 0.7 * shape[-1] ** -0.5))

        ones = lambda k: nn.Parameter(torch.ones(k))
        for kind in ("attn", "ffn"):
            base = torch.zeros(2 * n + n * n)
            s = (2 * il + (kind == "ffn")) % n         # each sub-layer begins by reading mostly one stream and writing mostly to it
            base[:n] = -2.0
            base[s] = 1.0
            base[n:2 * n] = -0.7
            base[n + s] = 0.7
            base[2 * n:] = 3.0 * torch.eye(n).flatten()
            setattr(self, f"hc_{kind}_fn", mat(2 * n + n * n, n * d, std=0.005))
            setattr(self, f"hc_{kind}_scale", ones(3))
            setattr(self, f"hc_{kind}_base", nn.Parameter(base))
            setattr(self, f"{kind}_norm", ones(d))
        self.attn_q_a, self.attn_q_a_norm = mat(c.q_rank, d), ones(c.q_rank)
        self.attn_q_b = mat(c.n_head * D, c.q_rank)
        self.attn_kv, self.attn_kv_a_norm = mat(D, d), ones(D)
        self.attn_sinks = nn.Parameter(torch.zeros(c.n_head))
        self.attn_output_a = mat(c.o_groups * c.o_rank, c.n_head * D // c.o_groups)
        self.attn_output_b = mat(d, c.o_groups * c.o_rank)
        r = self.ratio
        if r:
            w = D * (2 if r == 4 else 1)
            self.attn_compressor_kv, self.attn_compressor_gate = mat(w, d), mat(w, d)
            self.attn_compressor_ape = nn.Parameter(torch.randn(r, w) * (1.0 if r == 4 else 0.1))
            self.attn_compressor_norm = ones(D)
        if r == 4:
            ID = c.index_dim
            self.indexer_compressor_kv, self.indexer_compressor_gate = mat(2 * ID, d), mat(2 * ID, d)
            self.indexer_compressor_ape = nn.Parameter(torch.randn(r, 2 * ID) * 0.5)
            self.indexer_compressor_norm = ones(ID)
            self.indexer_attn_q_b, self.indexer_proj = mat(c.index_heads * ID, c.q_rank), mat(c.index_heads, d)
        self.ffn_gate_inp = mat(c.n_expert, d)
        if not self.hashed:
            self.register_buffer("exp_probs_b", torch.zeros(c.n_expert))
        self.ffn_gate_exps, self.ffn_up_exps = mat(c.n_expert, c.ff, d), mat(c.n_expert, c.ff, d)
        self.ffn_down_exps = mat(c.n_expert, d, c.ff)
        self.ffn_gate_shexp, self.ffn_up_shexp, self.ffn_down_shexp = mat(c.ff, d), mat(c.ff, d), mat(d, c.ff)

    def hc_pre(self, X, kind):
        c, n = self.c, self.c.hc
        g = lambda s: getattr(self, f"hc_{kind}_{s}")
        mix = wide(linear(rms(X.flatten(-2), c.eps), g("fn")))
        scale, base = g("scale"), g("base")
        pre = torch.sigmoid(mix[..., :n] * scale[0] + base[:n]) + c.hc_eps
        post = 2 * torch.sigmoid(mix[..., n:2 * n] * scale[1] + base[n:2 * n])
        comb = sinkhorn.sinkhorn(mix[..., 2 * n:] * scale[2] + base[2 * n:], n, c.sinkhorn, c.hc_eps).unflatten(-1, (n, n))
        x = sum(pre[..., s, None] * wide(X[..., s, :]) for s in range(n)).to(X.dtype)
        return rms(x, c.eps, getattr(self, f"{kind}_norm")), post, comb

    def hc_post(self, X, y, post, comb):
        n, v, Y = self.c.hc, wide(X), wide(y)
        rows = [post[..., k, None] * Y + sum(comb[..., j, k, None] * v[..., j, :] for j in range(n)) for k in range(n)]
        return torch.stack(rows, -2).to(X.dtype)

    def compress(self, h, prefix, D, cos, sin):
        """[B, T, d] -> rows [B, T / ratio, D]"""
        g, r = lambda s: getattr(self, prefix + s), self.ratio
        u = wide(linear(h, g("kv"))).unflatten(1, (-1, r))
        z = wide(linear(h, g("gate"))).unflatten(1, (-1, r)) + g("ape")
        if r == 4:      # the previous window's first half, this window's second half
            before = lambda t, fill: F.pad(t[:, :-1, :, :D], (0, 0, 0, 0, 1, 0), value=fill)
            u, z = torch.cat([before(u, 0.0), u[..., D:]], 2), torch.cat([before(z, -1e30), z[..., D:]], 2)
        row = rms((u * torch.softmax(z, 2)).sum(2), self.c.eps, g("norm")).to(h.dtype)
        return rope(row, cos[::r], sin[::r])

    def attention(self, h, cos, sin, sim, had, dense):
        """-> (output, KL loss of the indexer)"""
        c, (B, T, _) = self.c, h.shape
        H, D, W = c.n_head, c.head_dim, c.n_swa
        qr = rms(linear(h, self.attn_q_a), c.eps, self.attn_q_a_norm)
        q = rope(rms(linear(qr, self.attn_q_b).unflatten(-1, (H, D)), c.eps), cos[:, None], sin[:, None])
        kv = rope(rms(linear(h, self.attn_kv), c.eps, self.attn_kv_a_norm), cos, sin)
        if sim:
            kv = fp8_row(kv, c.n_rot)
        scale = D ** -0.5
        # window: each block of W queries sees its own block of keys and the one before
        nb = T // W
        kb = kv.unflatten(1, (nb, W))
        keys = torch.cat([F.pad(kb[:, :-1], (0, 0, 0, 0, 1, 0)), kb], 2)                       # [B, nb, 2W, D]
        lw = wide((q.reshape(B, nb, W * H, D) @ keys.transpose(-1, -2)).unflatten(2, (W, H))) * scale
        i, j = torch.arange(W, device=h.device)[:, None], torch.arange(2 * W, device=h.device)[None]
        band = (j > i) & (j <= i + W)
        first = torch.arange(nb, device=h.device)[:, None, None] > 0
        ok = band & (first | (j >= W))                                                          # [nb, W, 2W]
        lw = lw.masked_fill(~ok[None, :, :, None], -1e30).reshape(B, T, H, 2 * W)
        sink = self.attn_sinks.to(lw.dtype)[:, None]
        kl = None
        if self.ratio:
            ck = self.compress(h, "attn_compressor_", D, cos, sin)
            if sim:
                ck = fp8_row(ck, c.n_rot)
            n = ck.shape[1]
            t = torch.arange(T, device=h.device)[:, None]
            seen = torch.arange(n, device=h.device)[None] < (t + 1) // self.ratio               # [T, n]
            lc = wide((q.reshape(B, T * H, D) @ ck.transpose(-1, -2)).view(B, T, H, n)) * scale
            lc = lc.masked_fill(~seen[None, :, None], -1e30)
            if self.ratio == 4:
                score = self.index_scores(h.detach(), qr.detach(), cos, sin, sim, had)
                score = score.masked_fill(~seen[None], -1e30)
                kl = self.indexer_loss(score, lw.detach(), lc.detach(), sink.detach(), seen)
                if n > c.index_topk:
                    kth = score.detach().topk(c.index_topk, -1).values[..., -1:]
                    lc = lc.masked_fill((score < kth - dense * 1e30)[:, :, None], -1e30)
            m = torch.maximum(torch.maximum(lw.amax(-1, keepdim=True), lc.amax(-1, keepdim=True)), sink).detach()
            ew, ec = torch.exp(lw - m), torch.exp(lc - m)
            inv = 1 / (ew.sum(-1, keepdim=True) + ec.sum(-1, keepdim=True) + torch.exp(sink - m))
            o = ((ec * inv).to(h.dtype).view(B, T * H, n) @ ck).view(B, T, H, D)
        else:
            m = torch.maximum(lw.amax(-1, keepdim=True), sink).detach()
            ew = torch.exp(lw - m)
            inv = 1 / (ew.sum(-1, keepdim=True) + torch.exp(sink - m))
            o = 0
        o = o + ((ew * inv).to(h.dtype).view(B, nb, W * H, 2 * W) @ keys).view(B, T, H, D)
        o = rope(o, cos[:, None], -sin[:, None])
        G = c.o_groups
        low = torch.einsum("btgi,gri->btgr", o.reshape(B, T, G, -1), self.attn_output_a.to(h.dtype).unflatten(0, (G, -1)))
        return linear(low.flatten(-2), self.attn_output_b), kl

    def index_scores(self, h, qr, cos, sin, sim, had):
        c = self.c
        ik = self.compress(h, "indexer_compressor_", c.index_dim, cos, sin)
        iq = rope(linear(qr, self.indexer_attn_q_b).unflatten(-1, (c.index_heads, c.index_dim)), cos[:, None], sin[:, None])
        if sim:
            had = had.to(h.dtype)
            ik, iq = fp4_row(ik @ had), fp4_row(iq @ had)
        w = wide(linear(h, self.indexer_proj)) / math.sqrt(c.index_dim * c.index_heads)
        dots = (iq.flatten(1, 2) @ ik.transpose(-1, -2)).unflatten(1, (-1, c.index_heads))      # [B, T, heads, n]
        return (w[..., None] * wide(F.relu(dots))).sum(2)

    def indexer_loss(self, score, lw, lc, sink, seen):
        """Top-k has no gradient, so the indexer is taught apart: its softmax over the visible rows should match the attention that
        the heads together would pay to them if all were kept. Queries that look at compressed rows count by how much they look."""
        m = torch.maximum(torch.maximum(lw.amax(-1, keepdim=True), lc.amax(-1, keepdim=True)), sink)
        den = torch.exp(lw - m).sum(-1, keepdim=True) + torch.exp(lc - m).sum(-1, keepdim=True) + torch.exp(sink - m)
        want = (torch.exp(lc - m) / den).mean(2)                                                # [B, T, n]
        logq = torch.log_softmax(score, -1).masked_fill(~seen, 0)
        return -(want * logq).sum() / (want.sum() + 1e-3)

    def ffn(self, h, tokens_experts):
        """-> (output, share of tokens that each expert gets)"""
        c = self.c
        s = torch.sqrt(F.softplus(wide(linear(h, self.ffn_gate_inp))))
        idx = tokens_experts if self.hashed else (s.detach() + self.exp_probs_b).topk(c.n_used, -1).indices
        mask = (idx[..., None] == torch.arange(c.n_expert, device=s.device)).any(-2).to(s.dtype)
        w = s * mask
        w = w / w.sum(-1, keepdim=True) * c.route_scale
        w = torch.cat([w, torch.ones_like(w[..., :1])], -1)                                     # the shared expert comes last, weight 1
        both = lambda a, b: torch.cat([a.flatten(0, 1), b])
        g = linear(h, both(self.ffn_gate_exps, self.ffn_gate_shexp))
        u = linear(h, both(self.ffn_up_exps, self.ffn_up_shexp))
        a = F.silu(wide(g).clamp(max=c.swiglu_limit)) * wide(u).clamp(-c.swiglu_limit, c.swiglu_limit)
        a = (a.unflatten(-1, (-1, c.ff)) * w[..., None]).flatten(-2).to(h.dtype)
        down = torch.cat([self.ffn_down_exps, self.ffn_down_shexp[None]]).transpose(0, 1).flatten(1)
        return linear(a, down), mask.mean((0, 1))

    def forward(self, X, experts, cos, sin, had, sim: bool, dense):
        x, post, comb = self.hc_pre(X, "attn")
        y, kl = self.attention(x, cos, sin, sim, had, dense)
        X = self.hc_post(X, y, post, comb)
        x, post, comb = self.hc_pre(X, "ffn")
        y, load = self.ffn(x, experts)
        return self.hc_post(X, y, post, comb), kl, load


# ---------------------------------------------------------------- the model
class Nano(nn.Module):
    def __init__(self, c, seed=0, max_len=4096):
        super().__init__()
        torch.manual_seed(seed)
        self.c = c
        n, d = c.hc, c.embd
        self.token_embd = nn.Parameter(torch.randn(c.vocab, d) * 0.5)
        self.output = nn.Parameter(torch.randn(c.vocab, d) * 0.02)
        self.output_norm = nn.Parameter(torch.ones(d))
        self.output_hc_fn = nn.Parameter(torch.randn(n, n * d) * 0.005)
        self.output_hc_scale = nn.Parameter(torch.ones(1))
        self.output_hc_base = nn.Parameter(torch.zeros(n))
        self.blk = nn.ModuleList(Block(c, i) for i in range(c.n_layer))
        order = torch.argsort(torch.rand(c.n_hash, c.vocab, c.n_expert), -1)
        self.register_buffer("tid2eid", order[..., :c.n_used].contiguous())
        for nm, comp in (("plain", False), ("yarn", True)):
            cos, sin = rope_tables(c, comp, max_len)
            self.register_buffer(nm + "_cos", cos.float(), persistent=False)
            self.register_buffer(nm + "_sin", sin.float(), persistent=False)
        self.register_buffer("had", hadamard_matrix(c.index_dim).float(), persistent=False)

    def head(self, X):
        c = self.c
        mix = wide(linear(rms(X.flatten(-2), c.eps), self.output_hc_fn))
        w = torch.sigmoid(mix * self.output_hc_scale + self.output_hc_base) + c.hc_eps
        v = sum(w[..., s, None] * wide(X[..., s, :]) for s in range(c.hc)).to(X.dtype)
        return linear(rms(v, c.eps, self.output_norm), self.output)

    def head_loss(self, X, targets, weights):
        """-> (weighted cross entropy, which predictions are right)"""
        logits = self.head(X).float()
        ce = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(weights)
        return (ce * weights).sum() / weights.sum(), ce.detach(), logits.detach().argmax(-1) == targets

    def trunk(self, tokens, sim, dtype, dense=None, run=None):
        """tokens [B, T], T a multiple of 128 -> (streams [B, T, hc, d], KL losses, loads). `dense` = 1 (a tensor) lets ratio-4 layers
        see every row, as long as the indexer knows nothing; `run` may be a compiled form of calling a block."""
        T = tokens.shape[1]
        X = self.token_embd[tokens].to(dtype)[..., None, :].expand(-1, -1, self.c.hc, -1).contiguous()
        dense = torch.zeros((), device=X.device) if dense is None else dense
        kls, loads = [], []
        for il, blk in enumerate(self.blk):
            nm = "yarn" if blk.ratio else "plain"
            cos, sin = getattr(self, nm + "_cos")[:T], getattr(self, nm + "_sin")[:T]
            X, kl, load = (run or Block.__call__)(blk, X, self.tid2eid[il][tokens] if blk.hashed else None, cos, sin, self.had, sim, dense)
            kls += [kl] if kl is not None else []
            loads.append(load)
        return X, kls, loads

    def logits(self, tokens, sim=False, dtype=torch.float32):
        return self.head(self.trunk(tokens, sim, dtype)[0])

    def gguf_name(self, name):
        """Parameter or buffer name -> GGUF tensor name."""
        name = name.replace("indexer_attn_q_b", "indexer.attn_q_b").replace("indexer_proj", "indexer.proj")
        return name + (".bias" if name.endswith("exp_probs_b") else ".weight")
