{# Embedding rows into all streams (§2.0). streams: S. Workgroups: D / 256, rows. -#}
struct Params {
    d: u32,
}

@group(0) @binding(0) var<storage, read> embedded: array<f32>;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;
var<immediate> p: Params;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x < p.d {
{% for s in range(streams) %}
        x[(id.y * {{ streams }}u + {{ s }}u) * p.d + id.x] = embedded[id.y * p.d + id.x];
{% endfor %}
    }
}
