{# From the sums of `hc_mix`: the sub-layer's input, normalised (§2.1, steps 3 and 5; §2.9 for the head), by workgroup 0 of a
   row; weights and doubly stochastic mix of the streams (steps 3 and 4) by workgroup 1.

   streams: S; d: D; outputs: rows of the projection; head: whether it is the output head's; digits: whether few rows are multiplied
   as integers: then the input is laid out for lanes, too, if that is asked for. -#}
{% import "weights.wgsl" as weights with context %}
{% import "functions.wgsl" as functions %}
{# Vectors of a row for each thread. #}
{%- set each = (d // 4 + 255) // 256 %}
struct Params {
    // Sums of a row.
    slices: u32,
    // Where these are in the weights.
    scale: u32,
    base: u32,
    norm: u32,
    iterations: u32,
    hc_epsilon: f32,
    epsilon: f32,
    row0: u32,
    // Row of the result.
    out0: u32,
    // Whether to lay it out for lanes.
    lay_out: u32,
}

@group(0) @binding(0) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> sums: array<f32>;
@group(0) @binding(3) var<storage, read_write> input: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> weights: array<f32>;
{% if digits %}
@group(0) @binding(5) var<storage, read_write> digits: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read_write> transposed: array<vec4<f32>>;
{% endif %}
var<immediate> p: Params;

var<workgroup> eighths: array<f32, {{ (outputs + 1) * 8 }}>;
var<workgroup> projected: array<f32, {{ outputs + 1 }}>;
var<workgroup> pre: array<f32, {{ streams }}>;
var<workgroup> mix: array<f32, {{ 2 * streams * streams }}>;
var<workgroup> squares: array<f32, 256>;
var<workgroup> sixteenths: array<f32, 16>;
{% if digits %}
var<workgroup> laid_out: array<vec4<f32>, {{ d // 4 }}>;
{% endif %}

{{ functions.exponential() }}

fn weight(at: u32, i: u32) -> f32 {
    return bitcast<f32>(w[at + (i >> 2u)][i & 3u]);
}

// Σ of one number of each thread, in one order.
fn sum_all(thread: u32, value: f32) -> f32 {
    squares[thread] = value;
    workgroupBarrier();
    if thread < 16u {
        var sum = 0.0;
{% for i in range(16) %}
        sum += squares[thread + {{ 16 * i }}u];
{% endfor %}
        sixteenths[thread] = sum;
    }
    workgroupBarrier();
    var sum = 0.0;
{% for i in range(16) %}
    sum += sixteenths[{{ i }}];
{% endfor %}
    return sum;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = p.row0 + group.y;
    // The streams are on their way while the sums are made.
{% for n in range(each) %}
    let at{{ n }} = min(thread + {{ 256 * n }}u, {{ d // 4 - 1 }}u);
{% for s in range(streams) %}
    let x{{ n }}_{{ s }} = x[(row * {{ streams }}u + {{ s }}u) * {{ d // 4 }}u + at{{ n }}];
{% endfor %}
{% endfor %}
    var i = thread;
    while i < {{ (outputs + 1) * 8 }}u {
        var sum = 0.0;
        var slice = i & 7u;
        while slice < p.slices {
{% for j in range(8) %}
            let s{{ j }} = sums[(row * p.slices + min(slice + {{ 8 * j }}u, p.slices - 1u)) * {{ outputs + 1 }}u + (i >> 3u)];
{% endfor %}
{% for j in range(8) %}
            sum += select(0.0, s{{ j }}, slice + {{ 8 * j }}u < p.slices);
{% endfor %}
            slice += 64u;
        }
        eighths[i] = sum;
        i += 256u;
    }
    workgroupBarrier();
    i = thread;
    while i < {{ outputs + 1 }}u {
        let at = i * 8u;
        projected[i] = ((eighths[at] + eighths[at + 1u]) + (eighths[at + 2u] + eighths[at + 3u]))
            + ((eighths[at + 4u] + eighths[at + 5u]) + (eighths[at + 6u] + eighths[at + 7u]));
        i += 256u;
    }
    workgroupBarrier();
    let inverse = 1.0 / sqrt(projected[{{ outputs }}] / {{ streams * d }}.0 + p.epsilon);

{% if not head %}
    if group.x == 1u {
        let at = row * {{ streams + streams * streams }}u;
        let gate = weight(p.scale, 1u);
        let share = weight(p.scale, 2u);
        if thread < {{ streams }}u {
            let i = {{ streams }}u + thread;
            weights[at + thread] = 2.0 * sigmoid(fma(projected[i] * inverse, gate, weight(p.base, i)));
            // Thread j keeps row j; columns are summed through workgroup memory.
            var sum = 0.0;
            var most = -3.4e38;
{% for k in range(streams) %}
            var m{{ k }} = fma(projected[{{ 2 * streams + k }}u + thread * {{ streams }}u] * inverse, share, weight(p.base, {{ 2 * streams + k }}u + thread * {{ streams }}u));
            most = max(most, m{{ k }});
{% endfor %}
{% for k in range(streams) %}
            m{{ k }} = exp_of(m{{ k }} - most);
            sum += m{{ k }};
{% endfor %}
{% for k in range(streams) %}
            mix[thread * {{ streams }}u + {{ k }}u] = m{{ k }} / sum + p.hc_epsilon;
{% endfor %}
        }
        workgroupBarrier();
        // Columns, then rows and columns in turn. Even rounds are read from the first half, odd from the second.
        var round = 0u;
        while round < p.iterations {
            let from_ = (round & 1u) * {{ streams * streams }}u;
            let to = {{ streams * streams }}u - from_;
            if thread < {{ streams }}u {
                let mine = from_ + thread * {{ streams }}u;
{% for k in range(streams) %}
                let c{{ k }} = mix[mine + {{ k }}u] / ({% for j in range(streams) %}mix[from_ + {{ j * streams + k }}u] + {% endfor %}p.hc_epsilon);
{% endfor %}
                var sum = p.hc_epsilon;
                if round + 1u == p.iterations {
                    sum = 1.0;
                } else {
                    sum = ({% for k in range(streams) %}{% if k > 0 %} + {% endif %}c{{ k }}{% endfor %}) + p.hc_epsilon;
                }
{% for k in range(streams) %}
                mix[to + thread * {{ streams }}u + {{ k }}u] = c{{ k }} / sum;
{% endfor %}
            }
            workgroupBarrier();
            round += 1u;
        }
        if thread < {{ streams * streams }}u {
            weights[at + {{ streams }}u + thread] = mix[(p.iterations & 1u) * {{ streams * streams }}u + thread];
        }
        return;
    }
{% endif %}
    if thread < {{ streams }}u {
        pre[thread] = sigmoid(fma(projected[thread] * inverse, weight(p.scale, 0u), weight(p.base, thread))) + p.hc_epsilon;
    }
    workgroupBarrier();
    let out = (p.out0 + group.y) * {{ d // 4 }}u;
    var square = 0.0;
{% for n in range(each) %}
    var value{{ n }} = vec4<f32>(0.0);
    let norm{{ n }} = bitcast<vec4<f32>>(w[p.norm + at{{ n }}]);
{% for s in range(streams) %}
    value{{ n }} = fma(vec4<f32>(pre[{{ s }}]), x{{ n }}_{{ s }}, value{{ n }});
{% endfor %}
    if thread + {{ 256 * n }}u < {{ d // 4 }}u {
        square = fma(value{{ n }}.w, value{{ n }}.w, fma(value{{ n }}.z, value{{ n }}.z, fma(value{{ n }}.y, value{{ n }}.y, fma(value{{ n }}.x, value{{ n }}.x, square))));
    }
{% endfor %}
    let scale = 1.0 / sqrt(sum_all(thread, square) / {{ d }}.0 + p.epsilon);
{% for n in range(each) %}
    if thread + {{ 256 * n }}u < {{ d // 4 }}u {
        let result = value{{ n }} * scale * norm{{ n }};
        input[out + at{{ n }}] = result;
{% if digits %}
        laid_out[at{{ n }}] = result;
        if p.lay_out != 0u {
            transposed[{{ weights.transposed_at("(p.out0 + group.y)", (d // 16) ~ "u", "at" ~ n) }}] = result;
        }
{% endif %}
    }
{% endfor %}
{% if digits %}
    workgroupBarrier();
    var half = thread;
    while half < {{ d // 16 }}u && p.lay_out != 0u {
{% for i in range(4) %}
        let v{{ i }} = laid_out[4u * half + {{ i }}u];
{% endfor %}
{{ weights.lay_out_half("(p.out0 + group.y)", (d // 16) ~ "u", "half") }}
        half += 256u;
    }
{% endif %}
}
