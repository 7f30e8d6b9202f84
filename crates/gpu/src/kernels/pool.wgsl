{# Compressed rows of windows that end in a pass (§2.5): Σ u · softmax(z) over a window (and where windows overlap the one
   before), one softmax a channel; normalised, rotated, rounded and stored.

   ratio, dim (of a row), row_words, rope, plain; index_dim (128), index_words: of the indexer's rows, which are made beside, or 0
   words. Workgroups: rows, of which those that end no window return; kinds of rows. -#}
{% import "functions.wgsl" as functions %}
{% import "rows.wgsl" as rows %}
{% import "runs.wgsl" as runs %}
{% set overlaps = ratio == 4 %}
{# Slots of a window, and those that are read at a time, so that they come together. #}
{% set slots = 8 if overlaps else ratio %}
{% set block = 8 if slots % 8 == 0 else 1 %}
// Where a kind of rows has what it is made of.
struct Kind {
    u: u32,
    ape: u32,
    norm: u32,
    inputs: u32,
    inputs_rows: u32,
}

struct Params {
{{ runs.params() }}
    p_stride: u32,
    epsilon: f32,
    // The first row of the pass that may end a window.
    first: u32,
    // Where rows begin in the session; for the indexer's the run says it.
    to: u32,
{% for kind in ["main", "index"] %}
    // In a row of projections; weights of positions, and of the norm.
    {{ kind }}_u: u32,
    {{ kind }}_ape: u32,
    {{ kind }}_norm: u32,
    // The ring of inputs: words from the session's ring on, and rows.
    {{ kind }}_inputs: u32,
    {{ kind }}_inputs_rows: u32,
{% endfor %}
}

@group(0) @binding(0) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> tables: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read> projected: array<f32>;
{{ runs.sessions(3, "read_write") }}
var<immediate> p: Params;

var<workgroup> sums: array<f32, 128>;
var<workgroup> row: array<f32, {{ [dim, 128] | max }}>;
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

{# u and z of slots `s`.. of `window`, of channel `i` of rows with `dim`, as `one0`..: from the ring, or from this pass. Both are asked
   for, because what waits for one before it asks for the next waits eight times. -#}
{% macro read_block(dim) %}
{% set width = 2 * dim if overlaps else dim %}
{% for n in range(block) %}
    let channel{{ n }} = i{% if overlaps and n >= 4 %} + {{ dim }}u{% endif %};
    let position{{ n }} = {% if overlaps and n >= 4 %}4u * window + {{ n - 4 }}u{% else %}begin + s + {{ n }}u{% endif %};
    let far{{ n }} = begin_place + position{{ n }} - begin;
    let place{{ n }} = select(far{{ n }}, far{{ n }} - kind.inputs_rows, far{{ n }} >= kind.inputs_rows);
    let old{{ n }} = run.ring + kind.inputs + place{{ n }} * {{ 2 * width }}u + channel{{ n }};
    let new{{ n }} = (run.row0 + max(position{{ n }}, run.start) - run.start) * p.p_stride + kind.u + channel{{ n }};
    let new_u{{ n }} = projected[new{{ n }}];
    let new_z{{ n }} = projected[new{{ n }} + {{ width }}u] + weight(kind.ape, (position{{ n }} % {{ ratio }}u) * {{ width }}u + channel{{ n }});
    var u{{ n }}: u32;
    var z{{ n }}: u32;
{% endfor %}
{% call(session) runs.with_session("run.session") %}
{% for n in range(block) %}
    u{{ n }} = {{ session }}[old{{ n }}];
    z{{ n }} = {{ session }}[old{{ n }} + {{ width }}u];
{% endfor %}
{% endcall %}
{% for n in range(block) %}
    let is_new{{ n }} = position{{ n }} >= run.start;
    let one{{ n }} = select(vec2<f32>(bitcast<f32>(u{{ n }}), bitcast<f32>(z{{ n }})), vec2<f32>(new_u{{ n }}, new_z{{ n }}), is_new{{ n }});
{% endfor %}
{% endmacro %}

{% macro largest() %}
{% for n in range(block) %}
    most = select(most, max(most, one{{ n }}.y), s + {{ n }}u >= first);
{% endfor %}
{% endmacro %}

{% macro add_shares() %}
{% for n in range(block) %}
    if s + {{ n }}u >= first {
        let share = exp_of(one{{ n }}.y - most);
        value = fma(share, one{{ n }}.x, value);
        sum += share;
    }
{% endfor %}
{% endmacro %}

{% macro channel(name, dim) %}
// Channel `i` of the row of `window`.
fn {{ name }}(run: Run, kind: Kind, window: u32, i: u32) -> f32 {
{% if overlaps %}
    // Before the first window there is none.
    let first = select(0u, 4u, window == 0u);
    let begin = 4u * max(window, 1u) - 4u;
{% else %}
    let first = 0u;
    let begin = window * {{ ratio }}u;
{% endif %}
    let begin_place = begin % kind.inputs_rows;
    var most = -3.4e38;
    var sum = 0.0;
    var value = 0.0;
    var s = 0u;
{% if slots == block %}
{{ read_block(dim) }}
{{ largest() }}
{{ add_shares() }}
{% else %}
    while s < {{ slots }}u {
{{ read_block(dim) }}
{{ largest() }}
        s += {{ block }}u;
    }
    s = 0u;
    while s < {{ slots }}u {
{{ read_block(dim) }}
{{ add_shares() }}
        s += {{ block }}u;
    }
{% endif %}
    return value / sum;
}
{% endmacro %}

{{ channel("main_channel", dim) }}
{% if index_words > 0 %}
{{ channel("index_channel", index_dim) }}
{% endif %}

{# The row of `window` of a kind, rotated, in `row`. -#}
{% macro make(name, dim) %}
    let kind = Kind(p.{{ name }}_u, p.{{ name }}_ape, p.{{ name }}_norm, p.{{ name }}_inputs, p.{{ name }}_inputs_rows);
    var square = 0.0;
    var i = thread;
    while i < {{ dim }}u {
        let value = {{ name }}_channel(run, kind, window, i);
        row[i] = value;
        square = fma(value, value, square);
        i += 128u;
    }
    let scale = 1.0 / sqrt(sum_all(thread, square) / {{ dim }}.0 + p.epsilon);
    i = thread;
    while i < {{ dim }}u {
        row[i] = row[i] * scale * weight(kind.norm, i);
        i += 128u;
    }
    workgroupBarrier();
    if thread < {{ rope // 2 }}u {
        let i = {{ dim - rope }}u + 2u * thread;
        let number = window - run.start / {{ ratio }}u;
        let turn = bitcast<vec2<f32>>(tables[run.windows + number * {{ rope // 2 }}u + thread]);
        let v = vec2<f32>(row[i], row[i + 1u]);
        row[i] = fma(v.x, turn.x, -(v.y * turn.y));
        row[i + 1u] = fma(v.x, turn.y, v.y * turn.x);
    }
    workgroupBarrier();
{% endmacro %}

{% macro store_plain(dim) %}
    i = thread;
    while i < {{ dim }}u {
        keep(run.session, to + i, bitcast<u32>(row[i]));
        i += 128u;
    }
{% endmacro %}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let r = p.first + group.x;
    let run = run_of(r);
    let end = position_of(run, r) + 1u;
    if end % {{ ratio }}u != 0u {
        return;
    }
    let window = end / {{ ratio }}u - 1u;
{% if index_words > 0 %}
    if group.y == 1u {
{{ make("index", index_dim) }}
    let to = run.index + window * {{ index_words }}u;
{% if plain %}
{{ store_plain(index_dim) }}
{% else %}
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
{% endif %}
        return;
    }
{% endif %}
{{ make("main", dim) }}
    let to = p.to + window * {{ row_words }}u;
{% if plain %}
{{ store_plain(dim) }}
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
    if thread < {{ (dim - rope) // 4 }}u {
        let by = scale_inverse(scale_byte);
        var word = 0u;
        if scale_byte != 255u {
            word = e4m3_code(value.x * by) | (e4m3_code(value.y * by) << 8u) | (e4m3_code(value.z * by) << 16u) | (e4m3_code(value.w * by) << 24u);
        }
        keep(run.session, to + thread, word);
    } else if inside {
        let at = to + {{ (dim - rope) // 4 + (((dim - rope) // 64 + 7) // 8) * 2 }}u + 2u * (thread - {{ (dim - rope) // 4 }}u);
        keep(run.session, at, bf16_code(value.x) | (bf16_code(value.y) << 16u));
        keep(run.session, at + 1u, bf16_code(value.z) | (bf16_code(value.w) << 16u));
    }
    if thread < {{ (((dim - rope) // 64 + 7) // 8) * 2 }}u {
        var word = 0u;
        i = 0u;
        while i < 4u {
            let block = thread * 4u + i;
            if block < {{ (dim - rope) // 64 }}u {
                word |= codes[block * 16u] << (8u * i);
            }
            i += 1u;
        }
        keep(run.session, to + {{ (dim - rope) // 4 }}u + thread, word);
    }
{% endif %}
}
