{# Experts of a row and their weights (§2.7) by workgroup 0 of the row; the others make the shared expert's activation.

   experts: E; used: K; hashed; lays_out: whether the shared expert's activation is laid out for
   lanes (weights.wgsl), if that is asked for. Workgroups: 1 + shared width / 256, rows. -#}
{% import "functions.wgsl" as functions %}
{% import "weights.wgsl" as weights with context %}
struct Params {
    // Of a row of projections: router logits, then gate and up of the shared expert.
    stride: u32,
    width: u32,
    limit: f32,
    // Bias (f32), or table of experts by token (words).
    choice: u32,
    scale: f32,
    // Tokens of the rows, in words.
    tokens: u32,
    lay_out: u32,
}

@group(0) @binding(0) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> tables: array<u32>;
@group(0) @binding(2) var<storage, read> projected: array<f32>;
@group(0) @binding(3) var<storage, read_write> experts: array<u32>;
@group(0) @binding(4) var<storage, read_write> weights: array<f32>;
// Floats, or digits.
@group(0) @binding(5) var<storage, read_write> shared_mid: array<u32>;
@group(0) @binding(6) var<storage, read_write> flags: array<u32>;
var<immediate> p: Params;

var<workgroup> scores: array<f32, {{ experts }}>;
// Four a vector; what is past the last expert is below every one.
var<workgroup> biased: array<vec4<f32>, {{ (experts + 3) // 4 }}>;
{% if lays_out %}
var<workgroup> results: array<f32, 256>;
{% endif %}
var<workgroup> ranked: array<u32, {{ used }}>;

{{ functions.exponential() }}
{{ functions.softplus() }}
{{ functions.finite() }}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = group.y;
    if group.x > 0u {
        let i = (group.x - 1u) * 256u + thread;
        var result = 0.0;
        if i < p.width {
            let at = row * p.stride + {{ experts }}u + i;
            let gate = min(projected[at], p.limit);
            let up = clamp(projected[at + p.width], -p.limit, p.limit);
            result = silu(gate) * up;
        }
{% if lays_out %}
        if p.lay_out != 0u {
            results[thread] = result;
            workgroupBarrier();
            let halves = p.width / 16u;
            let half = (group.x - 1u) * 16u + thread;
            if thread < 16u && half < halves {
{% for i in range(4) %}
                let v{{ i }} = vec4<f32>({% for j in range(4) %}results[16u * thread + {{ 4 * i + j }}u]{% if j < 3 %}, {% endif %}{% endfor %});
{% endfor %}
{{ weights.digits_of_half() }}
                let to = 4u * (row * (3u * halves + 1u) + half);
{% for c in "xyzw" %}
                shared_mid[to + {{ loop.index0 }}u] = high.{{ c }};
                shared_mid[to + 4u * halves + {{ loop.index0 }}u] = low.{{ c }};
{% endfor %}
                shared_mid[to + 8u * halves] = bitcast<u32>(of_half.x);
                shared_mid[to + 8u * halves + 1u] = bitcast<u32>(of_half.y);
            }
            return;
        }
{% endif %}
        if i < p.width {
            shared_mid[row * p.width + i] = bitcast<u32>(result);
        }
        return;
    }
    var v = thread;
    while v < {{ (experts + 3) // 4 }}u {
        // Below every score where there is no expert, or none that is a number: so there are always enough to choose.
        var four = vec4<f32>(-3.4e38);
{% for i in range(4) %}
        {
            let e = 4u * v + {{ i }}u;
            if e < {{ experts }}u {
                let logit = projected[row * p.stride + e];
                let score = sqrt(softplus(logit));
                scores[e] = score;
                if !is_finite(logit) {
                    flags[row] = 1u;
                }{% if not hashed %} else {
                    four.{{ "xyzw"[i] }} = score + bitcast<f32>(w[p.choice + v].{{ "xyzw"[i] }});
                }{% endif %}

            }
        }
{% endfor %}
{% if not hashed %}
        biased[v] = four;
{% endif %}
        v += 256u;
    }
    workgroupBarrier();
{% if hashed %}
    if thread < {{ used }}u {
        let i = tables[p.tokens + row] * {{ used }}u + thread;
        ranked[thread] = w[p.choice + (i >> 2u)][i & 3u];
    }
{% else %}
    var e = thread;
    while e < {{ experts }}u {
        let mine = vec4<f32>(biased[e >> 2u][e & 3u]);
        var better = vec4<u32>(0u);
        var other = 0u;
        while other < {{ (experts + 3) // 4 }}u {
            let theirs = biased[other];
            let comes_first = vec4<u32>(4u * other) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(e);
            better += vec4<u32>((theirs > mine) | ((theirs == mine) & comes_first));
            other += 1u;
        }
        let place = (better.x + better.y) + (better.z + better.w);
        if place < {{ used }}u {
            ranked[place] = e;
        }
        e += 256u;
    }
{% endif %}
    workgroupBarrier();
    if thread < {{ used }}u {
        var sum = 0.0;
{% for k in range(used) %}
        sum += scores[ranked[{{ k }}]];
{% endfor %}
        let expert = ranked[thread];
        experts[row * {{ used }}u + thread] = expert;
        weights[row * {{ used }}u + thread] = scores[expert] / max(sum, 6.1035156e-5) * p.scale;
    }
}
