{# Scores of the indexer (§2.6): Σ_h weight[h] · max(0, query_h · key) of 32 keys for a row.

   index_heads, plain. Workgroups: keys / 32, rows. -#}
{% import "rows.wgsl" as rows %}
{% import "runs.wgsl" as runs %}
{# Heads of each eighth of the threads. #}
{%- set each = (index_heads + 7) // 8 %}
struct Params {
{{ runs.params() }}
    q_stride: u32,
    // First value of the indexer's query in a row.
    q: u32,
    // Head weights among a row's other projections, and their factor.
    p_stride: u32,
    weights: u32,
    scale: f32,
    first: u32,
    ratio: u32,
    // Scores of a row.
    stride: u32,
}

@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> projected: array<f32>;
@group(0) @binding(2) var<storage, read> tables: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read_write> scores: array<f32>;
{{ runs.sessions(4, "read") }}
var<immediate> p: Params;

// One key a column: element e of key k at e * 33 + k.
var<workgroup> keys: array<f32, {{ 128 * 33 }}>;
var<workgroup> sums: array<f32, 256>;

{{ runs.of_rows() }}
{{ rows.scales() }}
{{ rows.fp4() }}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = p.first + group.y;
    let run = run_of(row);
    let visible = (position_of(run, row) + 1u) / p.ratio;
    let first = group.x * 32u;
    if first >= visible {
        return;
    }
    // Thread: an eighth of a key.
    {
        let k = thread >> 3u;
        let part = thread & 7u;
        let key = run.index + min(first + k, visible - 1u) * {{ row_words }}u;
{% call(session) runs.with_session("run.session") %}
{% if plain %}
        var i = 0u;
        while i < 16u {
            keys[(part * 16u + i) * 33u + k] = bitcast<f32>({{ session }}[key + part * 16u + i]);
            i += 1u;
        }
{% else %}
        let scale = scale_of(({{ session }}[key + 16u] >> (8u * (part >> 1u))) & 255u);
        let words = vec2<u32>({{ session }}[key + part * 2u], {{ session }}[key + part * 2u + 1u]);
        var i = 0u;
        while i < 16u {
            keys[(part * 16u + i) * 33u + k] = e2m1_value((words[i >> 3u] >> (4u * (i & 7u))) & 15u) * scale;
            i += 1u;
        }
{% endif %}
{% endcall %}
    }
    workgroupBarrier();
    // Thread: a key, and an eighth of the heads, four of them at a time with each of its values.
    let k = thread & 31u;
    let first_head = (thread >> 5u) * {{ each }}u;
    let q_at = (row * p.q_stride + p.q) >> 2u;
    var sum = 0.0;
{% for block in range(0, each, 4) %}
    {
{% set heads = [4, each - block] | min %}
{% for h in range(heads) %}
        let head{{ h }} = first_head + {{ block + h }}u;
        let q{{ h }} = q_at + min(head{{ h }}, {{ index_heads - 1 }}u) * 32u;
        var dot{{ h }} = vec4<f32>(0.0);
{% endfor %}
        var v = 0u;
        while v < 32u {
            let values = vec4<f32>(keys[v * 132u + k], keys[v * 132u + 33u + k], keys[v * 132u + 66u + k], keys[v * 132u + 99u + k]);
{% for h in range(heads) %}
            dot{{ h }} = fma(q[q{{ h }} + v], values, dot{{ h }});
{% endfor %}
            v += 1u;
        }
{% for h in range(heads) %}
        if head{{ h }} < {{ index_heads }}u {
            let weight = projected[row * p.p_stride + p.weights + head{{ h }}] * p.scale;
            sum = fma(weight, max((dot{{ h }}.x + dot{{ h }}.y) + (dot{{ h }}.z + dot{{ h }}.w), 0.0), sum);
        }
{% endfor %}
    }
{% endfor %}
    sums[thread] = sum;
    workgroupBarrier();
    if thread < 32u && first + thread < visible {
{% for i in range(8) %}
        let s{{ i }} = sums[thread + {{ 32 * i }}u];
{% endfor %}
        scores[group.y * p.stride + first + thread] = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7));
    }
}
