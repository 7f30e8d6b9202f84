{# Products of a tile of activation rows and a tile of weight rows, both halves in workgroup memory, with f32 sums.

   rows, outputs, depth: of a tile; buffers: tiles in workgroup memory, 1, or 2 so that one is filled while the other is
   multiplied; warp_rows, warp_outputs: what 32 threads sum of it; coop: by cooperative matrices, or by
   the same operands in plain arithmetic. With coop, 32 threads must be a subgroup. -#}
{% set threads = 32 * (rows // warp_rows) * (outputs // warp_outputs) %}
{# Pieces (of 16 weights) and fours (of activations) of a tile that a thread brings. -#}
{% set pieces = outputs * depth // 16 // threads %}
{% set fours = rows * depth // 4 // threads %}
{# Fours from row to row: 8 halves more than the depth, so that rows begin in different banks, at multiples of 16 bytes. -#}
{% set stride = depth // 4 + 2 %}
{# Without coop, 16 threads share the outputs and the others the rows. -#}
{% set plain_rows = rows * 16 // threads %}
{% set plain_outputs = outputs // 16 %}
{% set half4_type = "vec4<f16>" if coop else "vec2<u32>" %}

{% macro enable() %}
{% if coop %}
enable f16;
enable wgpu_cooperative_matrix;
{% endif %}
{% endmacro %}

{% macro memory() %}
var<workgroup> row_tile: array<{{ half4_type }}, {{ buffers * rows * stride }}>;
var<workgroup> weight_tile: array<{{ half4_type }}, {{ buffers * outputs * stride }}>;
{% if coop %}
// 16 rows of 16 results for each 32 threads.
var<workgroup> results: array<f32, {{ threads * 8 }}>;
{% endif %}

fn half4(v: vec4<f32>) -> {{ half4_type }} {
{% if coop %}
    return vec4<f16>(v);
{% else %}
    return vec2<u32>(pack2x16float(v.xy), pack2x16float(v.zw));
{% endif %}
}
{% if not coop %}

fn float4(v: vec2<u32>) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(v.x), unpack2x16float(v.y));
}
{% endif %}
{% endmacro %}

{# Where in the tile the thread works: first row and output of its warp, or its own. -#}
{% macro places() %}
{% if coop %}
    let lane = thread & 31u;
    let row_in_tile = ((thread >> 5u) % {{ rows // warp_rows }}u) * {{ warp_rows }}u;
    let output_in_tile = ((thread >> 5u) / {{ rows // warp_rows }}u) * {{ warp_outputs }}u;
    let result_at = (thread >> 5u) * 256u;
{% for i in range(warp_rows // 16) %}
{% for j in range(warp_outputs // 16) %}
    var acc{{ i }}_{{ j }} = coop_mat16x16<f32, C>();
{% endfor %}
{% endfor %}
{% else %}
    let row_in_tile = thread >> 4u;
    let output_in_tile = 32u * ((thread >> 3u) & 1u) + 2u * (thread & 7u);
{% for i in range(plain_rows) %}
{% for j in range(plain_outputs) %}
    var acc{{ i }}_{{ j }} = 0.0;
{% endfor %}
{% endfor %}
{% endif %}
{% endmacro %}

{# Row of the plain sum `i`, and output of the plain sum `j`: pairs, as far apart as the halves of 32 outputs. -#}
{% macro plain_row(i) %}row_in_tile + {{ i * (threads // 16) }}u{% endmacro %}
{% macro plain_output(j) %}output_in_tile + {{ 64 * (j // 4) + 16 * (j // 2 % 2) + j % 2 }}u{% endmacro %}

{# Rows of the tiles before the ones in `buffer`. -#}
{% macro row_buffer(buffer="buffer") %}{% if buffers > 1 %}{{ buffer }} * {{ rows }}u + {% endif %}{% endmacro %}
{% macro weight_buffer(buffer="buffer") %}{% if buffers > 1 %}{{ buffer }} * {{ outputs }}u + {% endif %}{% endmacro %}

{# acc += row_tile · weight_tileᵀ. -#}
{% macro products() %}
{% if coop %}
{% for k in range(depth // 16) %}
        {
{% for i in range(warp_rows // 16) %}
            let a{{ i }} = coopLoadT<coop_mat16x16<f16, A>>(&row_tile[({{ row_buffer() }}row_in_tile + {{ 16 * i }}u) * {{ stride }}u + {{ 4 * k }}u], {{ stride }}u);
{% endfor %}
{% for j in range(warp_outputs // 16) %}
            let b{{ j }} = coopLoad<coop_mat16x16<f16, B>>(&weight_tile[({{ weight_buffer() }}output_in_tile + {{ 16 * j }}u) * {{ stride }}u + {{ 4 * k }}u], {{ stride }}u);
{% for i in range(warp_rows // 16) %}
            acc{{ i }}_{{ j }} = coopMultiplyAdd(a{{ i }}, b{{ j }}, acc{{ i }}_{{ j }});
{% endfor %}
{% endfor %}
        }
{% endfor %}
{% else %}
        var k = 0u;
        while k < {{ depth // 4 }}u {
{% for i in range(plain_rows) %}
            let a{{ i }} = float4(row_tile[({{ row_buffer() }}{{ plain_row(i) }}) * {{ stride }}u + k]);
{% endfor %}
{% for j in range(plain_outputs) %}
            {
                let b = float4(weight_tile[({{ weight_buffer() }}{{ plain_output(j) }}) * {{ stride }}u + k]);
{% for i in range(plain_rows) %}
                acc{{ i }}_{{ j }} = fma(a{{ i }}.w, b.w, fma(a{{ i }}.z, b.z, fma(a{{ i }}.y, b.y, fma(a{{ i }}.x, b.x, acc{{ i }}_{{ j }}))));
{% endfor %}
            }
{% endfor %}
            k += 1u;
        }
{% endif %}
{% endmacro %}

{# Puts a matrix of sums where its 32 threads can read it, from `results[result_at]` on. -#}
{% macro publish(acc) %}
        let sums_{{ acc }} = {{ acc }};
        workgroupBarrier();
        coopStoreT(sums_{{ acc }}, &results[result_at], 16u);
        workgroupBarrier();
{% endmacro %}

{# Row of the tile of weights that the thread's piece `n` is of, and row of activations that its four `n` is of. -#}
{% macro piece_row(n) %}thread / {{ depth // 16 }}u + {{ n * threads * 16 // depth }}u{% endmacro %}
{% macro four_row(n) %}thread / {{ depth // 4 }}u + {{ n * threads * 4 // depth }}u{% endmacro %}

{% macro for_type(action, buffer) %}
{% for ty in types %}
        {% if not loop.first %}else {% endif %}{% if not loop.last %}if ty == {{ type_ids[ty] }}u {% endif %}{
{% for n in range(pieces) %}
{% if action == "fetch" %}
            piece{{ n }} = fetch_{{ ty }}(weight_at{{ n }}, chunks, chunk, half);
{% else %}
            place_{{ ty }}(piece{{ n }}, chunk, half, ({{ weight_buffer(buffer) }}{{ piece_row(n) }}) * {{ stride }}u + piece_in_tile * 4u);
{% endif %}
{% endfor %}
        }
{% endfor %}
{% endmacro %}

{% macro fetch(c) %}
        {
            let chunk = min({{ c }} + (piece_in_tile >> 1u), chunks - 1u);
{{ for_type("fetch", "") }}
{% for n in range(fours) %}
            four{{ n }} = x[x_at{{ n }} + min(8u * ({{ c }}) + four_in_tile, 8u * chunks - 1u)];
{% endfor %}
        }
{% endmacro %}

{# Puts what was fetched of `c` into a buffer. -#}
{% macro place(c, buffer) %}
        {
            let chunk = min({{ c }} + (piece_in_tile >> 1u), chunks - 1u);
{{ for_type("place", buffer) }}
{% if depth > 32 %}
            // What is past the end adds nothing.
            if {{ c }} + (piece_in_tile >> 1u) >= chunks {
{% for n in range(pieces) %}
                let to{{ n }} = ({{ weight_buffer(buffer) }}{{ piece_row(n) }}) * {{ stride }}u + piece_in_tile * 4u;
{% for i in range(4) %}
                weight_tile[to{{ n }} + {{ i }}u] = half4(vec4<f32>());
{% endfor %}
{% endfor %}
            }
{% endif %}
{% for n in range(fours) %}
            row_tile[({{ row_buffer(buffer) }}{{ four_row(n) }}) * {{ stride }}u + four_in_tile] = four{{ n }};
{% endfor %}
        }
{% endmacro %}

{# Everything from zero to the sums. There must be: `thread`; `chunks`, those of a row; for each piece, `weight_at{n}`, where
   its row begins; for each four, `x_at{n}`, where its row begins in `x`; `ty`, the number of the piece's type, if there is more
   than one in `types`. The next tile is fetched while the present one is multiplied. -#}
{% macro sums() %}
    let piece_in_tile = thread % {{ depth // 16 }}u;
    let half = piece_in_tile & 1u;
    let four_in_tile = thread % {{ depth // 4 }}u;
{% for n in range(pieces) %}
    var piece{{ n }}: Piece;
{% endfor %}
{% for n in range(fours) %}
    var four{{ n }}: {{ half4_type }};
{% endfor %}
{{ places() }}
{{ fetch("0u") }}
    var c = 0u;
{% if buffers > 1 %}
    var buffer = 0u;
{{ place("0u", "0u") }}
    if {{ depth // 32 }}u < chunks {
{{ fetch(depth // 32 ~ "u") }}
    }
    while c < chunks {
        // One buffer is full, and nobody reads the other any more.
        workgroupBarrier();
        let next = c + {{ depth // 32 }}u;
        if next < chunks {
{{ place("next", "(1u - buffer)") }}
            if next + {{ depth // 32 }}u < chunks {
{{ fetch("next + " ~ depth // 32 ~ "u") }}
            }
        }
{{ products() }}
        buffer = 1u - buffer;
        c = next;
    }
{% else %}
    while c < chunks {
        workgroupBarrier();
{{ place("c", "") }}
        workgroupBarrier();
        let next = c + {{ depth // 32 }}u;
        if next < chunks {
{{ fetch("next") }}
        }
{{ products() }}
        c = next;
    }
{% endif %}
{% endmacro %}

{# Calls `put(row of the tile, output of the tile, result)` for each sum. -#}
{% macro put_all() %}
{% if coop %}
{% for i in range(warp_rows // 16) %}
{% for j in range(warp_outputs // 16) %}
    {
{{ publish("acc" ~ i ~ "_" ~ j) }}
        var n = 0u;
        while n < 8u {
            put(row_in_tile + {{ 16 * i }}u + 2u * n + (lane >> 4u), output_in_tile + {{ 16 * j }}u + (lane & 15u),
                results[result_at + 32u * n + lane]);
            n += 1u;
        }
    }
{% endfor %}
{% endfor %}
{% else %}
{% for i in range(plain_rows) %}
{% for j in range(plain_outputs) %}
    put({{ plain_row(i) }}, {{ plain_output(j) }}, acc{{ i }}_{{ j }});
{% endfor %}
{% endfor %}
{% endif %}
{% endmacro %}

{# The same where every other 16 rows of weights are another matrix's: calls `put(row, output, first of pair of results,
   second)`, each for two outputs, `output` and the next, of the first and of the other matrix. -#}
{% macro put_pairs() %}
{% if coop %}
{% for i in range(warp_rows // 16) %}
{% for j in range(0, warp_outputs // 16, 2) %}
    {
{{ publish("acc" ~ i ~ "_" ~ j) }}
{% for n in range(4) %}
        let first{{ n }} = vec2<f32>(results[result_at + {{ 64 * n }}u + 2u * lane], results[result_at + {{ 64 * n }}u + 2u * lane + 1u]);
{% endfor %}
{{ publish("acc" ~ i ~ "_" ~ (j + 1)) }}
{% for n in range(4) %}
        put(row_in_tile + {{ 16 * i + 4 * n }}u + (lane >> 3u), output_in_tile / 2u + {{ 8 * j }}u + 2u * (lane & 7u), first{{ n }},
            vec2<f32>(results[result_at + {{ 64 * n }}u + 2u * lane], results[result_at + {{ 64 * n }}u + 2u * lane + 1u]));
{% endfor %}
    }
{% endfor %}
{% endfor %}
{% else %}
{% for i in range(plain_rows) %}
{% for j in range(0, plain_outputs, 4) %}
    put({{ plain_row(i) }}, {{ 8 * j }}u + 16u * ((thread >> 3u) & 1u) + 2u * (thread & 7u),
        vec2<f32>(acc{{ i }}_{{ j }}, acc{{ i }}_{{ j + 1 }}), vec2<f32>(acc{{ i }}_{{ j + 2 }}, acc{{ i }}_{{ j + 3 }}));
{% endfor %}
{% endfor %}
{% endif %}
{% endmacro %}
