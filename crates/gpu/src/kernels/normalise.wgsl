{# Rows divided by their RMS and weighed. Workgroups: rows. -#}
struct Params {
    width: u32,
    // Values of a row of the input and of the result.
    from_stride: u32,
    to_stride: u32,
    norm: u32,
    epsilon: f32,
}

@group(0) @binding(0) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
var<immediate> p: Params;

var<workgroup> sums: array<f32, 128>;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let from_ = group.x * p.from_stride;
    var square = 0.0;
    var i = thread;
    while i < p.width {
        square = fma(x[from_ + i], x[from_ + i], square);
        i += 128u;
    }
    sums[thread] = square;
    workgroupBarrier();
    var half = 64u;
    while half > 0u {
        if thread < half {
            sums[thread] += sums[thread + half];
        }
        workgroupBarrier();
        half >>= 1u;
    }
    let inverse = 1.0 / sqrt(sums[0] / f32(p.width) + p.epsilon);
    i = thread;
    while i < p.width {
        y[group.x * p.to_stride + i] = x[from_ + i] * inverse * bitcast<f32>(w[p.norm + (i >> 2u)][i & 3u]);
        i += 128u;
    }
}
