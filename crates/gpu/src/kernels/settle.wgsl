{# After the projections of a layer (§2.3): each head of a query is normalised and rotated in place; the row's key is
   normalised, rotated, rounded and stored; what its compressors will need is stored; heads of the indexer's query are
   rotated and rounded (§2.6).

   head_dim, rope, plain; heads, index_heads (0 without an indexer); norms: where keys' norm is. Workgroups: heads + 1 +
   index_heads + compressors, rows. -#}
{% import "rows.wgsl" as rows %}
{% import "runs.wgsl" as runs %}
{% set nope = head_dim - rope %}
struct Params {
{{ runs.params() }}
    // Of a row: values of queries (and the indexer's after them), and of other projections.
    q_stride: u32,
    p_stride: u32,
    // Where keys are among the other projections, and their norm's weights.
    kv: u32,
    norm: u32,
    epsilon: f32,
    // The first row of the pass that is settled, and how many are.
    first: u32,
    count: u32,
    // Rows of the ring that rows go to, and as many of the last rows as are kept.
    ring_rows: u32,
    kept: u32,
    // Whether rows also go to the pass's own.
    fresh: u32,
    // Rings of compressors' inputs: words from the ring on, rows of it.
    inputs: u32,
    inputs_rows: u32,
    inputs_kept: u32,
    index_inputs: u32,
    index_inputs_rows: u32,
    index_inputs_kept: u32,
    // Where compressors' projections begin (u of the main one, then z; then those of the indexer's), and their positions.
    u: u32,
    ape: u32,
    index_u: u32,
    index_ape: u32,
    // First of the rotations of the layer's kind.
    rotations: u32,
}

@group(0) @binding(0) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> tables: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read> projected: array<f32>;
@group(0) @binding(3) var<storage, read_write> q: array<f32>;
@group(0) @binding(4) var<storage, read_write> fresh: array<u32>;
{{ runs.sessions(5, "read_write") }}
var<immediate> p: Params;

var<workgroup> sums: array<f32, 128>;
var<workgroup> row: array<f32, {{ head_dim if head_dim > 128 else 128 }}>;
var<workgroup> codes: array<u32, 128>;

{{ runs.of_rows() }}
{{ runs.keeper() }}
{{ rows.scales() }}
{% if not plain %}
{{ rows.fp8() }}
{{ rows.fp4() }}
{% endif %}

fn weight(at: u32, i: u32) -> f32 {
    return bitcast<f32>(w[at + (i >> 2u)][i & 3u]);
}

fn sum_all(thread: u32, value: f32) -> f32 {
    sums[thread] = value;
    workgroupBarrier();
    var half = 64u;
    while half > 0u {
        if thread < half {
            sums[thread] += sums[thread + half];
        }
        workgroupBarrier();
        half >>= 1u;
    }
    return sums[0];
}

// Rotates a pair, the `pair`th of its row's position.
fn rotated(v: vec2<f32>, at: u32) -> vec2<f32> {
    let turn = bitcast<vec2<f32>>(tables[at]);
    return vec2<f32>(fma(v.x, turn.x, -(v.y * turn.y)), fma(v.x, turn.y, v.y * turn.x));
}

// Rotates the tail of the four values that begin at 4 * v of a row of `dim`.
fn rotated_tail(value: vec4<f32>, v: u32, dim: u32, r: u32) -> vec4<f32> {
    let tail = (dim - {{ rope }}u) / 4u;
    if v < tail {
        return value;
    }
    let at = p.rotations + r * {{ rope // 2 }}u + 2u * (v - tail);
    return vec4<f32>(rotated(value.xy, at), rotated(value.zw, at + 1u));
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let r = p.first + group.y;
    let run = run_of(r);
    let position = position_of(run, r);
    let left = p.count - group.y;
    if group.x < {{ heads }}u {
        // A head of the query.
        let at = r * p.q_stride + group.x * {{ head_dim }}u + 4u * thread;
        let inside = thread < {{ head_dim // 4 }}u;
        var value = vec4<f32>(0.0);
        if inside {
            value = vec4<f32>(q[at], q[at + 1u], q[at + 2u], q[at + 3u]);
        }
        let square = fma(value.w, value.w, fma(value.z, value.z, fma(value.y, value.y, value.x * value.x)));
        let scale = 1.0 / sqrt(sum_all(thread, square) / {{ head_dim }}.0 + p.epsilon);
        if inside {
            value = rotated_tail(value * scale, thread, {{ head_dim }}u, r);
            q[at] = value.x;
            q[at + 1u] = value.y;
            q[at + 2u] = value.z;
            q[at + 3u] = value.w;
        }
        return;
    }
    if group.x == {{ heads }}u {
        // The key.
        let at = r * p.p_stride + p.kv + 4u * thread;
        let inside = thread < {{ head_dim // 4 }}u;
        var value = vec4<f32>(0.0);
        if inside {
            value = vec4<f32>(projected[at], projected[at + 1u], projected[at + 2u], projected[at + 3u]);
        }
        let square = fma(value.w, value.w, fma(value.z, value.z, fma(value.y, value.y, value.x * value.x)));
        let scale = 1.0 / sqrt(sum_all(thread, square) / {{ head_dim }}.0 + p.epsilon);
        if inside {
            value = rotated_tail(value * scale * bitcast<vec4<f32>>(w[p.norm + thread]), thread, {{ head_dim }}u, r);
        }
        let words = {{ row_words }}u;
        let to_ring = left <= p.kept;
        let ring_at = run.ring + (position % p.ring_rows) * words;
        let fresh_at = r * words;
{% if plain %}
        if inside {
            let bits = bitcast<vec4<u32>>(value);
{% for i in range(4) %}
            if to_ring {
                keep(run.session, ring_at + 4u * thread + {{ i }}u, bits.{{ "xyzw"[i] }});
            }
            if p.fresh != 0u {
                fresh[fresh_at + 4u * thread + {{ i }}u] = bits.{{ "xyzw"[i] }};
            }
{% endfor %}
        }
{% else %}
        let bits = bitcast<vec4<u32>>(value) & vec4<u32>(0x7fffffffu);
        codes[thread] = max(max(bits.x, bits.y), max(bits.z, bits.w));
        workgroupBarrier();
        // A scale for 64 values: sixteen threads.
        var amax = 0x38d1b717u;
        var i = 0u;
        while i < 16u {
            amax = max(amax, codes[(thread & ~15u) + i]);
            i += 1u;
        }
        let scale_byte = scale_code(amax, 0x43e00000u);
        workgroupBarrier();
        codes[thread] = scale_byte;
        workgroupBarrier();
        if thread < {{ nope // 4 }}u {
            let by = scale_inverse(scale_byte);
            var word = 0u;
            if scale_byte != 255u {
                word = e4m3_code(value.x * by) | (e4m3_code(value.y * by) << 8u) | (e4m3_code(value.z * by) << 16u) | (e4m3_code(value.w * by) << 24u);
            }
            put(run.session, to_ring, ring_at, fresh_at, thread, word);
        } else if inside {
            let at = {{ nope // 4 + ((nope // 64 + 7) // 8) * 2 }}u + 2u * (thread - {{ nope // 4 }}u);
            put(run.session, to_ring, ring_at, fresh_at, at, bf16_code(value.x) | (bf16_code(value.y) << 16u));
            put(run.session, to_ring, ring_at, fresh_at, at + 1u, bf16_code(value.z) | (bf16_code(value.w) << 16u));
        }
        if thread < {{ ((nope // 64 + 7) // 8) * 2 }}u {
            var word = 0u;
            var i = 0u;
            while i < 4u {
                let block = thread * 4u + i;
                if block < {{ nope // 64 }}u {
                    word |= codes[block * 16u] << (8u * i);
                }
                i += 1u;
            }
            put(run.session, to_ring, ring_at, fresh_at, {{ nope // 4 }}u + thread, word);
        }
{% endif %}
        return;
    }
{% if ratio > 0 %}
    if group.x == {{ heads + 1 }}u {
        // What the compressor's rows are made of: u, and z with its position.
        if left <= p.inputs_kept {
            let from_ = r * p.p_stride + p.u;
            let to = run.ring + p.inputs + (position % p.inputs_rows) * {{ 2 * width }}u;
            let ape = (position % {{ ratio }}u) * {{ width }}u;
            var i = thread;
            while i < {{ width }}u {
                keep(run.session, to + i, bitcast<u32>(projected[from_ + i]));
                keep(run.session, to + {{ width }}u + i, bitcast<u32>(projected[from_ + {{ width }}u + i] + weight(p.ape, ape + i)));
                i += 128u;
            }
        }
        return;
    }
{% endif %}
{% if index_heads > 0 %}
    if group.x == {{ heads + 2 }}u {
        if left <= p.index_inputs_kept {
            let from_ = r * p.p_stride + p.index_u;
            let to = run.ring + p.index_inputs + (position % p.index_inputs_rows) * 512u;
            let ape = (position % {{ ratio }}u) * 256u;
            var i = thread;
            while i < 256u {
                keep(run.session, to + i, bitcast<u32>(projected[from_ + i]));
                keep(run.session, to + 256u + i, bitcast<u32>(projected[from_ + 256u + i] + weight(p.index_ape, ape + i)));
                i += 128u;
            }
        }
        return;
    }
    // A head of the indexer's query: 128 values, one a thread.
    let at = r * p.q_stride + {{ heads * head_dim }}u + (group.x - {{ heads + 3 }}u) * 128u;
    row[thread] = q[at + thread];
    workgroupBarrier();
    if thread < {{ rope // 2 }}u {
        let i = {{ 128 - rope }}u + 2u * thread;
        let pair = rotated(vec2<f32>(row[i], row[i + 1u]), p.rotations + r * {{ rope // 2 }}u + thread);
        row[i] = pair.x;
        row[i + 1u] = pair.y;
    }
{% if plain %}
    workgroupBarrier();
    q[at + thread] = row[thread];
{% else %}
    let value = hadamard(thread);
    codes[thread] = bitcast<u32>(value) & 0x7fffffffu;
    workgroupBarrier();
    var amax = 0x01c00000u;
    var i = 0u;
    while i < 32u {
        amax = max(amax, codes[(thread & ~31u) + i]);
        i += 1u;
    }
    let scale_byte = scale_code(amax, 0x40c00000u);
    q[at + thread] = e2m1_value(e2m1_code(value * scale_inverse(scale_byte))) * scale_of(scale_byte);
{% endif %}
{% endif %}
}
{% if not plain %}

fn put(session: u32, to_ring: bool, ring_at: u32, fresh_at: u32, i: u32, word: u32) {
    if to_ring {
        keep(session, ring_at + i, word);
    }
    if p.fresh != 0u {
        fresh[fresh_at + i] = word;
    }
}
{% if index_heads > 0 %}

// The Walsh–Hadamard rotation of `row`, whose last writes need no barrier: the value of this thread.
fn hadamard(thread: u32) -> f32 {
    var step = 1u;
    while step < 128u {
        workgroupBarrier();
        let low = row[thread & ~step];
        let high = row[thread | step];
        workgroupBarrier();
        row[thread] = select(low + high, low - high, (thread & step) != 0u);
        step <<= 1u;
    }
    workgroupBarrier();
    return row[thread] * 0.0883883476;
}
{% endif %}
{% endif %}
