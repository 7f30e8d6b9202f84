{# Flags a row of which a value is infinite or no number. Workgroups: width / 4,096, rows. -#}
{% import "functions.wgsl" as functions %}
struct Params {
    // First value of the first row, and values of a row.
    at: u32,
    width: u32,
    flag: u32,
}

@group(0) @binding(0) var<storage, read> values: array<f32>;
@group(0) @binding(1) var<storage, read_write> flags: array<u32>;
var<immediate> p: Params;

{{ functions.finite() }}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let first = p.at + group.y * p.width;
    let begin = group.x * 4096u + thread;
    var all = true;
{% for i in range(16) %}
    let v{{ i }} = values[first + min(begin + {{ 256 * i }}u, p.width - 1u)];
{% endfor %}
{% for i in range(16) %}
    all = all && is_finite(v{{ i }});
{% endfor %}
    if !all {
        flags[p.flag + group.y] = 1u;
    }
}
