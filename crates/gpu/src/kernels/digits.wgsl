{# Rows of inputs as digits, for products of several rows at a time: of each row the high digits of all halves of chunks, then the
   low ones, a vector of a half each, then scale and sum of two halves a vector; last what the products are to be multiplied by.

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
{% if norm %}
@group(0) @binding(2) var<storage, read> w: array<vec4<u32>>;
{% endif %}
var<immediate> p: Params;

var<workgroup> others: array<vec2<f32>, 256>;
{% if norm %}
// Sums of squares by lane, as a product of one row takes them.
var<workgroup> squares: array<f32, 32>;
{% endif %}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let half = group.x * 256u + thread;
    let x_at = group.y * p.x_stride + 4u * min(half, p.halves - 1u);
    let row = group.y * (p.halves * 5u / 2u + 1u);
{% for i in range(4) %}
    let v{{ i }} = x[x_at + {{ i }}u]{% if norm %} * bitcast<vec4<f32>>(w[p.norm + 4u * min(half, p.halves - 1u) + {{ i }}u]){% endif %};
{% endfor %}
{{ weights.digits_of_half() }}
    others[thread] = of_half;
{% if norm %}
    if thread < 32u {
        var sum_of_lane = 0.0;
        var i = thread;
        while i < 4u * p.halves {
            let v = x[group.y * p.x_stride + i];
            sum_of_lane = fma(v.w, v.w, fma(v.z, v.z, fma(v.y, v.y, fma(v.x, v.x, sum_of_lane))));
            i += 32u;
        }
        squares[thread] = sum_of_lane;
    }
{% endif %}
    workgroupBarrier();
    if half < p.halves {
        digits[row + half] = high;
        digits[row + p.halves + half] = low;
        if (half & 1u) == 0u {
            digits[row + 2u * p.halves + half / 2u] = bitcast<vec4<u32>>(vec4<f32>(of_half, others[thread ^ 1u]));
        }
    }
{% if norm %}
    if half == 0u {
        var sum_of_row = 0.0;
        var i = 0u;
        while i < 32u {
            sum_of_row += squares[i];
            i += 1u;
        }
        let scale_of_row = 1.0 / sqrt(sum_of_row / f32(16u * p.halves) + p.epsilon);
        digits[row + p.halves * 5u / 2u] = bitcast<vec4<u32>>(vec4<f32>(scale_of_row, 0.0, 0.0, 0.0));
    }
{% endif %}
}
