{# Compressed rows of windows that end in a pass (§2.5): Σ u · softmax(z) over a window (and where windows overlap the one
   before), one softmax a channel; normalised, rotated, rounded and stored.

   ratio, dim (of the row), rope, plain; indexer: whether it is the indexer's. Workgroups: rows, of which those that end no
   window return. -#}
{% import "functions.wgsl" as functions %}
{% import "rows.wgsl" as rows %}
{% import "runs.wgsl" as runs %}
{% set overlaps = ratio == 4 %}
{% set width = 2 * dim if overlaps else dim %}
{% set nope = dim - rope %}
{% set block = 8 if ratio % 8 == 0 or overlaps else 1 %}
struct Params {
{{ runs.params() }}
    p_stride: u32,
    u: u32,
    ape: u32,
    norm: u32,
    epsilon: f32,
    // The first row of the pass that may end a window.
    first: u32,
    // Ring of inputs: words from the ring on, rows of it.
    inputs: u32,
    inputs_rows: u32,
    // Where rows begin in the session; for the indexer's the run says it.
    to: u32,
}

@group(0) @binding(0) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> tables: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read> projected: array<f32>;
{{ runs.sessions(3, "read_write") }}
var<immediate> p: Params;

var<workgroup> sums: array<f32, 128>;
var<workgroup> row: array<f32, {{ dim if dim > 128 else 128 }}>;
var<workgroup> codes: array<u32, 128>;

{{ runs.of_rows() }}
{{ runs.keeper() }}
{{ functions.exponential() }}
{{ rows.scales() }}
{{ rows.fp8() }}
{{ rows.fp4() }}

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

{% for s in range(states) %}
// u and z of channel `i` of the token at `position`.
fn input{{ s }}(run: Run, position: u32, i: u32) -> vec2<f32> {
    if position < run.start {
        let at = run.ring + p.inputs + (position % p.inputs_rows) * {{ 2 * width }}u + i;
        return vec2<f32>(bitcast<f32>(session{{ s }}[at]), bitcast<f32>(session{{ s }}[at + {{ width }}u]));
    }
    let at = (run.row0 + position - run.start) * p.p_stride + p.u + i;
    return vec2<f32>(projected[at], projected[at + {{ width }}u] + weight(p.ape, (position % {{ ratio }}u) * {{ width }}u + i));
}

// Slot `s` of channel `i` of the row of `window`.
fn slot{{ s }}(run: Run, window: u32, s: u32, i: u32) -> vec2<f32> {
{% if overlaps %}
    if s < 4u {
        return input{{ s }}(run, (window - 1u) * 4u + s, i);
    }
    return input{{ s }}(run, window * 4u + s - 4u, {{ dim }}u + i);
{% else %}
    return input{{ s }}(run, window * {{ ratio }}u + s, i);
{% endif %}
}

// Channel `i` of the row of `window`.
fn channel_session{{ s }}(run: Run, window: u32, i: u32) -> f32 {
{% if overlaps %}
    let first = select(0u, 4u, window == 0u);
    let last = 8u;
{% else %}
    let first = 0u;
    let last = {{ ratio }}u;
{% endif %}
    // A block of slots at a time, so that they come together; before the first window there is none.
    var most = -3.4e38;
    var s = 0u;
    while s < last {
{% for n in range(block) %}
        let z{{ n }} = slot{{ s }}(run, window, max(s + {{ n }}u, first), i).y;
{% endfor %}
{% for n in range(block) %}
        most = max(most, z{{ n }});
{% endfor %}
        s += {{ block }}u;
    }
    var sum = 0.0;
    var value = 0.0;
    s = 0u;
    while s < last {
{% for n in range(block) %}
        let one{{ n }} = slot{{ s }}(run, window, max(s + {{ n }}u, first), i);
{% endfor %}
{% for n in range(block) %}
        if s + {{ n }}u >= first {
            let share = exp_of(one{{ n }}.y - most);
            value = fma(share, one{{ n }}.x, value);
            sum += share;
        }
{% endfor %}
        s += {{ block }}u;
    }
    return value / sum;
}

