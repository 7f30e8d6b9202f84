{# Attention of four heads of a row over 64 of its keys, which are values as well (§2.3): unnormalised sums, with the largest
   score and the sum of weights, for `combine`. Keys are the window's rows, then the compressed rows, ascending; they are cut
   into pieces of 64 by their place in that list, whatever else is in the pass.

   head_dim, rope, plain, heads. Workgroups: heads / 4, pieces, rows. -#}
{% import "functions.wgsl" as functions %}
{% import "rows.wgsl" as rows %}
{% set nope = head_dim - rope %}
{% set vecs = head_dim // 4 %}
struct Params {
    q_stride: u32,
    row0: u32,
    // Position of row 0 of the run, which is row `run0` of the pass.
    start: u32,
    run0: u32,
    window: u32,
    ring: u32,
    ring_rows: u32,
    // Compressed rows: where they begin, tokens for one (0 without), most that are used.
    compressed: u32,
    ratio: u32,
    top_k: u32,
    // First position that is among the pass's own rows.
    fresh: u32,
    pieces: u32,
    scale: f32,
}

@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> session: array<u32>;
@group(0) @binding(2) var<storage, read> fresh: array<u32>;
@group(0) @binding(3) var<storage, read> chosen: array<u32>;
@group(0) @binding(4) var<storage, read_write> partial: array<f32>;
var<immediate> p: Params;

var<workgroup> queries: array<vec4<f32>, {{ 4 * vecs }}>;
// Where each key begins; the highest bit says that it is one of the pass's own rows.
var<workgroup> places: array<u32, 64>;
// Halves of the products of 4 heads with 64 keys: [half, head, key].
var<workgroup> dots: array<f32, 512>;
// [head, key / 4].
var<workgroup> scores: array<vec4<f32>, 64>;
// Of each key, for the 4 heads.
var<workgroup> weights: array<array<f32, 4>, 64>;

{{ functions.exponential() }}
{{ rows.scales() }}
{{ rows.fp8() }}
{{ rows.key_loader("session", plain, nope) }}
{{ rows.key_loader("fresh", plain, nope) }}

fn key(place: u32, v: u32) -> vec4<f32> {
    if (place & 0x80000000u) != 0u {
        return key_fresh(place & 0x7fffffffu, v);
    }
    return key_session(place, v);
}

fn place_of(number: u32, near: u32, position: u32, row: u32, listed: bool) -> u32 {
    if number < near {
        let at = position + 1u - near + number;
        if at >= p.fresh {
            return 0x80000000u | ((at - p.fresh) * {{ row_words }}u);
        }
        return p.ring + (at % p.ring_rows) * {{ row_words }}u;
    }
    var which = number - near;
    if listed {
        which = chosen[row * p.top_k + which];
    }
    return p.compressed + which * {{ row_words }}u;
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = p.row0 + group.z;
    let position = p.start + row - p.run0;
    let near = min(position + 1u, p.window);
    var far = 0u;
    var listed = false;
    if p.ratio > 0u {
        far = (position + 1u) / p.ratio;
        listed = far > p.top_k;
        far = min(far, p.top_k);
    }
    let count = near + far;
    let begin = group.y * 64u;
    if begin >= count {
        return;
    }
    let keys = min(64u, count - begin);
    var i = thread;
    while i < {{ 4 * vecs }}u {
        queries[i] = q[row * p.q_stride + group.x * {{ 4 * vecs }}u + i];
        i += 128u;
    }
    if thread < 64u {
        places[thread] = place_of(begin + min(thread, keys - 1u), near, position, row, listed);
    }
    workgroupBarrier();
    // A key for each two threads, which all heads are multiplied with while it is unpacked. Threads that work at the same time
    // read the same queries.
    {
        let place = places[thread & 63u];
        var v = thread >> 6u;
{% for h in range(4) %}
        var dot{{ h }} = vec4<f32>(0.0);
{% endfor %}
        while v < {{ vecs }}u {
            let values = key(place, v);
{% for h in range(4) %}
            dot{{ h }} = fma(queries[{{ h * vecs }}u + v], values, dot{{ h }});
{% endfor %}
            v += 2u;
        }
        let to = (thread >> 6u) * 256u + (thread & 63u);
{% for h in range(4) %}
        dots[to + {{ h * 64 }}u] = (dot{{ h }}.x + dot{{ h }}.y) + (dot{{ h }}.z + dot{{ h }}.w);
{% endfor %}
    }
    workgroupBarrier();
    if thread < 64u {
        // Of head thread / 16, four keys.
        let at = (thread >> 4u) * 64u + (thread & 15u) * 4u;
        let sum = vec4<f32>(dots[at], dots[at + 1u], dots[at + 2u], dots[at + 3u])
            + vec4<f32>(dots[at + 256u], dots[at + 257u], dots[at + 258u], dots[at + 259u]);
        let number = vec4<u32>((thread & 15u) * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
        scores[thread] = select(vec4<f32>(-3.0e38), sum * p.scale, number < vec4<u32>(keys));
    }
    workgroupBarrier();
    // Of head thread / 32, two keys.
    let head = thread >> 5u;
    var high = scores[head * 16u];
    i = 1u;
    while i < 16u {
        high = max(high, scores[head * 16u + i]);
        i += 1u;
    }
    let most = max(max(high.x, high.y), max(high.z, high.w));
    i = 2u * (thread & 31u);
    while i < 2u * (thread & 31u) + 2u {
        weights[i][head] = exp_of(scores[head * 16u + (i >> 2u)][i & 3u] - most);
        i += 1u;
    }
    workgroupBarrier();
{% for h in range(4) %}
    var out{{ h }} = vec4<f32>(0.0);
{% endfor %}
    let mine = min(thread, {{ vecs - 1 }}u);
    var k = 0u;
    while k < keys {
        let values = key(places[k], mine);
{% for h in range(4) %}
        out{{ h }} = fma(vec4<f32>(weights[k][{{ h }}]), values, out{{ h }});
{% endfor %}
        k += 1u;
    }
    let to = ((group.z * p.pieces + group.y) * {{ heads }}u + group.x * 4u) * {{ head_dim + 2 }}u;
    if thread < {{ vecs }}u {
{% for h in range(4) %}
{% for i in range(4) %}
        partial[to + {{ h * (head_dim + 2) + i }}u + 4u * thread] = out{{ h }}[{{ i }}];
{% endfor %}
{% endfor %}
    }
    if (thread & 31u) == 0u {
        var sum = 0.0;
        k = 0u;
        while k < keys {
            sum += weights[k][head];
            k += 1u;
        }
        partial[to + head * {{ head_dim + 2 }}u + {{ head_dim }}u] = most;
        partial[to + head * {{ head_dim + 2 }}u + {{ head_dim + 1 }}u] = sum;
    }
}
