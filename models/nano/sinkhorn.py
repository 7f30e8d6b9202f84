"""Sinkhorn normalisation of the hyper-connections (docs/spec/model.md 2.1, step 4) as one operation with its own gradient.

As PyTorch operations, 20 rounds on 4 x 4 matrices are hundreds of tiny kernels. On a GPU it is one CUDA kernel each way, a thread a
matrix; `kernel_source` is also plain C, so the same text is tested on a CPU. Elsewhere it is the PyTorch form.
"""
import functools

import torch

BODY = """
// Forward: softmax over rows' entries (+eps), one column pass, then ITERS-1 rounds of row and column passes.
// `sums` keeps every divisor, so that the backward pass can undo one division at a time.
__device__ void forward_one(const float* x, float* c, float (*sums)[N], float eps) {
  for (int i = 0; i < N; i++) {
    float m = x[i * N], t = 0;
    for (int j = 1; j < N; j++) m = fmaxf(m, x[i * N + j]);
    for (int j = 0; j < N; j++) { c[i * N + j] = expf(x[i * N + j] - m); t += c[i * N + j]; }
    for (int j = 0; j < N; j++) c[i * N + j] = c[i * N + j] / t + eps;
  }
  #pragma unroll
  for (int k = 0; k < STEPS; k++) {
    int col = k % 2 == 0;
    #pragma unroll
    for (int a = 0; a < N; a++) {
      float s = eps;
      for (int b = 0; b < N; b++) s += col ? c[b * N + a] : c[a * N + b];
      for (int b = 0; b < N; b++) { if (col) c[b * N + a] /= s; else c[a * N + b] /= s; }
      sums[k][a] = s;
    }
  }
}
// Backward: for c' = c / s with s = sum(c) + eps, dc = (dc' - sum(dc' c')) / s.
__device__ void backward_one(const float* x, const float* grad, float* dx, float eps) {
  float c[N * N], d[N * N], sums[STEPS][N];
  forward_one(x, c, sums, eps);
  for (int i = 0; i < N * N; i++) d[i] = grad[i];
  #pragma unroll
  for (int k = STEPS - 1; k >= 0; k--) {
    int col = k % 2 == 0;
    #pragma unroll
    for (int a = 0; a < N; a++) {
      float s = sums[k][a], t = 0;
      for (int b = 0; b < N; b++) { int i = col ? b * N + a : a * N + b; t += d[i] * c[i]; }
      for (int b = 0; b < N; b++) { int i = col ? b * N + a : a * N + b; d[i] = (d[i] - t) / s; c[i] *= s; }
    }
  }
  for (int i = 0; i < N; i++) {       // c is now softmax + eps
    float t = 0;
    for (int j = 0; j < N; j++) t += d[i * N + j] * (c[i * N + j] - eps);
    for (int j = 0; j < N; j++) dx[i * N + j] = (c[i * N + j] - eps) * (d[i * N + j] - t);
  }
}
"""
KERNELS = """
extern "C" __global__ void sinkhorn_forward(const float* x, float* out, long long rows, float eps) {
  long long r = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (r >= rows) return;
  float a[N * N], c[N * N], sums[STEPS][N];
  for (int i = 0; i < N * N; i++) a[i] = x[r * N * N + i];
  forward_one(a, c, sums, eps);
  for (int i = 0; i < N * N; i++) out[r * N * N + i] = c[i];
}
extern "C" __global__ void sinkhorn_backward(const float* x, const float* grad, float* dx, long long rows, float eps) {
  long long r = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (r >= rows) return;
  float a[N * N], g[N * N], d[N * N];
  for (int i = 0; i < N * N; i++) { a[i] = x[r * N * N + i]; g[i] = grad[r * N * N + i]; }
  backward_one(a, g, d, eps);
  for (int i = 0; i < N * N; i++) dx[r * N * N + i] = d[i];
}
"""


def kernel_source(n, iters):
    return f"#define N {n}\n#define STEPS {2 * iters - 1}\n" + BODY


