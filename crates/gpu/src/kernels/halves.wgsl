{# Rows of activations as halves, each multiplied by the power of two that brings its largest magnitude to 2^14..2^15: no value
   leaves the range of a half, and none that matters beside the largest loses precision. Workgroups: 1, rows. -#}
struct Params {
    // Of a row, in vec4s: to the next, and what is used.
    stride: u32,
    fours: u32,
}

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> halves: array<vec2<u32>>;
// What undoes each row's multiplication.
@group(0) @binding(2) var<storage, read_write> inverses: array<f32>;
var<immediate> p: Params;

var<workgroup> largest: array<u32, 256>;

// Magnitudes in the order of their bits; those of no number are above all others.
fn magnitude(v: vec4<f32>) -> u32 {
    let bits = bitcast<vec4<u32>>(v) & vec4<u32>(0x7fffffffu);
    return max(max(bits.x, bits.y), max(bits.z, bits.w));
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let start = group.y * p.stride;
    var most = 0u;
    var i = thread;
    while i < p.fours {
        most = max(most, magnitude(x[start + i]));
        i += 256u;
    }
    largest[thread] = most;
    var width = 128u;
    while width > 0u {
        workgroupBarrier();
        if thread < width {
            largest[thread] = max(largest[thread], largest[thread + width]);
        }
        width >>= 1u;
    }
    workgroupBarrier();
    // Exponents with their bias of 127: the inverse of the scale must be a normal number, too.
    let exponent = min(268u - (largest[0] >> 23u), 253u);
    let scale = bitcast<f32>(exponent << 23u);
    if thread == 0u {
        inverses[group.y] = bitcast<f32>((254u - exponent) << 23u);
    }
    i = thread;
    while i < p.fours {
        let v = x[start + i] * scale;
        halves[group.y * p.fours + i] = vec2<u32>(pack2x16float(v.xy), pack2x16float(v.zw));
        i += 256u;
    }
}
