//! What an adapter makes of cooperative matrices, one operation at a time: loads and stores of each kind that kernels use,
//! products, sums, and matrices that stay in variables. Numbers are whole and small, so that every result is exact.

use std::sync::Arc;

use crate::attend_many::cooperative;
use crate::device::{Checks, Choice, Device, adapters};
use crate::kernel::{Buffer, Commands, Kernels};

const SIDE: usize = 16;

/// How a matrix lies in workgroup memory: the elements' type, how many of a row one has, and elements from row to row.
#[derive(Clone, Copy, Debug)]
struct Layout {
    element: &'static str,
    width: usize,
    stride: usize,
    /// Whether rows of memory are rows of the matrix, and not columns.
    rows: bool,
}

impl Layout {
    fn suffix(&self) -> &'static str {
        if self.rows { "T" } else { "" }
    }

    /// `memory`'s element for row i / 16 and column i % 16 of the matrix.
    fn element(&self, memory: &str) -> String {
        let Layout { width, stride, rows, .. } = *self;
        let (major, minor) = if rows { ("i / 16u", "i % 16u") } else { ("i % 16u", "i / 16u") };
        let component = if width > 1 { format!("[({minor}) % {width}u]") } else { String::new() };
        format!("{memory}[{stride}u * ({major}) + ({minor}) / {width}u]{component}")
    }

    fn memory(&self, name: &str) -> String {
        format!("var<workgroup> {name}: array<{}, {}>;\n", self.element, self.stride * SIDE)
    }
}

/// Layouts of factors, and of sums.
fn layouts(scalar: &str) -> Vec<Layout> {
    let of = |[width, stride]: [usize; 2], rows| {
        let element = match (scalar, width) {
            ("f16", 1) => "f16",
            ("f16", 2) => "vec2<f16>",
            ("f16", _) => "vec4<f16>",
            (_, 1) => "f32",
            _ => "vec4<f32>",
        };
        Layout { element, width, stride, rows }
    };
    // Rows lie at multiples of 16 bytes.
    let sizes = if scalar == "f16" { vec![[1, 24], [2, 12], [4, 6]] } else { vec![[1, 20], [4, 5]] };
    sizes.into_iter().flat_map(|size| [true, false].map(|rows| of(size, rows))).collect()
}

/// A kernel of two subgroups, each of which makes the same: `a · b + c` by `middle`.
fn kernel(a: Layout, b: Layout, c: Layout, out: Layout, middle: &str) -> String {
    let fill = |layout: Layout, memory: &str, at: usize, scalar: &str| {
        format!("        {} = {scalar}(numbers[{at}u + i]);\n", layout.element(memory))
    };
    format!(
        "enable f16;
enable wgpu_cooperative_matrix;
@group(0) @binding(0) var<storage, read> numbers: array<f32>;
@group(0) @binding(1) var<storage, read_write> made: array<f32>;
struct Params {{ zero: u32 }}
var<immediate> p: Params;
{}{}{}{}{}@compute @workgroup_size(64)
fn main(@builtin(local_invocation_index) thread: u32) {{
    var i = thread;
    while i < 256u {{
{}{}{}        i += 64u;
    }}
    workgroupBarrier();
{middle}
    workgroupBarrier();
    if thread < 32u {{
        coopStore{}(sums, &out0[0], {}u);
    }} else {{
        coopStore{}(sums, &out1[0], {}u);
    }}
    workgroupBarrier();
    i = thread;
    while i < 256u {{
        made[i] = {};
        made[256u + i] = {};
        i += 64u;
    }}
}}
",
        a.memory("a"),
        b.memory("b"),
        c.memory("c"),
        out.memory("out0"),
        out.memory("out1"),
        fill(a, "a", 0, "f16"),
        fill(b, "b", 256, "f16"),
        fill(c, "c", 512, "f32"),
        out.suffix(),
        out.stride,
        out.suffix(),
        out.stride,
        out.element("out0"),
        out.element("out1"),
    )
}

fn load(layout: Layout, memory: &str, matrix: &str) -> String {
    format!("coopLoad{}<{matrix}>(&{memory}[0], {}u)", layout.suffix(), layout.stride)
}

/// Whole numbers from -8 to 8: a, b and c, rows first.
fn numbers() -> Vec<f32> {
    (0..768).map(|i| ((i * 37 + i / 16 * 11) % 17) as f32 - 8.0).collect()
}

/// `a · b`, or `a · b + c`.
fn product(numbers: &[f32], with_c: bool) -> Vec<f32> {
    let cell = |i: usize| {
        let dot = |k: usize| numbers[i / SIDE * SIDE + k] * numbers[256 + k * SIDE + i % SIDE];
        (0..SIDE).map(dot).sum::<f32>() + if with_c { numbers[512 + i] } else { 0.0 }
    };
    (0..256).map(cell).collect()
}

