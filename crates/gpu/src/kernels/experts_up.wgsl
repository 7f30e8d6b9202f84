{# silu(min(gate, limit)) · clamp(up, ±limit) · weight of one choice of a row (§2.7), if its expert is in a slot.

   gate, up: types; used: K; digits: whether integers are multiplied where types allow, of inputs that were laid out for lanes; makes: whether results are left as digits; outputs: of each 32 lanes, an even number.
   Workgroups: width / (8 outputs), choices. -#}
{% import "weights.wgsl" as weights with context %}
{% import "functions.wgsl" as functions %}
{% set types = [gate] if gate == up else [gate, up] %}
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
    // First entry of the layer in the slot table.
    table: u32,
}

@group(0) @binding(0) var<storage, read> slab: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> table: array<u32>;
@group(0) @binding(2) var<storage, read> experts: array<u32>;
@group(0) @binding(3) var<storage, read> shares: array<f32>;
// Transposed, where they were laid out.
@group(0) @binding(4) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> mid: array<{{ "vec4<u32>" if makes else "f32" }}>;
{% if "iq2_xxs" in types %}
@group(0) @binding(6) var<storage, read> code_book: array<vec2<u32>>;
{% endif %}
{% set made = "digits" if digits and types | reject("in", weights.unscaled) | list else "" %}
{% if made %}
@group(0) @binding({{ 7 if "iq2_xxs" in types else 6 }}) var<storage, read> digits: array<vec4<u32>>;
{% endif %}
var<immediate> p: Params;

{{ weights.helpers("slab") }}
{{ weights.product_types(types, digits) }}
{{ weights.product_functions(types, "slab", digits) }}
{{ weights.reduction(16 * outputs, 256) }}
{{ weights.staged(1, 128, types, digits, made) }}
{{ functions.exponential() }}
{% if makes %}
var<workgroup> results: array<f32, {{ 8 * outputs }}>;
{% endif %}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let choice = group.y;
    let slot = table[p.table + experts[choice]];
    if slot == 0xffffffffu {
        return;
    }
{% if "iq2_xxs" in types %}
    load_points(thread, 256u);
    workgroupBarrier();
{% endif %}
    let lane = thread & 31u;
    let x_at = (choice / {{ used }}u) * p.chunks * 8u;
    let chunks = p.chunks;
{% if made %}
    let row = choice / {{ used }}u;
    let halves = 2u * p.chunks;
{{ weights.row_digits(0, "row", "halves", "0u") }}
    let x_chunks = p.chunks;
{% endif %}
    let first_of_all = group.x * {{ 8 * outputs }}u;
    let first = first_of_all + (thread >> 5u) * {{ outputs }}u;
{% set gates = namespace(list=[]) %}
{% set ups = namespace(list=[]) %}
{% for n in range(outputs) %}
    let gate{{ n }} = slot * p.slot + p.gate + min(first + {{ n }}u, p.width - 1u) * p.gate_stride;
    let up{{ n }} = slot * p.slot + p.up + min(first + {{ n }}u, p.width - 1u) * p.up_stride;
    var gates{{ n }}_0 = 0.0;
    var ups{{ n }}_0 = 0.0;
{% set gates.list = gates.list + [["gate" ~ n, gate, "gates" ~ n]] %}
{% set ups.list = ups.list + [["up" ~ n, up, "ups" ~ n]] %}
{% endfor %}
{% for of in ([gates.list + ups.list] if gate == up else [gates.list, ups.list]) %}
{% call(r, i) weights.products(of, "slab", 1, 128, 256, digits, made) %}x[x_at + {{ i }}]{% endcall %}
{% endfor %}
{% for n in range(outputs) %}
    partial[((thread >> 5u) * {{ 2 * outputs }}u + {{ n }}u) * 32u + lane] = gates{{ n }}_0;
    partial[((thread >> 5u) * {{ 2 * outputs }}u + {{ outputs + n }}u) * 32u + lane] = ups{{ n }}_0;
{% endfor %}
    reduce(thread);
    if thread < {{ 8 * outputs }}u {
        let at = thread / {{ outputs }}u * {{ 2 * outputs }}u + thread % {{ outputs }}u;
        let f = first_of_all + thread;
        var result = 0.0;
        if f < p.width {
            let gate = min(totals[at], p.limit);
            let up = clamp(totals[at + {{ outputs }}u], -p.limit, p.limit);
            result = silu(gate) * up * shares[choice];
{% if not makes %}
            mid[choice * p.width + f] = result;
{% endif %}
        }
{% if makes %}
        results[thread] = result;
{% endif %}
    }
{% if makes %}
    workgroupBarrier();
    let half = first_of_all / 16u + thread;
    if thread < {{ outputs // 2 }}u && half < p.width / 16u {
{% for i in range(4) %}
        let v{{ i }} = vec4<f32>({% for j in range(4) %}results[16u * thread + {{ 4 * i + j }}u]{% if j < 3 %}, {% endif %}{% endfor %});
{% endfor %}
{{ weights.digits_of_half() }}
        let to = choice * (3u * (p.width / 16u) + 1u) + half;
        mid[to] = high;
        mid[to + p.width / 16u] = low;
        mid[to + 2u * (p.width / 16u)] = bitcast<vec4<u32>>(vec4<f32>(of_half, 0.0, 0.0));
    }
{% endif %}
}
