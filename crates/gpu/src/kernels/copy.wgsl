{# Copies words within a buffer, to where they overlap nothing that is copied. Workgroups: of 1,024 words. -#}
struct Params {
    from_word: u32,
    to_word: u32,
    words: u32,
}

@group(0) @binding(0) var<storage, read_write> memory: array<u32>;
var<immediate> p: Params;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
{% for i in range(4) %}
    {
        let word = group.x * 1024u + {{ i * 256 }}u + thread;
        if word < p.words {
            memory[p.to_word + word] = memory[p.from_word + word];
        }
    }
{% endfor %}
}