/// A kernel, what it is for, and whether it adds `c`.
fn cases() -> Vec<(String, bool, String)> {
    let halves = layouts("f16");
    let sums = layouts("f32");
    let (a, b, c) = ("coop_mat16x16<f16, A>", "coop_mat16x16<f16, B>", "coop_mat16x16<f32, C>");
    let (usual, usual_sums) = (halves[4], sums[0]);
    let mut cases = Vec::new();
    let multiply = |la: Layout, lb: Layout| {
        let (load_a, load_b) = (load(la, "a", a), load(lb, "b", b));
        format!("    let sums = coopMultiplyAdd({load_a}, {load_b}, {c}());")
    };
    for &layout in &halves {
        cases.push((
            format!("A from {layout:?}"),
            false,
            kernel(layout, usual, usual_sums, usual_sums, &multiply(layout, usual)),
        ));
        cases.push((
            format!("B from {layout:?}"),
            false,
            kernel(usual, layout, usual_sums, usual_sums, &multiply(usual, layout)),
        ));
    }
    for &layout in &sums {
        cases.push((
            format!("C to {layout:?}"),
            false,
            kernel(usual, usual, usual_sums, layout, &multiply(usual, usual)),
        ));
        let middle = format!(
            "    let sums = coopMultiplyAdd({}, {}, {});",
            load(usual, "a", a),
            load(usual, "b", b),
            load(layout, "c", c)
        );
        cases.push((format!("C from {layout:?}"), true, kernel(usual, usual, layout, usual_sums, &middle)));
    }
    let middle = format!(
        "    var even = {c}();
    var odd = {};
    even = coopMultiplyAdd({}, {}, even);
    let sums = even + odd;",
        load(usual_sums, "c", c),
        load(usual, "a", a),
        load(usual, "b", b)
    );
    cases.push(("sum of two".into(), true, kernel(usual, usual, usual_sums, usual_sums, &middle)));
    // The factors stay in variables while their memory is written again, and round a loop.
    let middle = format!(
        "    var kept: {a};
    kept = {};
    let other = {};
    var sum = {};
    workgroupBarrier();
    i = thread;
    while i < 96u {{
        a[i] = vec4<f16>(7.0);
        i += 64u;
    }}
    workgroupBarrier();
    var n = 0u;
    while n < 1u + p.zero {{
        sum = coopMultiplyAdd(kept, other, sum);
        workgroupBarrier();
        n += 1u;
    }}
    let sums = sum;",
        load(usual, "a", a),
        load(usual, "b", b),
        load(usual_sums, "c", c)
    );
    cases.push(("kept in variables".into(), true, kernel(usual, usual, usual_sums, usual_sums, &middle)));
    cases
}

#[test]
fn cooperative_operations_are_exact() {
    let cases = cases();
    for (name, _, source) in &cases {
        let module = naga::front::wgsl::parse_str(source).unwrap();
        let mut valid =
            naga::valid::Validator::new(naga::valid::ValidationFlags::all(), naga::valid::Capabilities::all());
        valid.validate(&module).unwrap_or_else(|error| panic!("{name}: {}\n{source}", error.emit_to_string(source)));
    }
    let usable = adapters().into_iter().filter(|adapter| adapter.lacks.is_empty());
    let Some(adapter) = usable.into_iter().find(cooperative) else {
        println!("skipped: no adapter has cooperative matrices of 16 with subgroups of 32");
        return;
    };
    let numbers = numbers();
    let mut wrong = Vec::new();
    for checks in [Checks::Off, Checks::On] {
        let device = Device::open(Choice::Index(adapter.index), checks).unwrap();
        let kernels = Arc::new(Kernels::new(device.clone()));
        let mut commands = Commands::new(device.clone(), kernels.clone());
        let input = Buffer::new(&device, "numbers", 4 * numbers.len() as u64).unwrap();
        commands.write((&input, 0), bytemuck::cast_slice(&numbers));
        for (n, (name, with_c, source)) in cases.iter().enumerate() {
            let kernel = kernels.make(n, "cooperative", source, name.clone()).unwrap();
            let out = Buffer::new(&device, "made", 2048).unwrap();
            commands.write((&out, 0), bytemuck::cast_slice(&[f32::NAN; 512]));
            commands.run(&kernel, &[input.all(), out.all()], &0_u32, [1, 1, 1]);
            let made: Vec<f32> = bytemuck::pod_collect_to_vec(&commands.read((&out, 0), 2048).unwrap());
            let expected = product(&numbers, *with_c);
            let off = |half: &[f32]| half.iter().zip(&expected).filter(|(a, b)| a != b).count();
            let off = [off(&made[..256]), off(&made[256..])];
            println!("checks {checks:?}, {name}: {off:?} of 256 are wrong");
            if off != [0, 0] {
                println!("  {:?}\n  expected {:?}", &made[..32], &expected[..32]);
                wrong.push(name);
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}
