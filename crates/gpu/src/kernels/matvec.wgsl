{# y[r] = W x[r] for a list of matrices (jobs) at once and a few rows: each output is one dot product, summed by 32 lanes in one
   order whatever the number of rows.

   types: those of the matrices; rows: activation rows together; norm: whether x is divided by its RMS and weighed first. -#}
{% import "weights.wgsl" as weights with context %}
{% set outputs = 4 %}
{% set values = 4 * outputs * rows %}
{# Chunks of inputs in workgroup memory at a time; for more than four rows there is no room. #}
{%- set tile = 128 if rows == 1 else 32 %}
{% set is_staged = rows <= 4 %}
{{ weights.chunk_struct() }}

struct Params {
    // Where the jobs are, and how many.
    jobs: u32,
    job_count: u32,
    rows: u32,
    // Of a row, in vec4s.
    x_stride: u32,
    // Of a row, in floats.
    y_stride: u32,
    // Where the norm's weights are, and its epsilon.
    norm: u32,
    epsilon: f32,
}

@group(0) @binding(0) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
{% if "iq2_xxs" in types %}
@group(0) @binding(3) var<storage, read> code_book: array<vec2<u32>>;
{% endif %}
var<immediate> p: Params;

{{ weights.helpers("w") }}
{{ weights.type_functions(types) }}
{% for ty in types %}
{{ weights.loader(ty, "w") }}
{% endfor %}
{{ weights.reduction(values, 128) }}
{% if is_staged %}
{{ weights.staged(rows, tile) }}
{% endif %}
{% if norm %}
var<workgroup> inverse: array<f32, {{ rows }}>;
{% endif %}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    // The job of this workgroup: the last that begins at or before it.
    var j = p.job_count - 1u;
    while j > 0u && w[p.jobs + 2u * j + 1u].x > group.x {
        j -= 1u;
    }
    let matrix = w[p.jobs + 2u * j];
    let place = w[p.jobs + 2u * j + 1u];
    let base = matrix.x;
    let stride = matrix.y;
    let chunks = matrix.z;
    let ty = matrix.w;
    let output_count = place.y;
    let lane = thread & 31u;
    let first = (group.x - place.x) * {{ 4 * outputs }}u + (thread >> 5u) * {{ outputs }}u;
    let row0 = group.y * {{ rows }}u;
{% for r in range(rows) %}
    let x_at{{ r }} = min(row0 + {{ r }}u, p.rows - 1u) * p.x_stride + place.z;
{% endfor %}
{% if "iq2_xxs" in types %}
    load_points(thread, 128u);
    workgroupBarrier();
{% endif %}
{% if norm %}
    // Each quarter of the threads takes rows of its own.
    {
        var squares: f32;
{% for r in range(rows) %}
        if (thread >> 5u) == {{ r % 4 }}u {
            squares = 0.0;
            var i = lane;
            while i < chunks * 8u {
                let v = x[x_at{{ r }} + i];
                squares = fma(v.w, v.w, fma(v.z, v.z, fma(v.y, v.y, fma(v.x, v.x, squares))));
                i += 32u;
            }
            partial[{{ r }}u * 32u + lane] = squares;
        }
{% endfor %}
        reduce(thread);
        if thread < {{ rows }}u {
            inverse[thread] = 1.0 / sqrt(totals[thread] / f32(chunks * 32u) + p.epsilon);
        }
        workgroupBarrier();
    }
{% endif %}
{% for n in range(outputs) %}
    let at{{ n }} = base + min(first + {{ n }}u, output_count - 1u) * stride;
{% for r in range(rows) %}
    var acc{{ n }}_{{ r }} = 0.0;
{% endfor %}
{% endfor %}
    var first_chunk = 0u;
    while first_chunk < chunks {
{% if is_staged %}
{% call(r, i) weights.stage(rows, tile) %}
{% if norm %}x[{{ "x_at" ~ r }} + {{ i }}] * inverse[{{ r }}] * bitcast<vec4<f32>>(w[p.norm + {{ i }}]){% else %}x[{{ "x_at" ~ r }} + {{ i }}]{% endif %}
{%- endcall %}
{% endif %}
{% for ty in types %}
        {% if not loop.first %}else {% endif %}{% if not loop.last %}if ty == {{ type_ids[ty] }}u {% endif %}{
            var c = lane;
            while {% if is_staged %}c < {{ tile }}u && {% endif %}first_chunk + c < chunks {
{% if rows > 1 %}
{% for n in range(outputs) %}
                let k{{ n }} = load_{{ ty }}_w(at{{ n }}, chunks, first_chunk + c);
{% endfor %}
{% endif %}
{% for r in range(rows) %}
                {
{% if is_staged %}
                {{ weights.inputs(r, tile) }}
{% else %}
{% for i in range(8) %}
                    let x{{ i }} = x[x_at{{ r }} + 8u * c + {{ i }}u]{% if norm %} * inverse[{{ r }}] * bitcast<vec4<f32>>(w[p.norm + 8u * c + {{ i }}u]){% endif %};
{% endfor %}
{% endif %}
{% for n in range(outputs) %}
{% if rows > 1 %}
                    {{ weights.dot(ty, "acc" ~ n ~ "_" ~ r, "k" ~ n) }}
{% else %}
                    {
                        let k{{ n }} = load_{{ ty }}_w(at{{ n }}, chunks, first_chunk + c);
                        {{ weights.dot(ty, "acc" ~ n ~ "_" ~ r, "k" ~ n) }}
                    }
{% endif %}
{% endfor %}
                }
{% endfor %}
                c += 32u;
            }
        }
{% endfor %}
        first_chunk += {% if is_staged %}{{ tile }}u{% else %}chunks{% endif %};
    }
{% for n in range(outputs) %}
{% for r in range(rows) %}
    partial[(((thread >> 5u) * {{ outputs }}u + {{ n }}u) * {{ rows }}u + {{ r }}u) * 32u + lane] = acc{{ n }}_{{ r }};
{% endfor %}
{% endfor %}
    reduce(thread);
    if thread < {{ values }}u {
        let output = (group.x - place.x) * {{ 4 * outputs }}u + thread / {{ rows }}u;
        let row = row0 + thread % {{ rows }}u;
        if output < output_count && row < p.rows {
            y[row * p.y_stride + place.w + output] = totals[thread];
        }
    }
}
