{# y[r] = W x[r] for a list of matrices (jobs) at once and a few rows: each output is one dot product, summed by 32 lanes in one
   order whatever the number of rows.

   types: those of the matrices; rows: activation rows together; outputs: of each 32 lanes; norm: whether x is divided by its
   RMS and weighed first; digits: whether integers are multiplied where types allow; made: whether the inputs were laid out for
   lanes before: those of several rows are, if any type is one of integers. -#}
{% import "weights.wgsl" as weights with context %}
{% set made = "digits" if made and digits and types | reject("in", weights.unscaled) | list else "" %}
{# Chunks of inputs in workgroup memory at a time, and outputs and rows that are summed at a time. #}
{%- set tile = 128 // rows if rows < 4 else 32 %}
{% set at_once = [rows, 4] | min %}
{# Where all are integers, half of the lanes take rows 0 to 3 of eight and half the others, of twice the outputs: so an input that
   was read serves more outputs, and fewer registers hold more. #}
{% set has_floats = types | select("in", weights.unscaled) | list %}
{% set parts = 2 if rows == 8 and digits and not has_floats else 1 %}
{% set lane_rows = rows // parts %}
{% set lane_outputs = outputs * parts %}
{% set together = outputs if rows == 1 else 4 if parts == 2 else 4 // at_once %}
{% set values = 8 * together * at_once %}

struct Params {
    // Where the list of workgroups is.
    groups: u32,
    rows: u32,
    // Of a row, in vec4s.
    x_stride: u32,
    // Of a row, in floats.
    y_stride: u32,
    // Where the norm's weights are, and its epsilon.
    norm: u32,
    epsilon: f32,
    // Halves of chunks in a row of digits.
    halves: u32,
}

@group(0) @binding(0) var<storage, read> w: array<vec4<u32>>;
// Transposed, if they were laid out before.
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
{% if "iq2_xxs" in types %}
@group(0) @binding(3) var<storage, read> code_book: array<vec2<u32>>;
{% endif %}
{% if made %}
@group(0) @binding({{ 4 if "iq2_xxs" in types else 3 }}) var<storage, read> digits: array<vec4<u32>>;
{% endif %}
var<immediate> p: Params;

{{ weights.helpers("w") }}
{{ weights.product_types(types, digits) }}
{{ weights.product_functions(types, "w", digits) }}
{{ weights.reduction(values, 256) }}
{{ weights.staged(rows, tile, types, digits, made) }}
{% set squares = norm and not made %}
{% if squares %}
// Sums of squares of each row, by lane.
var<workgroup> squares: array<f32, {{ rows * 32 }}>;
{% endif %}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let matrix = w[p.groups + 2u * group.x];
    let place = w[p.groups + 2u * group.x + 1u];
    let stride = matrix.y;
    let chunks = matrix.z;
    let ty = matrix.w;
    let output_count = place.x;
    let lane = thread & 31u;
    let first = (thread >> 5u) / {{ parts }}u * {{ lane_outputs }}u;
    let row0 = group.y * {{ rows }}u;
    let lane_row0 = row0 + (thread >> 5u) % {{ parts }}u * {{ lane_rows }}u;
{% for r in range(lane_rows) %}
    let input{{ r }} = min(lane_row0 + {{ r }}u, p.rows - 1u);
{% if made %}
    let x_at{{ r }} = 4u * input{{ r }} * p.halves + place.y / 8u;
{{ weights.row_digits(r, "input" ~ r, "p.halves", "place.y") }}
{% else %}
    let x_at{{ r }} = input{{ r }} * p.x_stride + place.y;
{% endif %}
{% endfor %}
{% if made and has_floats %}
    let x_chunks = p.halves / 2u;
{% endif %}
{% if "iq2_xxs" in types %}
    load_points(thread, 256u);
    workgroupBarrier();
{% endif %}
{% if squares %}
    if thread < {{ 32 * rows }}u {
        let at = min(row0 + (thread >> 5u), p.rows - 1u) * p.x_stride + place.y;
        var sum = 0.0;
        var i = lane;
        while i < chunks * 8u {
            let v = x[at + i];
            sum = fma(v.w, v.w, fma(v.z, v.z, fma(v.y, v.y, fma(v.x, v.x, sum))));
            i += 32u;
        }
        squares[thread] = sum;
    }
{% endif %}
{% for n in range(lane_outputs) %}
    let at{{ n }} = matrix.x + min(first + {{ n }}u, output_count - 1u) * stride;
{% for r in range(lane_rows) %}
    var acc{{ n }}_{{ r }} = 0.0;
{% endfor %}
{% endfor %}
{% for type in types %}
    {% if not loop.first %}else {% endif %}{% if not loop.last %}if ty == {{ type_ids[type] }}u {% endif %}{
{% for n0 in range(0, lane_outputs, 4) %}
{% set of = namespace(list=[]) %}
{% for n in range(n0, [n0 + 4, lane_outputs] | min) %}
{% set of.list = of.list + [["at" ~ n, type, "acc" ~ n]] %}
{% endfor %}
{% call(r, i) weights.products(of.list, "w", lane_rows, tile, 256, digits, made) %}x[{{ "x_at" ~ r }} + {{ i }}]{% if norm and not made %} * bitcast<vec4<f32>>(w[p.norm + {{ i }}]){% endif %}{% endcall %}
{% endfor %}
    }
{% endfor %}
{% for n0 in range(0, lane_outputs, together) %}
{% for r0 in range(0, lane_rows, at_once) %}
{% for n in range(n0, n0 + together) %}
{% for r in range(r0, r0 + at_once) %}
    partial[(((thread >> 5u) * {{ together }}u + {{ n - n0 }}u) * {{ at_once }}u + {{ r - r0 }}u) * 32u + lane] = acc{{ n }}_{{ r }};
{% endfor %}
{% endfor %}
    reduce(thread);
    if thread < {{ values }}u {
        let of_group = thread / {{ at_once }}u;
        let lanes = of_group / {{ together }}u;
        let output = lanes / {{ parts }}u * {{ lane_outputs }}u + {{ n0 }}u + of_group % {{ together }}u;
        let row = lanes % {{ parts }}u * {{ lane_rows }}u + {{ r0 }}u + thread % {{ at_once }}u;
        if output < output_count && row0 + row < p.rows {
{% if squares %}
            var sum = 0.0;
            var i = 0u;
            while i < 32u {
                sum += squares[row * 32u + i];
                i += 1u;
            }
            let scale = 1.0 / sqrt(sum / f32(chunks * 32u) + p.epsilon);
{% elif norm %}
            let scale = bitcast<f32>(digits[(row0 + row + 1u) * (3u * p.halves + 1u) - 1u].x);
{% endif %}
            y[(row0 + row) * p.y_stride + place.z + output] = totals[thread]{% if norm %} * scale{% endif %};
        }
    }
{% endfor %}
{% endfor %}
}
