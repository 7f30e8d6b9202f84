{# Attention of a head from its pieces, in their order; the sink takes part in the denominator only; rotated back (§2.3).

   head_dim, rope, heads; digits: whether few rows are multiplied as integers: then the row is laid out for lanes, too, if that is asked
   for. Workgroups: heads, rows. -#}
{% import "weights.wgsl" as weights with context %}
{% import "functions.wgsl" as functions %}
{% import "runs.wgsl" as runs %}
struct Params {
{{ runs.params() }}
    first: u32,
    window: u32,
    ratio: u32,
    top_k: u32,
    pieces: u32,
    // Where the sinks are, f32.
    sinks: u32,
    rotations: u32,
    // Whether to lay the row out for lanes.
    lay_out: u32,
}

@group(0) @binding(0) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> tables: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read> partial: array<f32>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;
{% if digits %}
@group(0) @binding(4) var<storage, read_write> digits: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read_write> transposed: array<vec4<f32>>;
{% endif %}
var<immediate> p: Params;

// Of up to 256 pieces: the largest scores, then weights; and sums.
var<workgroup> shares: array<f32, 256>;
var<workgroup> sums: array<f32, 256>;
{% if digits %}
var<workgroup> laid_out: array<f32, {{ head_dim }}>;
{% endif %}

{{ runs.of_rows() }}
{{ functions.exponential() }}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = p.first + group.y;
    let position = position_of(run_of(row), row);
    var count = min(position + 1u, p.window);
    if p.ratio > 0u {
        count += min((position + 1u) / p.ratio, p.top_k);
    }
    let pieces = (count + 31u) / 32u;
    let first = (group.y * p.pieces * {{ heads }}u + group.x) * {{ head_dim + 2 }}u;
    let sink = bitcast<f32>(w[p.sinks + (group.x >> 2u)][group.x & 3u]);
    var most = sink;
    var i = thread;
    while i < pieces {
        most = max(most, partial[first + i * {{ heads * (head_dim + 2) }}u + {{ head_dim }}u]);
        i += 256u;
    }
    shares[thread] = most;
    workgroupBarrier();
    i = 0u;
    while i < min(pieces, 256u) {
        most = max(most, shares[i]);
        i += 1u;
    }
    var sum = 0.0;
    var value = vec2<f32>(0.0);
    let mine = min(2u * thread, {{ head_dim - 2 }}u);
    var begin = 0u;
    while begin < pieces {
        workgroupBarrier();
        let at = first + min(begin + thread, pieces - 1u) * {{ heads * (head_dim + 2) }}u + {{ head_dim }}u;
        shares[thread] = exp_of(partial[at] - most);
        sums[thread] = partial[at + 1u];
        workgroupBarrier();
        let end = min(256u, pieces - begin);
        i = 0u;
        while i < end {
            // Eight at once, so that they come together; what is past the last is left out.
{% for j in range(8) %}
            let at{{ j }} = first + min(begin + i + {{ j }}u, pieces - 1u) * {{ heads * (head_dim + 2) }}u + mine;
            let v{{ j }} = vec2<f32>(partial[at{{ j }}], partial[at{{ j }} + 1u]);
{% endfor %}
{% for j in range(8) %}
            if i + {{ j }}u < end {
                value = fma(v{{ j }}, vec2<f32>(shares[i + {{ j }}u]), value);
                sum = fma(sums[i + {{ j }}u], shares[i + {{ j }}u], sum);
            }
{% endfor %}
            i += 8u;
        }
        begin += 256u;
    }
    value = value / (sum + exp_of(sink - most));
    if thread >= {{ (head_dim - rope) // 2 }}u && thread < {{ head_dim // 2 }}u {
        let turn = bitcast<vec2<f32>>(tables[p.rotations + row * {{ rope // 2 }}u + thread - {{ (head_dim - rope) // 2 }}u]);
        value = vec2<f32>(fma(value.x, turn.x, value.y * turn.y), fma(value.y, turn.x, -(value.x * turn.y)));
    }
    if thread < {{ head_dim // 2 }}u {
        let to = (row * {{ heads }}u + group.x) * {{ head_dim }}u + 2u * thread;
        out[to] = value.x;
        out[to + 1u] = value.y;
{% if digits %}
        laid_out[2u * thread] = value.x;
        laid_out[2u * thread + 1u] = value.y;
{% endif %}
    }
{% if digits %}
    workgroupBarrier();
    if thread < {{ head_dim // 16 }}u && p.lay_out != 0u {
        let half = group.x * {{ head_dim // 16 }}u + thread;
{% for i in range(4) %}
        let v{{ i }} = vec4<f32>({% for j in range(4) %}laid_out[16u * thread + {{ 4 * i + j }}u]{% if j < 3 %}, {% endif %}{% endfor %});
        transposed[{{ weights.transposed_at("row", (heads * head_dim // 16) ~ "u", "4u * half + " ~ i ~ "u") }}] = v{{ i }};
{% endfor %}
{{ weights.lay_out_half("row", (heads * head_dim // 16) ~ "u", "half") }}
    }
{% endif %}
}
