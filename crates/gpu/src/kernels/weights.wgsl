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

{# ---- Codes as they are, for products of integers (`Fast`) ----

   What a lane takes at a time is a *unit*: 16 elements of these types, so that lanes that work at the same time read memory without
   gaps; a chunk of the others. -#}
{% set halved = ["q8_0", "q2_k", "q4_k"] %}

{% macro raw_struct() %}
// A unit as it lies in memory: codes, and the words that its scales are in.
struct Raw {
    codes: vec4<u32>,
    head: vec4<u32>,
}

// A unit as bytes with signs, four a word: the second vector is a chunk's only.
struct Codes {
    first: vec4<u32>,
    second: vec4<u32>,
    scale: f32,
    minimum: f32,
}

fn half_of(word: u32, i: u32) -> f32 {
    let both = unpack2x16float(word);
    return select(both.x, both.y, (i & 1u) != 0u);
}

// Four bytes from 1 to 127, negative where `signs` has a 1 in the lowest bit of the byte.
fn with_signs(bytes: u32, signs: u32) -> u32 {
    return (bytes ^ (255u * signs)) + signs;
}
{% endmacro %}

{% macro raw_loader(ty, memory) %}
// Unit `u` of the row that begins at `row` and has `chunks` chunks.
fn raw_{{ ty }}_{{ memory }}(row: u32, chunks: u32, u: u32) -> Raw {
    var raw: Raw;
{% if ty == "q8_0" %}
    raw.codes = {{ memory }}[row + u];
    raw.head.x = {{ memory }}[row + 2u * chunks + (u >> 4u)][(u >> 2u) & 3u];
{% elif ty == "q2_k" %}
    raw.codes = {{ memory }}[row + 4u * (u >> 4u) + ((u >> 2u) & 2u) + (u & 1u)];
    let blocks = chunks >> 3u;
    raw.head.x = {{ memory }}[row + 4u * blocks + (u >> 4u)][(u >> 2u) & 3u];
    raw.head.y = {{ memory }}[row + 5u * blocks + (u >> 6u)][(u >> 4u) & 3u];
{% elif ty == "q4_k" %}
    let at = row + 9u * (u >> 4u);
    raw.codes = {{ memory }}[at + 1u + ((u >> 1u) & 6u) + (u & 1u)];
    raw.head = {{ memory }}[at];
{% elif ty == "iq2_xxs" %}
    raw.codes = {{ memory }}[row + (u >> 1u)];
    raw.head.x = {{ memory }}[row + (chunks >> 1u) + (u >> 6u)][(u >> 4u) & 3u];
{% elif ty == "mxfp4" %}
    raw.codes = {{ memory }}[row + u];
    raw.head.x = {{ memory }}[row + chunks + (u >> 4u)][(u >> 2u) & 3u];
{% endif %}
    return raw;
}
{% endmacro %}

{% macro codes(ty) %}
// Unit `u` of a row.
fn codes_{{ ty }}(raw: Raw, u: u32) -> Codes {
    var codes: Codes;
{% if ty == "q8_0" %}
    codes.first = raw.codes;
    codes.scale = half_of(raw.head.x, u >> 1u);
{% elif ty == "q2_k" %}
    codes.first = (raw.codes >> vec4<u32>(u & 6u)) & vec4<u32>(0x03030303u);
    let both = raw.head.x >> (8u * (u & 3u));
    let d = unpack2x16float(raw.head.y);
    codes.scale = d.x * f32(both & 15u);
    codes.minimum = d.y * f32((both >> 4u) & 15u);
{% elif ty == "q4_k" %}
    let part = (u >> 1u) & 7u;
    codes.first = (raw.codes >> vec4<u32>(4u * (part & 1u))) & vec4<u32>(0x0f0f0f0fu);
    let d = unpack2x16float(raw.head.x);
    let by = 8u * (part & 3u);
    let low = vec2<u32>(raw.head.y >> by, raw.head.z >> by);
    let rest = vec2<u32>(raw.head.w >> by, raw.head.w >> (by + 4u));
    let six = select((rest & vec2<u32>(15u)) | ((low >> vec2<u32>(2u)) & vec2<u32>(48u)), low & vec2<u32>(63u), part < 4u);
    codes.scale = d.x * f32(six.x);
    codes.minimum = d.y * f32(six.y);
{% elif ty == "iq2_xxs" %}
    let group = select(raw.codes.xy, raw.codes.zw, (u & 1u) != 0u);
{% for i in range(4) %}
    let point{{ i }} = points[(group.x >> {{ 8 * i }}u) & 255u];
    let signs{{ i }} = even((group.y >> {{ 7 * i }}u) & 127u);
{% set half = "first" if i < 2 else "second" %}
    codes.{{ half }}.{{ "xz"[i % 2] }} = with_signs(point{{ i }}.x, ((signs{{ i }} & 15u) * 0x00204081u) & 0x01010101u);
    codes.{{ half }}.{{ "yw"[i % 2] }} = with_signs(point{{ i }}.y, ((signs{{ i }} >> 4u) * 0x00204081u) & 0x01010101u);
{% endfor %}
    codes.scale = half_of(raw.head.x, u >> 3u) * (0.5 + f32(group.y >> 28u)) * 0.25;
{% elif ty == "mxfp4" %}
    codes.first = doubled(raw.codes);
    codes.second = doubled(raw.codes >> vec4<u32>(4u));
    let exponent = (raw.head.x >> (8u * (u & 3u))) & 255u;
    codes.scale = bitcast<f32>(select((exponent - 1u) << 23u, 0x00200000u << exponent, exponent < 2u));
{% endif %}
    return codes;
}
{% endmacro %}

{% macro digit_functions() %}
fn dot16(codes: vec4<u32>, digits: vec4<u32>) -> i32 {
    return (dot4I8Packed(codes.x, digits.x) + dot4I8Packed(codes.y, digits.y))
        + (dot4I8Packed(codes.z, digits.z) + dot4I8Packed(codes.w, digits.w));
}
{% endmacro %}

{# Inputs as whole numbers of two digits, 128 high + low, with a scale for each half of a chunk. A value is off by at most the
   largest of its half / 32,512. Of a half, `v0`..`v3`: its `high` and `low` digits, and `of_half`, the scale and the sum of its
   values. -#}
{% macro digits_of_half() %}
                // As bits: so also what is no number is the largest.
                let bits = max(max(bitcast<vec4<u32>>(v0) & vec4<u32>(0x7fffffffu), bitcast<vec4<u32>>(v1) & vec4<u32>(0x7fffffffu)),
                    max(bitcast<vec4<u32>>(v2) & vec4<u32>(0x7fffffffu), bitcast<vec4<u32>>(v3) & vec4<u32>(0x7fffffffu)));
                let most = bitcast<f32>(max(max(bits.x, bits.y), max(bits.z, bits.w)));
                // So small that its inverse might be none: all digits are 0.
                let by = select(16256.0 / most, 0.0, most < 1e-30);
                var high: vec4<u32>;
                var low: vec4<u32>;
                var sum = vec4<i32>(0);
{% for i in range(4) %}
                {
                    let q = vec4<i32>(round(v{{ i }} * by));
                    let upper = (q + vec4<i32>(64)) >> vec4<u32>(7u);
                    high.{{ "xyzw"[i] }} = pack4xI8(upper);
                    low.{{ "xyzw"[i] }} = pack4xI8(q - (upper << vec4<u32>(7u)));
                    sum += q;
                }
{% endfor %}
                let scale = most / 16256.0;
                let of_half = vec2<f32>(scale, f32((sum.x + sum.y) + (sum.z + sum.w)) * scale);
{% endmacro %}

{# Fills `staged` with the digits of one row's chunks from `first_chunk` on of `chunks`: vectors 0 and 1 have the high digits of
   chunk `c`, 2 and 3 the low ones, vector `i` at `i * (tile + 4) + c`, so that lanes with a unit each meet no bank twice; and
   `halves`. `source(0, i)` is vector `i` of the row. All `threads` run it. -#}
{% macro stage_digits(tile, threads) %}
    {
        workgroupBarrier();
        let left = min({{ tile }}u, chunks - first_chunk) * 2u;
        var h = thread;
        while h < left {
{% for i in range(4) %}
            let v{{ i }} = {{ caller(0, "8u * first_chunk + 4u * h + " ~ i ~ "u") }};
{% endfor %}
            {
{{ digits_of_half() }}
                let to = (h & 1u) * {{ tile + 4 }}u + (h >> 1u);
                staged[to] = high;
                staged[to + {{ 2 * (tile + 4) }}u] = low;
                halves[h] = of_half;
            }
            h += {{ threads }}u;
        }
        workgroupBarrier();
    }
{% endmacro %}

{# The digits of unit `u` of those that are staged, of a type. -#}
{% macro digits_of_unit(ty, tile) %}
{% if ty in halved %}
                let x0 = staged[(u & 1u) * {{ tile + 4 }}u + (u >> 1u)];
                let x1 = staged[(2u + (u & 1u)) * {{ tile + 4 }}u + (u >> 1u)];
                let of_x = halves[u];
{% else %}
{% for i in range(4) %}
                let x{{ i }} = staged[{{ i * (tile + 4) }}u + u];
{% endfor %}
                let of_x = vec4<f32>(halves[2u * u], halves[2u * u + 1u]);
{% endif %}
{% endmacro %}

{# ---- Inputs laid out for lanes ----

   A row of inputs that several workgroups multiply by is laid out once, by the kernel that made it or by digits.wgsl. In `digits`:
   the high digits of all halves of chunks, the low ones, then scale and sum, a vector of a half each; last what the products are to be
   multiplied by, if anything. In `transposed`: the floats, vector `i` of chunk `c` at `i * chunks + c`, so that lanes that take a chunk
   each read without gaps. -#}

{# Where the digits of row `row` are in `digits`, from vector `x_at` of the row on; `halves` in all. -#}
{% macro row_digits(r, row, halves, x_at) %}
    let high_at{{ r }} = {{ row }} * (3u * {{ halves }} + 1u) + {{ x_at }} / 4u;
    let low_at{{ r }} = high_at{{ r }} + {{ halves }};
    let halves_at{{ r }} = low_at{{ r }} + {{ halves }};
{% endmacro %}

{# Writes half `half` of row `row` there: `v0`..`v3`. -#}
{% macro lay_out_half(row, halves, half) %}
            {
{{ digits_of_half() }}
                let to = {{ row }} * (3u * {{ halves }} + 1u) + {{ half }};
                digits[to] = high;
                digits[to + {{ halves }}] = low;
                digits[to + 2u * {{ halves }}] = bitcast<vec4<u32>>(vec4<f32>(of_half, 0.0, 0.0));
            }
{% endmacro %}

{# Where vector `i` of row `row` is in `transposed`; `halves` in all. -#}
{% macro transposed_at(row, halves, i) -%}
4u * {{ row }} * {{ halves }} + (({{ i }}) & 7u) * ({{ halves }} / 2u) + (({{ i }}) >> 3u)
{%- endmacro %}

{# The same of row `r`, which was laid out in `memory`. -#}
{% macro digits_in_memory(ty, r, memory) %}
{% if ty in halved %}
                let x0 = {{ memory }}[high_at{{ r }} + u];
                let x1 = {{ memory }}[low_at{{ r }} + u];
                let of_x = bitcast<vec2<f32>>({{ memory }}[halves_at{{ r }} + u].xy);
{% else %}
                let x0 = {{ memory }}[high_at{{ r }} + 2u * u];
                let x1 = {{ memory }}[high_at{{ r }} + 2u * u + 1u];
                let x2 = {{ memory }}[low_at{{ r }} + 2u * u];
                let x3 = {{ memory }}[low_at{{ r }} + 2u * u + 1u];
                let of_x = bitcast<vec4<f32>>(vec4<u32>({{ memory }}[halves_at{{ r }} + 2u * u].xy, {{ memory }}[halves_at{{ r }} + 2u * u + 1u].xy));
{% endif %}
{% endmacro %}

{# acc + codes · digits, in one order. -#}
{% macro dot_digits(ty, acc, codes) %}
{% if ty in halved %}
{{ acc }} = fma({{ codes }}.scale, f32((dot16({{ codes }}.first, x0) << 7u) + dot16({{ codes }}.first, x1)) * of_x.x, {{ acc }});
{% if ty in minimums %}
{{ acc }} = fma(-{{ codes }}.minimum, of_x.y, {{ acc }});
{% endif %}
{% else %}
{
    let a = f32((dot16({{ codes }}.first, x0) << 7u) + dot16({{ codes }}.first, x2)) * of_x.x;
    let b = f32((dot16({{ codes }}.second, x1) << 7u) + dot16({{ codes }}.second, x3)) * of_x.z;
    {{ acc }} = fma({{ codes }}.scale, a + b, {{ acc }});
}
{% endif %}
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
// The 4-bit floats in the lower halves of bytes, doubled, as bytes with signs.
fn doubled(codes: vec4<u32>) -> vec4<u32> {
    let ones = vec4<u32>(0x01010101u);
    let low = codes & vec4<u32>(0x07070707u);
    let odd = low & (low >> vec4<u32>(2u)) & ones;
    let high = (low >> vec4<u32>(1u)) & (low >> vec4<u32>(2u)) & ones;
    // 0, 1, 2, 3, 4, 6, 8, 12: what a code is more than itself.
    let bytes = low + odd + ((high + (odd & high)) << vec4<u32>(1u));
    let signs = (codes >> vec4<u32>(3u)) & ones;
    let top = signs << vec4<u32>(7u);
    return ((bytes ^ (top - signs)) + signs) ^ top;
}

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
   work at the same time, each at a chunk of its own, meet no bank twice: eight vectors of floats, of four rows at most, or four
   of digits (at `i * (tile + 4) + c`), unless they were made before. -#}
{% macro staged(rows, tile, types, digits, made) %}
{% set floats = 8 * ([rows, 4] | min) * (tile + 1) %}
{% set has_floats = not made and (not digits or types | select("in", unscaled) | list) %}
{% set has_digits = digits and not made and types | reject("in", unscaled) | list %}
{% if has_floats or has_digits %}
var<workgroup> staged: array<vec4<u32>, {{ [floats if has_floats else 0, 4 * (tile + 4) if has_digits else 0] | max }}>;
{% endif %}
{% if has_digits %}
var<workgroup> halves: array<vec2<f32>, {{ 2 * tile }}>;
{% endif %}
{% endmacro %}

{# Fills them with the chunks from `first_chunk` on of `chunks`. `source(r, i)` is vector `i` of row `r`. All `threads` run it. -#}
{% macro stage(rows, tile, threads) %}
    {
        workgroupBarrier();
        let left = min({{ tile }}u, chunks - first_chunk) * 8u;
{% for r in range(rows) %}
        {
            var i = thread;
            while i < left {
                staged[{{ r * 8 * (tile + 1) }}u + (i & 7u) * {{ tile + 1 }}u + (i >> 3u)] = bitcast<vec4<u32>>({{ caller(r, "8u * first_chunk + i") }});
                i += {{ threads }}u;
            }
        }
{% endfor %}
        workgroupBarrier();
    }
{% endmacro %}

{# The 32 inputs of chunk `c` of those that are staged, as `x0`..`x7`. -#}
{% macro inputs(r, tile) %}
{% for i in range(8) %}
                let x{{ i }} = bitcast<vec4<f32>>(staged[{{ (r * 8 + i) * (tile + 1) }}u + c]);
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

{# Functions that products with these types of rows in `memory` need. -#}
{% macro product_functions(types, memory, digits) %}
{% for ty in types %}
{% if digits and ty not in unscaled %}
{{ raw_loader(ty, memory) }}
{% else %}
{{ loader(ty, memory) }}
{% endif %}
{% endfor %}
{% endmacro %}

{# What every kernel with products begins with. -#}
{% macro product_types(types, digits) %}
{{ chunk_struct() }}
{{ type_functions(types) }}
{% if digits %}
{{ raw_struct() }}
{{ digit_functions() }}
{% for ty in types %}
{% if digits and ty not in unscaled %}
{{ codes(ty) }}
{% endif %}
{% endfor %}
{% endif %}
{% endmacro %}

{# Adds the products of unit `unit` of each row of weights with the digits of `rows` rows: those of one row, if they were not made
   before, are `x0` to `x3` and `of_x`. -#}
{% macro multiply_digits(of, memory, unit, rows, made) %}
{% for at, ty, acc in of %}
            let m{{ loop.index0 }} = raw_{{ ty }}_{{ memory }}({{ at }}, chunks, min({{ unit }} + 32u, last_unit));
            let w{{ loop.index0 }} = codes_{{ ty }}(k{{ loop.index0 }}, {{ unit }});
{% endfor %}
{% for r in range(rows) %}
            {
{% if made %}
                {{ digits_in_memory(of[0][1], r, made) }}
{% endif %}
{% for at, ty, acc in of %}
                {{ dot_digits(ty, acc ~ "_" ~ r, "w" ~ loop.index0) }}
{% endfor %}
            }
{% endfor %}
{% for at, ty, acc in of %}
            k{{ loop.index0 }} = m{{ loop.index0 }};
{% endfor %}
{% endmacro %}

{# Dot products of `rows` rows of inputs with rows of weights: `of` lists [where the row begins, its type, what is added to].
   Lane `lane` of 32 takes every 32nd unit (chunk, of floats), in one order whatever else is computed. `source(r, i)` is vector `i` of row `r` of
   the inputs; all `threads` run it. Integers are computed where `digits` and the type allow: the types must agree in that, and in
   their units. Inputs are made into digits here, of one row at a time, unless they were laid out before (`made` is where: `row_digits`,
   and `source(r, i)` is vector `i` of those that are transposed, of `x_chunks` chunks). -#}
{% macro products(of, memory, rows, tile, threads, digits, made) %}
{% set source = caller %}
    {
{% if not made %}
    var first_chunk = 0u;
{% endif %}
{% if digits and of[0][1] not in unscaled %}
{% set units = 2 if of[0][1] in halved else 1 %}
    let last_unit = {{ units }}u * chunks - 1u;
    // The next codes are on their way while these are multiplied.
{% for at, ty, acc in of %}
    var k{{ loop.index0 }} = raw_{{ ty }}_{{ memory }}({{ at }}, chunks, min(lane, last_unit));
{% endfor %}
{% if not made %}
    while first_chunk < chunks {
{% call(r, i) stage_digits(tile, threads) %}{{ source(r, i) }}{% endcall %}
        let first_unit = {{ units }}u * first_chunk;
        let left = {{ units }}u * min({{ tile }}u, chunks - first_chunk);
        var u = lane;
        while u < left {
            {{ digits_of_unit(of[0][1], tile) }}
{{ multiply_digits(of, memory, "first_unit + u", 1, "") }}
            u += 32u;
        }
        first_chunk += {{ tile }}u;
    }
{% else %}
    var u = lane;
    while u <= last_unit {
{{ multiply_digits(of, memory, "u", rows, made) }}
        u += 32u;
    }
{% endif %}
{% elif made %}
    var c = lane;
    while c < chunks {
{% for at, ty, acc in of %}
        let k{{ loop.index0 }} = load_{{ ty }}_{{ memory }}({{ at }}, chunks, c);
{% endfor %}
{% for r in range(rows) %}
        {
{% for i in range(8) %}
            let x{{ i }} = {{ source(r, i ~ "u * x_chunks + c") }};
{% endfor %}
{% for at, ty, acc in of %}
            {{ dot(ty, acc ~ "_" ~ r, "k" ~ loop.index0) }}
{% endfor %}
        }
{% endfor %}
        c += 32u;
    }
{% else %}
{# As many rows at a time as there is room for. #}
{% for r0 in range(0, rows, 4) %}
{% set count = [4, rows - r0] | min %}
    first_chunk = 0u;
    while first_chunk < chunks {
{% call(r, i) stage(count, tile, threads) %}{{ source(r0 + r, i) }}{% endcall %}
        var c = lane;
        while c < {{ tile }}u && first_chunk + c < chunks {
{% if rows > 1 %}
{% for at, ty, acc in of %}
            let k{{ loop.index0 }} = load_{{ ty }}_{{ memory }}({{ at }}, chunks, first_chunk + c);
{% endfor %}
{% endif %}
{% for r in range(count) %}
            {
                {{ inputs(r, tile) }}
{% for at, ty, acc in of %}
                {
{% if rows == 1 %}
                    let k{{ loop.index0 }} = load_{{ ty }}_{{ memory }}({{ at }}, chunks, first_chunk + c);
{% endif %}
                    {{ dot(ty, acc ~ "_" ~ (r0 + r), "k" ~ loop.index0) }}
                }
{% endfor %}
            }
{% endfor %}
            c += 32u;
        }
        first_chunk += {{ tile }}u;
    }
{% endfor %}
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
