{# Outputs of one choice of a row, if its expert is in a slot, each at its own place `[rows, 1 + K, D]`; of the shared expert
   at place 0, where that is asked for.

   down, shared_down: types; used: K; digits: whether integers are multiplied where types allow; made: whether what
   experts made is laid out for lanes, and shared_made: what the shared expert made; outputs: of each 32 lanes. Workgroups: D / (8 outputs), choices (then rows, for the shared expert). -#}
{% import "weights.wgsl" as weights with context %}
{% set types = [down] if down == shared_down else [down, shared_down] %}

struct Params {
    slot: u32,
    down: u32,
    stride: u32,
    chunks: u32,
    d: u32,
    table: u32,
    choices: u32,
    // The shared expert: where it is in the layer, of its rows.
    shared_down: u32,
    shared_stride: u32,
    shared_chunks: u32,
}

@group(0) @binding(0) var<storage, read> slab: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> table: array<u32>;
@group(0) @binding(3) var<storage, read> experts: array<u32>;
{% if made %}
@group(0) @binding(4) var<storage, read> digits: array<vec4<u32>>;
{% else %}
@group(0) @binding(4) var<storage, read> mid: array<vec4<f32>>;
{% endif %}
{% if shared_made %}
@group(0) @binding(5) var<storage, read> shared_digits: array<vec4<u32>>;
{% else %}
@group(0) @binding(5) var<storage, read> shared_mid: array<vec4<f32>>;
{% endif %}
@group(0) @binding(6) var<storage, read_write> outputs: array<f32>;
{% if "iq2_xxs" in [down, shared_down] %}
@group(0) @binding(7) var<storage, read> code_book: array<vec2<u32>>;
{% endif %}
var<immediate> p: Params;

{{ weights.helpers("slab") }}
{{ weights.helpers("w") }}
{{ weights.product_types(types, digits) }}
{{ weights.product_functions([down], "slab", digits) }}
{{ weights.product_functions([shared_down], "w", digits) }}
{{ weights.reduction(8 * outputs, 256) }}
{{ weights.staged(1, 128, ([] if made else [down]) + ([] if shared_made else [shared_down]), digits, false) }}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let lane = thread & 31u;
{% if "iq2_xxs" in types %}
    load_points(thread, 256u);
    workgroupBarrier();
{% endif %}
    let first_of_all = group.x * {{ 8 * outputs }}u;
    let first = first_of_all + (thread >> 5u) * {{ outputs }}u;
    var to: u32;
{% set of = namespace(list=[]) %}
{% for n in range(outputs) %}
    var acc{{ n }}_0 = 0.0;
{% set of.list = of.list + [["row" ~ n, down, "acc" ~ n]] %}
{% endfor %}
    if group.y < p.choices {
        let choice = group.y;
        let slot = table[p.table + experts[choice]];
        if slot == 0xffffffffu {
            return;
        }
        to = (choice / {{ used }}u) * {{ 1 + used }}u + 1u + choice % {{ used }}u;
        let chunks = p.chunks;
{% if made %}
        let halves = 2u * chunks;
{{ weights.row_digits(0, "choice", "halves", "0u") }}
{% else %}
        let x_at = choice * chunks * 8u;
{% endif %}
{% for n in range(outputs) %}
        let row{{ n }} = slot * p.slot + p.down + min(first + {{ n }}u, p.d - 1u) * p.stride;
{% endfor %}
{% call(r, i) weights.products(of.list, "slab", 1, 128, 256, digits, "digits" if made else "") %}mid[x_at + {{ i }}]{% endcall %}
    } else {
        let row = group.y - p.choices;
        to = row * {{ 1 + used }}u;
        let chunks = p.shared_chunks;
{% if shared_made %}
        let halves = 2u * chunks;
{{ weights.row_digits(0, "row", "halves", "0u") }}
{% else %}
        let x_at = row * chunks * 8u;
{% endif %}
{% set of.list = [] %}
{% for n in range(outputs) %}
        let row{{ n }} = p.shared_down + min(first + {{ n }}u, p.d - 1u) * p.shared_stride;
{% set of.list = of.list + [["row" ~ n, shared_down, "acc" ~ n]] %}
{% endfor %}
{% call(r, i) weights.products(of.list, "w", 1, 128, 256, digits, "shared_digits" if shared_made else "") %}shared_mid[x_at + {{ i }}]{% endcall %}
    }
{% for n in range(outputs) %}
    partial[((thread >> 5u) * {{ outputs }}u + {{ n }}u) * 32u + lane] = acc{{ n }}_0;
{% endfor %}
    reduce(thread);
    if thread < {{ 8 * outputs }}u && first_of_all + thread < p.d {
        outputs[to * p.d + first_of_all + thread] = totals[thread];
    }
}
