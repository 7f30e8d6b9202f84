{# Rows of a session as they are stored (docs/formats.md): the small floats and their scales. -#}

{% macro scales() %}
// Exponent code of the smallest power of two that brings `amax` (bits of a magnitude) within the format whose largest
// number has these bits.
fn scale_code(amax: u32, most: u32) -> u32 {
    if amax >= 0x7f800000u {
        return 255u;
    }
    return ((amax + (0x007fffffu - (most & 0x007fffffu))) >> 23u) + 127u - (most >> 23u);
}

fn scale_inverse(code: u32) -> f32 {
    return bitcast<f32>((254u - code) << 23u);
}

fn scale_of(code: u32) -> f32 {
    if code == 255u {
        return bitcast<f32>(0x7fc00000u | (code >> 30u));
    }
    return bitcast<f32>(select(code << 23u, 0x00400000u, code == 0u));
}
{% endmacro %}

{% macro fp8() %}
fn e4m3_code(value: f32) -> u32 {
    let bits = bitcast<u32>(clamp(value, -448.0, 448.0));
    let magnitude = bits & 0x7fffffffu;
    let below = bitcast<u32>(bitcast<f32>(magnitude) + 16384.0) - 0x46800000u;
    let above = ((magnitude + 0x7ffffu + ((magnitude >> 20u) & 1u)) >> 20u) - 960u;
    return ((bits >> 24u) & 0x80u) | (select(above, below, magnitude < 0x3c800000u) & 0x7fu);
}

// Four codes of a word.
fn e4m3_values(word: u32) -> vec4<f32> {
    let code = unpack4xU8(word);
    let magnitude = (code & vec4<u32>(127u)) << vec4<u32>(20u);
    let above = bitcast<vec4<f32>>(magnitude + vec4<u32>(0x3c000000u));
    let below = bitcast<vec4<f32>>(magnitude + vec4<u32>(0x3c800000u)) - vec4<f32>(0.015625);
    let value = select(above, below, magnitude < vec4<u32>(0x00800000u));
    return bitcast<vec4<f32>>(bitcast<vec4<u32>>(value) | ((code & vec4<u32>(128u)) << vec4<u32>(24u)));
}

fn bf16_code(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    if (bits & 0x7fffffffu) > 0x7f800000u {
        return (bits >> 16u) | 0x40u;
    }
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}
{% endmacro %}

{% macro fp4() %}
fn e2m1_code(value: f32) -> u32 {
    let m = abs(value);
    let code = u32(m > 0.25) + u32(m >= 0.75) + u32(m > 1.25) + u32(m >= 1.75) + u32(m > 2.5) + u32(m >= 3.5) + u32(m > 5.0);
    return code | ((bitcast<u32>(value) >> 31u) << 3u);
}

fn e2m1_value(code: u32) -> f32 {
    let e = (code >> 1u) & 3u;
    let m = f32(code & 1u);
    let magnitude = select((1.0 + 0.5 * m) * f32(1u << (e - 1u)), 0.5 * m, e == 0u);
    return select(magnitude, -magnitude, (code & 8u) != 0u);
}
{% endmacro %}

{# Values 4v..4v+3 of the row at word `at` of `memory`, a row of attention: `nope` FP8 values with a scale for each 64, then
   BF16; or f32 in plain arithmetic. -#}
{% macro key_loader(memory, plain, nope) %}
fn key_{{ memory }}(at: u32, v: u32) -> vec4<f32> {
{% if plain %}
    return bitcast<vec4<f32>>(vec4<u32>({{ memory }}[at + 4u * v], {{ memory }}[at + 4u * v + 1u], {{ memory }}[at + 4u * v + 2u], {{ memory }}[at + 4u * v + 3u]));
{% else %}
    if v < {{ nope // 4 }}u {
        let block = v >> 4u;
        let code = ({{ memory }}[at + {{ nope // 4 }}u + (block >> 2u)] >> (8u * (block & 3u))) & 255u;
        return e4m3_values({{ memory }}[at + v]) * scale_of(code);
    }
    let tail = at + {{ nope // 4 + ((nope // 64 + 7) // 8) * 2 }}u + 2u * (v - {{ nope // 4 }}u);
    let p = {{ memory }}[tail];
    let q = {{ memory }}[tail + 1u];
    return bitcast<vec4<f32>>(vec4<u32>(p << 16u, p & 0xffff0000u, q << 16u, q & 0xffff0000u));
{% endif %}
}
{% endmacro %}
