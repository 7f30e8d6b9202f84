{# Computes nothing of use for a while: so long as a device is at work it keeps its clock up. Workgroups: 1. -#}
struct Params {
    rounds: u32,
}

@group(0) @binding(0) var<storage, read_write> left: array<u32>;
var<immediate> p: Params;

@compute @workgroup_size(32)
fn main(@builtin(local_invocation_index) thread: u32) {
    var value = thread;
    var round = 0u;
    while round < p.rounds {
        // Each round waits for the one before.
        value = value * 1664525u + 1013904223u;
        value ^= value >> 7u;
        round += 1u;
    }
    left[thread] = value;
}
