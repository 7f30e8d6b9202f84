{# Scores of the indexer for passes of many rows (§2.6): what `index_score` computes, with queries and keys in f16 (in the
   model's own arithmetic they are numbers of 4 bits times powers of two, which f16 holds as they are) and sums in f32.

   A workgroup takes `rows_tile` rows, which have 128 heads together (heads of a row filled up to `heads_tile`), and 1024 keys,
   32 at a time: they are decoded to workgroup memory and multiplied with the queries, which stay in registers; the products
   go through workgroup memory to be weighted and summed. Numbers beyond f16's range are taken as its largest.

   With `coop`, products are of cooperative matrices: subgroup s multiplies heads 32 (s mod 4).. with 16 keys. Subgroups have
   32 threads then. Without, threads do the same with the same numbers.

   index_heads (at most 64), plain, row_words; coop. Workgroups: keys / 1024, rows / rows_tile. -#}
{% import "rows.wgsl" as rows %}
{% set heads_tile = 16 if index_heads <= 16 else 32 if index_heads <= 32 else 64 %}
{% set rows_tile = 128 // heads_tile %}
{% set m_tiles = heads_tile // 16 %}
{% if coop %}
enable f16;
enable wgpu_cooperative_matrix;
{% endif %}
struct Params {
    // Values of a row of queries, and where the indexer's begin (multiples of 4).
    q_stride: u32,
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
    rows: u32,
}

@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> projected: array<f32>;
@group(0) @binding(2) var<storage, read> session: array<u32>;
@group(0) @binding(3) var<storage, read_write> scores: array<f32>;
var<immediate> p: Params;

// Keys, 34 vectors each (32 and two more, so that they lie in different banks); first of all, queries.
var<workgroup> keys: array<{{ "vec4<f16>" if coop else "vec2<u32>" }}, {{ 32 * 34 }}>;
// Products of a key with all heads at 33 · key.
// Without matrices single numbers: threads may not write components of one vector.
var<workgroup> products: array<{{ "vec4<f32>" if coop else "f32" }}, {{ 32 * 33 if coop else 4 * 32 * 33 }}>;
var<workgroup> weights: array<vec4<f32>, 32>;
var<workgroup> sums: array<f32, 256>;

{{ rows.scales() }}

fn put(at: u32, exact: vec4<f32>) {
    let value = clamp(exact, vec4<f32>(-65504.0), vec4<f32>(65504.0));
{% if coop %}
    keys[at] = vec4<f16>(value);
{% else %}
    keys[at] = vec2<u32>(pack2x16float(value.xy), pack2x16float(value.zw));
{% endif %}
}

// A vector of the query of head m of the workgroup.
fn query(row0: u32, m: u32, v: u32) -> vec4<f32> {
    let row = row0 + m / {{ heads_tile }}u;
    let head = m % {{ heads_tile }}u;
    if row >= p.rows || head >= {{ index_heads }}u {
        return vec4<f32>(0.0);
    }
    return q[((p.row0 + row) * p.q_stride + p.q) / 4u + head * 32u + v];
}
{% if not plain %}

// Eight FP4 numbers, divided by 2¹⁴: their bits are those of f16 with a shorter exponent and fraction.
fn put_e2m1(at: u32, word: u32, scale: f32) {
{% for i in range(4) %}
    let x{{ i }} = unpack2x16float((((word >> {{ 4 * i }}u) & 0x00070007u) << 9u) | (((word >> {{ 4 * i }}u) & 0x00080008u) << 12u));
{% endfor %}
    put(at, vec4<f32>(x0.x, x1.x, x2.x, x3.x) * scale);
    put(at + 1u, vec4<f32>(x0.y, x1.y, x2.y, x3.y) * scale);
}
{% endif %}

{# The stored words of this thread's eighth of the key numbered `number`. -#}
{% macro fetch(number) %}
        {
            let key = p.keys + min({{ number }} + (thread >> 3u), end - 1u) * {{ row_words }}u;
            let part = thread & 7u;
{% if plain %}
{% for i in range(16) %}
            raw{{ i // 4 }}.{{ "xyzw"[i % 4] }} = session[key + 16u * part + {{ i }}u];
{% endfor %}
{% else %}
            raw0 = session[key + 2u * part];
            raw1 = session[key + 2u * part + 1u];
            raw2 = session[key + 16u];
{% endif %}
        }
{% endmacro %}
@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row0 = group.y * {{ rows_tile }}u;
    let first = group.x * 1024u;
    // What the last of the rows sees.
    let last = min(row0 + {{ rows_tile }}u, p.rows) - 1u;
    let end = min((p.start + p.row0 + last - p.run0 + 1u) / p.ratio, first + 1024u);
    if first >= end {
        return;
    }
{% for i in range(4 if plain else 3) %}
    var raw{{ i }}: {{ "vec4<u32>" if plain else "u32" }};
{% endfor %}
{{ fetch("first") }}
    if thread < 32u {
        let row = row0 + 4u * thread / {{ heads_tile }}u;
        let head = 4u * thread % {{ heads_tile }}u;
        var weight = vec4<f32>(0.0);
{% for i in range(4) %}
        if row < p.rows && head + {{ i }}u < {{ index_heads }}u {
            weight.{{ "xyzw"[i] }} = projected[(p.row0 + row) * p.p_stride + p.weights + head + {{ i }}u] * p.scale;
        }
{% endfor %}
        weights[thread] = weight;
    }
{% if coop %}
    let subgroup = thread >> 5u;
    let m0 = (subgroup & 3u) * 32u;
    let n0 = (subgroup >> 2u) * 16u;
{% for m in range(2) %}
{% for k in range(8) %}
    var query{{ m }}_{{ k }}: coop_mat16x16<f16, A>;
{% endfor %}
{% endfor %}
    // Queries come through the keys' memory, 32 values of each head at a time.
    var i = 0u;
{% for round in range(4) %}
    i = thread;
    while i < 1024u {
        put(i, query(row0, i >> 3u, {{ 8 * round }}u + (i & 7u)));
        i += 256u;
    }
    workgroupBarrier();
{% for m in range(2) %}
{% for k in range(2) %}
    query{{ m }}_{{ 2 * round + k }} = coopLoadT<coop_mat16x16<f16, A>>(&keys[(m0 + {{ 16 * m }}u) * 8u + {{ 4 * k }}u], 8u);
{% endfor %}
{% endfor %}
    workgroupBarrier();
{% endfor %}
{% endif %}
    // This thread sums products of sixteen heads with a key, and writes the score of one.
    let key = thread & 31u;
    let tile = thread >> 5u;
    let row = row0 + tile;
    let visible = (p.start + p.row0 + row - p.run0 + 1u) / p.ratio;
    var at = first;
    while at < end {
        {
            let to = (thread >> 3u) * 34u + (thread & 7u) * 4u;
{% if plain %}
{% for i in range(4) %}
            put(to + {{ i }}u, bitcast<vec4<f32>>(raw{{ i }}));
{% endfor %}
{% else %}
            let scale = scale_of((raw2 >> (8u * ((thread & 7u) >> 1u))) & 255u) * 16384.0;
            put_e2m1(to, raw0, scale);
            put_e2m1(to + 2u, raw1, scale);
{% endif %}
        }
        workgroupBarrier();
        // The next keys are on their way meanwhile.
{{ fetch("at + 32u") }}
{% if coop %}
        {
{% for m in range(2) %}
            var sum{{ m }} = coop_mat16x16<f32, C>();
{% endfor %}
{% for k in range(8) %}
            {
                let column = coopLoad<coop_mat16x16<f16, B>>(&keys[n0 * 34u + {{ 4 * k }}u], 34u);
{% for m in range(2) %}
                sum{{ m }} = coopMultiplyAdd(query{{ m }}_{{ k }}, column, sum{{ m }});
{% endfor %}
            }
{% endfor %}
{% for m in range(2) %}
            {
                let to = n0 * 33u + (m0 + {{ 16 * m }}u) / 4u;
                let sums = sum{{ m }};
                coopStore(sums, &products[to], 33u);
            }
{% endfor %}
        }
{% else %}
        {
            let m = thread >> 1u;
            let n0 = (thread & 1u) * 16u;
{% for i in range(16) %}
            var dot{{ i }} = 0.0;
{% endfor %}
            var v = 0u;
            while v < 32u {
                let exact = clamp(query(row0, m, v), vec4<f32>(-65504.0), vec4<f32>(65504.0));
                let one = vec4<f32>(unpack2x16float(pack2x16float(exact.xy)), unpack2x16float(pack2x16float(exact.zw)));
{% for i in range(16) %}
                {
                    let packed = keys[(n0 + {{ i }}u) * 34u + v];
                    dot{{ i }} += dot(one, vec4<f32>(unpack2x16float(packed.x), unpack2x16float(packed.y)));
                }
{% endfor %}
                v += 1u;
            }
{% for i in range(16) %}
            products[(n0 + {{ i }}u) * 132u + m] = dot{{ i }};
{% endfor %}
        }
{% endif %}
        workgroupBarrier();
        var sum = vec4<f32>(0.0);
{% for i in range(4) %}
{% if coop %}
        let product{{ i }} = products[key * 33u + tile * 4u + {{ i }}u];
{% else %}
        let at{{ i }} = 4u * (key * 33u + tile * 4u + {{ i }}u);
        let product{{ i }} = vec4<f32>(products[at{{ i }}], products[at{{ i }} + 1u], products[at{{ i }} + 2u], products[at{{ i }} + 3u]);
{% endif %}
        sum = fma(weights[tile * 4u + {{ i }}u], max(product{{ i }}, vec4<f32>(0.0)), sum);
{% endfor %}
        sums[thread] = (sum.x + sum.y) + (sum.z + sum.w);
        workgroupBarrier();
        if tile < {{ rows_tile }}u && row < p.rows && at + key < min(visible, end) {
            var score = 0.0;
{% for m in range(m_tiles) %}
            score += sums[(tile * {{ m_tiles }}u + {{ m }}u) * 32u + key];
{% endfor %}
            scores[row * p.stride + at + key] = score;
        }
        at += 32u;
    }
}
