{# Flags a row of which a value is infinite or no number. Workgroups: 1, rows. -#}
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
    var all = true;
    var i = thread;
    while i < p.width {
        all = all && is_finite(values[p.at + group.y * p.width + i]);
        i += 256u;
    }
    if !all {
        flags[p.flag + group.y] = 1u;
    }
}
