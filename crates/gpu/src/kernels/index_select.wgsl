{# The `top_k` rows of the highest scores, ascending; of equal scores the earlier rows (§2.6). By radix: four rounds find the
   score of the last that is chosen, then the rows above it and as many as are left of those equal to it are listed.

   Workgroups: 1, rows. -#}
{% import "runs.wgsl" as runs %}
struct Params {
{{ runs.params() }}
    first: u32,
    ratio: u32,
    top_k: u32,
    stride: u32,
}

@group(0) @binding(0) var<storage, read> scores: array<f32>;
@group(0) @binding(1) var<storage, read_write> chosen: array<u32>;
@group(0) @binding(2) var<storage, read_write> flags: array<u32>;
@group(0) @binding(3) var<storage, read> tables: array<vec2<u32>>;
var<immediate> p: Params;

var<workgroup> counts: array<atomic<u32>, 256>;
var<workgroup> above: array<u32, 256>;
var<workgroup> equal: array<u32, 256>;
var<workgroup> found: vec2<u32>;

{{ runs.of_rows() }}
// Bits that order as the scores do.
fn order(score: f32) -> u32 {
    let bits = bitcast<u32>(score);
    return select(bits | 0x80000000u, ~bits, (bits >> 31u) != 0u);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = p.first + group.y;
    let visible = (position_of(run_of(row), row) + 1u) / p.ratio;
    if visible <= p.top_k {
        return;
    }
    let scores_at = group.y * p.stride;
    // The bits known so far of the last score chosen, and how many of those with these bits are.
    var prefix = 0u;
    var wanted = p.top_k;
    var round = 0u;
    while round < 4u {
        let shift = 24u - 8u * round;
        atomicStore(&counts[thread], 0u);
        workgroupBarrier();
        var i = thread;
        while i < visible {
            let bits = order(scores[scores_at + i]);
            if round == 0u {
                if (bitcast<u32>(scores[scores_at + i]) & 0x7f800000u) == 0x7f800000u {
                    flags[row] = 1u;
                }
                atomicAdd(&counts[bits >> 24u], 1u);
            } else if (bits >> (shift + 8u)) == (prefix >> (shift + 8u)) {
                atomicAdd(&counts[(bits >> shift) & 255u], 1u);
            }
            i += 256u;
        }
        workgroupBarrier();
        // Of each digit: how many have it or a higher one.
        let mine = atomicLoad(&counts[thread]);
        above[thread] = mine;
        var step = 1u;
        while step < 256u {
            workgroupBarrier();
            var more = 0u;
            if thread + step < 256u {
                more = above[thread + step];
            }
            workgroupBarrier();
            above[thread] += more;
            step <<= 1u;
        }
        let higher = above[thread] - mine;
        if higher < wanted && above[thread] >= wanted {
            found = vec2<u32>(thread, wanted - higher);
        }
        workgroupBarrier();
        prefix |= found.x << shift;
        wanted = found.y;
        workgroupBarrier();
        round += 1u;
    }
    // Each thread looks at rows that follow each other, so that the list ascends.
    let each = (visible + 255u) / 256u;
    let begin = min(thread * each, visible);
    let end = min(begin + each, visible);
    var more = 0u;
    var same = 0u;
    var i = begin;
    while i < end {
        let bits = order(scores[scores_at + i]);
        more += u32(bits > prefix);
        same += u32(bits == prefix);
        i += 1u;
    }
    above[thread] = more;
    equal[thread] = same;
    workgroupBarrier();
    var step = 1u;
    while step < 256u {
        var a = 0u;
        var b = 0u;
        if thread >= step {
            a = above[thread - step];
            b = equal[thread - step];
        }
        workgroupBarrier();
        above[thread] += a;
        equal[thread] += b;
        workgroupBarrier();
        step <<= 1u;
    }
    var equals = equal[thread] - same;
    var to = row * p.top_k + above[thread] - more + min(equals, wanted);
    i = begin;
    while i < end {
        let bits = order(scores[scores_at + i]);
        if bits > prefix {
            chosen[to] = i;
            to += 1u;
        } else if bits == prefix {
            if equals < wanted {
                chosen[to] = i;
                to += 1u;
            }
            equals += 1u;
        }
        i += 1u;
    }
}