{% endfor %}
@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let r = p.first + group.x;
    let run = run_of(r);
    let end = position_of(run, r) + 1u;
    if end % {{ ratio }}u != 0u {
        return;
    }
    let window = end / {{ ratio }}u - 1u;
    var square = 0.0;
    var i = thread;
    while i < {{ dim }}u {
        var value = 0.0;
{% call(session) runs.with_session("run.session") %}
        value = channel_{{ session }}(run, window, i);
{% endcall %}
        row[i] = value;
        square = fma(value, value, square);
        i += 128u;
    }
    let scale = 1.0 / sqrt(sum_all(thread, square) / {{ dim }}.0 + p.epsilon);
    i = thread;
    while i < {{ dim }}u {
        row[i] = row[i] * scale * weight(p.norm, i);
        i += 128u;
    }
    workgroupBarrier();
    if thread < {{ rope // 2 }}u {
        let i = {{ nope }}u + 2u * thread;
        let number = window - run.start / {{ ratio }}u;
        let turn = bitcast<vec2<f32>>(tables[run.windows + number * {{ rope // 2 }}u + thread]);
        let v = vec2<f32>(row[i], row[i + 1u]);
        row[i] = fma(v.x, turn.x, -(v.y * turn.y));
        row[i + 1u] = fma(v.x, turn.y, v.y * turn.x);
    }
    workgroupBarrier();
    let to = {{ "run.index" if indexer else "p.to" }} + window * {{ row_words }}u;
{% if plain %}
    i = thread;
    while i < {{ dim }}u {
        keep(run.session, to + i, bitcast<u32>(row[i]));
        i += 128u;
    }
{% elif indexer %}
    var step = 1u;
    while step < 128u {
        let low = row[thread & ~step];
        let high = row[thread | step];
        workgroupBarrier();
        row[thread] = select(low + high, low - high, (thread & step) != 0u);
        workgroupBarrier();
        step <<= 1u;
    }
    let value = row[thread] * 0.0883883476;
    codes[thread] = bitcast<u32>(value) & 0x7fffffffu;
    workgroupBarrier();
    var amax = 0x01c00000u;
    i = 0u;
    while i < 32u {
        amax = max(amax, codes[(thread & ~31u) + i]);
        i += 1u;
    }
    let scale_byte = scale_code(amax, 0x40c00000u);
    workgroupBarrier();
    codes[thread] = select(e2m1_code(value * scale_inverse(scale_byte)), 0u, scale_byte == 255u) | (scale_byte << 8u);
    workgroupBarrier();
    if thread < 16u {
        var word = 0u;
        i = 0u;
        while i < 8u {
            word |= (codes[thread * 8u + i] & 15u) << (4u * i);
            i += 1u;
        }
        keep(run.session, to + thread, word);
    }
    if thread == 16u {
        keep(run.session, to + 16u, (codes[0] >> 8u) | ((codes[32] >> 8u) << 8u) | ((codes[64] >> 8u) << 16u) | ((codes[96] >> 8u) << 24u));
    }
{% else %}
    let inside = thread < {{ dim // 4 }}u;
    var value = vec4<f32>(0.0);
    if inside {
        value = vec4<f32>(row[4u * thread], row[4u * thread + 1u], row[4u * thread + 2u], row[4u * thread + 3u]);
    }
    let bits = bitcast<vec4<u32>>(value) & vec4<u32>(0x7fffffffu);
    codes[thread] = max(max(bits.x, bits.y), max(bits.z, bits.w));
    workgroupBarrier();
    var amax = 0x38d1b717u;
    i = 0u;
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
        keep(run.session, to + thread, word);
    } else if inside {
        let at = to + {{ nope // 4 + ((nope // 64 + 7) // 8) * 2 }}u + 2u * (thread - {{ nope // 4 }}u);
        keep(run.session, at, bf16_code(value.x) | (bf16_code(value.y) << 16u));
        keep(run.session, at + 1u, bf16_code(value.z) | (bf16_code(value.w) << 16u));
    }
    if thread < {{ ((nope // 64 + 7) // 8) * 2 }}u {
        var word = 0u;
        i = 0u;
        while i < 4u {
            let block = thread * 4u + i;
            if block < {{ nope // 64 }}u {
                word |= codes[block * 16u] << (8u * i);
            }
            i += 1u;
        }
        keep(run.session, to + {{ nope // 4 }}u + thread, word);
    }
{% endif %}
}
