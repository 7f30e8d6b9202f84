{# Choices of a pass by their experts: for each expert the list of its choices, in their order, cut into tiles.

   experts: E; tile: rows of a tile. Workgroups: E. -#}
struct Params {
    // Rows times experts used.
    choices: u32,
}

@group(0) @binding(0) var<storage, read> chosen: array<u32>;
// The choices of expert 0, those of expert 1...
@group(0) @binding(1) var<storage, read_write> order: array<u32>;
// Number of tiles, then of each: expert, first place in the order, count.
@group(0) @binding(2) var<storage, read_write> tiles: array<vec4<u32>>;
var<immediate> p: Params;

// Sums do not depend on who adds first.
var<workgroup> counts: array<atomic<u32>, {{ experts }}>;
var<workgroup> mine: array<u32, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let expert = group.x;
    var e = thread;
    while e < {{ experts }}u {
        atomicStore(&counts[e], 0u);
        e += 256u;
    }
    workgroupBarrier();
    // Each thread has a stretch of the choices.
    let each = (p.choices + 255u) / 256u;
    let first = min(thread * each, p.choices);
    let end = min(first + each, p.choices);
    var found = 0u;
    var i = first;
    while i < end {
        let e = chosen[i];
        atomicAdd(&counts[e], 1u);
        found += u32(e == expert);
        i += 1u;
    }
    mine[thread] = found;
    workgroupBarrier();
    // What is before this expert, and before this thread's.
    var place = 0u;
    var tile = 1u;
    e = 0u;
    while e < expert {
        let count = atomicLoad(&counts[e]);
        place += count;
        tile += (count + {{ tile - 1 }}u) / {{ tile }}u;
        e += 1u;
    }
    let count = atomicLoad(&counts[expert]);
    let expert_tiles = (count + {{ tile - 1 }}u) / {{ tile }}u;
    i = thread;
    while i < expert_tiles {
        tiles[tile + i] = vec4<u32>(expert, place + i * {{ tile }}u, min(count - i * {{ tile }}u, {{ tile }}u), 0u);
        i += 256u;
    }
    if expert == {{ experts - 1 }}u && thread == 0u {
        tiles[0] = vec4<u32>(tile - 1u + expert_tiles, 0u, 0u, 0u);
    }
    var earlier = 0u;
    while earlier < thread {
        place += mine[earlier];
        earlier += 1u;
    }
    i = first;
    while i < end {
        if chosen[i] == expert {
            order[place] = i;
            place += 1u;
        }
        i += 1u;
    }
}
