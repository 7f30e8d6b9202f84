{# Outputs of many rows' choices, times their weights, if their expert is in a slot, each at its own place `[rows, 1 + K, D]`.

   down: type; types: the same; used: K; and what tiles.wgsl takes. Workgroups: D / outputs, tiles of group.wgsl at most. -#}
{% import "weights.wgsl" as weights with context %}
{% import "pieces.wgsl" as pieces with context %}
{% import "tiles.wgsl" as tiles with context %}
{{ tiles.enable() }}
struct Params {
    // Of a slot in vec4s, and where down begins in it; of its rows.
    slot: u32,
    down: u32,
    stride: u32,
    chunks: u32,
    d: u32,
    // First entry of the slot table.
    table: u32,
    // What undoes the scale of `mid`.
    inverse: f32,
}

@group(0) @binding(0) var<storage, read> slab: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> table: array<u32>;
@group(0) @binding(2) var<storage, read> order: array<u32>;
@group(0) @binding(3) var<storage, read> tiles: array<vec4<u32>>;
// What experts_up_many made, in the order.
@group(0) @binding(4) var<storage, read> x: array<{{ tiles.half4_type }}>;
@group(0) @binding(5) var<storage, read> shares: array<f32>;
@group(0) @binding(6) var<storage, read_write> results_of_choices: array<f32>;
{% if "iq2_xxs" in types %}
@group(0) @binding(7) var<storage, read> code_book: array<vec2<u32>>;
{% endif %}
var<immediate> p: Params;

{{ tiles.memory() }}
{{ pieces.piece_struct() }}
{{ weights.type_functions(types) }}
{{ pieces.fetcher(down, "slab") }}
{{ pieces.placer(down) }}
// Expert, first place in the order, count.
var<private> tile: vec4<u32>;
var<private> output0: u32;

fn put(row: u32, output: u32, sum: f32) {
    if row < tile.z && output0 + output < p.d {
        let choice = order[tile.y + row];
        let to = (choice / {{ used }}u) * {{ 1 + used }}u + 1u + choice % {{ used }}u;
        results_of_choices[to * p.d + output0 + output] = sum * p.inverse * shares[choice];
    }
}

@compute @workgroup_size({{ tiles.threads }})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    if group.y >= tiles[0].x {
        return;
    }
    let slot = table[p.table + tiles[1u + group.y].x];
    if slot == 0xffffffffu {
        return;
    }
    tile = tiles[1u + group.y];
    output0 = group.x * {{ outputs }}u;
    let chunks = p.chunks;
{% for n in range(tiles.pieces) %}
    let weight_at{{ n }} = slot * p.slot + p.down + min(output0 + {{ tiles.piece_row(n) }}, p.d - 1u) * p.stride;
{% endfor %}
{% for n in range(tiles.fours) %}
    let x_at{{ n }} = (tile.y + min({{ tiles.four_row(n) }}, tile.z - 1u)) * chunks * 8u;
{% endfor %}
{% if "iq2_xxs" in types %}
    load_points(thread, {{ tiles.threads }}u);
    workgroupBarrier();
{% endif %}
{{ tiles.sums() }}
{{ tiles.put_all() }}
}
