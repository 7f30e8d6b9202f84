{# y[r] = W x[r] for a list of matrices (jobs) at once and many rows, by tiles: factors are rounded to halves, sums are f32. A
   result depends on its row and weights only.

   types: those of the matrices; and what tiles.wgsl takes. Workgroups: tiles of outputs of all jobs, tiles of rows. -#}
{% import "weights.wgsl" as weights with context %}
{% import "pieces.wgsl" as pieces with context %}
{% import "tiles.wgsl" as tiles with context %}
{{ tiles.enable() }}
struct Params {
    // Where the jobs are.
    jobs: u32,
    rows: u32,
    // Of a row, in fours.
    x_stride: u32,
    // Of a row, in floats.
    y_stride: u32,
}

@group(0) @binding(0) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> x: array<{{ tiles.half4_type }}>;
@group(0) @binding(2) var<storage, read> inverses: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
{% if "iq2_xxs" in types %}
@group(0) @binding(4) var<storage, read> code_book: array<vec2<u32>>;
{% endif %}
var<immediate> p: Params;

{{ tiles.memory() }}
{{ pieces.piece_struct() }}
{{ weights.type_functions(types) }}
{% for ty in types %}
{{ pieces.fetcher(ty, "w") }}
{{ pieces.placer(ty) }}
{% endfor %}
var<private> row0: u32;
var<private> output0: u32;
var<private> place: vec4<u32>;

fn put(row: u32, output: u32, sum: f32) {
    if row0 + row < p.rows && output0 + output < place.y {
        y[(row0 + row) * p.y_stride + place.w + output0 + output] = sum * inverses[row0 + row];
    }
}

@compute @workgroup_size({{ tiles.threads }})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    var job = p.jobs;
    var tile = group.x;
    while tile * {{ outputs }}u >= w[job + 1u].y {
        tile -= (w[job + 1u].y + {{ outputs - 1 }}u) / {{ outputs }}u;
        job += 2u;
    }
    let matrix = w[job];
    place = w[job + 1u];
    row0 = group.y * {{ rows }}u;
    output0 = tile * {{ outputs }}u;
    let chunks = matrix.z;
    let ty = matrix.w;
{% for n in range(tiles.pieces) %}
    let weight_at{{ n }} = matrix.x + min(output0 + {{ tiles.piece_row(n) }}, place.y - 1u) * matrix.y;
{% endfor %}
{% for n in range(tiles.fours) %}
    let x_at{{ n }} = min(row0 + {{ tiles.four_row(n) }}, p.rows - 1u) * p.x_stride + place.z;
{% endfor %}
{% if "iq2_xxs" in types %}
    load_points(thread, {{ tiles.threads }}u);
    workgroupBarrier();
{% endif %}
{{ tiles.sums() }}
{{ tiles.put_all() }}
}
