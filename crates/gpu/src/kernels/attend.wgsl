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
var<workgroup> keys: array<vec4<f32>, {{ 8 * vecs }}>;
var<workgroup> dots: array<f32, 128>;
var<workgroup> scores: array<f32, 32>;

{{ functions.exponential() }}
{{ rows.scales() }}
{{ rows.fp8() }}
{{ rows.key_loader("session", plain, nope) }}
{{ rows.key_loader("fresh", plain, nope) }}

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
    let end = min(begin + 64u, count);
    var i = thread;
    while i < {{ 4 * vecs }}u {
        queries[i] = q[row * p.q_stride + group.x * {{ 4 * vecs }}u + i];
        i += 128u;
    }
{% for h in range(4) %}
    var most{{ h }} = -3.0e38;
    var sum{{ h }} = 0.0;
    var out{{ h }} = vec4<f32>(0.0);
{% endfor %}
    let mine = min(thread, {{ vecs - 1 }}u);
    var at = begin;
    while at < end {
        workgroupBarrier();
        var k = 0u;
        while k < 8u {
            let number = min(at + k, end - 1u);
            if number < near {
                let where_ = position + 1u - near + number;
                if where_ >= p.fresh {
                    keys[k * {{ vecs }}u + mine] = key_fresh((where_ - p.fresh) * {{ row_words }}u, mine);
                } else {
                    keys[k * {{ vecs }}u + mine] = key_session(p.ring + (where_ % p.ring_rows) * {{ row_words }}u, mine);
                }
            } else {
                var which = number - near;
                if listed {
                    which = chosen[row * p.top_k + which];
                }
                keys[k * {{ vecs }}u + mine] = key_session(p.compressed + which * {{ row_words }}u, mine);
            }
            k += 1u;
        }
        workgroupBarrier();
        // Four threads to each of 8 · 4 products.
        {
            let head = (thread >> 2u) & 3u;
            let key = thread >> 4u;
            var sum = vec4<f32>(0.0);
            var v = thread & 3u;
            while v < {{ vecs }}u {
                sum = fma(queries[head * {{ vecs }}u + v], keys[key * {{ vecs }}u + v], sum);
                v += 4u;
            }
            dots[thread] = (sum.x + sum.y) + (sum.z + sum.w);
        }
        workgroupBarrier();
        if thread < 32u {
            // Of key thread / 4, head thread % 4.
            let d = thread * 4u;
            let score = ((dots[d] + dots[d + 1u]) + (dots[d + 2u] + dots[d + 3u])) * p.scale;
            scores[(thread & 3u) * 8u + (thread >> 2u)] = select(-3.0e38, score, at + (thread >> 2u) < end);
        }
        workgroupBarrier();
{% for h in range(4) %}
        {
            let s = {{ h * 8 }}u;
            let high = max(max(max(scores[s], scores[s + 1u]), max(scores[s + 2u], scores[s + 3u])),
                max(max(scores[s + 4u], scores[s + 5u]), max(scores[s + 6u], scores[s + 7u])));
            let now = max(most{{ h }}, high);
            let fade = exp_of(most{{ h }} - now);
            sum{{ h }} *= fade;
            out{{ h }} *= fade;
            most{{ h }} = now;
        }
{% endfor %}
        // Weights, one a thread.
        if thread < 32u {
            let h = thread >> 3u;
            var most = most0;
            if h == 1u { most = most1; }
            if h == 2u { most = most2; }
            if h == 3u { most = most3; }
            dots[thread] = exp_of(scores[thread] - most);
        }
        workgroupBarrier();
        k = 0u;
        while k < 8u {
            let key = keys[k * {{ vecs }}u + mine];
{% for h in range(4) %}
            {
                let weight = dots[{{ h * 8 }}u + k];
                sum{{ h }} += weight;
                out{{ h }} = fma(vec4<f32>(weight), key, out{{ h }});
            }
{% endfor %}
            k += 1u;
        }
        at += 8u;
    }
{% for h in range(4) %}
    {
        let to = ((group.z * p.pieces + group.y) * {{ heads }}u + group.x * 4u + {{ h }}u) * {{ head_dim + 2 }}u;
        if thread < {{ vecs }}u {
            partial[to + 4u * thread] = out{{ h }}.x;
            partial[to + 4u * thread + 1u] = out{{ h }}.y;
            partial[to + 4u * thread + 2u] = out{{ h }}.z;
            partial[to + 4u * thread + 3u] = out{{ h }}.w;
        }
        if thread == 0u {
            partial[to + {{ head_dim }}u] = most{{ h }};
            partial[to + {{ head_dim + 1 }}u] = sum{{ h }};
        }
    }
{% endfor %}
}
