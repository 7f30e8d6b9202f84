//! Cooperative matrices said with plain threads, so that kernels that use them are tested where there are none.

/// `source` with its matrices emulated: 32 threads hold one, eight values of half a row each.
pub(crate) fn emulated(source: &str) -> String {
    let mut out = source.replace("enable wgpu_cooperative_matrix;", "");
    for call in ["coopLoadT", "coopLoad", "coopStoreT", "coopStore"] {
        out = named_by_buffer(&out, call);
    }
    for matrix in ["coop_mat16x16<f16, A>", "coop_mat16x16<f16, B>", "coop_mat16x16<f32, C>"] {
        out = out.replace(matrix, "Tile");
    }
    out = out.replace("even + odd", "tile_sum(even, odd)");
    let main = out.find("fn main(").expect("an entry point");
    let body = main + out[main..].find('{').expect("its body") + 1;
    // Eight, which the compiler does not know: it would unroll everything.
    out.insert_str(body, "\n    tile_thread = thread;\n    tile_eight = 8u + (bitcast<u32>(p.scale) >> 31u);");
    let threads: usize = after(&out, "@workgroup_size(").split(')').next().unwrap().parse().unwrap();
    let accesses: String = ["keys", "weights", "staged", "products"]
        .into_iter()
        .filter(|buffer| out.contains(&format!("_{buffer}(")))
        .map(|buffer| access(buffer, after(&out, &format!("> {buffer}: array<")).starts_with("vec2")))
        .collect();
    // Written out: software Vulkan ends every loop when all together have gone round 65,535 times.
    let factors: String =
        (0..16).map(|k| format!("    let f{k} = f32(tile_scratch[base + row * 16u + {k}u]);\n")).collect();
    let sum = |k| format!("        sum += f{k} * f32(tile_scratch[base + {}u + column + i]);\n", k * 16);
    let sums: String = (0..16).map(sum).collect();
    let product = PRODUCT.replace("SCRATCH", &(threads * 8).to_string());
    format!("{out}{}{accesses}", product.replace("FACTORS", &factors).replace("SUMS", &sums))
}

fn after<'s>(text: &'s str, what: &str) -> &'s str {
    text.split_once(what).unwrap_or_else(|| panic!("{what} is not in the kernel")).1
}

/// `call<…>(…&buffer[at], …)` to `call_buffer(…at, …)`.
fn named_by_buffer(source: &str, call: &str) -> String {
    let mut out = String::new();
    let mut rest = source;
    while let Some(start) = [format!("{call}<"), format!("{call}(")].iter().filter_map(|c| rest.find(&c[..])).min() {
        let pointer = start + rest[start..].find('&').expect("a pointer");
        let arguments = start + rest[start..pointer].find('(').expect("arguments");
        let (buffer, tail) = rest[pointer + 1..].split_once('[').expect("an array");
        let mut depth = 1;
        let end = tail.find(|c| {
            depth += i32::from(c == '[') - i32::from(c == ']');
            depth == 0
        });
        let (at, tail) = tail.split_at(end.expect("a closed bracket"));
        out.extend([&rest[..start], call, "_", buffer, &rest[arguments..pointer], at]);
        rest = &tail[1..];
    }
    out + rest
}

/// Functions that load from and store to a buffer of vectors.
fn access(buffer: &str, pairs: bool) -> String {
    let width = if pairs { 2 } else { 4 };
    let of = |major: &str, minor: &str| {
        format!("{buffer}[at + ({major}) * stride + ({minor}) / {width}u][({minor}) % {width}u]")
    };
    let load = |name: &str, place: &str| {
        format!(
            "fn {name}_{buffer}(at: u32, stride: u32) -> Tile {{
    var tile: Tile;
    let row = (tile_thread & 31u) >> 1u;
    let column = (tile_thread & 1u) * 8u;
    for (var i = 0u; i < tile_eight; i++) {{ tile.values[i] = f32({place}); }}
    return tile;
}}
"
        )
    };
    let store = |name: &str, place: &str| {
        format!(
            "fn {name}_{buffer}(tile: Tile, at: u32, stride: u32) {{
    var copy = tile;
    let row = (tile_thread & 31u) >> 1u;
    let column = (tile_thread & 1u) * 8u;
    for (var i = 0u; i < tile_eight; i++) {{ {place} = copy.values[i]; }}
}}
"
        )
    };
    let (row_major, column_major) = (of("row", "column + i"), of("column + i", "row"));
    let mut all = load("coopLoadT", &row_major) + &load("coopLoad", &column_major);
    if buffer == "staged" || buffer == "products" {
        all += &(store("coopStoreT", &row_major) + &store("coopStore", &column_major));
    }
    all
}

const PRODUCT: &str = "
struct Tile { values: array<f32, 8> }
var<private> tile_thread: u32;
var<private> tile_eight: u32;
var<workgroup> tile_scratch: array<f16, SCRATCH>;

fn tile_sum(a: Tile, b: Tile) -> Tile {
    var left = a;
    var right = b;
    for (var i = 0u; i < tile_eight; i++) { left.values[i] += right.values[i]; }
    return left;
}

fn tile_put(tile: Tile) {
    var copy = tile;
    workgroupBarrier();
    for (var i = 0u; i < tile_eight; i++) { tile_scratch[tile_thread * 8u + i] = f16(copy.values[i]); }
    workgroupBarrier();
}

fn coopMultiplyAdd(a: Tile, b: Tile, c: Tile) -> Tile {
    let base = (tile_thread & ~31u) * 8u;
    let row = (tile_thread & 31u) >> 1u;
    let column = (tile_thread & 1u) * 8u;
    tile_put(a);
FACTORS    tile_put(b);
    var sums = c;
    for (var i = 0u; i < tile_eight; i++) {
        var sum = sums.values[i];
SUMS        sums.values[i] = sum;
    }
    return sums;
}
";
