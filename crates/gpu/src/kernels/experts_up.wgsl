{# silu(min(gate, limit)) · clamp(up, ±limit) · weight of one choice of a row (§2.7), if its expert is in a slot.

   gate, up: types; used: K. Workgroups: width / 8, choices. -#}
{% import "weights.wgsl" as weights with context %}
{% import "functions.wgsl" as functions %}
{{ weights.chunk_struct() }}

struct Params {
    // Of a slot in vec4s, and where gate and up begin in it; of their rows.
    slot: u32,
    gate: u32,
    up: u32,
    gate_stride: u32,
    up_stride: u32,
    chunks: u32,
    width: u32,
    limit: f32,
    // First entry of the slot table, and first slot of the slab.
    table: u32,
    choice0: u32,
}

@group(0) @binding(0) var<storage, read> slab: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> table: array<u32>;
@group(0) @binding(2) var<storage, read> experts: array<u32>;
@group(0) @binding(3) var<storage, read> shares: array<f32>;
@group(0) @binding(4) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> mid: array<f32>;
{% if "iq2_xxs" in [gate, up] %}
@group(0) @binding(6) var<storage, read> code_book: array<vec2<u32>>;
{% endif %}
var<immediate> p: Params;

{{ weights.helpers("slab") }}
{{ weights.type_functions([gate, up]) }}
{{ weights.loader(gate, "slab") }}
{% if up != gate %}
{{ weights.loader(up, "slab") }}
{% endif %}
{{ weights.reduction(16, 128) }}
{{ weights.staged(1, 128) }}
{{ functions.exponential() }}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let choice = p.choice0 + group.y;
    let slot = table[p.table + experts[choice]];
    if slot == 0xffffffffu {
        return;
    }
{% if "iq2_xxs" in [gate, up] %}
    load_points(thread, 128u);
    workgroupBarrier();
{% endif %}
    let lane = thread & 31u;
    let first = group.x * 8u + (thread >> 5u) * 2u;
    let x_at = (choice / {{ used }}u) * p.chunks * 8u;
{% for n in range(2) %}
    let gate{{ n }} = slot * p.slot + p.gate + min(first + {{ n }}u, p.width - 1u) * p.gate_stride;
    let up{{ n }} = slot * p.slot + p.up + min(first + {{ n }}u, p.width - 1u) * p.up_stride;
    var gate_acc{{ n }} = 0.0;
    var up_acc{{ n }} = 0.0;
{% endfor %}
    let chunks = p.chunks;
    var first_chunk = 0u;
    while first_chunk < chunks {
{% call(r, i) weights.stage(1, 128) %}x[x_at + {{ i }}]{% endcall %}
        var c = lane;
        while c < 128u && first_chunk + c < chunks {
            {{ weights.inputs(0, 128) }}
{% for n in range(2) %}
            {
                let k = load_{{ gate }}_slab(gate{{ n }}, chunks, first_chunk + c);
                {{ weights.dot(gate, "gate_acc" ~ n, "k") }}
            }
            {
                let k = load_{{ up }}_slab(up{{ n }}, chunks, first_chunk + c);
                {{ weights.dot(up, "up_acc" ~ n, "k") }}
            }
{% endfor %}
            c += 32u;
        }
        first_chunk += 128u;
    }
{% for n in range(2) %}
    partial[((thread >> 5u) * 4u + {{ n }}u) * 32u + lane] = gate_acc{{ n }};
    partial[((thread >> 5u) * 4u + {{ 2 + n }}u) * 32u + lane] = up_acc{{ n }};
{% endfor %}
    reduce(thread);
    if thread < 8u {
        let at = (thread >> 1u) * 4u + (thread & 1u);
        let f = group.x * 8u + thread;
        if f < p.width {
            let gate = min(totals[at], p.limit);
            let up = clamp(totals[at + 2u], -p.limit, p.limit);
            mid[choice * p.width + f] = silu(gate) * up * shares[choice];
        }
    }
}
