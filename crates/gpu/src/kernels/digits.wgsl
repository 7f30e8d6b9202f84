{# Lays rows of inputs out for lanes (weights.wgsl), where no kernel that made them did.

   norm: whether the inputs are to be divided by their RMS, and are weighed first. Workgroups: halves / 256, rows. -#}
{% import "weights.wgsl" as weights with context %}

struct Params {
    // Of a row, in vec4s.
    x_stride: u32,
    halves: u32,
    // Where the norm's weights are.
    norm: u32,
    epsilon: f32,
}

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> digits: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> transposed: array<vec4<f32>>;
{% if norm %}
@group(0) @binding(3) var<storage, read> w: array<vec4<u32>>;
{% endif %}
var<immediate> p: Params;
{% if norm %}

// Sums of squares by lane, as a product of one row takes them.
var<workgroup> squares: array<f32, 32>;
{% endif %}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let half = group.x * 256u + thread;
    let x_at = group.y * p.x_stride;
    if half < p.halves {
{% for i in range(4) %}
        let v{{ i }} = x[x_at + 4u * half + {{ i }}u]{% if norm %} * bitcast<vec4<f32>>(w[p.norm + 4u * half + {{ i }}u]){% endif %};
{% endfor %}
{% for i in range(4) %}
        transposed[{{ weights.transposed_at("group.y", "p.halves", "4u * half + " ~ i ~ "u") }}] = v{{ i }};
{% endfor %}
{{ weights.lay_out_half("group.y", "p.halves", "half") }}
    }
{% if norm %}
    if thread < 32u {
        var sum = 0.0;
        var i = thread;
        while i < 4u * p.halves {
            let v = x[x_at + i];
            sum = fma(v.w, v.w, fma(v.z, v.z, fma(v.y, v.y, fma(v.x, v.x, sum))));
            i += 32u;
        }
        squares[thread] = sum;
    }
    workgroupBarrier();
    if half == 0u {
        var sum = 0.0;
        var i = 0u;
        while i < 32u {
            sum += squares[i];
            i += 1u;
        }
        let scale = 1.0 / sqrt(sum / f32(16u * p.halves) + p.epsilon);
        digits[(group.y + 1u) * (3u * p.halves + 1u) - 1u] = bitcast<vec4<u32>>(vec4<f32>(scale, 0.0, 0.0, 0.0));
    }
{% endif %}
}
