{# Attention of a head from its pieces, in their order; the sink takes part in the denominator only; rotated back (§2.3).

   head_dim, rope, heads. Workgroups: heads, rows. -#}
{% import "functions.wgsl" as functions %}
struct Params {
    row0: u32,
    start: u32,
    run0: u32,
    window: u32,
    ratio: u32,
    top_k: u32,
    pieces: u32,
    // Where the sinks are, f32.
    sinks: u32,
    rotations: u32,
}

@group(0) @binding(0) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> tables: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read> partial: array<f32>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;
var<immediate> p: Params;

{{ functions.exponential() }}

@compute @workgroup_size({{ head_dim // 2 }})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = p.row0 + group.y;
    let position = p.start + row - p.run0;
    var count = min(position + 1u, p.window);
    if p.ratio > 0u {
        count += min((position + 1u) / p.ratio, p.top_k);
    }
    let pieces = (count + 63u) / 64u;
    let sink = bitcast<f32>(w[p.sinks + (group.x >> 2u)][group.x & 3u]);
    var most = sink;
    var i = 0u;
    while i < pieces {
        most = max(most, partial[((group.y * p.pieces + i) * {{ heads }}u + group.x) * {{ head_dim + 2 }}u + {{ head_dim }}u]);
        i += 1u;
    }
    var sum = 0.0;
    var value = vec2<f32>(0.0);
    i = 0u;
    while i < pieces {
        let at = ((group.y * p.pieces + i) * {{ heads }}u + group.x) * {{ head_dim + 2 }}u;
        let share = exp_of(partial[at + {{ head_dim }}u] - most);
        sum = fma(partial[at + {{ head_dim + 1 }}u], share, sum);
        value = fma(vec2<f32>(partial[at + 2u * thread], partial[at + 2u * thread + 1u]), vec2<f32>(share), value);
        i += 1u;
    }
    value = value / (sum + exp_of(sink - most));
    if thread >= {{ (head_dim - rope) // 2 }}u {
        let turn = tables[p.rotations + row * {{ rope // 2 }}u + thread - {{ (head_dim - rope) // 2 }}u];
        value = vec2<f32>(fma(value.x, turn.x, value.y * turn.y), fma(value.y, turn.x, -(value.x * turn.y)));
    }
    let to = (row * {{ heads }}u + group.x) * {{ head_dim }}u + 2u * thread;
    out[to] = value.x;
    out[to + 1u] = value.y;
}
