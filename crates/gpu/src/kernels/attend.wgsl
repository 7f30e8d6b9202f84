{# Attention of a few heads of a row over 32 of its keys, which are values as well (§2.3): unnormalised sums, with the largest
   score and the sum of weights, for `combine`. Keys are the window's rows, then the compressed rows, ascending; they are cut
   into pieces of 32 by their place in that list, whatever else is in the pass.

   head_dim, rope, plain, heads; row_words: of a key; together: heads of a workgroup, 4 or 8. Workgroups: heads / together,
   pieces, rows. -#}
{% import "functions.wgsl" as functions %}
{% import "rows.wgsl" as rows %}
{% import "runs.wgsl" as runs %}
{% set nope = head_dim - rope %}
{% set vecs = head_dim // 4 %}
{# Keys begin at odd words, so that threads with a key each meet no bank twice. #}
{%- set pitch = row_words + 1 - row_words % 2 %}
struct Params {
{{ runs.params() }}
    q_stride: u32,
    first: u32,
    window: u32,
    ring_rows: u32,
    // Compressed rows: where they begin, tokens for one (0 without), most that are used.
    compressed: u32,
    ratio: u32,
    top_k: u32,
    // First position that is among the pass's own rows, where they are apart: of one session.
    fresh: u32,
    pieces: u32,
    scale: f32,
}

@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> tables: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read> fresh: array<u32>;
@group(0) @binding(3) var<storage, read> chosen: array<u32>;
@group(0) @binding(4) var<storage, read_write> partial: array<f32>;
{{ runs.sessions(5, "read") }}
var<immediate> p: Params;

{% if not plain %}
// The keys as they are stored.
var<workgroup> rows: array<u32, {{ 32 * pitch }}>;
{% endif %}
// Where each key begins; the highest bit says that it is one of the pass's own rows.
var<workgroup> places: array<u32, 32>;
// Eighths of the products of heads with keys: [eighth, head, key].
var<workgroup> dots: array<f32, {{ 8 * together * 32 }}>;
// [key, head].
var<workgroup> weights: array<f32, {{ 32 * together }}>;

{{ runs.of_rows() }}
{{ functions.exponential() }}
{{ rows.scales() }}
{{ rows.fp8() }}
{% if plain %}
{% for s in range(states) %}
{{ rows.key_loader("session" ~ s, plain, nope) }}
{% endfor %}
{{ rows.key_loader("fresh", plain, nope) }}

// Values 4v..4v+3 of key `k`.
fn key(session: u32, k: u32, v: u32) -> vec4<f32> {
    let place = places[k];
    if (place & 0x80000000u) != 0u {
        return key_fresh(place & 0x7fffffffu, v);
    }
    var value = vec4<f32>(0.0);
{% call(memory) runs.with_session("session") %}
    value = key_{{ memory }}(place, v);
{% endcall %}
    return value;
}
{% else %}
{{ rows.key_loader("rows", plain, nope) }}

// Values 4v..4v+3 of key `k`.
fn key(session: u32, k: u32, v: u32) -> vec4<f32> {
    return key_rows(k * {{ pitch }}u, v);
}
{% endif %}

fn place_of(run: Run, number: u32, near: u32, position: u32, row: u32, listed: bool) -> u32 {
    if number < near {
        let at = position + 1u - near + number;
        if at >= p.fresh {
            return 0x80000000u | ((run.row0 + at - p.fresh) * {{ row_words }}u);
        }
        return run.ring + (at % p.ring_rows) * {{ row_words }}u;
    }
    var which = number - near;
    if listed {
        which = chosen[row * p.top_k + which];
    }
    return p.compressed + which * {{ row_words }}u;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = p.first + group.z;
    let run = run_of(row);
    let position = position_of(run, row);
    let near = min(position + 1u, p.window);
    var far = 0u;
    var listed = false;
    if p.ratio > 0u {
        far = (position + 1u) / p.ratio;
        listed = far > p.top_k;
        far = min(far, p.top_k);
    }
    let count = near + far;
    let begin = group.y * 32u;
    if begin >= count {
        return;
    }
    let keys = min(32u, count - begin);
    if thread < 32u {
        places[thread] = place_of(run, begin + min(thread, keys - 1u), near, position, row, listed);
    }
    workgroupBarrier();
    let lane = thread & 31u;
    let part = thread >> 5u;
{% if not plain %}
    // Everything is asked for before anything is waited for, where no key is one of the pass's own rows.
    if position < p.fresh {
{% call(session) runs.with_session("run.session") %}
{% for n in range((32 * row_words + 255) // 256) %}
        let i{{ n }} = min(thread + {{ 256 * n }}u, {{ 32 * row_words - 1 }}u);
        let word{{ n }} = {{ session }}[places[i{{ n }} / {{ row_words }}u] + i{{ n }} % {{ row_words }}u];
{% endfor %}
{% for n in range((32 * row_words + 255) // 256) %}
        rows[i{{ n }} / {{ row_words }}u * {{ pitch }}u + i{{ n }} % {{ row_words }}u] = word{{ n }};
{% endfor %}
{% endcall %}
{% if states == 1 %}
    } else {
        var i = thread;
        while i < {{ 32 * row_words }}u {
            let k = i / {{ row_words }}u;
            let place = places[k];
            let from_ = (place & 0x7fffffffu) + i - k * {{ row_words }}u;
            var word = 0u;
            if (place & 0x80000000u) != 0u {
                word = fresh[from_];
            } else {
                word = session0[from_];
            }
            rows[k * {{ pitch }}u + i - k * {{ row_words }}u] = word;
            i += 256u;
        }
{% endif %}
    }
    workgroupBarrier();
{% endif %}
    // A key for each lane, and an eighth of its values for each 32 threads, which all read the same of the queries.
    let q_at = row * p.q_stride + group.x * {{ together * vecs }}u;
{% for h in range(together) %}
    var dot{{ h }} = vec4<f32>(0.0);
{% endfor %}
    var v = part * {{ (vecs + 7) // 8 }}u;
    let end = min(v + {{ (vecs + 7) // 8 }}u, {{ vecs }}u);
    while v < end {
        let values = key(run.session, lane, v);
{% for h in range(together) %}
        dot{{ h }} = fma(q[q_at + {{ h * vecs }}u + v], values, dot{{ h }});
{% endfor %}
        v += 1u;
    }
{% for h in range(together) %}
    dots[part * {{ together * 32 }}u + {{ h * 32 }}u + lane] = (dot{{ h }}.x + dot{{ h }}.y) + (dot{{ h }}.z + dot{{ h }}.w);
{% endfor %}
    workgroupBarrier();
    // A head for each 32 threads, of each key.
    var score = -3.0e38;
    if part < {{ together }}u {
        let at = part * 32u + lane;
{% for i in range(8) %}
        let d{{ i }} = dots[at + {{ i * together * 32 }}u];
{% endfor %}
        let sum = ((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7));
        score = select(score, sum * p.scale, lane < keys);
    }
    workgroupBarrier();
    if part < {{ together }}u {
        dots[part * 32u + lane] = score;
    }
    workgroupBarrier();
    let to = ((group.z * p.pieces + group.y) * {{ heads }}u + group.x * {{ together }}u) * {{ head_dim + 2 }}u;
    if part < {{ together }}u {
        var most = dots[part * 32u];
        var k = 1u;
        while k < 32u {
            most = max(most, dots[part * 32u + k]);
            k += 1u;
        }
        weights[lane * {{ together }}u + part] = exp_of(score - most);
        if lane == 0u {
            partial[to + part * {{ head_dim + 2 }}u + {{ head_dim }}u] = most;
        }
    }
    workgroupBarrier();
    if thread < {{ together }}u {
        var sum = 0.0;
        var k = 0u;
        while k < keys {
            sum += weights[k * {{ together }}u + thread];
            k += 1u;
        }
        partial[to + thread * {{ head_dim + 2 }}u + {{ head_dim + 1 }}u] = sum;
    }
    // Four values for each thread, and half of the heads.
    v = thread & 127u;
    let first = (thread >> 7u) * {{ together // 2 }}u;
    while v < {{ vecs }}u {
{% for h in range(together // 2) %}
        var out{{ h }} = vec4<f32>(0.0);
{% endfor %}
        var k = 0u;
        while k < keys {
            let values = key(run.session, k, v);
{% for h in range(together // 2) %}
            out{{ h }} = fma(vec4<f32>(weights[k * {{ together }}u + first + {{ h }}u]), values, out{{ h }});
{% endfor %}
            k += 1u;
        }
{% for h in range(together // 2) %}
{% for i in range(4) %}
        partial[to + (first + {{ h }}u) * {{ head_dim + 2 }}u + 4u * v + {{ i }}u] = out{{ h }}[{{ i }}];
{% endfor %}
{% endfor %}
        v += 128u;
    }
}
