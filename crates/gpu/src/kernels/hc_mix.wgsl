{# Ends a sub-layer and begins the next: its output goes back into the streams (§2.2), and of the new streams the projections
   of the next hyper-connection and the sum of squares are summed over 64 of the D values (§2.1, steps 1 and 2).

   streams: S; outputs: rows of the projection; post: whether a sub-layer ended. Workgroups: D / 64, rows. -#}
struct Params {
    d: u32,
    // Outputs of the sub-layer that are added, `[rows, parts, D]`.
    parts: u32,
    // Where the projection is, f32.
    function: u32,
}

@group(0) @binding(0) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> output: array<f32>;
@group(0) @binding(2) var<storage, read> weights: array<f32>;
@group(0) @binding(3) var<storage, read_write> x: array<f32>;
@group(0) @binding(4) var<storage, read_write> sums: array<f32>;
var<immediate> p: Params;

var<workgroup> old: array<f32, {{ streams * 64 }}>;
var<workgroup> fresh: array<f32, {{ streams * 64 }}>;
var<workgroup> partial: array<f32, {{ (outputs + 1) * 64 }}>;
var<workgroup> eighths: array<f32, {{ (outputs + 1) * 8 }}>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let lane = thread & 63u;
    let quarter = thread >> 6u;
    let d = group.x * 64u + lane;
    let row = group.y;
    // Everything that is read is asked for before anything is waited for.
{% for i in range((outputs + 3) // 4) %}
{% for s in range(streams) %}
    let at{{ i }}_{{ s }} = (min({{ 4 * i }}u + quarter, {{ outputs - 1 }}u) * {{ streams }}u + {{ s }}u) * p.d + d;
    let f{{ i }}_{{ s }} = bitcast<f32>(w[p.function + (at{{ i }}_{{ s }} >> 2u)][at{{ i }}_{{ s }} & 3u]);
{% endfor %}
{% endfor %}
    var s = quarter;
    while s < {{ streams }}u {
        old[s * 64u + lane] = x[(row * {{ streams }}u + s) * p.d + d];
        s += 4u;
    }
{% if post %}
    var y = 0.0;
    var part = 0u;
    while part < p.parts {
{% for i in range(8) %}
        let y{{ i }} = output[(row * p.parts + min(part + {{ i }}u, p.parts - 1u)) * p.d + d];
{% endfor %}
{% for i in range(8) %}
        y += select(0.0, y{{ i }}, part + {{ i }}u < p.parts);
{% endfor %}
        part += 8u;
    }
    workgroupBarrier();
    let at = row * {{ streams + streams * streams }}u;
    s = quarter;
    while s < {{ streams }}u {
        var value = weights[at + s] * y;
{% for j in range(streams) %}
        value = fma(weights[at + {{ streams + j * streams }}u + s], old[{{ j * 64 }}u + lane], value);
{% endfor %}
        fresh[s * 64u + lane] = value;
        x[(row * {{ streams }}u + s) * p.d + d] = value;
        s += 4u;
    }
{% set now = "fresh" %}
{% else %}
{% set now = "old" %}
{% endif %}
    workgroupBarrier();
{% for i in range((outputs + 3) // 4) %}
    if {{ 4 * i }}u + quarter < {{ outputs }}u {
        var sum = 0.0;
{% for s in range(streams) %}
        sum = fma(f{{ i }}_{{ s }}, {{ now }}[{{ s * 64 }}u + lane], sum);
{% endfor %}
        partial[({{ 4 * i }}u + quarter) * 64u + lane] = sum;
    }
{% endfor %}
    if quarter == 3u {
        var square = 0.0;
{% for s in range(streams) %}
        square = fma({{ now }}[{{ s * 64 }}u + lane], {{ now }}[{{ s * 64 }}u + lane], square);
{% endfor %}
        partial[{{ outputs * 64 }}u + lane] = square;
    }
    workgroupBarrier();
    var i = thread;
    while i < {{ (outputs + 1) * 8 }}u {
        let at = (i >> 3u) * 64u + (i & 7u);
        eighths[i] = ((partial[at] + partial[at + 8u]) + (partial[at + 16u] + partial[at + 24u]))
            + ((partial[at + 32u] + partial[at + 40u]) + (partial[at + 48u] + partial[at + 56u]));
        i += 256u;
    }
    workgroupBarrier();
    i = thread;
    while i < {{ outputs + 1 }}u {
        let at = i * 8u;
        sums[(row * groups.x + group.x) * {{ outputs + 1 }}u + i] =
            ((eighths[at] + eighths[at + 1u]) + (eighths[at + 2u] + eighths[at + 3u]))
            + ((eighths[at + 4u] + eighths[at + 5u]) + (eighths[at + 6u] + eighths[at + 7u]));
        i += 256u;
    }
}
