// Reads a buffer as fast as it can be read: what kernels that use each weight once can be measured against.

@group(0) @binding(0) var<storage, read> memory: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> sums: array<u32>;

struct Params {
    // Vectors, a multiple of all threads.
    vectors: u32,
}
var<immediate> params: Params;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let threads = groups.x * 256u;
    var sum = vec4<u32>(0u);
    var at = id.x;
    while at < params.vectors {
        sum ^= memory[at];
        at += threads;
    }
    sums[id.x] = sum.x ^ sum.y ^ sum.z ^ sum.w;
}
