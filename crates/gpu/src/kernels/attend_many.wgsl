{# Attention of all heads of a row in one dispatch, for passes of many rows (§2.3): what `attend` and `combine` compute, with
   queries, keys and weights in f16, products and sums in f32.

   A workgroup takes `heads_tile` heads of a row, 32 · `subgroups` threads. It goes through the keys 16 at a time: they are
   decoded to workgroup memory (times `key_factor`, a power of two that keeps them within f16), multiplied with the queries,
   and the weighted keys are added to sums that never leave the registers. Weights are relative to a score that all sums of
   the head share; it moves (and the sums are scaled, through workgroup memory) only when a score exceeds it by 8, so that
   weights stay below e⁸, which f16 holds, and sums are scaled rarely.

   With `coop`, products are of cooperative matrices: subgroup s multiplies 16 heads with one of `parts` parts of a key, and
   sums head_dim / subgroups columns of all heads. Subgroups have 32 threads then. Without, threads do the same with
   the same numbers.

   heads, head_dim, rope (64), plain, row_words; heads_tile, subgroups, coop. Workgroups: heads / heads_tile, rows. -#}
{% import "functions.wgsl" as functions %}
{% import "rows.wgsl" as rows %}
{% set nope = head_dim - rope %}
{% set vecs = head_dim // 4 %}
{% set threads = 32 * subgroups %}
{# Vectors of a key in workgroup memory: a little more, so that rows lie in different banks. -#}
{% set pitch = vecs + 2 %}
{# Threads that decode a key together. -#}
{% set key_threads = threads // 16 %}
{% set key_vecs = vecs // key_threads %}
{% set m_tiles = heads_tile // 16 %}
{% set parts = subgroups // m_tiles if coop else 1 %}
{% set k_tiles = head_dim // 16 // parts %}
{% set round_tiles = k_tiles // m_tiles %}
{% set round_vecs = 4 * round_tiles %}
{% set columns = head_dim // subgroups %}
{% set n_tiles = columns // 16 %}
{% set head_threads = threads // heads_tile %}
{% set pairs = 8 // head_threads %}
{# Without matrices: a thread's columns (in vectors) and heads. -#}
{% set column_threads = vecs if vecs < threads else threads %}
{% set my_columns = vecs // column_threads %}
{% set my_heads = heads_tile * column_threads // threads %}
{% set staging = 80 * subgroups if coop else 5 * heads_tile %}
{% if coop %}
enable f16;
enable wgpu_cooperative_matrix;
{% endif %}
{% macro four_staged(at, coop) %}
{% if coop %}staged[{{ at }}]{% else %}vec4<f32>(staged[4u * ({{ at }})], staged[4u * ({{ at }}) + 1u], staged[4u * ({{ at }}) + 2u], staged[4u * ({{ at }}) + 3u]){% endif %}
{%- endmacro %}
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
    scale: f32,
    key_factor: f32,
    // Where the sinks are, f32, and the rotations.
    sinks: u32,
    rotations: u32,
}

@group(0) @binding(0) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> session: array<u32>;
@group(0) @binding(2) var<storage, read> fresh: array<u32>;
@group(0) @binding(3) var<storage, read> chosen: array<u32>;
@group(0) @binding(4) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> tables: array<vec2<f32>>;
@group(0) @binding(6) var<storage, read_write> out: array<vec4<f32>>;
var<immediate> p: Params;

var<workgroup> keys: array<{{ "vec4<f16>" if coop else "vec2<u32>" }}, {{ 16 * pitch }}>;
// Scores of a head at 5 · head, once for each part of a key; or 16 · 16 sums of each subgroup on their way.
// Without matrices single numbers: threads may not write components of one vector.
var<workgroup> staged: array<{{ "vec4<f32>" if coop else "f32" }}, {{ staging if coop else 4 * staging }}>;
// Weights of 16 keys of a head, in pairs, at 12 · head.
var<workgroup> weights: array<{{ "vec2<f16>" if coop else "u32" }}, {{ 12 * heads_tile }}>;
// What a head's sums are to be multiplied with.
var<workgroup> factors: array<f32, {{ heads_tile }}>;
var<workgroup> totals: array<f32, {{ threads }}>;
// Whether any head's score moved. One word of four: drivers lay variables one after the other, and matrices are loaded from
// multiples of 16 bytes.
var<workgroup> moved: array<atomic<u32>, 4>;

{{ functions.exponential() }}
{{ rows.scales() }}

fn put_key(at: u32, value: vec4<f32>) {
{% if coop %}
    keys[at] = vec4<f16>(value);
{% else %}
    keys[at] = vec2<u32>(pack2x16float(value.xy), pack2x16float(value.zw));
{% endif %}
}
{% if not coop %}

fn key(at: u32) -> vec4<f32> {
    let packed = keys[at];
    return vec4<f32>(unpack2x16float(packed.x), unpack2x16float(packed.y));
}
{% endif %}
{% if not plain %}

// Four FP8 numbers, divided by 256: their bits are those of f16 with a shorter exponent and fraction.
fn e4m3_parts(word: u32) -> vec4<f32> {
    let odd = word >> 8u;
    let a = unpack2x16float(((word & 0x00800080u) << 8u) | ((word & 0x007f007fu) << 7u));
    let b = unpack2x16float(((odd & 0x00800080u) << 8u) | ((odd & 0x007f007fu) << 7u));
    return vec4<f32>(a.x, b.x, a.y, b.y);
}
{% endif %}

// A vector of a head's result, scaled, rotated back and written.
fn put(row: u32, head: u32, v: u32, sum: vec4<f32>) {
    var value = sum;
    if v >= {{ nope // 4 }}u {
        let at = p.rotations + row * {{ rope // 2 }}u + 2u * (v - {{ nope // 4 }}u);
        let a = tables[at];
        let b = tables[at + 1u];
        value = vec4<f32>(
            fma(value.x, a.x, value.y * a.y), fma(value.y, a.x, -(value.x * a.y)),
            fma(value.z, b.x, value.w * b.y), fma(value.w, b.x, -(value.z * b.y)));
    }
    if head < {{ heads }}u {
        out[(row * {{ heads }}u + head) * {{ vecs }}u + v] = value;
    }
}

{% macro words(memory) %}
{% for j in range(key_vecs) %}
{% set v = key_threads * j %}
{% if plain %}
                {
                    let at = base + 4u * (key_part + {{ v }}u);
                    raw{{ j }} = vec4<u32>({{ memory }}[at], {{ memory }}[at + 1u], {{ memory }}[at + 2u], {{ memory }}[at + 3u]);
                }
{% elif v < nope // 4 %}
                raw{{ j }} = {{ memory }}[base + key_part + {{ v }}u];
{% else %}
                {
                    let at = base + {{ nope // 4 + (nope // 64 + 7) // 8 * 2 }}u + 2u * (key_part + {{ v - nope // 4 }}u);
                    raw{{ j }} = vec2<u32>({{ memory }}[at], {{ memory }}[at + 1u]);
                }
{% endif %}
{% endfor %}
{% if not plain %}
{% for i in range((nope // 64 + 3) // 4) %}
                scales{{ i }} = {{ memory }}[base + {{ nope // 4 + i }}u];
{% endfor %}
{% endif %}
{% endmacro %}
{# The stored words of this thread's part of the key numbered `number`, to `raw…`. -#}
{% macro fetch(number) %}
        {
            let number = min({{ number }} + slot, count - 1u);
            var own = false;
            var base = 0u;
            if number < near {
                let where_ = position + 1u - near + number;
                own = where_ >= p.fresh;
                if own {
                    base = (p.run0 + where_ - p.fresh) * {{ row_words }}u;
                } else {
                    base = p.ring + (where_ % p.ring_rows) * {{ row_words }}u;
                }
            } else {
                var which = number - near;
                if listed {
                    which = chosen[row * p.top_k + which];
                }
                base = p.compressed + which * {{ row_words }}u;
            }
            if own {
{{ words("fresh") }}            } else {
{{ words("session") }}            }
        }
{% endmacro %}
{# Sums of heads 16m.. and the nth 16 columns of each subgroup to `staged`. -#}
{% macro stage(m, n) %}
            let sums = sum{{ m }}_{{ n }};
            workgroupBarrier();
            coopStoreT(sums, &staged[stage_at], 5u);
            workgroupBarrier();
{% endmacro %}
@compute @workgroup_size({{ threads }})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = p.row0 + group.y;
    let head0 = group.x * {{ heads_tile }}u;
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
    // Of 16 keys, the one that this thread helps to decode; the vectors it decodes are key_part, key_part + {{ key_threads }}, …
    let slot = thread / {{ key_threads }}u;
    let key_part = thread % {{ key_threads }}u;
{% for j in range(key_vecs) %}
    var raw{{ j }}: {{ "vec4<u32>" if plain else "u32" if key_threads * j < nope // 4 else "vec2<u32>" }};
{% endfor %}
{% if not plain %}
{% for i in range((nope // 64 + 3) // 4) %}
    var scales{{ i }}: u32;
{% endfor %}
{% endif %}
{{ fetch("0u") }}
    // The head whose weights this thread helps to find.
    let head = thread / {{ head_threads }}u;
    let head_part = thread % {{ head_threads }}u;
    var most = 0.0;
    var total = 0.0;
{% if coop %}
    let subgroup = thread >> 5u;
    let lane = thread & 31u;
    let m_tile = subgroup % {{ m_tiles }}u;
    let part = subgroup / {{ m_tiles }}u;
    let stage_at = subgroup * 80u;
    let lane_at = stage_at + (lane >> 1u) * 5u + (lane & 1u) * 2u;
{% for k in range(k_tiles) %}
    var query{{ k }}: coop_mat16x16<f16, A>;
{% endfor %}
    // Queries come through the keys' memory, {{ round_tiles }} matrices of each subgroup at a time.
    var i = 0u;
{% for round in range(m_tiles) %}
    i = thread;
    while i < {{ 16 * vecs }}u {
        let h = head0 + i / {{ round_vecs * parts }}u;
        let x = i % {{ round_vecs * parts }}u;
        let v = x / {{ round_vecs }}u * {{ vecs // parts }}u + {{ round * round_vecs }}u + x % {{ round_vecs }}u;
        var value = vec4<f32>(0.0);
        if h < {{ heads }}u {
            value = q[row * p.q_stride + h * {{ vecs }}u + v];
        }
        put_key(i, value);
        i += {{ threads }}u;
    }
    workgroupBarrier();
{% for k in range(round_tiles) %}
    query{{ round * round_tiles + k }} = coopLoadT<coop_mat16x16<f16, A>>(
        &keys[m_tile * {{ 16 * round_vecs * parts }}u + part * {{ round_vecs }}u + {{ 4 * k }}u], {{ round_vecs * parts }}u);
{% endfor %}
    workgroupBarrier();
{% endfor %}
{% for m in range(m_tiles) %}
{% for n in range(n_tiles) %}
    var sum{{ m }}_{{ n }} = coop_mat16x16<f32, C>();
{% endfor %}
{% endfor %}
{% else %}
    let column = thread % {{ column_threads }}u;
    let my_head = thread / {{ column_threads }}u * {{ my_heads }}u;
{% for h in range(my_heads) %}
{% for c in range(my_columns) %}
    var sum{{ h }}_{{ c }} = vec4<f32>(0.0);
{% endfor %}
{% endfor %}
{% endif %}

    var at = 0u;
    while at < count {
{% for j in range(key_vecs) %}
{% set v = key_threads * j %}
        {
            let to = slot * {{ pitch }}u + key_part + {{ v }}u;
{% if plain %}
            put_key(to, bitcast<vec4<f32>>(raw{{ j }}) * p.key_factor);
{% elif v < nope // 4 %}
            let scale = scale_of((scales{{ v // 64 }} >> {{ v // 16 % 4 * 8 }}u) & 255u);
            put_key(to, e4m3_parts(raw{{ j }}) * (scale * (p.key_factor * 256.0)));
{% else %}
            let tail = vec4<u32>(raw{{ j }}.x << 16u, raw{{ j }}.x & 0xffff0000u, raw{{ j }}.y << 16u, raw{{ j }}.y & 0xffff0000u);
            put_key(to, bitcast<vec4<f32>>(tail) * p.key_factor);
{% endif %}
        }
{% endfor %}
        if thread == 0u {
            atomicStore(&moved[0], 0u);
        }
        workgroupBarrier();
        // The next keys are on their way meanwhile.
{{ fetch("at + 16u") }}
{% if coop %}
        {
            var even = coop_mat16x16<f32, C>();
            var odd = coop_mat16x16<f32, C>();
{% for k in range(k_tiles) %}
            {
                let key = coopLoad<coop_mat16x16<f16, B>>(&keys[part * {{ 4 * k_tiles }}u + {{ 4 * k }}u], {{ pitch }}u);
                {{ "odd" if k % 2 else "even" }} = coopMultiplyAdd(query{{ k }}, key, {{ "odd" if k % 2 else "even" }});
            }
{% endfor %}
            let sums = even + odd;
            coopStoreT(sums, &staged[stage_at], 5u);
        }
{% else %}
        {
{% for i in range(2 * pairs) %}
            var dot{{ i }} = 0.0;
{% endfor %}
            if head0 + head < {{ heads }}u {
                let from_ = row * p.q_stride + (head0 + head) * {{ vecs }}u;
                let first = head_part * {{ 2 * pairs * pitch }}u;
                var v = 0u;
                while v < {{ vecs }}u {
                    let exact = q[from_ + v];
                    let query = vec4<f32>(unpack2x16float(pack2x16float(exact.xy)), unpack2x16float(pack2x16float(exact.zw)));
{% for i in range(2 * pairs) %}
                    dot{{ i }} += dot(query, key(first + {{ i * pitch }}u + v));
{% endfor %}
                    v += 1u;
                }
            }
{% for i in range(2 * pairs) %}
            {
                let which = head_part * {{ 2 * pairs }}u + {{ i }}u;
                staged[head * 20u + which] = dot{{ i }};
            }
{% endfor %}
        }
{% endif %}
        workgroupBarrier();
        var fade = 1.0;
        {
            var high = -3.0e38;
{% for g in range(4) %}
            {
                var scores = {{ four_staged("head * 5u + " ~ g ~ "u", coop) }};
{% for i in range(1, parts) %}
                scores += staged[{{ i * heads_tile * 5 }}u + head * 5u + {{ g }}u];
{% endfor %}
                scores *= p.scale / p.key_factor;
{% for c in range(4) %}
                high = max(high, select(-3.0e38, scores.{{ "xyzw"[c] }}, at + {{ 4 * g + c }}u < count));
{% endfor %}
            }
{% endfor %}
            if at == 0u {
                most = high;
            } else if high > most + 8.0 {
                fade = exp_of(most - high);
                most = high;
                atomicStore(&moved[0], 1u);
            }
        }
        if head_part == 0u {
            factors[head] = fade;
        }
        total *= fade;
{% for i in range(pairs) %}
        {
            let pair = head_part * {{ pairs }}u + {{ i }}u;
            var scores = {{ four_staged("head * 5u + (pair >> 1u)", coop) }};
{% for i in range(1, parts) %}
            scores += staged[{{ i * heads_tile * 5 }}u + head * 5u + (pair >> 1u)];
{% endfor %}
            scores *= p.scale / p.key_factor;
            let two = select(scores.xy, scores.zw, (pair & 1u) != 0u);
            let first = at + 2u * pair;
            let weight = vec2<f32>(
                select(0.0, exp_of(two.x - most), first < count), select(0.0, exp_of(two.y - most), first + 1u < count));
            // The denominator has the weights as they are used.
{% if coop %}
            let rounded = vec2<f16>(weight);
            weights[head * 12u + pair] = rounded;
            total += f32(rounded.x) + f32(rounded.y);
{% else %}
            let packed = pack2x16float(weight);
            weights[head * 12u + pair] = packed;
            let rounded = unpack2x16float(packed);
            total += rounded.x + rounded.y;
{% endif %}
        }
{% endfor %}
        workgroupBarrier();
        let any_moved = atomicLoad(&moved[0]) != 0u;
{% if coop %}
        if any_moved {
{% for m in range(m_tiles) %}
            {
                let factor = factors[{{ 16 * m }}u + (lane >> 1u)];
{% for n in range(n_tiles) %}
                {
{{ stage(m, n) }}
                    staged[lane_at] *= factor;
                    staged[lane_at + 1u] *= factor;
                    workgroupBarrier();
                    sum{{ m }}_{{ n }} = coopLoadT<coop_mat16x16<f32, C>>(&staged[stage_at], 5u);
                }
{% endfor %}
            }
{% endfor %}
        }
        {
{% for m in range(m_tiles) %}
            let weight{{ m }} = coopLoadT<coop_mat16x16<f16, A>>(&weights[{{ 16 * 12 * m }}u], 12u);
{% endfor %}
{% for n in range(n_tiles) %}
            {
                let value = coopLoadT<coop_mat16x16<f16, B>>(&keys[subgroup * {{ columns // 4 }}u + {{ 4 * n }}u], {{ pitch }}u);
{% for m in range(m_tiles) %}
                sum{{ m }}_{{ n }} = coopMultiplyAdd(weight{{ m }}, value, sum{{ m }}_{{ n }});
{% endfor %}
            }
{% endfor %}
        }
{% else %}
        if any_moved {
{% for h in range(my_heads) %}
            {
                let factor = factors[my_head + {{ h }}u];
{% for c in range(my_columns) %}
                sum{{ h }}_{{ c }} *= factor;
{% endfor %}
            }
{% endfor %}
        }
        var pair = 0u;
        while pair < 8u {
{% for c in range(my_columns) %}
            let a{{ c }} = key(2u * pair * {{ pitch }}u + column + {{ c * column_threads }}u);
            let b{{ c }} = key((2u * pair + 1u) * {{ pitch }}u + column + {{ c * column_threads }}u);
{% endfor %}
{% for h in range(my_heads) %}
            {
                let weight = unpack2x16float(weights[(my_head + {{ h }}u) * 12u + pair]);
{% for c in range(my_columns) %}
                sum{{ h }}_{{ c }} = fma(vec4<f32>(weight.x), a{{ c }}, fma(vec4<f32>(weight.y), b{{ c }}, sum{{ h }}_{{ c }}));
{% endfor %}
            }
{% endfor %}
            pair += 1u;
        }
{% endif %}
        workgroupBarrier();
        at += 16u;
    }

    totals[thread] = total;
    workgroupBarrier();
    if head_part == 0u {
        var sum = 0.0;
{% for i in range(head_threads) %}
        sum += totals[thread + {{ i }}u];
{% endfor %}
        let at_sink = p.sinks * 4u + min(head0 + head, {{ heads - 1 }}u);
        let sink = bitcast<f32>(w[at_sink >> 2u][at_sink & 3u]);
        let high = max(sink, most);
        let share = exp_of(most - high);
        factors[head] = share / (fma(sum, share, exp_of(sink - high)) * p.key_factor);
    }
    workgroupBarrier();
{% if coop %}
{% for m in range(m_tiles) %}
    {
        let factor = factors[{{ 16 * m }}u + (lane >> 1u)];
        let to = head0 + {{ 16 * m }}u + (lane >> 1u);
{% for n in range(n_tiles) %}
        {
{{ stage(m, n) }}
            let v = subgroup * {{ columns // 4 }}u + {{ 4 * n }}u + (lane & 1u) * 2u;
            put(row, to, v, staged[lane_at] * factor);
            put(row, to, v + 1u, staged[lane_at + 1u] * factor);
        }
{% endfor %}
    }
{% endfor %}
{% else %}
{% for h in range(my_heads) %}
    {
        let factor = factors[my_head + {{ h }}u];
{% for c in range(my_columns) %}
        put(row, head0 + my_head + {{ h }}u, column + {{ c * column_threads }}u, sum{{ h }}_{{ c }} * factor);
{% endfor %}
    }
{% endfor %}
{% endif %}
}
