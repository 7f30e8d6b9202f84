{# Outputs of one choice of a row, if its expert is in a slot, each at its own place `[rows, 1 + K, D]`; of the shared expert
   at place 0, where that is asked for.

   down, shared_down: types; used: K. Workgroups: D / 16, choices (then rows, for the shared expert). -#}
{% import "weights.wgsl" as weights with context %}
{{ weights.chunk_struct() }}

struct Params {
    slot: u32,
    down: u32,
    stride: u32,
    chunks: u32,
    d: u32,
    table: u32,
    choice0: u32,
    choices: u32,
    // The shared expert: where it is in the layer, of its rows.
    shared_down: u32,
    shared_stride: u32,
    shared_chunks: u32,
    row0: u32,
}

@group(0) @binding(0) var<storage, read> slab: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> table: array<u32>;
@group(0) @binding(3) var<storage, read> experts: array<u32>;
@group(0) @binding(4) var<storage, read> mid: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> shared_mid: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> outputs: array<f32>;
{% if "iq2_xxs" in [down, shared_down] %}
@group(0) @binding(7) var<storage, read> code_book: array<vec2<u32>>;
{% endif %}
var<immediate> p: Params;

{{ weights.helpers("slab") }}
{{ weights.helpers("w") }}
{{ weights.type_functions([down, shared_down]) }}
{{ weights.loader(down, "slab") }}
{{ weights.loader(shared_down, "w") }}
{{ weights.reduction(16, 128) }}
{{ weights.staged(1, 128) }}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let lane = thread & 31u;
    let first = group.x * 16u + (thread >> 5u) * 4u;
    var to: u32;
{% if "iq2_xxs" in [down, shared_down] %}
    load_points(thread, 128u);
    workgroupBarrier();
{% endif %}
{% for n in range(4) %}
    var acc{{ n }} = 0.0;
{% endfor %}
    if group.y < p.choices {
        let choice = p.choice0 + group.y;
        let slot = table[p.table + experts[choice]];
        if slot == 0xffffffffu {
            return;
        }
        to = (choice / {{ used }}u) * {{ 1 + used }}u + 1u + choice % {{ used }}u;
        let x_at = choice * p.chunks * 8u;
{% for n in range(4) %}
        let row{{ n }} = slot * p.slot + p.down + min(first + {{ n }}u, p.d - 1u) * p.stride;
{% endfor %}
        let chunks = p.chunks;
        var first_chunk = 0u;
        while first_chunk < chunks {
{% call(r, i) weights.stage(1, 128) %}mid[x_at + {{ i }}]{% endcall %}
            var c = lane;
            while c < 128u && first_chunk + c < chunks {
                {{ weights.inputs(0, 128) }}
{% for n in range(4) %}
                {
                    let k = load_{{ down }}_slab(row{{ n }}, chunks, first_chunk + c);
                    {{ weights.dot(down, "acc" ~ n, "k") }}
                }
{% endfor %}
                c += 32u;
            }
            first_chunk += 128u;
        }
    } else {
        let row = p.row0 + group.y - p.choices;
        to = row * {{ 1 + used }}u;
        let x_at = row * p.shared_chunks * 8u;
{% for n in range(4) %}
        let row{{ n }} = p.shared_down + min(first + {{ n }}u, p.d - 1u) * p.shared_stride;
{% endfor %}
        let chunks = p.shared_chunks;
        var first_chunk = 0u;
        while first_chunk < chunks {
{% call(r, i) weights.stage(1, 128) %}shared_mid[x_at + {{ i }}]{% endcall %}
            var c = lane;
            while c < 128u && first_chunk + c < chunks {
                {{ weights.inputs(0, 128) }}
{% for n in range(4) %}
                {
                    let k = load_{{ shared_down }}_w(row{{ n }}, chunks, first_chunk + c);
                    {{ weights.dot(shared_down, "acc" ~ n, "k") }}
                }
{% endfor %}
                c += 32u;
            }
            first_chunk += 128u;
        }
    }
{% for n in range(4) %}
    partial[((thread >> 5u) * 4u + {{ n }}u) * 32u + lane] = acc{{ n }};
{% endfor %}
    reduce(thread);
    if thread < 16u && group.x * 16u + thread < p.d {
        outputs[to * p.d + group.x * 16u + thread] = totals[thread];
    }
}
