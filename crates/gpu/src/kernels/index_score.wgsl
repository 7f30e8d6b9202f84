{# Scores of the indexer (§2.6): Σ_h weight[h] · max(0, query_h · key) of 32 keys for a row.

   index_heads, plain. Workgroups: keys / 32, rows. -#}
{% import "rows.wgsl" as rows %}
struct Params {
    q_stride: u32,
    // First value of the indexer's query in a row.
    q: u32,
    // Head weights among a row's other projections, and their factor.
    p_stride: u32,
    weights: u32,
    scale: f32,
    row0: u32,
    start: u32,
    run0: u32,
    ratio: u32,
    // Where the rows begin in the session.
    keys: u32,
    // Scores of a row.
    stride: u32,
}

@group(0) @binding(0) var<storage, read> q: array<f32>;
@group(0) @binding(1) var<storage, read> projected: array<f32>;
@group(0) @binding(2) var<storage, read> session: array<u32>;
@group(0) @binding(3) var<storage, read_write> scores: array<f32>;
var<immediate> p: Params;

// One key a column: element e of key k at e * 33 + k.
var<workgroup> keys: array<f32, {{ 128 * 33 }}>;
var<workgroup> query: array<f32, 512>;
var<workgroup> sums: array<f32, 128>;

{{ rows.scales() }}
{{ rows.fp4() }}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = p.row0 + group.y;
    let visible = (p.start + row - p.run0 + 1u) / p.ratio;
    let first = group.x * 32u;
    if first >= visible {
        return;
    }
    // Thread: a quarter of a key.
    {
        let k = thread >> 2u;
        let part = thread & 3u;
        let key = p.keys + min(first + k, visible - 1u) * {{ row_words }}u;
{% if plain %}
        var i = 0u;
        while i < 32u {
            keys[(part * 32u + i) * 33u + k] = bitcast<f32>(session[key + part * 32u + i]);
            i += 1u;
        }
{% else %}
        let scale = scale_of((session[key + 16u] >> (8u * part)) & 255u);
        var i = 0u;
        while i < 4u {
            let word = session[key + part * 4u + i];
            var j = 0u;
            while j < 8u {
                keys[(part * 32u + i * 8u + j) * 33u + k] = e2m1_value((word >> (4u * j)) & 15u) * scale;
                j += 1u;
            }
            i += 1u;
        }
{% endif %}
    }
    // Thread: a key and one of four heads.
    let k = thread & 31u;
    let quarter = thread >> 5u;
    var sum = 0.0;
    var head = 0u;
    while head < {{ index_heads }}u {
        workgroupBarrier();
        var i = thread;
        while i < 512u {
            if head + (i >> 7u) < {{ index_heads }}u {
                query[i] = q[row * p.q_stride + p.q + head * 128u + i];
            }
            i += 128u;
        }
        workgroupBarrier();
        if head + quarter < {{ index_heads }}u {
            var a = 0.0;
            var b = 0.0;
            i = 0u;
            while i < 128u {
                a = fma(query[quarter * 128u + i], keys[i * 33u + k], a);
                b = fma(query[quarter * 128u + i + 1u], keys[(i + 1u) * 33u + k], b);
                i += 2u;
            }
            let weight = projected[row * p.p_stride + p.weights + head + quarter] * p.scale;
            sum = fma(weight, max(a + b, 0.0), sum);
        }
        head += 4u;
    }
    sums[thread] = sum;
    workgroupBarrier();
    if thread < 32u && first + thread < visible {
        scores[group.y * p.stride + first + thread] =
            (sums[thread] + sums[thread + 32u]) + (sums[thread + 64u] + sums[thread + 96u]);
    }
}
