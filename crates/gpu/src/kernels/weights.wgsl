{# Rows of weights as they lie on the device (src/format.rs), 32 elements at a time: a *chunk*. A row begins at a whole
   vec4<u32>; an element is scale * q - minimum, with a scale (and minimum) for each half of the chunk. -#}

{# Types whose halves have scales of their own, and types that have minimums. -#}
{% set two_scales = ["q2_k"] %}
{% set minimums = ["q2_k", "q4_k"] %}
{% set unscaled = ["f32", "f16", "bf16"] %}

{% macro chunk_struct() %}
struct Chunk {
    q0: vec4<f32>, q1: vec4<f32>, q2: vec4<f32>, q3: vec4<f32>,
    q4: vec4<f32>, q5: vec4<f32>, q6: vec4<f32>, q7: vec4<f32>,
    scale: vec2<f32>,
    minimum: vec2<f32>,
}
{% endmacro %}

{% macro loader(ty, memory) %}
// Chunk `c` of the row that begins at `row` and has `chunks` of them.
fn load_{{ ty }}_{{ memory }}(row: u32, chunks: u32, c: u32) -> Chunk {
    var chunk: Chunk;
{% if ty == "f32" %}
{% for i in range(8) %}
    chunk.q{{ i }} = bitcast<vec4<f32>>({{ memory }}[row + 8u * c + {{ i }}u]);
{% endfor %}
{% elif ty == "f16" %}
{% for i in range(4) %}
    let p{{ i }} = {{ memory }}[row + 4u * c + {{ i }}u];
    chunk.q{{ 2 * i }} = vec4<f32>(unpack2x16float(p{{ i }}.x), unpack2x16float(p{{ i }}.y));
    chunk.q{{ 2 * i + 1 }} = vec4<f32>(unpack2x16float(p{{ i }}.z), unpack2x16float(p{{ i }}.w));
{% endfor %}
{% elif ty == "bf16" %}
{% for i in range(4) %}
    let p{{ i }} = {{ memory }}[row + 4u * c + {{ i }}u];
    chunk.q{{ 2 * i }} = bitcast<vec4<f32>>(vec4<u32>(p{{ i }}.x << 16u, p{{ i }}.x & 0xffff0000u, p{{ i }}.y << 16u, p{{ i }}.y & 0xffff0000u));
    chunk.q{{ 2 * i + 1 }} = bitcast<vec4<f32>>(vec4<u32>(p{{ i }}.z << 16u, p{{ i }}.z & 0xffff0000u, p{{ i }}.w << 16u, p{{ i }}.w & 0xffff0000u));
{% endfor %}
{% elif ty == "q8_0" %}
{% for i in range(2) %}
    let p{{ i }} = {{ memory }}[row + 2u * c + {{ i }}u];
    chunk.q{{ 4 * i }} = vec4<f32>(unpack4xI8(p{{ i }}.x));
    chunk.q{{ 4 * i + 1 }} = vec4<f32>(unpack4xI8(p{{ i }}.y));
    chunk.q{{ 4 * i + 2 }} = vec4<f32>(unpack4xI8(p{{ i }}.z));
    chunk.q{{ 4 * i + 3 }} = vec4<f32>(unpack4xI8(p{{ i }}.w));
{% endfor %}
    chunk.scale.x = half_{{ memory }}(row + 2u * chunks, c);
{% elif ty == "iq2_xxs" %}
    let pair = {{ memory }}[row + (c >> 1u)];
    let group = select(pair.xy, pair.zw, (c & 1u) != 0u);
{% for i in range(4) %}
    let point{{ i }} = points[(group.x >> {{ 8 * i }}u) & 255u];
    let signs{{ i }} = even((group.y >> {{ 7 * i }}u) & 127u);
    chunk.q{{ 2 * i }} = signed(vec4<f32>(unpack4xU8(point{{ i }}.x)), signs{{ i }});
    chunk.q{{ 2 * i + 1 }} = signed(vec4<f32>(unpack4xU8(point{{ i }}.y)), signs{{ i }} >> 4u);
{% endfor %}
    chunk.scale.x = half_{{ memory }}(row + (chunks >> 1u), c >> 3u) * (0.5 + f32(group.y >> 28u)) * 0.25;
{% elif ty == "q2_k" %}
    let block = c >> 3u;
    let part = c & 7u;
    let shift = vec4<u32>(2u * (part & 3u));
    let at = row + 4u * block + 2u * (part >> 2u);
{% for i in range(2) %}
    let p{{ i }} = ({{ memory }}[at + {{ i }}u] >> shift) & vec4<u32>(0x03030303u);
    chunk.q{{ 4 * i }} = vec4<f32>(unpack4xU8(p{{ i }}.x));
    chunk.q{{ 4 * i + 1 }} = vec4<f32>(unpack4xU8(p{{ i }}.y));
    chunk.q{{ 4 * i + 2 }} = vec4<f32>(unpack4xU8(p{{ i }}.z));
    chunk.q{{ 4 * i + 3 }} = vec4<f32>(unpack4xU8(p{{ i }}.w));
{% endfor %}
    let blocks = chunks >> 3u;
    let both = {{ memory }}[row + 4u * blocks + block][part >> 1u] >> (16u * (part & 1u));
    let d = unpack2x16float({{ memory }}[row + 5u * blocks + (block >> 2u)][block & 3u]);
    chunk.scale = d.x * vec2<f32>(f32(both & 15u), f32((both >> 8u) & 15u));
    chunk.minimum = d.y * vec2<f32>(f32((both >> 4u) & 15u), f32((both >> 12u) & 15u));
{% elif ty == "q4_k" %}
    let at = row + 9u * (c >> 3u);
    let part = c & 7u;
    let shift = vec4<u32>(4u * (part & 1u));
{% for i in range(2) %}
    let p{{ i }} = ({{ memory }}[at + 1u + 2u * (part >> 1u) + {{ i }}u] >> shift) & vec4<u32>(0x0f0f0f0fu);
    chunk.q{{ 4 * i }} = vec4<f32>(unpack4xU8(p{{ i }}.x));
    chunk.q{{ 4 * i + 1 }} = vec4<f32>(unpack4xU8(p{{ i }}.y));
    chunk.q{{ 4 * i + 2 }} = vec4<f32>(unpack4xU8(p{{ i }}.z));
    chunk.q{{ 4 * i + 3 }} = vec4<f32>(unpack4xU8(p{{ i }}.w));
{% endfor %}
    let head = {{ memory }}[at];
    let d = unpack2x16float(head.x);
    let by = 8u * (part & 3u);
    let low = vec2<u32>(head.y >> by, head.z >> by);
    let rest = vec2<u32>(head.w >> by, head.w >> (by + 4u));
    let six = select((rest & vec2<u32>(15u)) | ((low >> vec2<u32>(2u)) & vec2<u32>(48u)), low & vec2<u32>(63u), part < 4u);
    chunk.scale.x = d.x * f32(six.x);
    chunk.minimum.x = d.y * f32(six.y);
{% elif ty == "mxfp4" %}
    let p = {{ memory }}[row + c];
    let low = vec4<u32>(0x0f0f0f0fu);
    let first = p & low;
    let second = (p >> vec4<u32>(4u)) & low;
{% for i in range(4) %}
    chunk.q{{ i }} = e2m1(first.{{ "xyzw"[i] }});
    chunk.q{{ i + 4 }} = e2m1(second.{{ "xyzw"[i] }});
{% endfor %}
    let exponent = ({{ memory }}[row + chunks + (c >> 4u)][(c >> 2u) & 3u] >> (8u * (c & 3u))) & 255u;
    chunk.scale.x = bitcast<f32>(select((exponent - 1u) << 23u, 0x00200000u << exponent, exponent < 2u));
{% endif %}
    return chunk;
}
{% endmacro %}

{% macro helpers(memory) %}
// Half `i` of those that begin at `at`.
fn half_{{ memory }}(at: u32, i: u32) -> f32 {
    let both = unpack2x16float({{ memory }}[at + (i >> 3u)][(i >> 1u) & 3u]);
    return select(both.x, both.y, (i & 1u) != 0u);
}

fn float_{{ memory }}(at: u32, i: u32) -> f32 {
    return bitcast<f32>({{ memory }}[at + (i >> 2u)][i & 3u]);
}
{% endmacro %}

{% macro type_functions(types) %}
{% if "iq2_xxs" in types %}
// Points of the code book, eight magnitudes a byte each (`load_points` fills it).
var<workgroup> points: array<vec2<u32>, 256>;

fn load_points(thread: u32, threads: u32) {
    var i = thread;
    while i < 256u {
        points[i] = code_book[i];
        i += threads;
    }
}

// Eight signs: the last makes their number even.
fn even(signs: u32) -> u32 {
    return signs | ((countOneBits(signs) & 1u) << 7u);
}

fn signed(magnitudes: vec4<f32>, signs: u32) -> vec4<f32> {
    let bits = (vec4<u32>(signs) << vec4<u32>(31u, 30u, 29u, 28u)) & vec4<u32>(0x80000000u);
    return bitcast<vec4<f32>>(bitcast<vec4<u32>>(magnitudes) ^ bits);
}
{% endif %}
{% if "mxfp4" in types %}
// Four doubled 4-bit floats, one in each byte.
fn e2m1(codes: u32) -> vec4<f32> {
    let code = unpack4xU8(codes);
    let m = code & vec4<u32>(1u);
    let e = (code >> vec4<u32>(1u)) & vec4<u32>(3u);
    let magnitude = select((vec4<u32>(2u) + m) << (e - vec4<u32>(1u)), m, e == vec4<u32>(0u));
    let value = vec4<f32>(magnitude);
    return select(value, -value, (code & vec4<u32>(8u)) != vec4<u32>(0u));
}
{% endif %}
{% endmacro %}

{# Inputs in workgroup memory, `tile` chunks of `rows` rows: vector `i` of chunk `c` at `i * (tile + 1) + c`, so that threads that
   work at the same time, each at a chunk of its own, meet no bank twice. -#}
{% macro staged(rows, tile) %}
var<workgroup> staged: array<vec4<f32>, {{ rows * 8 * (tile + 1) }}>;
{% endmacro %}

{# Fills them with the chunks from `first_chunk` on of `chunks`. `source(r, i)` is vector `i` of row `r`. All 128 threads run it. -#}
{% macro stage(rows, tile) %}
    {
        workgroupBarrier();
        let left = min({{ tile }}u, chunks - first_chunk) * 8u;
{% for r in range(rows) %}
        {
            var i = thread;
            while i < left {
                staged[{{ r * 8 * (tile + 1) }}u + (i & 7u) * {{ tile + 1 }}u + (i >> 3u)] = {{ caller(r, "8u * first_chunk + i") }};
                i += 128u;
            }
        }
{% endfor %}
        workgroupBarrier();
    }
{% endmacro %}

{# The 32 inputs of chunk `c` of those that are staged, as `x0`..`x7`. -#}
{% macro inputs(r, tile) %}
{% for i in range(8) %}
                let x{{ i }} = staged[{{ (r * 8 + i) * (tile + 1) }}u + c];
{% endfor %}
{% endmacro %}

{# acc + chunk · x, in one order: what Exact relies on. `x0`..`x7` are the row's values. -#}
{% macro dot(ty, acc, chunk) %}
{
{% if ty in two_scales %}
    let a = fma({{ chunk }}.q3, x3, fma({{ chunk }}.q2, x2, fma({{ chunk }}.q1, x1, {{ chunk }}.q0 * x0)));
    let b = fma({{ chunk }}.q7, x7, fma({{ chunk }}.q6, x6, fma({{ chunk }}.q5, x5, {{ chunk }}.q4 * x4)));
    {{ acc }} = fma({{ chunk }}.scale.x, (a.x + a.y) + (a.z + a.w), {{ acc }});
    {{ acc }} = fma({{ chunk }}.scale.y, (b.x + b.y) + (b.z + b.w), {{ acc }});
{% else %}
    let a = fma({{ chunk }}.q7, x7, fma({{ chunk }}.q6, x6, fma({{ chunk }}.q5, x5, fma({{ chunk }}.q4, x4,
        fma({{ chunk }}.q3, x3, fma({{ chunk }}.q2, x2, fma({{ chunk }}.q1, x1, {{ chunk }}.q0 * x0)))))));
{% if ty in unscaled %}
    {{ acc }} += (a.x + a.y) + (a.z + a.w);
{% else %}
    {{ acc }} = fma({{ chunk }}.scale.x, (a.x + a.y) + (a.z + a.w), {{ acc }});
{% endif %}
{% endif %}
{% if ty in minimums %}
    let s = (x0 + x1) + (x2 + x3);
    let t = (x4 + x5) + (x6 + x7);
{% if ty in two_scales %}
    {{ acc }} = fma(-{{ chunk }}.minimum.x, (s.x + s.y) + (s.z + s.w), {{ acc }});
    {{ acc }} = fma(-{{ chunk }}.minimum.y, (t.x + t.y) + (t.z + t.w), {{ acc }});
{% else %}
    let u = s + t;
    {{ acc }} = fma(-{{ chunk }}.minimum.x, (u.x + u.y) + (u.z + u.w), {{ acc }});
{% endif %}
{% endif %}
}
{% endmacro %}

{# Sums of 32 lanes each: `partial[v * 32 + lane]` of `values` values, in one order, into `totals[v]`. `threads` run it. -#}
{% macro reduction(values, threads) %}
var<workgroup> partial: array<f32, {{ values * 32 }}>;
var<workgroup> quarters: array<f32, {{ values * 8 }}>;
var<workgroup> totals: array<f32, {{ values }}>;

fn reduce(thread: u32) {
    workgroupBarrier();
    var i = thread;
    while i < {{ values * 8 }}u {
        let at = (i >> 3u) * 32u + (i & 7u);
        quarters[i] = (partial[at] + partial[at + 8u]) + (partial[at + 16u] + partial[at + 24u]);
        i += {{ threads }}u;
    }
    workgroupBarrier();
    i = thread;
    while i < {{ values }}u {
        let at = i * 8u;
        totals[i] = ((quarters[at] + quarters[at + 1u]) + (quarters[at + 2u] + quarters[at + 3u]))
            + ((quarters[at + 4u] + quarters[at + 5u]) + (quarters[at + 6u] + quarters[at + 7u]));
        i += {{ threads }}u;
    }
    workgroupBarrier();
}
{% endmacro %}