def reference(x, n, iters, eps):
    c = torch.softmax(x.unflatten(-1, (n, n)), -1) + eps
    c = c / (c.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        c = c / (c.sum(-1, keepdim=True) + eps)
        c = c / (c.sum(-2, keepdim=True) + eps)
    return c.flatten(-2)


@functools.cache
def cuda_kernels(n, iters):
    """-> (forward, backward) callables (grid, block, arguments)"""
    import cupy
    mod = cupy.RawModule(code=kernel_source(n, iters) + KERNELS, options=("--std=c++17",))

    def launcher(name):
        kernel = mod.get_function(name)

        def launch(rows, pointers, eps):
            with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
                kernel(((rows + 127) // 128,), (128,), tuple(cupy.uint64(p) for p in pointers) + (cupy.int64(rows), cupy.float32(eps)))
        return launch
    return launcher("sinkhorn_forward"), launcher("sinkhorn_backward")


@torch.library.custom_op("nano::sinkhorn_forward", mutates_args=(), device_types="cuda")
def _forward(x: torch.Tensor, n: int, iters: int, eps: float) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    cuda_kernels(n, iters)[0](x.numel() // (n * n), (x.data_ptr(), out.data_ptr()), eps)
    return out


@torch.library.custom_op("nano::sinkhorn_backward", mutates_args=(), device_types="cuda")
def _backward(x: torch.Tensor, grad: torch.Tensor, n: int, iters: int, eps: float) -> torch.Tensor:
    x, grad = x.contiguous(), grad.contiguous()
    dx = torch.empty_like(x)
    cuda_kernels(n, iters)[1](x.numel() // (n * n), (x.data_ptr(), grad.data_ptr(), dx.data_ptr()), eps)
    return dx


@_forward.register_fake
def _(x, n, iters, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(x, grad, n, iters, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    x, ctx.n, ctx.iters, ctx.eps = inputs
    ctx.save_for_backward(x)


def _grad(ctx, grad):
    return torch.ops.nano.sinkhorn_backward(ctx.saved_tensors[0], grad, ctx.n, ctx.iters, ctx.eps), None, None, None


_forward.register_autograd(_grad, setup_context=_setup)


def sinkhorn(x, n, iters, eps):
    """x [..., n * n] row by row -> doubly stochastic [..., n * n]"""
    if x.is_cuda:
        return torch.ops.nano.sinkhorn_forward(x.float().contiguous(), n, iters, eps)
    return reference(x, n, iters, eps)


def test_on_cpu():
    """The CUDA text compiled as C, against autograd of the PyTorch form."""
    import ctypes, subprocess, tempfile
    n, iters, eps = 4, 20, 1e-6
    src = "#include <math.h>\n#define __device__ static\n" + kernel_source(n, iters) + """
    void fwd(const float* x, float* o, int r, float e) { for (int i = 0; i < r; i++) { float s[STEPS][N]; forward_one(x+i*N*N, o+i*N*N, s, e); } }
    void bwd(const float* x, const float* g, float* d, int r, float e) { for (int i = 0; i < r; i++) backward_one(x+i*N*N, g+i*N*N, d+i*N*N, e); }"""
    with tempfile.TemporaryDirectory() as tmp:
        open(tmp + "/s.c", "w").write(src)
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", tmp + "/s.so", tmp + "/s.c", "-lm"], check=True)
        lib = ctypes.CDLL(tmp + "/s.so")
        x = (2 * torch.randn(500, n * n)).requires_grad_()
        g = torch.randn(500, n * n)
        want = reference(x.double(), n, iters, eps)
        want.backward(g.double())
        out, dx = torch.empty(500, n * n), torch.empty(500, n * n)
        p = lambda t: ctypes.c_void_p(t.data_ptr())
        lib.fwd(p(x), p(out), 500, ctypes.c_float(eps))
        lib.bwd(p(x), p(g), p(dx), 500, ctypes.c_float(eps))
        print("sinkhorn: forward", (out - want).abs().max().item(), "backward", (dx - x.grad).abs().max().item())


if __name__ == "__main__":
    test_on_cpu()
