{# silu(min(gate, limit)) · clamp(up, ±limit) for many rows, if their expert is in a slot: halves times `scale`, in the order of
   group.wgsl. The rows' weights are for experts_down_many.

   gate, up: types; types: the same, each once; used: K; and what tiles.wgsl takes. A tile's weights are 16 rows of gate, the
   same 16 of up, and so on. Workgroups: width / (outputs / 2), tiles of group.wgsl at most. -#}
{% import "weights.wgsl" as weights with context %}
{% import "functions.wgsl" as functions %}
{% import "pieces.wgsl" as pieces with context %}
{% import "tiles.wgsl" as tiles with context %}
{{ tiles.enable() }}
struct Params {
    // Of a slot in vec4s, and where gate and up begin in it; of their rows.
    slot: u32,
    gate: u32,
    up: u32,
    gate_stride: u32,
    up_stride: u32,
    chunks: u32,
    // Even.
    width: u32,
    limit: f32,
    // First entry of the slot table.
    table: u32,
    scale: f32,
}

@group(0) @binding(0) var<storage, read> slab: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> table: array<u32>;
@group(0) @binding(2) var<storage, read> order: array<u32>;
@group(0) @binding(3) var<storage, read> tiles: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> x: array<{{ tiles.half4_type }}>;
@group(0) @binding(5) var<storage, read> inverses: array<f32>;
@group(0) @binding(6) var<storage, read_write> mid: array<u32>;
{% if "iq2_xxs" in types %}
@group(0) @binding(7) var<storage, read> code_book: array<vec2<u32>>;
{% endif %}
var<immediate> p: Params;

{{ tiles.memory() }}
{{ pieces.piece_struct() }}
{{ weights.type_functions(types) }}
{% for ty in types %}
{{ pieces.fetcher(ty, "slab") }}
{{ pieces.placer(ty) }}
{% endfor %}
{{ functions.exponential() }}
// Expert, first place in the order, count.
var<private> tile: vec4<u32>;
var<private> output0: u32;

fn activation(gate: f32, up: f32) -> f32 {
    return silu(min(gate, p.limit)) * clamp(up, -p.limit, p.limit) * p.scale;
}

fn put(row: u32, output: u32, gate: vec2<f32>, up: vec2<f32>) {
    let f = output0 + output;
    if row < tile.z && f < p.width {
        let inverse = inverses[order[tile.y + row] / {{ used }}u];
        let both = vec2<f32>(activation(gate.x * inverse, up.x * inverse), activation(gate.y * inverse, up.y * inverse));
        mid[((tile.y + row) * p.width + f) >> 1u] = pack2x16float(both);
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
    output0 = group.x * {{ outputs // 2 }}u;
    let chunks = p.chunks;
{% if types | length > 1 %}
    let ty = select({{ type_ids[gate] }}u, {{ type_ids[up] }}u, (({{ tiles.piece_row(0) }}) & 16u) != 0u);
{% endif %}
    let is_up = (({{ tiles.piece_row(0) }}) & 16u) != 0u;
    let matrix = slot * p.slot + select(p.gate, p.up, is_up);
    let stride = select(p.gate_stride, p.up_stride, is_up);
{% for n in range(tiles.pieces) %}
    let row{{ n }} = {{ tiles.piece_row(n) }};
    let f{{ n }} = output0 + (row{{ n }} >> 5u) * 16u + (row{{ n }} & 15u);
    let weight_at{{ n }} = matrix + min(f{{ n }}, p.width - 1u) * stride;
{% endfor %}
{% for n in range(tiles.fours) %}
    let x_at{{ n }} = (order[tile.y + min({{ tiles.four_row(n) }}, tile.z - 1u)] / {{ used }}u) * chunks * 8u;
{% endfor %}
{% if "iq2_xxs" in types %}
    load_points(thread, {{ tiles.threads }}u);
    workgroupBarrier();
{% endif %}
{{ tiles.sums() }}
{{ tiles.put_pairs() }}
}
