{# From the sums of `hc_mix`: the sub-layer's input, normalised (§2.1, steps 3 and 5; §2.9 for the head), by workgroup 0 of a
   row; weights and doubly stochastic mix of the streams (steps 3 and 4) by workgroup 1.

   streams: S; outputs: rows of the projection; head: whether it is the output head's. -#}
{% import "functions.wgsl" as functions %}
struct Params {
    d: u32,
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
}

@group(0) @binding(0) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> sums: array<f32>;
@group(0) @binding(3) var<storage, read_write> input: array<f32>;
@group(0) @binding(4) var<storage, read_write> weights: array<f32>;
var<immediate> p: Params;

var<workgroup> eighths: array<f32, {{ (outputs + 1) * 8 }}>;
var<workgroup> projected: array<f32, {{ outputs + 1 }}>;
var<workgroup> pre: array<f32, {{ streams }}>;
var<workgroup> mix: array<f32, {{ 2 * streams * streams }}>;
var<workgroup> squares: array<f32, 256>;

{{ functions.exponential() }}

fn weight(at: u32, i: u32) -> f32 {
    return bitcast<f32>(w[at + (i >> 2u)][i & 3u]);
}

// Σ of one number of each thread, in one order.
fn sum_all(thread: u32, value: f32) -> f32 {
    squares[thread] = value;
    workgroupBarrier();
    var half = 128u;
    while half > 0u {
        if thread < half {
            squares[thread] += squares[thread + half];
        }
        workgroupBarrier();
        half >>= 1u;
    }
    return squares[0];
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = p.row0 + group.y;
    var i = thread;
    while i < {{ (outputs + 1) * 8 }}u {
        var sum = 0.0;
        var slice = i & 7u;
        while slice < p.slices {
            sum += sums[(row * p.slices + slice) * {{ outputs + 1 }}u + (i >> 3u)];
            slice += 8u;
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
    let inverse = 1.0 / sqrt(projected[{{ outputs }}] / f32({{ streams }}u * p.d) + p.epsilon);

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
    let out = (p.out0 + group.y) * p.d;
    var square = 0.0;
    var d = thread;
    while d < p.d {
        var value = 0.0;
{% for s in range(streams) %}
        value = fma(pre[{{ s }}], x[(row * {{ streams }}u + {{ s }}u) * p.d + d], value);
{% endfor %}
        input[out + d] = value;
        square = fma(value, value, square);
        d += 256u;
    }
    let scale = 1.0 / sqrt(sum_all(thread, square) / f32(p.d) + p.epsilon);
    d = thread;
    while d < p.d {
        input[out + d] = input[out + d] * scale * weight(p.norm, d);
        d += 256u;
    }
}
