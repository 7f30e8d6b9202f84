{# Weights on their way into a tile of halves, 16 elements at a time: a *piece*, one half of a chunk (weights.wgsl). Fetching is
   apart from unpacking, so that the next tile's bytes are on their way while the present one is multiplied.

   types: those of the matrices; tiles.wgsl has `half4` and the tile. -#}
{% set vectors = 4 if "f32" in types else (2 if "f16" in types or "bf16" in types else 1) %}

{% macro piece_struct() %}
struct Piece {
{% for i in range(vectors) %}
    v{{ i }}: vec4<u32>,
{% endfor %}
    // What scales it.
    extra: vec4<u32>,
}
{% endmacro %}

{% macro fetcher(ty, memory) %}
// Half `h` of chunk `c` of the row that begins at `row` and has `chunks` of them.
fn fetch_{{ ty }}(row: u32, chunks: u32, c: u32, h: u32) -> Piece {
    var piece: Piece;
{% if ty == "f32" %}
{% for i in range(4) %}
    piece.v{{ i }} = {{ memory }}[row + 8u * c + 4u * h + {{ i }}u];
{% endfor %}
{% elif ty in ["f16", "bf16"] %}
{% for i in range(2) %}
    piece.v{{ i }} = {{ memory }}[row + 4u * c + 2u * h + {{ i }}u];
{% endfor %}
{% elif ty == "q8_0" %}
    piece.v0 = {{ memory }}[row + 2u * c + h];
    piece.extra.x = {{ memory }}[row + 2u * chunks + (c >> 3u)][(c >> 1u) & 3u];
{% elif ty == "iq2_xxs" %}
    piece.v0 = {{ memory }}[row + (c >> 1u)];
    piece.extra.x = {{ memory }}[row + (chunks >> 1u) + (c >> 6u)][(c >> 4u) & 3u];
{% elif ty == "q2_k" %}
    let block = c >> 3u;
    let blocks = chunks >> 3u;
    piece.v0 = {{ memory }}[row + 4u * block + 2u * ((c >> 2u) & 1u) + h];
    piece.extra.x = {{ memory }}[row + 4u * blocks + block][(c >> 1u) & 3u];
    piece.extra.y = {{ memory }}[row + 5u * blocks + (block >> 2u)][block & 3u];
{% elif ty == "q4_k" %}
    let at = row + 9u * (c >> 3u);
    piece.v0 = {{ memory }}[at + 1u + 2u * ((c >> 1u) & 3u) + h];
    piece.extra = {{ memory }}[at];
{% elif ty == "mxfp4" %}
    piece.v0 = {{ memory }}[row + c];
    piece.extra.x = {{ memory }}[row + chunks + (c >> 4u)][(c >> 2u) & 3u];
{% endif %}
    return piece;
}
{% endmacro %}

{% macro placer(ty) %}
// Puts the piece's 16 values at `to` of the tile of weights.
fn place_{{ ty }}(piece: Piece, c: u32, h: u32, to: u32) {
{% if ty == "f32" %}
{% for i in range(4) %}
    weight_tile[to + {{ i }}u] = half4(bitcast<vec4<f32>>(piece.v{{ i }}));
{% endfor %}
{% elif ty == "f16" %}
{% for i in range(2) %}
    weight_tile[to + {{ 2 * i }}u] = half4(vec4<f32>(unpack2x16float(piece.v{{ i }}.x), unpack2x16float(piece.v{{ i }}.y)));
    weight_tile[to + {{ 2 * i + 1 }}u] = half4(vec4<f32>(unpack2x16float(piece.v{{ i }}.z), unpack2x16float(piece.v{{ i }}.w)));
{% endfor %}
{% elif ty == "bf16" %}
{% for i in range(2) %}
    let low{{ i }} = bitcast<vec4<f32>>(piece.v{{ i }} << vec4<u32>(16u));
    let high{{ i }} = bitcast<vec4<f32>>(piece.v{{ i }} & vec4<u32>(0xffff0000u));
    weight_tile[to + {{ 2 * i }}u] = half4(vec4<f32>(low{{ i }}.x, high{{ i }}.x, low{{ i }}.y, high{{ i }}.y));
    weight_tile[to + {{ 2 * i + 1 }}u] = half4(vec4<f32>(low{{ i }}.z, high{{ i }}.z, low{{ i }}.w, high{{ i }}.w));
{% endfor %}
{% elif ty == "q8_0" %}
    let both = unpack2x16float(piece.extra.x);
    let scale = select(both.x, both.y, (c & 1u) != 0u);
{% for i in range(4) %}
    weight_tile[to + {{ i }}u] = half4(vec4<f32>(unpack4xI8(piece.v0.{{ "xyzw"[i] }})) * scale);
{% endfor %}
{% elif ty == "iq2_xxs" %}
    let group = select(piece.v0.xy, piece.v0.zw, (c & 1u) != 0u);
    let both = unpack2x16float(piece.extra.x);
    let scale = select(both.x, both.y, (c & 8u) != 0u) * (0.5 + f32(group.y >> 28u)) * 0.25;
    let codes = group.x >> (16u * h);
    let parities = group.y >> (14u * h);
{% for i in range(2) %}
    let point{{ i }} = points[(codes >> {{ 8 * i }}u) & 255u];
    let signs{{ i }} = even((parities >> {{ 7 * i }}u) & 127u);
    weight_tile[to + {{ 2 * i }}u] = half4(signed(vec4<f32>(unpack4xU8(point{{ i }}.x)) * scale, signs{{ i }}));
    weight_tile[to + {{ 2 * i + 1 }}u] = half4(signed(vec4<f32>(unpack4xU8(point{{ i }}.y)) * scale, signs{{ i }} >> 4u));
{% endfor %}
{% elif ty == "q2_k" %}
    let codes = (piece.v0 >> vec4<u32>(2u * (c & 3u))) & vec4<u32>(0x03030303u);
    let both = piece.extra.x >> (16u * (c & 1u) + 8u * h);
    let d = unpack2x16float(piece.extra.y);
    let scale = d.x * f32(both & 15u);
    let minimum = vec4<f32>(-d.y * f32((both >> 4u) & 15u));
{% for i in range(4) %}
    weight_tile[to + {{ i }}u] = half4(fma(vec4<f32>(unpack4xU8(codes.{{ "xyzw"[i] }})), vec4<f32>(scale), minimum));
{% endfor %}
{% elif ty == "q4_k" %}
    let codes = (piece.v0 >> vec4<u32>(4u * (c & 1u))) & vec4<u32>(0x0f0f0f0fu);
    let d = unpack2x16float(piece.extra.x);
    let by = 8u * (c & 3u);
    let low = vec2<u32>(piece.extra.y >> by, piece.extra.z >> by);
    let rest = vec2<u32>(piece.extra.w >> by, piece.extra.w >> (by + 4u));
    let six = select((rest & vec2<u32>(15u)) | ((low >> vec2<u32>(2u)) & vec2<u32>(48u)), low & vec2<u32>(63u), (c & 7u) < 4u);
    let scale = d.x * f32(six.x);
    let minimum = vec4<f32>(-d.y * f32(six.y));
{% for i in range(4) %}
    weight_tile[to + {{ i }}u] = half4(fma(vec4<f32>(unpack4xU8(codes.{{ "xyzw"[i] }})), vec4<f32>(scale), minimum));
{% endfor %}
{% elif ty == "mxfp4" %}
    let codes = (piece.v0 >> vec4<u32>(4u * h)) & vec4<u32>(0x0f0f0f0fu);
    let exponent = (piece.extra.x >> (8u * (c & 3u))) & 255u;
    let scale = bitcast<f32>(select((exponent - 1u) << 23u, 0x00200000u << exponent, exponent < 2u));
{% for i in range(4) %}
    weight_tile[to + {{ i }}u] = half4(e2m1(codes.{{ "xyzw"[i] }}) * scale);
{% endfor %}
{% endif %}
}
{% endmacro %}
